"""Which event of a user is train, valid or test, and the proof that no target leaks into its history."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from contract.schema import TEST, TRAIN, VALID
from etl.clean import time_order

MIN_EVENTS = 3  # leave-one-out takes two; a history needs one


def with_position(events: DataFrame) -> DataFrame:
    """Adds position int: 1.. along a user's events, by given split, time and input order.

    Ties in time are broken by the input order, never by the item: an order of item ids would leak into the split.
    """
    return events.withColumn("position", F.row_number().over(Window.partitionBy("user_id").orderBy(*time_order())))


def leave_one_out(events: DataFrame) -> DataFrame:
    """Sets split from position: a user's last event is test, the one before valid, the others train.

    Users with fewer than 3 events are train only.
    """
    num_events = F.count(F.lit(1)).over(Window.partitionBy("user_id"))
    num_later = num_events - F.col("position")
    split = F.when((num_events < MIN_EVENTS) | (num_later > 1), TRAIN).when(num_later == 1, VALID).otherwise(TEST)
    return events.withColumn("split", split.cast("byte"))


def check_no_leak(events: DataFrame, repeats: str, split: str) -> None:
    """Looks at every user of split events for a target that its own history gives away.

    Raises:
        ValueError: a user has an item twice (repeats = 'first'), or a target of leave-one-out does not come after
            the history in (ts, input order), or is not the only one; the message names a user.
    """
    users = events.groupBy("user_id").agg(
        (F.count(F.lit(1)) - F.count_distinct("item_id")).alias("num_repeated"),
        *(F.count_if(F.col("split") == part).alias(f"num_{part}") for part in (VALID, TEST)),
        *(_edge(F.max, part).alias(f"last_{part}") for part in (TRAIN, VALID)),
        *(_edge(F.min, part).alias(f"first_{part}") for part in (VALID, TEST)),
    )
    bad = F.lit(False)
    if repeats == "first":
        bad |= F.col("num_repeated") > 0
    if split == "leave_one_out":
        bad |= (F.col(f"num_{VALID}") > 1) | (F.col(f"num_{TEST}") > 1)
        for earlier, later in ((TRAIN, VALID), (VALID, TEST), (TRAIN, TEST)):
            # A user without events of one of the two has a null here.
            bad |= F.coalesce(F.col(f"last_{earlier}") >= F.col(f"first_{later}"), F.lit(False))
    for user in users.where(bad).limit(1).collect():
        raise ValueError(
            f"a target leaks into its history, first seen at user {user.user_id!r}: {user.num_repeated} repeated "
            f"item(s), {user[f'num_{VALID}']} valid and {user[f'num_{TEST}']} test events, or targets that are not last"
        )


def _edge(function, part: int) -> Column:
    return function(F.when(F.col("split") == part, F.struct("ts", "order")))
