"""Which rows of the log can be used, and what they hold: reasons, the census, bots, pseudonyms.

`log` is the table of `etl.readers`: every row of the input, the unusable ones with a reason.
"""

import hmac
import os
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from contract.schema import FIRST_MS, MS_PER_DAY
from contract.settings import Etl
from etl.values import REPLACEMENT

MAX_EVENT_TYPES = 127  # an event is an int8
MAX_GROUPS = 1000  # reasons and event types that are counted; a log has a dozen
PROBE_ROWS = 1000
MIN_KEY_BYTES = 16
LOUD_SHARE = 0.5  # of events on unknown items, or of items without events: said as a warning


@dataclass(frozen=True)
class Profile:
    """How many rows of the log or the catalog there are, by reason and by type."""

    num_read: int
    bad: dict[str, int]  # reason -> rows
    num_by_event: dict[str, int]  # of the good rows; "" stands for those without a type
    num_damaged: int = 0  # good rows of the catalog, some of whose text could not be decoded

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    @property
    def num_good(self) -> int:
        return self.num_read - self.num_bad

    def __str__(self) -> str:
        parts = [f"{self.num_read:,} rows"]
        parts += [f"{num:,} {name}" for name, num in self.num_by_event.items() if name]
        parts += [f"{self.num_damaged:,} with text that cannot be decoded"] if self.num_damaged else []
        parts += [f"{self.num_bad:,} bad, in quarantine"] if self.bad else []
        return ", ".join([*parts, *(f"{num:,} {reason}" for reason, num in self.bad.items())])


@dataclass(frozen=True)
class Known:
    """How far the log and the catalog are about the same items; events are good rows of the wanted types."""

    num_events: int
    num_known_events: int  # whose item is in the catalog
    num_items: int  # of the catalog
    num_items_with_events: int

    @property
    def num_unknown_events(self) -> int:
        return self.num_events - self.num_known_events

    def __str__(self) -> str:
        of_events = f"{self.num_known_events:,} of {self.num_events:,} events are of items in the catalog"
        of_items = f"{self.num_items_with_events:,} of its {self.num_items:,} items have events"
        loud = (
            self.num_unknown_events > LOUD_SHARE * self.num_events
            or self.num_items_with_events < (1 - LOUD_SHARE) * self.num_items
        )
        return f"{'WARNING: only ' if loud else ''}{of_events}, {of_items}"


def mark_bad(log: DataFrame, time_unit: str, now_ms: int) -> DataFrame:
    """Gives a reason to rows whose time cannot be true. Times of unit 'order' are positions and not looked at."""
    if time_unit == "order":
        return log
    # A day of grace: clocks run ahead, and an 'iso' time without a zone may be of one to the east.
    reason = (
        F.when(F.col("reason").isNotNull(), F.col("reason"))
        .when(F.col("ts") < FIRST_MS, F.lit("timestamp before 1995"))
        .when(F.col("ts") > now_ms + MS_PER_DAY, F.lit("timestamp in the future"))
    )
    # What the readers found bad has its raw row; these rows are readable, so their columns say it all.
    row = F.to_json(F.struct("user_id", "item_id", "ts", "event"))
    marked = log.withColumn("reason", reason)
    return marked.withColumn("raw", F.when(F.col("reason").isNotNull(), F.coalesce("raw", row)))


def check_head(log: DataFrame, what: str) -> None:
    """Looks at the first rows that Spark finds: a wrong column or unit spoils them all, and is told at once.

    Raises:
        ValueError: there are no rows, or none of the first ones can be used.
    """
    head = log.select("reason", "raw").limit(PROBE_ROWS).collect()
    if not head:
        raise ValueError(f"the {what} is empty: its files hold no rows")
    if all(row.reason is not None for row in head):
        raise ValueError(
            f"none of the first {len(head):,} rows of the {what} can be used, such as ({head[0].reason}): "
            f"{head[0].raw}\nmend the files or the [data] settings"
        )


def census(log: DataFrame) -> DataFrame:
    """reason, event, item_id, num long: rows by these three; item_id and event are null where there is a reason.

    One aggregation by hash, for the profile and for the items at once: the log is read twice, here and by
    `blocks.gather`, and kept nowhere, as it may be larger than all disks at hand.
    """
    good = F.col("reason").isNull()
    keys = [
        F.when(good, F.coalesce("event", F.lit(""))).alias("event"),
        F.when(good, F.col("item_id")).alias("item_id"),
    ]
    return log.select("reason", *keys).groupBy("reason", "event", "item_id").agg(F.count(F.lit(1)).alias("num"))


def items(census: DataFrame, wanted: tuple[str, ...]) -> DataFrame:
    """item_id: those of the good rows of the wanted event types, of any type if none are named."""
    good = census.where(F.col("reason").isNull())
    return (good.where(F.col("event").isin(*wanted)) if wanted else good).select("item_id").distinct()


def profile(census: DataFrame) -> Profile:
    """Raises ValueError when there are so many event types that the column must be another kind of text."""
    groups = census.groupBy("reason", "event").agg(F.sum("num").alias("num")).limit(MAX_GROUPS).collect()
    if len(groups) == MAX_GROUPS:
        raise ValueError(f"data.event_column holds {MAX_GROUPS:,} types or more; name another column or none")
    bad = sorted((g for g in groups if g.reason is not None), key=lambda g: (-g.num, g.reason))
    return Profile(
        num_read=sum(g.num for g in groups),
        bad={g.reason: g.num for g in bad},
        num_by_event={g.event: g.num for g in sorted(groups, key=lambda g: g.event or "") if g.reason is None},
    )


def check_bad_share(found: Profile, rows: DataFrame, what: str, max_bad_share: float) -> None:
    """Raises ValueError, with the counts and an example per reason, when too much or everything is unusable."""
    if found.num_bad <= max_bad_share * found.num_read and (found.num_good or not found.num_read):
        return
    first = F.min_by(F.substring("raw", 1, 200), "order").alias("raw")
    bad = rows.where(F.col("reason").isNotNull()).groupBy("reason").agg(first)
    examples = {row.reason: row.raw for row in bad.collect()}
    raise ValueError(
        f"{found.num_bad:,} of the {found.num_read:,} rows of the {what} are unusable "
        f"({found.num_bad / found.num_read:.2%}), at most {max_bad_share:.2%} may be (etl.max_bad_share):\n"
        + "\n".join(f"{num:,} x {reason}, such as: {examples.get(reason)}" for reason, num in found.bad.items())
        + "\nmend the files or the [data] settings, or raise etl.max_bad_share"
    )


def catalog_profile(catalog: DataFrame) -> Profile:
    """`profile` of the items' table, with the texts that hold U+FFFD: decoders put it where they cannot decode."""
    is_good = F.col("reason").isNull()
    damaged = F.count_if(is_good & F.contains("text", F.lit(REPLACEMENT))).alias("damaged")
    groups = catalog.groupBy("reason").agg(F.count(F.lit(1)).alias("num"), damaged).collect()
    bad = sorted((g for g in groups if g.reason is not None), key=lambda g: (-g.num, g.reason))
    num_good = sum(g.num for g in groups if g.reason is None)
    return Profile(
        num_read=sum(g.num for g in groups),
        bad={g.reason: g.num for g in bad},
        num_by_event={"": num_good} if num_good else {},
        num_damaged=sum(g.damaged for g in groups),
    )


def check_damaged_share(found: Profile, catalog: DataFrame, encoding: str, max_bad_share: float) -> None:
    """Raises ValueError, with an example, when too many of the catalog's texts cannot be decoded."""
    if found.num_damaged <= max_bad_share * found.num_good:
        return
    is_damaged = F.col("reason").isNull() & F.contains("text", F.lit(REPLACEMENT))
    first = (
        catalog.where(is_damaged).agg(F.min_by(F.struct("item_id", F.substring("text", 1, 200)), "order")).first()[0]
    )
    share = found.num_damaged / found.num_good
    raise ValueError(
        f"{found.num_damaged:,} of the {found.num_good:,} texts of the catalog hold what cannot be decoded in "
        f"{encoding} ({share:.2%}), at most {max_bad_share:.2%} may (etl.max_bad_share), such as: "
        f"{first[0]}: {first[1]}\nset data.encoding (latin-1, cp1252, ...), mend the files, or raise etl.max_bad_share"
    )


def known(census: DataFrame, texts: DataFrame, wanted: tuple[str, ...]) -> Known:
    """How many of the events are of items in `texts` (item_id, text), and how many of these have events."""
    good = census.where(F.col("reason").isNull())
    good = good.where(F.col("event").isin(*wanted)) if wanted else good
    by_item = good.groupBy("item_id").agg(F.sum("num").alias("num"))
    listed = texts.select("item_id", F.lit(True).alias("listed"))
    is_known = F.col("listed").isNotNull()
    num = F.coalesce("num", F.lit(0))
    counts = by_item.join(listed, "item_id", "full").agg(
        F.sum(num), F.sum(F.when(is_known, num)), F.count("listed"), F.count_if(is_known & (num > 0))
    )
    return Known(*(int(value or 0) for value in counts.first()))


def check_known(found: Known, census: DataFrame, texts: DataFrame, max_unknown_share: float) -> None:
    """Raises ValueError, with ids of either side, when hardly any event is of an item in the catalog."""
    if found.num_unknown_events <= max_unknown_share * found.num_events:
        return
    of_log = census.where(F.col("reason").isNull()).select("item_id").distinct()
    sides = (of_log.join(texts, "item_id", "left_anti"), texts)
    firsts = [side.select("item_id").orderBy("item_id").limit(3).collect() for side in sides]
    in_log, in_catalog = (", ".join(row.item_id for row in rows) for rows in firsts)
    share = found.num_unknown_events / found.num_events
    raise ValueError(
        f"{found.num_unknown_events:,} of the {found.num_events:,} events are of items that the catalog does not have "
        f"({share:.2%}), at most {max_unknown_share:.2%} may be (etl.max_unknown_share); items of the log: {in_log}; "
        f"of the catalog: {in_catalog}\nmend the ids or data.item_column, leave data.items empty, or raise "
        "etl.max_unknown_share"
    )


def event_types(found: Profile, wanted: tuple[str, ...]) -> list[str]:
    """The types to keep, weakest first: `wanted`, or all that occur in the order of their names.

    Raises:
        ValueError: none of the good rows is of a wanted type, or there are more types than an int8 holds.
    """
    for name in wanted:
        if (whole := name.partition(".")[0]).isdecimal() and name.rstrip("0") == f"{whole}.":
            raise ValueError(
                f"etl.events has {name!r}: whole numbers are read as {whole!r} whatever their type; write that"
            )
    types = list(wanted) or [name for name in found.num_by_event if name]
    if len(types) > MAX_EVENT_TYPES:
        raise ValueError(
            f"{len(types)} event types, at most {MAX_EVENT_TYPES} can be told apart; list fewer in etl.events"
        )
    if wanted and not any(found.num_by_event.get(name) for name in wanted):
        there = ", ".join(f"{name or 'none'} ({num:,})" for name, num in found.num_by_event.items())
        raise ValueError(f"etl.events = {list(wanted)}: no row is of such a type; the log holds: {there}")
    return types


def without_bots(log: DataFrame, max_daily_events: int) -> tuple[DataFrame, int]:
    """Leaves out the good rows of users with more than so many of them on one day (UTC); returns them and the users."""
    day = F.floor(F.col("ts") / MS_PER_DAY)
    per_day = log.where(F.col("reason").isNull()).groupBy("user_id", day.alias("day")).count()
    bots = per_day.where(F.col("count") > max_daily_events).select("user_id").distinct().persist()
    is_bot = (log["user_id"] == bots["user_id"]) & log["reason"].isNull()
    return log.join(bots, is_bot, "left_anti"), bots.count()


def pseudonym_key(etl: Etl) -> bytes | None:
    """The secret that etl.pseudonym_key names, None without one. It never gets into a plan, a log or the manifest.

    Raises:
        ValueError: the variable is not set, or too short to be a secret.
    """
    if not etl.pseudonym_key:
        return None
    key = os.environ.get(etl.pseudonym_key, "").encode()
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(
            f"etl.pseudonym_key = {etl.pseudonym_key!r}: the environment variable of this name must hold a secret of "
            f"at least {MIN_KEY_BYTES} characters, it has {len(key)}; openssl rand -hex 32 prints one"
        )
    return key


def with_pseudonyms(log: DataFrame, key: bytes) -> DataFrame:
    """Replaces user_id by the first 128 bits of its HMAC-SHA256, in hex, and drops the raw text of bad rows.

    In Python, although SQL could compute it: an expression with the key in it would show in plans and event logs.
    """

    @F.arrow_udf(T.StringType())
    def pseudonym(users: pa.Array) -> pa.Array:
        distinct = users.cast(pa.binary()).dictionary_encode()  # bytes: bad rows have ids that are not UTF-8
        hashed = [hmac.digest(key, user, "sha256")[:16].hex() for user in distinct.dictionary.to_pylist()]
        return pa.array(hashed, pa.string()).take(distinct.indices)

    return log.withColumn("user_id", pseudonym("user_id")).withColumn("raw", F.lit(None).cast("string"))
