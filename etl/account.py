"""What became of the log: the steps that removed events, and what the manifest and the report say of the corpus."""

import datetime
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from contract import schema
from contract.settings import Config
from etl.blocks import Gathered
from etl.corpus import Written
from etl.hygiene import Profile
from etl.kcore import Round

DAY = datetime.timedelta(days=1)
EPOCH = datetime.date(1970, 1, 1)
MAX_LINES_SEARCHED = 1000  # of a file of the quarantine, for examples
MAX_EXAMPLE = 300  # characters


@dataclass(frozen=True)
class Step:
    """A step over the log: what it removed, and how many rows are left after it."""

    what: str
    removed: int
    left: int


def cleaning_steps(config: Config, found: Profile, types: list[str], gathered: Gathered) -> list[Step]:
    """From the rows that were read to the events of users, in the order in which they are removed."""
    etl, counts = config.etl, gathered.counts
    num_wanted = sum(found.num_by_event.get(name, 0) for name in types) if etl.events else found.num_good
    removed = {
        "rows that cannot be used, in quarantine": found.num_bad,
        "rows of other event types": found.num_good - num_wanted,
        f"rows of bots, with over {etl.max_daily_events:,} events a day": num_wanted - counts["num_rows"],
        f"rows before the latest {etl.max_user_events:,} of a user": counts["num_over_limit"],
        "exact duplicates": counts["num_duplicates"],
        "events on items of an earlier split of the user": counts["num_in_earlier_split"],
        "repeated events of a user on an item": counts["num_repeats"],
    }
    return _steps([Step("rows read", 0, found.num_read)], removed)


def all_steps(cleaning: list[Step], rounds: list[Round], counts: dict[str, int]) -> list[Step]:
    """`cleaning` and what came after it, down to the events of the corpus."""
    left = rounds[-1].num_events if rounds else cleaning[-1].left
    num_events = sum(counts[f"num_{name}"] for name in (*schema.SPLITS, "context"))
    removed = {
        "events outside the k-core": cleaning[-1].left - left,
        "events that the split leaves out": left - num_events,
    }
    return _steps(cleaning, removed)


def _steps(steps: list[Step], removed: dict[str, int]) -> list[Step]:
    for what, num in removed.items():
        if num:
            steps = [*steps, Step(what, num, steps[-1].left - num)]
    return steps


def spoken(steps: list[Step]) -> str:
    return ", ".join([f"{steps[-1].left:,} left", *(f"{step.removed:,} {step.what}" for step in steps[1:])])


def corpus_counts(
    found: Profile, found_items: Profile, cleaning: list[Step], written: list[Written], items: DataFrame
) -> dict[str, int]:
    """The manifest's counts."""
    by_split = np.sum([shard.num_by_split for shard in written], axis=0)
    num_items, num_cold, num_textless = items.agg(
        F.count(F.lit(1)), F.count_if(F.col("num_train") == 0), F.count_if(F.col("text") == "")
    ).first()
    damaged = {"num_items_damaged": found_items.num_damaged} if found_items.num_damaged else {}
    return {
        "num_rows_read": found.num_read,
        "num_rows_bad": found.num_bad,
        "num_items_bad": found_items.num_bad,
        **damaged,  # of the catalog's rows, with text that cannot be decoded
        "num_cleaned": cleaning[-1].left,
        "num_users": sum(shard.files["users"].num_rows for shard in written),
        "num_items": num_items,
        **{f"num_{name}": int(num) for name, num in zip([*schema.SPLITS, "context"], by_split, strict=True)},
        "num_cold_users": sum(shard.num_cold_users for shard in written),
        "num_cold_items": num_cold,
        "num_items_without_text": num_textless,
    }


def spoken_counts(counts: dict[str, int]) -> str:
    return ", ".join(
        f"{value:,} {key.removeprefix('num_').replace('_', ' ')}" for key, value in counts.items() if value
    )


def quarantine(found: dict[str, Profile], folder: Path) -> dict[str, dict[str, dict]]:
    """{table: {reason: {"num", "example"}}}; examples are looked for among the first rows of each file."""
    examples: dict[tuple[str, str], str] = {}
    for table in found:
        for file in sorted((folder / table).glob("*.json")):
            with file.open() as lines:
                for row in map(json.loads, itertools.islice(lines, MAX_LINES_SEARCHED)):
                    examples.setdefault((table, row["reason"]), (row["raw"] or "")[:MAX_EXAMPLE])
    return {
        table: {reason: {"num": num, "example": examples.get((table, reason), "")} for reason, num in seen.bad.items()}
        for table, seen in found.items()
    }


def event_weights(config: Config, types: list[str], written: list[Written]) -> list[float]:
    """Of each event type as a target, by etl.event_weights, so that the corpus' events weigh 1 on average."""
    weights = np.array(config.etl.event_weights or [1.0] * len(types))
    num = np.sum([shard.num_by_type for shard in written], axis=0)[1 : len(types) + 1]
    mean = (num @ weights) / num.sum() if num @ weights else 1.0
    return (weights / mean).tolist()


def shard_list(written: list[Written]) -> dict[str, list[dict]]:
    """Of every split [{file, num_users, num_events}]."""
    return {
        split: [
            {"file": file.name, "num_users": file.num_rows, "num_events": file.num_values}
            for shard in written
            if (file := shard.files.get(split))
        ]
        for split in schema.SPLITS
    }


def report(
    config: Config,
    steps: list[Step],
    rounds: list[Round],
    quarantine: dict[str, dict[str, dict]],
    types: list[str],
    written: list[Written],
    counts: dict[str, int],
) -> dict:
    """What `report.write_report` shows, but for the histograms over items."""
    by_type = np.sum([shard.num_by_type for shard in written], axis=0)
    first = {code: min((s.spans[code][0] for s in written if code in s.spans), default=None) for code in range(3)}
    return {
        "name": config.name,
        "time_unit": config.data.time_unit,
        "filters": [{"what": step.what, "removed": step.removed, "left": step.left} for step in steps],
        "k_core": [
            {"round": n, "num_users": r.num_users, "num_items": r.num_items, "num_events": r.num_events}
            for n, r in enumerate(rounds, start=1)
        ],
        "quarantine": quarantine,
        "events_by_type": {name: int(by_type[code]) for code, name in enumerate(types, start=1)},
        "events_per_user": _bins(np.sum([shard.num_by_length for shard in written], axis=0)),
        "activity": _activity(written),
        "split": {
            "method": config.etl.split,
            **{key: counts[key] for key in ("num_train", "num_valid", "num_test", "num_context", "num_users")},
            **{key: counts[key] for key in ("num_items", "num_cold_items", "num_cold_users")},
            "first_valid_ts": first[schema.VALID],
            "first_test_ts": first[schema.TEST],
            "leak_check": "passed",
        },
        "shards": shard_list(written),
        "content": {
            "num_items_without_text": counts["num_items_without_text"],
            **{key: counts[key] for key in ("num_items_damaged",) if key in counts},
            "vocab_size": counts["vocab_size"],
        },
    }


def _bins(num: np.ndarray) -> list[list[int]]:
    """[[low, num]] of the bins [low, 2 low) that are not empty."""
    return [[1 << int(b), int(num[b])] for b in np.flatnonzero(num)]


def log_bins(items: DataFrame, size: Column) -> list[list[int]]:
    """[[low, num]]: rows whose size is in [low, 2 low), low = 0 for those of size 0."""
    low = F.when(size > 0, F.pow(F.lit(2), F.floor(F.log2(size))).cast("long")).otherwise(0)
    return sorted([row.low, row["count"]] for row in items.groupBy(low.alias("low")).count().collect())


def _activity(written: list[Written]) -> list[list]:
    """[[day, train, valid, test]], the days in order."""
    days: dict[int, np.ndarray] = {}
    for shard in written:
        for day, nums in shard.activity.items():
            days[day] = days.get(day, 0) + np.array(nums[:3])
    return [[str(EPOCH + day * DAY), *map(int, nums)] for day, nums in sorted(days.items())]
