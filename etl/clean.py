"""From the rows of the log to the events that count: hygiene, duplicates, repeats, long histories, k-core.

`events` is the table of `etl.readers`. `mark_bad` adds reasons; `merge_repeats` turns good rows into
    kept events: user_id, item_id, ts, event byte (0 none, else 1 + position in the event types), split, order,
    num_rows long (input rows behind the event), num_distinct long (of them, different ones),
    num_splits long (splits that the user's event on the item was found in)
partitioned by user_id, which the steps after it rely on to run without another shuffle.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

MS_PER_DAY = 86_400_000
FIRST_MS = 788_918_400_000  # 1995-01-01: no shop's log is older
MAX_EVENT_TYPES = 127  # an event is an int8
MAX_GROUPS = 1000  # reasons and event types that are counted; a log has a dozen


@dataclass(frozen=True)
class Profile:
    """What one pass over the raw log found."""

    num_read: int
    bad: dict[str, int]  # reason -> rows
    examples: dict[str, str]  # reason -> a row
    num_by_event: dict[str, int]  # of the good rows; "" stands for those without a type

    @property
    def num_bad(self) -> int:
        return sum(self.bad.values())

    @property
    def num_good(self) -> int:
        return self.num_read - self.num_bad

    def __str__(self) -> str:
        parts = [f"{self.num_read:,} rows"]
        parts += [f"{num:,} {name}" for name, num in self.num_by_event.items() if name]
        parts += [f"{self.num_bad:,} bad, in quarantine"] if self.bad else []
        return ", ".join([*parts, *(f"{num:,} {reason}" for reason, num in self.bad.items())])


def mark_bad(events: DataFrame, time_unit: str, now_ms: int) -> DataFrame:
    """Gives a reason to rows whose time cannot be true. Times of unit 'order' are positions and not looked at."""
    if time_unit == "order":
        return events
    # A day of grace: clocks run ahead, and an 'iso' time without a zone may be of one to the east.
    reason = (
        F.when(F.col("reason").isNotNull(), F.col("reason"))
        .when(F.col("ts") < FIRST_MS, F.lit("timestamp before 1995"))
        .when(F.col("ts") > now_ms + MS_PER_DAY, F.lit("timestamp in the future"))
    )
    # What the readers found bad has its raw row; these rows are readable, so their columns say it all.
    row = F.to_json(F.struct("user_id", "item_id", "ts", "event"))
    marked = events.withColumn("reason", reason)
    return marked.withColumn("raw", F.when(F.col("reason").isNotNull(), F.coalesce("raw", row)))


def profile(rows: DataFrame, what: str) -> Profile:
    """Counts the rows of `what`, the log or the catalog, by reason and event type, in one job.

    Raises:
        ValueError: there are no rows, or so many event types that the column must be another kind of text.
    """
    good = F.col("reason").isNull()
    event = F.when(good, F.coalesce("event", F.lit(""))) if "event" in rows.columns else F.lit("")
    groups = rows.groupBy("reason", event.alias("event")).agg(
        F.count(F.lit(1)).alias("num"), F.min(F.substring("raw", 1, 200)).alias("example")
    )
    groups = groups.limit(MAX_GROUPS).collect()
    if not groups:
        raise ValueError(f"the {what} is empty: its files hold no rows")
    if len(groups) == MAX_GROUPS:
        raise ValueError(f"data.event_column holds {MAX_GROUPS:,} types or more; name another column or none")
    bad = sorted((g for g in groups if g.reason is not None), key=lambda g: (-g.num, g.reason))
    return Profile(
        num_read=sum(g.num for g in groups),
        bad={g.reason: g.num for g in bad},
        examples={g.reason: g.example for g in bad},
        num_by_event={g.event: g.num for g in sorted(groups, key=lambda g: g.event or "") if g.reason is None},
    )


def check_bad_share(found: Profile, what: str, max_bad_share: float) -> None:
    """Raises ValueError, with the counts and an example per reason, when too much or everything is unusable."""
    if found.num_bad > max_bad_share * found.num_read or found.num_bad == found.num_read:
        raise ValueError(
            f"{found.num_bad:,} of the {found.num_read:,} rows of the {what} are unusable "
            f"({found.num_bad / found.num_read:.2%}), at most {max_bad_share:.2%} may be (etl.max_bad_share):\n"
            + "\n".join(f"{num:,} x {reason}, such as: {found.examples[reason]}" for reason, num in found.bad.items())
            + "\nmend the files or the [data] settings, or raise etl.max_bad_share"
        )


def event_types(found: Profile, wanted: tuple[str, ...]) -> list[str]:
    """The types to keep, weakest first: `wanted`, or all that occur in the order of their names.

    Raises:
        ValueError: none of the good rows is of a wanted type, or there are more types than an int8 holds.
    """
    types = list(wanted) or [name for name in found.num_by_event if name]
    if len(types) > MAX_EVENT_TYPES:
        raise ValueError(
            f"{len(types)} event types, at most {MAX_EVENT_TYPES} can be told apart; list fewer in etl.events"
        )
    if not wanted:
        return types
    if not any(found.num_by_event.get(name) for name in wanted):
        there = ", ".join(f"{name or 'none'} ({num:,})" for name, num in found.num_by_event.items())
        raise ValueError(f"etl.events = {list(wanted)}: no row is of such a type; the log holds: {there}")
    return types


def merge_repeats(events: DataFrame, types: list[str], only_listed: bool, repeats: str) -> DataFrame:
    """Good rows -> kept events: filtered by type, exact duplicates dropped, repeats handled.

    With `only_listed` rows of other types than `types` are left out. repeats = 'first': one event per user and item,
    at its first time (of the earliest split), of the strongest type met there; 'keep': all that differ.
    """
    code = F.coalesce(F.array_position(F.array(*map(F.lit, types)), F.col("event")), F.lit(0)) if types else F.lit(0)
    good = events.where(F.col("reason").isNull()).withColumn("event", code.cast("byte"))
    if only_listed:
        good = good.where(F.col("event") > 0)
    # Everything below groups by the user at least, so that this is the one shuffle of the log.
    by_user = good.select("user_id", "item_id", "ts", "event", "split", "order").repartition("user_id")
    distinct = by_user.groupBy("user_id", "item_id", "ts", "event", "split").agg(
        F.min("order").alias("order"), F.count(F.lit(1)).alias("num_rows")
    )
    if repeats == "keep":
        return distinct.withColumn("num_distinct", F.lit(1)).withColumn("num_splits", F.lit(1))
    first = F.min(F.struct("split", "ts", "order")).alias("first")
    merged = distinct.groupBy("user_id", "item_id").agg(
        first,
        F.max(F.struct(-F.coalesce("split", F.lit(0)), "event"))["event"].alias("event"),
        F.sum("num_rows").alias("num_rows"),
        F.count(F.lit(1)).alias("num_distinct"),
        F.count_distinct(F.coalesce("split", F.lit(0).cast("byte"))).alias("num_splits"),
    )
    return merged.select(
        "user_id",
        "item_id",
        "first.ts",
        "event",
        "first.split",
        "first.order",
        "num_rows",
        "num_distinct",
        "num_splits",
    )


def time_order() -> tuple[Column, ...]:
    """What a user's events are sorted by. A split that the input gives comes first: its parts may have no times."""
    return F.col("split"), F.col("ts"), F.col("order")


def with_age(events: DataFrame) -> DataFrame:
    """Adds age int: 1 for a user's latest event. Ties in time are broken by the input order."""
    latest_first = Window.partitionBy("user_id").orderBy(*(column.desc() for column in time_order()))
    return events.withColumn("age", F.row_number().over(latest_first))


def count_merged(events: DataFrame, num_good: int, max_user_events: int) -> dict[str, int]:
    """What became of num_good rows in merge_repeats and by the limit on age, in one job:

    num_filtered (of other event types), num_duplicates (exact), num_in_earlier_split (left out of the later one),
    num_repeats (merged), num_over_limit (older than max_user_events), num_events (left).
    """
    sums = events.agg(
        *(F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in ("num_rows", "num_distinct", "num_splits")),
        F.count(F.lit(1)).alias("num"),
        F.count_if(F.col("age") > max_user_events).alias("num_over_limit"),
    ).first()
    return {
        "num_filtered": num_good - sums.num_rows,
        "num_duplicates": sums.num_rows - sums.num_distinct,
        "num_in_earlier_split": sums.num_splits - sums.num,
        "num_repeats": sums.num_distinct - sums.num_splits,
        "num_over_limit": sums.num_over_limit,
        "num_events": sums.num - sums.num_over_limit,
    }


def k_core(events: DataFrame, min_user: int, min_item: int) -> Iterator[tuple[DataFrame, int, int]]:
    """Yields (events left, users left, items left) after each round; the last one is the k-core, a fixed point.

    A round keeps the items with min_item events of the users left, then the users with min_user events on those
    items. Either set can only shrink, so one of them decides the other, and a round needs no more of the one before
    than its users. `events` is read twice a round and should be persisted, partitioned by user_id. What is yielded
    is not persisted: keeping each round's events would nest the query plans, which then grow exponentially.
    """
    users, num_before = None, -1
    while True:
        of_users = events.join(users, "user_id", "left_semi") if users else events
        items = _at_least(of_users, "item_id", min_item).persist()
        users = _at_least(events.join(items, "item_id", "left_semi"), "user_id", min_user).persist()
        num_users, num_items = users.count(), items.count()
        yield events.join(items, "item_id", "left_semi").join(users, "user_id", "left_semi"), num_users, num_items
        if num_users in (0, num_before):
            return
        num_before = num_users


def _at_least(events: DataFrame, key: str, least: int) -> DataFrame:
    return events.groupBy(key).agg(F.count(F.lit(1)).alias("num")).where(F.col("num") >= least).select(key)
