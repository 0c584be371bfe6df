"""What of the log can be used: reasons, counts, messages, bots and pseudonyms."""

import hashlib
import hmac

import pytest
from pyspark.sql import functions as F

from contract.settings import Etl
from etl import hygiene

DAY = hygiene.MS_PER_DAY
NOW = 1_700_000_000_000
KEY = b"a secret of 32 characters or so."


def by_order(table):
    return table.orderBy("order").collect()


def test_times_that_cannot_be_true(log):
    rows = [
        ("u", "a", hygiene.FIRST_MS - 1), ("u", "b", hygiene.FIRST_MS, "view"), ("u", "c", NOW + DAY),
        ("u", "d", NOW + DAY + 1, "cart"), ("u", "e", None), (None, "f", 5),
    ]  # fmt: skip
    found = by_order(hygiene.mark_bad(log(*rows, bad={5: "no user id"}), "ms", NOW))
    assert [(row.reason, row.raw) for row in found] == [
        ("timestamp before 1995", '{"user_id":"u","item_id":"a","ts":788918399999}'),
        (None, None),
        (None, None),
        ("timestamp in the future", '{"user_id":"u","item_id":"d","ts":1700086400001,"event":"cart"}'),
        (None, None),  # the input has no time
        ("no user id", "row 5"),  # what was found first stays
    ]
    assert by_order(hygiene.mark_bad(log(*rows), "order", NOW)) == by_order(log(*rows))  # positions, not dates


def test_the_head_of_a_log(log):
    hygiene.check_head(log(("u", "a", 1), ("u", "b", 2), bad={0: "no user id"}), "log")
    with pytest.raises(ValueError, match="the log is empty: its files hold no rows"):
        hygiene.check_head(log(("u", "a", 1)).limit(0), "log")
    with pytest.raises(ValueError, match=r"none of the first 2 rows .* such as \(no user id\): row 0\nmend the files"):
        hygiene.check_head(log(("u", "a", 1), ("u", "b", 2), bad={0: "no user id", 1: "no user id"}), "log")


def test_census_profile_and_items(log):
    rows = [("u", "a", 1, "view"), ("u", "a", 2, "view"), ("v", "a", 1, "cart"), ("v", "b", 1, None), ("w", "c", 1)]
    bad = [("x", "d", 1, "view"), ("x", "e", 1, "cart"), ("x", None, 1, "view")]
    table = log(*rows, *bad, bad={5: "no timestamp", 6: "no item id", 7: "no item id"})
    census = hygiene.census(table).persist()
    assert {tuple(row) for row in census.collect()} == {
        (None, "view", "a", 2), (None, "cart", "a", 1), (None, "", "b", 1), (None, "", "c", 1),
        ("no timestamp", None, None, 1), ("no item id", None, None, 2),
    }  # fmt: skip
    found = hygiene.profile(census)
    assert found == hygiene.Profile(8, {"no item id": 2, "no timestamp": 1}, {"": 2, "cart": 1, "view": 2})
    assert list(found.bad) == ["no item id", "no timestamp"]  # the most frequent first
    assert (found.num_bad, found.num_good) == (3, 5)
    assert str(found) == "8 rows, 1 cart, 2 view, 3 bad, in quarantine, 2 no item id, 1 no timestamp"

    def ids(*wanted):
        return sorted(row.item_id for row in hygiene.items(census, wanted).collect())

    assert (ids(), ids("cart"), ids("view", "cart"), ids("none")) == (["a", "b", "c"], ["a"], ["a"], [])


def test_too_many_types_are_another_kind_of_text(spark):
    many = spark.range(1100).select(
        F.lit(None).cast("string").alias("reason"), F.col("id").cast("string").alias("event"), F.lit(1).alias("num")
    )
    with pytest.raises(ValueError, match=r"data\.event_column holds 1,000 types or more"):
        hygiene.profile(many)


def test_bad_share(log):
    rows = [("u", "a", n) for n in range(10)]
    table = log(*rows, bad={3: "no user id", 7: "no item id", 8: "no item id"})
    found = hygiene.profile(hygiene.census(table))
    hygiene.check_bad_share(found, table, "log", 0.3)
    with pytest.raises(ValueError) as error:
        hygiene.check_bad_share(found, table, "log", 0.29)
    assert str(error.value) == (
        "3 of the 10 rows of the log are unusable (30.00%), at most 29.00% may be (etl.max_bad_share):\n"
        "2 x no item id, such as: row 7\n"
        "1 x no user id, such as: row 3\n"
        "mend the files or the [data] settings, or raise etl.max_bad_share"
    )
    useless = log(*rows[:2], bad={0: "no user id", 1: "no user id"})
    with pytest.raises(ValueError, match="2 of the 2 rows"):
        hygiene.check_bad_share(hygiene.profile(hygiene.census(useless)), useless, "log", 1.0)


def test_a_catalog_without_rows_has_no_bad_ones(log):
    nothing = log(("u", "a", 1)).limit(0)
    hygiene.check_bad_share(hygiene.profile(hygiene.census(nothing)), nothing, "catalog", 0.01)


CATALOG = "item_id string, text string, order long, reason string, raw string"


def test_texts_that_cannot_be_decoded_are_counted_and_stop_above_a_share(spark):
    rows = [(f"i{n}", "caf\ufffd" if n in (3, 4) else "caf\u00e9", n, "x" if n == 4 else None, "r") for n in range(6)]
    table = spark.createDataFrame(rows, CATALOG)
    found = hygiene.catalog_profile(table)
    assert found == hygiene.Profile(6, {"x": 1}, {"": 5}, num_damaged=1)
    assert str(found) == "6 rows, 1 with text that cannot be decoded, 1 bad, in quarantine, 1 x"
    hygiene.check_damaged_share(found, table, "utf-8", 0.2)
    with pytest.raises(
        ValueError, match=r"1 of the 5 texts .* decoded in utf-8 \(20.00%\).* i3: caf\ufffd\nset data.enc"
    ):
        hygiene.check_damaged_share(found, table, "utf-8", 0.19)
    assert hygiene.catalog_profile(table.limit(0)) == hygiene.Profile(0, {}, {})


def test_a_log_and_a_catalog_of_different_items(log, spark):
    rows = [("u", "7.0", 1, "view"), ("u", "7.0", 2, "view"), ("v", "a", 1, "view"), ("v", "b", 1, "cart")]
    census = hygiene.census(log(*rows, ("w", "c", 1, "view"), bad={4: "no timestamp"}))
    texts = spark.createDataFrame([("7", "T"), ("b", "B"), ("c", "C")], "item_id string, text string")
    found = hygiene.known(census, texts, ())
    assert found == hygiene.Known(num_events=4, num_known_events=1, num_items=3, num_items_with_events=1)
    assert str(found) == ("WARNING: only 1 of 4 events are of items in the catalog, 1 of its 3 items have events")
    assert str(hygiene.Known(4, 4, 2, 1)) == "4 of 4 events are of items in the catalog, 1 of its 2 items have events"
    assert str(hygiene.Known(4, 4, 3, 1)).startswith("WARNING")
    hygiene.check_known(found, census, texts, 0.75)
    with pytest.raises(
        ValueError, match=r"3 of the 4 events .* \(75.00%\).* of the log: 7.0, a; of the catalog: 7, b, c\n"
    ):
        hygiene.check_known(found, census, texts, 0.7)
    assert hygiene.known(census, texts, ("view",)) == hygiene.Known(3, 0, 3, 0)


def test_event_types():
    found = hygiene.Profile(9, {}, {"": 2, "cart": 3, "view": 4})
    assert hygiene.event_types(found, ()) == ["cart", "view"]
    assert hygiene.event_types(found, ("view", "gift")) == ["view", "gift"]
    with pytest.raises(
        ValueError, match=r"etl.events = \['gift'\].* the log holds: none \(2\), cart \(3\), view \(4\)"
    ):
        hygiene.event_types(found, ("gift",))
    with pytest.raises(ValueError, match=r"etl.events has '5.0': whole numbers are read as '5'"):
        hygiene.event_types(found, ("4.5", "5.0"))
    with pytest.raises(ValueError, match="128 event types, at most 127"):
        hygiene.event_types(hygiene.Profile(128, {}, {f"e{n}": 1 for n in range(128)}), ())


def test_users_with_too_many_events_on_a_day_are_bots(log):
    busy = [("bot", f"i{n}", 10 * DAY + n) for n in range(4)]
    calm = [("calm", f"i{n}", 10 * DAY + n) for n in range(3)] + [("calm", "i9", 11 * DAY)]
    midnight = [("late", f"i{n}", 10 * DAY + n - 2) for n in range(4)]  # two on each side
    spoilt = [("spoilt", f"i{n}", 10 * DAY) for n in range(4)] + [("bot", "i", 1), (None, "i", 1)]
    rows = [*busy, *calm, *midnight, *spoilt]
    bad = {12: "no item id", 16: "no item id", 17: "no user id"}
    left, num_bots = hygiene.without_bots(log(*rows, bad=bad), 3)
    assert num_bots == 1
    # Only good rows make a bot, and only good rows go: bad ones are still to be put in quarantine.
    assert [row.order for row in by_order(left)] == list(range(4, 18))
    assert left.columns == log(*rows).columns


def test_pseudonyms_are_hmacs_and_the_raw_rows_go(log):
    users = ["ann", "bob", "ann", "", "zoë", None]
    rows = [(user, f"i{n}", n) for n, user in enumerate(users)]
    found = by_order(hygiene.with_pseudonyms(log(*rows, bad={3: "no user id", 5: "no user id"}), KEY))
    for row, user in zip(found, users, strict=True):
        expected = user if user is None else hmac.new(KEY, user.encode(), hashlib.sha256).hexdigest()[:32]
        assert row.user_id == expected
        assert row.raw is None
    assert [row.reason for row in found] == [None, None, None, "no user id", None, "no user id"]
    assert [row.item_id for row in found] == [f"i{n}" for n in range(6)]


def test_user_ids_that_are_not_utf8_have_pseudonyms_too(log):
    """They are bad rows, which come this way as well."""
    rows = log(("ann", "a", 1), ("?", "b", 2), bad={1: "user id not in UTF-8"})
    broken = rows.withColumn("user_id", F.expr("IF(user_id = '?', CAST(X'FFFE' AS STRING), user_id)"))
    found = by_order(hygiene.with_pseudonyms(broken, KEY))
    assert found[0].user_id == hmac.new(KEY, b"ann", hashlib.sha256).hexdigest()[:32]
    assert found[1].reason == "user id not in UTF-8"


def test_the_key_is_not_in_the_plan(log):
    table = hygiene.with_pseudonyms(log(("ann", "a", 1)), KEY)
    assert KEY.decode() not in table._jdf.queryExecution().toString()


def test_a_key_must_be_there_and_long(monkeypatch):
    assert hygiene.pseudonym_key(Etl()) is None
    etl = Etl(pseudonym_key="SHOP_KEY")
    for value, length in ((None, 0), ("", 0), ("short", 5), ("15 characters..", 15)):
        monkeypatch.delenv("SHOP_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("SHOP_KEY", value)
        with pytest.raises(
            ValueError, match=f"'SHOP_KEY': .* at least 16 characters, it has {length}; openssl"
        ) as error:
            hygiene.pseudonym_key(etl)
        assert not value or value not in str(error.value)
    monkeypatch.setenv("SHOP_KEY", "16 characters...")
    assert hygiene.pseudonym_key(etl) == b"16 characters..."
