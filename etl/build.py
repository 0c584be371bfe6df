"""Turns a log into corpus/: cleaned, split, with dense ids, a tokenizer and WebDataset shards.

    spark-submit etl/build.py --config configs/demo.toml
    spark-submit --master 'local[8]' --driver-memory 16g etl/build.py --config configs/phone.toml
    spark-submit --master spark://host:7077 etl/build.py --config my.toml --work=/shared/runs/my
    python etl/build.py --config configs/demo.toml          # the same as the first

On a cluster the input and the work folder lie on a file system that all machines see under the same path. Spark's
settings are spark-submit's (--conf spark.sql.shuffle.partitions=...); a log of megabytes is done in half the time
with --driver-java-options -XX:TieredStopAtLevel=1.
"""

import hashlib
import shutil
import time
from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from contract import schema
from contract.artifacts import MAX_BYTES_HASHED_ON_OPEN, sha256, stage_output
from contract.cli import Progress, parse, run, show_plan
from contract.config import Config
from contract.tracking import track
from etl import clean, content, corpus, readers, split
from etl.session import spark_session


def main(argv: list[str]) -> None:
    config, dry_run = parse(argv, __doc__)
    if dry_run:
        reads = {setting: " ".join(patterns) for setting, patterns in readers.input_patterns(config.data).items()}
        show_plan(config, reads, config.work_dir / "corpus")
        return
    files = readers.input_files(config.data)
    progress = Progress("etl")
    progress(f"starting Spark to read {', '.join(f'{len(paths)} of {key}' for key, paths in files.items())}")
    with stage_output(config, "corpus") as output, track(config, "etl") as record:
        with spark_session(f"colarec etl {config.name}") as spark:
            counts, extra = build(spark, config, files, output.path, progress)
        record.metrics(counts)
        artifact = output.commit(counts, {"raw": digest(files)}, **extra)
    progress(f"wrote {artifact.path}")


def build(
    spark: SparkSession, config: Config, files: dict[str, list[Path]], folder: Path, progress: Progress
) -> tuple[dict[str, int], dict]:
    """Writes the files of corpus/ into `folder`; returns the manifest's counts and its extra keys."""
    etl, seed = config.etl, config.seed

    # What can be used of the log, and of what the items say
    log = readers.read_events(spark, config, files)
    log = clean.mark_bad(log, config.data.time_unit, now_ms=time.time_ns() // 10**6).persist()
    found = clean.profile(log, "log")
    progress(f"log: {found}")
    catalog = readers.read_items(spark, config.data, files).persist()
    found_items = clean.profile(catalog, "catalog")
    progress(f"catalog: {found_items}")
    for rows, what, seen in ((log, "log", found), (catalog, "catalog", found_items)):
        clean.check_bad_share(seen, what, etl.max_bad_share)
        if seen.num_bad:
            corpus.write_quarantine(rows, folder / "quarantine" / what)

    # Which events count
    types = clean.event_types(found, etl.events)
    merged = clean.with_age(clean.merge_repeats(log, types, bool(etl.events), etl.repeats)).persist()
    steps = clean.count_merged(merged, found.num_good, etl.max_user_events)
    progress(f"events: {spoken(steps)}")
    log.unpersist()
    events = merged.where(F.col("age") <= etl.max_user_events)
    if max(etl.min_user, etl.min_item) > 1:
        rounds = clean.k_core(events, etl.min_user, etl.min_item)
        for number, (core, num_users, num_items) in enumerate(rounds, start=1):
            events = core
            progress(
                f"k-core round {number}: {num_users:,} users with {etl.min_user} events or more, "
                f"{num_items:,} items with {etl.min_item} or more"
            )

    # Train, valid and test
    events = split.with_position(events)
    events = split.leave_one_out(events) if etl.split == "leave_one_out" else events
    # Read back from files, the events have a plan of one step, whatever the number of rounds behind them.
    stage = folder / "_events"
    events.drop("age", "num_rows", "num_distinct", "num_splits").write.parquet(str(stage))
    events = spark.read.parquet(str(stage))
    merged.unpersist()
    split.check_no_leak(events, etl.repeats, etl.split)

    # Dense ids, tables
    users, num_users = corpus.with_dense_index(events.select("user_id").distinct(), "user_id", seed, "user_idx")
    if not num_users:
        raise ValueError(
            f"no user is left with etl.min_user = {etl.min_user} and etl.min_item = {etl.min_item}; lower them"
        )
    users = corpus.write_parquet(users, schema.USERS, num_users, num_users, folder / "users.parquet")
    texts = corpus.texts(catalog)
    item_ids = corpus.item_ids(events, texts, whole_catalog=etl.min_item == 0)
    items, num_items = corpus.with_dense_index(item_ids, "item_id", seed, "item_idx")
    items = content.with_normal_text(items.join(texts, "item_id", "left")).persist()
    interactions = corpus.dense_interactions(events, users, items)
    interactions = corpus.write_parquet(
        interactions, corpus.INTERACTIONS, steps["num_events"], num_users, folder / "interactions"
    )
    sizes = {"num_users": num_users, "num_items": num_items, **corpus.count_splits(interactions)}
    sizes["num_cold_items"] = num_items - sizes.pop("num_train_items")
    progress(f"split: {spoken(sizes)}")

    # What the items say
    model = content.train_tokenizer(items, etl.vocab_size, etl.max_item_tokens, folder / "tokenizer")
    vocab_size, num_textless = content.vocab_size(model), items.where(F.col("text") == "").count()
    progress(f"tokenizer: {vocab_size:,} pieces; {num_textless:,} items have no text")
    items = corpus.with_statistics(content.with_token_ids(items, model, etl.max_item_tokens), interactions)
    corpus.write_parquet(items, schema.ITEMS, num_items, num_items, folder / "items.parquet")
    item_users = corpus.item_users(interactions, etl.max_users_per_item, seed)
    corpus.write_parquet(item_users, schema.ITEM_USERS, num_items, num_items, folder / "item_users.parquet")

    # Shards
    histories = corpus.histories(interactions).persist()
    shards = {}
    for code, name in enumerate(schema.SPLITS):
        rows = corpus.sequences(histories, code, etl.valid_in_history)
        shards[name] = corpus.write_shards(rows, name, etl.num_shards, seed, folder)
        progress(f"{name}: {len(shards[name])} shards, {sum(s['num_users'] for s in shards[name]):,} users")
    shutil.rmtree(stage)

    counts = {"num_rows_read": found.num_read, "num_rows_bad": found.num_bad, **steps, **sizes}
    counts |= {"num_items_bad": found_items.num_bad, "num_items_without_text": num_textless, "vocab_size": vocab_size}
    return counts, {"events": types, "shards": shards, "time_unit": config.data.time_unit}


def spoken(counts: dict[str, int]) -> str:
    return ", ".join(f"{value:,} {key.removeprefix('num_').replace('_', ' ')}" for key, value in counts.items())


def digest(files: dict[str, list[Path]]) -> str:
    """Of the names and contents of the input files; of large ones size and time stand for the content."""
    seen = hashlib.sha256()
    for file in (file for paths in files.values() for file in paths):
        stat = file.stat()
        large = stat.st_size > MAX_BYTES_HASHED_ON_OPEN
        seen.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns if large else sha256(file)}\n".encode())
    return seen.hexdigest()


if __name__ == "__main__":
    run(main)
