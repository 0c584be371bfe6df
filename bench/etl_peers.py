"""The job of bench/etl.py in polars and in DuckDB, as one would write it for a single machine.

    POLARS_MAX_THREADS=2 python bench/etl_peers.py polars FOLDER OUT
    python bench/etl_peers.py duckdb FOLDER OUT --cores 2 --memory 8g

Reads log-*.parquet and items.parquet of FOLDER and writes items, users, interactions and histories to OUT as Parquet,
with counts.json: num_users, num_items, num_events. The two agree in them with each other and with etl/build.py.

Of a user the latest 1000 good rows count, and of these the first on each item; exact duplicates go with the repeats.
`place` sorts events by time and, within a millisecond, by the input order, and holds the type as well. Raw ids become
codes early, so that the k-core joins integers: codes in the order of a hash stay in that order when some of them are
left out.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import duckdb
import polars as pl
from polars import col

EVENTS = ("clicks", "carts", "orders")
MIN_USER = MIN_ITEM = 5
MAX_USER_EVENTS = 1000
MIN_EVENTS = 3  # leave-one-out takes two; users with fewer are train only
TRAIN, VALID, TEST = 0, 1, 2
FIRST_MS = 788_918_400_000  # 1995-01-01
MS_PER_DAY = 86_400_000
# place = timestamp << 64 | number of the row << 8 | type
TIME_SHIFT, ROW_SHIFT = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("polars", "duckdb"))
    parser.add_argument("folder", type=Path, help="where bench/etl.py generate wrote the log")
    parser.add_argument("out", type=Path, help="where to write; replaced")
    parser.add_argument("--cores", type=int, default=2, help="of DuckDB; polars reads POLARS_MAX_THREADS")
    parser.add_argument("--memory", default="8g", help="DuckDB spills to disk beyond; polars has no such setting")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    if args.engine == "polars":
        counts = with_polars(args.folder, args.out)
    else:
        counts = with_duckdb(args.folder, args.out, args.cores, args.memory)
    (args.out / "counts.json").write_text(json.dumps(counts))


def latest_ms() -> int:
    """What is later is bad. A day of grace, as clocks run ahead."""
    return time.time_ns() // 10**6 + MS_PER_DAY


# --- polars ---


def with_polars(folder: Path, out: Path) -> dict[str, int]:
    """Streams the log up to the first aggregation, which leaves a row per user and item; the rest is in memory."""
    events = first_events(folder).collect(engine="streaming")
    codes = {}
    for key in ("user", "item"):
        codes[key] = events.select(col(f"{key}_id").unique()).sort(col(f"{key}_id").hash(seed=1)).with_row_index(key)
        events = events.join(codes[key], on=f"{key}_id").drop(f"{key}_id")
    events = k_core(events)
    for key in ("user", "item"):
        left = codes[key].join(events.select(col(key).unique()), on=key, how="semi").sort(key)
        codes[key] = left.with_row_index(f"{key}_idx", offset=1)
        events = events.join(codes[key].select(key, f"{key}_idx"), on=key).drop(key)
    titles = pl.read_parquet(folder / "items.parquet")
    codes["item"].drop("item").join(titles, on="item_id", how="left").write_parquet(out / "items.parquet")
    codes["user"].drop("user").write_parquet(out / "users.parquet")

    ts = (col("place") // (1 << TIME_SHIFT)).cast(pl.Int64).alias("ts")
    event = (col("place") % (1 << ROW_SHIFT)).cast(pl.Int8).alias("event")
    events = with_split(events.sort("user_idx", "place").select("user_idx", "item_idx", ts, event))
    events.write_parquet(out / "interactions.parquet")
    events.group_by("user_idx", maintain_order=True).agg(pl.all()).write_parquet(out / "histories.parquet")
    return {"num_users": codes["user"].height, "num_items": codes["item"].height, "num_events": events.height}


def first_events(folder: Path) -> pl.LazyFrame:
    """user_id, item_id, place: of the good rows that count one per user and item."""
    log = pl.scan_parquet(folder / "log-*.parquet", row_index_name="row")
    good = (col("user_id") != "") & (col("item_id") != "")  # neither is true of a null
    good &= col("timestamp").is_between(FIRST_MS, latest_ms()) & col("event").is_in(EVENTS)
    type_ = pl.coalesce(pl.when(col("event") == name).then(n) for n, name in enumerate(EVENTS, start=1))
    place = (col("timestamp").cast(pl.Int128) * (1 << TIME_SHIFT)) + (col("row").cast(pl.Int128) * (1 << ROW_SHIFT))
    rows = log.filter(good).select("user_id", "item_id", (place + type_.cast(pl.Int128)).alias("place"))
    return with_latest(rows).group_by("user_id", "item_id").agg(col("place").min())


def with_latest(rows: pl.LazyFrame) -> pl.LazyFrame:
    """At most the latest rows of a user; only the few users with more than that are sorted."""
    num = rows.group_by("user_id").len().collect(engine="streaming")
    hot = num.filter(col("len") > MAX_USER_EVENTS).select("user_id").lazy()
    age = col("place").rank("ordinal", descending=True).over("user_id")
    of_hot = rows.join(hot, on="user_id", how="semi").filter(age <= MAX_USER_EVENTS)
    return pl.concat([rows.join(hot, on="user_id", how="anti"), of_hot])


def k_core(events: pl.DataFrame) -> pl.DataFrame:
    height = -1
    while events.height != height:
        height = events.height
        for key, least in (("item", MIN_ITEM), ("user", MIN_USER)):
            enough = events.group_by(key).len().filter(col("len") >= least)
            events = events.join(enough, on=key, how="semi")
    return events


def with_split(events: pl.DataFrame) -> pl.DataFrame:
    """Adds split to events sorted by user and time."""
    num_later = pl.len() - pl.int_range(1, pl.len() + 1)
    split = pl.when((pl.len() < MIN_EVENTS) | (num_later > 1)).then(TRAIN).when(num_later == 1).then(VALID)
    return events.with_columns(split.otherwise(TEST).cast(pl.Int8).over("user_idx").alias("split"))


# --- DuckDB ---


def with_duckdb(folder: Path, out: Path, cores: int, memory: str) -> dict[str, int]:
    """A table per step in a database on disk, so that all of it may spill. `memory`: such as 8g."""
    stage = out / "stage.duckdb"
    config = {"threads": cores, "memory_limit": f"{memory}b", "temp_directory": str(out / "spill")}
    with duckdb.connect(str(stage), config=config) as database:
        database.execute("SET preserve_insertion_order = false")
        create_pairs(database, folder)
        create_events(database)
        create_k_core(database)
        create_interactions(database)
        copy_outputs(database, folder, out)
        counts = {
            "num_users": count(database, "dense_users"),
            "num_items": count(database, "dense_items"),
            "num_events": count(database, "events"),
        }
    stage.unlink()
    return counts


def count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def create_pairs(database: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """pairs: of the good rows that count one per user and item; users and items: their codes."""
    row = f"((file_index::HUGEINT << 40) + file_row_number) << {ROW_SHIFT}"
    database.execute(f"""
        CREATE VIEW log AS
        SELECT user_id, item_id,
            (timestamp::HUGEINT << {TIME_SHIFT}) + ({row}) + list_position({list(EVENTS)}, event) AS place
        FROM read_parquet('{folder}/log-*.parquet')
        WHERE user_id <> '' AND item_id <> '' AND event IN {EVENTS} AND timestamp BETWEEN {FIRST_MS} AND {latest_ms()}
    """)
    database.execute(f"""
        CREATE TABLE hot AS SELECT user_id FROM log GROUP BY user_id HAVING count(*) > {MAX_USER_EVENTS}
    """)
    database.execute(f"""
        CREATE TABLE pairs AS
        WITH latest AS (
            SELECT * FROM log ANTI JOIN hot USING (user_id)
            UNION ALL
            SELECT * FROM log SEMI JOIN hot USING (user_id)
            QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY place DESC) <= {MAX_USER_EVENTS}
        )
        SELECT user_id, item_id, min(place) AS place FROM latest GROUP BY user_id, item_id
    """)
    for key in ("user", "item"):
        database.execute(f"""
            CREATE TABLE {key}s AS
            SELECT {key}_id, row_number() OVER (ORDER BY hash({key}_id), {key}_id)::INTEGER AS {key}_code
            FROM (SELECT DISTINCT {key}_id FROM pairs)
        """)


def create_events(database: duckdb.DuckDBPyConnection) -> None:
    """events: the pairs with codes."""
    database.execute("""
        CREATE TABLE events AS
        SELECT user_code, item_code, place FROM pairs JOIN users USING (user_id) JOIN items USING (item_id)
    """)
    database.execute("DROP TABLE pairs")


def create_k_core(database: duckdb.DuckDBPyConnection) -> None:
    """events: their k-core; dense_users and dense_items: what is left of users and items, with dense ids."""
    num_before, num_events = -1, count(database, "events")
    while num_events != num_before:
        for key, least in (("item", MIN_ITEM), ("user", MIN_USER)):
            database.execute(f"""
                CREATE OR REPLACE TABLE events AS
                SELECT * FROM events
                SEMI JOIN (SELECT {key}_code FROM events GROUP BY {key}_code HAVING count(*) >= {least})
                USING ({key}_code)
            """)
        num_before, num_events = num_events, count(database, "events")
    for key in ("user", "item"):
        database.execute(f"""
            CREATE TABLE dense_{key}s AS
            SELECT {key}_code, {key}_id, row_number() OVER (ORDER BY {key}_code)::INTEGER AS {key}_idx
            FROM {key}s SEMI JOIN events USING ({key}_code)
        """)


def create_interactions(database: duckdb.DuckDBPyConnection) -> None:
    """interactions: user_idx, item_idx, ts, event, split, place."""
    database.execute(f"""
        CREATE TABLE interactions AS
        SELECT user_idx, item_idx, (place >> {TIME_SHIFT})::BIGINT AS ts, place,
            (place & {(1 << ROW_SHIFT) - 1})::TINYINT AS event,
            count(*) OVER history AS num, num - row_number() OVER (history ORDER BY place) AS num_later,
            CASE WHEN num < {MIN_EVENTS} OR num_later > 1 THEN {TRAIN} WHEN num_later = 1 THEN {VALID} ELSE {TEST} END
                ::TINYINT AS split
        FROM events JOIN dense_users USING (user_code) JOIN dense_items USING (item_code)
        WINDOW history AS (PARTITION BY user_idx)
    """)


def copy_outputs(database: duckdb.DuckDBPyConnection, folder: Path, out: Path) -> None:
    titles = f"read_parquet('{folder}/items.parquet')"
    event = "{item_idx: item_idx, ts: ts, event: event, split: split}"
    outputs = {
        "items": f"""SELECT item_idx, item_id, title
            FROM dense_items LEFT JOIN {titles} USING (item_id) ORDER BY item_idx""",
        "users": "SELECT user_idx, user_id FROM dense_users ORDER BY user_idx",
        "interactions": "SELECT user_idx, item_idx, ts, event, split FROM interactions ORDER BY user_idx, place",
        "histories": f"""SELECT user_idx, list({event} ORDER BY place) AS events
            FROM interactions GROUP BY user_idx ORDER BY user_idx""",
    }
    for name, query in outputs.items():
        database.execute(f"COPY ({query}) TO '{out}/{name}.parquet' (FORMAT parquet)")


if __name__ == "__main__":
    main()
