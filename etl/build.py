"""Turns a log into corpus/: cleaned, split, with dense ids, a tokenizer and WebDataset shards.

    spark-submit etl/build.py --config configs/demo.toml
    spark-submit --master 'local[8]' --driver-memory 16g etl/build.py --config configs/phone.toml
    spark-submit --master spark://host:7077 etl/build.py --config my.toml --work=/shared/runs/my
    python etl/build.py --config configs/demo.toml          # the same as the first

On a cluster the input and the work folder lie on a file system that all machines see under the same path; docs/etl.md
has the rest. Spark's settings are spark-submit's (--conf spark.sql.shuffle.partitions=...); a log of megabytes is done
in half the time with --driver-java-options -XX:TieredStopAtLevel=1.
"""

import hashlib
import time
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from contract import schema
from contract.artifacts import MAX_BYTES_HASHED_ON_OPEN, stage_output
from contract.cli import Progress, parse, run, show_plan
from contract.disk import sha256
from contract.settings import Config
from contract.spark import spark_session
from contract.tracking import track
from etl import account, blocks, content, corpus, hygiene, readers, report, split
from etl import files as input_files
from etl.kcore import k_core
from etl.tasks import check_shared, remove_folder


def main(argv: list[str]) -> None:
    config, dry_run = parse(argv, __doc__)
    if dry_run:
        show_plan(config, readers.input_patterns(config.data), config.work_dir / "corpus", input_files.matches)
        return
    files = readers.input_files(config.data)
    key = hygiene.pseudonym_key(config.etl)
    progress = Progress("etl")
    progress(f"starting Spark to read {', '.join(f'{len(paths)} of {name}' for name, paths in files.items())}")
    with stage_output(config, "corpus") as output, track(config, "etl") as record:
        with spark_session(f"colarec etl {config.name}", "contract", "etl", work=config.work_dir) as spark:
            counts, extra = build(spark, config, files, key, output.path, progress)
        record.metrics(counts)
        for name in ("report.html", "report.json"):
            record.artifact(output.path / name)
        artifact = output.commit(counts, {"raw": digest(files)}, **extra)
    progress(f"wrote {artifact.path}; {artifact.path / 'report.html'} shows what became of the log")


def build(
    spark: SparkSession,
    config: Config,
    files: dict[str, list[Path]],
    key: bytes | None,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, int], dict]:
    """Writes the files of corpus/ into `folder`; returns the manifest's counts and its extra keys."""
    etl, seed = config.etl, config.seed
    stage = folder / "_stage"
    stage.mkdir()
    check_shared(spark, stage)

    # What can be used of the log, and of what the items say
    log = readers.read_events(spark, config, files)
    log = hygiene.mark_bad(log, config.data.time_unit, now_ms=time.time_ns() // 10**6)
    log = hygiene.with_pseudonyms(log, key) if key else log
    hygiene.check_head(log, "log")
    census = staged(hygiene.census(log), stage / "census")
    found = hygiene.profile(census)
    progress(f"log: {found}")
    hygiene.check_bad_share(found, log, "log", etl.max_bad_share)
    types = hygiene.event_types(found, etl.events)
    listed = readers.read_items(spark, config.data, files).persist()
    if readers.item_files(files):
        hygiene.check_head(listed, "catalog")
    found_items = hygiene.catalog_profile(listed)
    progress(f"catalog: {found_items}")
    hygiene.check_bad_share(found_items, listed, "catalog", etl.max_bad_share)
    hygiene.check_damaged_share(found_items, listed, config.data.encoding, etl.max_bad_share)
    texts = corpus.texts(listed)
    if found_items.num_good:
        known = hygiene.known(census, texts, etl.events)
        progress(f"catalog: {known}")
        hygiene.check_known(known, census, texts, etl.max_unknown_share)
    catalog = corpus.number_catalog(hygiene.items(census, etl.events), texts, seed, stage / "catalog")

    # Which events count
    if etl.max_daily_events:
        log, num_bots = hygiene.without_bots(log, etl.max_daily_events)
        progress(f"bots: {num_bots:,} users had more than {etl.max_daily_events:,} events on a day")
    source = blocks.Source(readers.log_files(files), readers.granule_bytes(spark))
    gathered = blocks.gather(log, source, types, etl, seed, stage / "catalog", stage)
    cleaning = account.cleaning_steps(config, found, types, gathered)
    progress(f"events: {account.spoken(cleaning)}")
    rounds = []
    if max(etl.min_user, etl.min_item) > 1:
        for core in k_core(spark, gathered.blocks, etl.min_user, etl.min_item, stage):
            rounds.append(core)
            progress(
                f"k-core round {len(rounds)}: {core.num_users:,} users with {etl.min_user} events or more, "
                f"{core.num_items:,} items with {etl.min_item} or more"
            )

    # Train, valid and test
    out = rounds[-1].out if rounds else []
    bounds = split.bounds(etl, gathered.span[1])
    settled = split.settle(spark, gathered.blocks, out, etl, seed, bounds, stage)
    if not settled:
        if not rounds:
            raise ValueError(
                f"etl.split = {etl.split!r} leaves no user: none has two events of its days; choose another"
            )
        raise ValueError(
            f"no user is left with etl.min_user = {etl.min_user} and etl.min_item = {etl.min_item}; lower them"
        )

    # Items and what they say
    statistics = split.read_statistics(spark, settled, stage)
    if not statistics.where(F.col("num_train") > 0).limit(1).count():
        why = {
            "given": f"data.split_column = {config.data.split_column!r} says train of none; mend the column",
            "random": f"etl.split_shares = {list(etl.split_shares)} give it none; give train more",
        }.get(etl.split, "all are later than its days begin; lower etl.test_days and etl.valid_days")
        raise ValueError(f"etl.split = {etl.split!r} leaves no train event: {why}")
    items, num_items = corpus.dense_items(catalog, statistics, etl.min_item == 0, seed)
    items = staged(content.with_normal_text(items.join(texts, "item_id", "left"), etl.max_text), stage / "items")
    model = content.tokenizer(items, etl, folder / "tokenizer")
    tokenised = content.with_token_ids(items, model, etl.max_item_tokens)
    tokenised = corpus.write_parquet(tokenised, schema.ITEMS, num_items, num_items, folder / "items.parquet")
    progress(f"items: {num_items:,}, {content.vocab_size(model):,} pieces of text")

    # Users, what they did, shards
    shards = corpus.plan_shards(settled, etl.num_shards)
    dated = config.data.time_unit != "order"
    written = corpus.write_shards(spark, shards, stage / "items", etl, seed, dated, stage, folder)
    split.check_clock([shard.spans for shard in written], etl.split)
    if not sum(shard.num_learned_users for shard in written):
        raise ValueError(
            f"no user has two train events, one to be predicted from the other (etl.split = {etl.split!r}): nothing "
            "can be learned; hold out less (etl.split, etl.test_days, etl.valid_days, etl.split_shares), or use a "
            "log with more events of a user"
        )
    progress(f"shards: {len(shards):,} parts of the users, with their valid and test shards")
    pairs = [stage / shard.pairs for shard in written]
    corpus.write_item_users(spark, pairs, num_items, etl.max_users_per_item, folder / "item_users.parquet")

    # What became of the rest
    corpus.keep_quarantine(gathered.quarantine, folder / "quarantine" / "log", stage)
    if found_items.num_bad:
        source = blocks.Source(readers.item_files(files), source.granule)
        corpus.quarantine_catalog(listed, source, folder / "quarantine" / "catalog", stage)
    counts = account.corpus_counts(found, found_items, cleaning, written, items)
    counts["vocab_size"] = content.vocab_size(model)
    progress(f"corpus: {account.spoken_counts(counts)}")
    steps = account.all_steps(cleaning, rounds, counts)
    quarantine = account.quarantine({"log": found, "catalog": found_items}, folder / "quarantine")
    summary = account.report(config, steps, rounds, quarantine, types, written, counts)
    summary["events_per_item"] = account.log_bins(items, F.col("num"))
    summary["content"]["tokens_per_item"] = account.log_bins(tokenised, F.size("token_ids"))
    report.write_report(summary, folder)
    remove_folder(stage)
    extra = {"events": types, "event_weights": account.event_weights(config, types, written)}
    return counts, extra | {"shards": account.shard_list(written), "time_unit": config.data.time_unit}


def staged(table: DataFrame, folder: Path) -> DataFrame:
    """The table, computed once and read back from files, which outlive the executor that computed them."""
    table.write.parquet(str(folder))
    return table.sparkSession.read.parquet(str(folder))


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
