"""Time and memory of etl/build.py against the same job in polars and DuckDB, on a made-up log.

    python bench/etl.py generate /data/log20m --events 20000000
    python bench/etl.py run /data/log20m --engine spark,polars,duckdb --memory 8g --cores 2

The log has the shape of OTTO's (RecSys 2022): at 200M events 12.9M users, 1.86M items and three event types in 30
days, in proportion at other sizes. A user's number of events is heavy-tailed (mean 15.5, median 6, the largest 700)
but for a few hot users, one with 1% of all events; items are Zipf's. Some rows repeat others exactly, and 0.1% are bad.

The job: drop bad rows and exact duplicates, at most the latest 1000 rows of a user, of these the first on an item,
the 5-core of users and items, leave-one-out; number users and items in the order of a hash, and write items, users,
interactions and histories. etl/build.py does more in its time: it looks for leaks, counts what each step removes,
trains a tokenizer and encodes the texts, samples users per item, writes WebDataset shards, hashes all files, and
records the run in MLflow. bench/etl_peers.py does the job and nothing else.

Each engine has a process tree of its own. CPU seconds are user and system time of the tree. Peak memory is resident
anonymous memory of the tree, looked at every 0.2 s: no file cache, as that can be dropped at any time. An engine
whose tree exceeds 1.25 x --memory is killed, as in a container, and did not finish. Spark's
heap is three quarters of --memory, as its Python workers need some; DuckDB's memory_limit is all of it; polars has no
such setting. Results go to FOLDER/results.json as well, and from there, for the repository:

    python bench/etl.py publish /data/log1m /data/log20m       # the last of each engine -> bench/results/etl.json, .md
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from contract.artifacts import git_revision

ROOT = Path(__file__).resolve().parent.parent

# The log
ROWS_PER_FILE, MIN_FILES = 4_000_000, 8
USERS_PER_EVENT, ITEMS_PER_EVENT = 12.9e6 / 200e6, 1.86e6 / 200e6
# Shifts of the Zipf laws, see `zipf`: of the users in proportion, so that a user's events are as many at any size; of
# the items and words fixed, so that the share of the most frequent one is (0.1% of the events at 200M, 0.2% at 1M).
USER_SHIFT_SHARE, ITEM_SHIFT, WORD_SHIFT = 1 / 250, 93, 10
HOT_SHARES, MAX_HOT_EVENTS = (0.01, 0.002, 0.0005), 2_000_000
START_MS, SPAN_MS, MAX_DELAY_MS = 1_704_067_200_000, 30 * 86_400_000, 120_000
# A repeat is of a row at most so many rows before; carts and orders are among them.
REPEAT_SHARE, REPEAT_WITHIN, DUPLICATE_SHARE, BAD_SHARE = 0.3, 10_000, 0.005, 0.001
EVENTS, EVENT_SHARES_OF_REPEATS = ("clicks", "carts", "orders"), (0.66, 0.26, 0.08)
NUM_WORDS, MIN_TITLE_WORDS, MAX_TITLE_WORDS = 20_000, 3, 8
SYLLABLES = ("ve", "lo", "ra", "kan", "ti", "so", "mer", "du", "nix", "po", "lar", "be", "qui", "zen", "fa", "ro")

CONFIG = """\
[data]
format = "parquet"
path = "{folder}"
interactions = ["log-*.parquet"]
items = ["items.parquet"]
items_format = "parquet"
time_unit = "ms"
event_column = "event"
text_columns = ["title"]

[etl]
events = ["clicks", "carts", "orders"]
repeats = "first"
min_user = 5
min_item = 5
max_user_events = 1000
split = "leave_one_out"
"""

SAMPLE_SECONDS = 0.2
MEMORY_SLACK = 1.25
PACKAGES = {"spark": "pyspark", "polars": "polars", "duckdb": "duckdb"}
ENGINES = tuple(PACKAGES)
COUNTS = ("num_users", "num_items", "num_events")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="write the log, the items and a config for etl/build.py")
    make.add_argument("folder", type=Path)
    make.add_argument("--events", type=int, default=1_000_000, help="rows of the log (default: %(default)s)")
    make.add_argument("--seed", type=int, default=1)
    measure = commands.add_parser("run", help="run the engines on the log, one after the other")
    measure.add_argument("folder", type=Path)
    measure.add_argument("--engine", default=",".join(ENGINES), help="some of %(default)s")
    measure.add_argument("--memory", type=memory_size, default="8g", help="such as 512m or 8g (default: %(default)s)")
    measure.add_argument("--cores", type=int, default=2)
    show = commands.add_parser("publish", help="write bench/results/etl.json and etl.md")
    show.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "generate":
        generate(args.folder, args.events, args.seed)
    elif args.command == "publish":
        publish(args.folders, ROOT / "bench" / "results")
    elif unknown := set(args.engine.split(",")) - set(ENGINES):
        parser.error(f"--engine {','.join(unknown)}: must be among {', '.join(ENGINES)}")
    else:
        run(args.folder, args.engine.split(","), args.memory, args.cores)


# --- the log ---


def generate(folder: Path, num_events: int, seed: int) -> None:
    """Writes log-*.parquet (user_id string, item_id string, timestamp int64 ms, event string), items.parquet
    (item_id, title string) and config.toml. The same bytes for the same seed; memory for one file at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("log-*.parquet"):
        old.unlink()
    start, num_files = time.monotonic(), max(MIN_FILES, -(-num_events // ROWS_PER_FILE))
    bounds = np.linspace(0, num_events, num_files + 1).astype(np.int64)
    for number, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
        rng = np.random.default_rng([seed, number])
        pq.write_table(log_table(rng, low, high, num_events), folder / f"log-{number:05d}.parquet")
    rng = np.random.default_rng([seed, num_files])
    pq.write_table(items_table(rng, number_of_items(num_events)), folder / "items.parquet")
    (folder / "config.toml").write_text(CONFIG.format(folder=folder.resolve()))
    print(f"wrote {num_events:,} events in {num_files} files to {folder} in {time.monotonic() - start:.0f} s")


def number_of_items(num_events: int) -> int:
    return max(1, round(num_events * ITEMS_PER_EVENT))


def log_table(rng: np.random.Generator, low: int, high: int, num_events: int) -> pa.Table:
    """Rows low..high of a log of num_events, roughly in time order."""
    num_rows = high - low
    user = draw_users(rng, num_rows, num_events)
    item = zipf(rng, num_rows, number_of_items(num_events), ITEM_SHIFT)
    event = np.zeros(num_rows, np.int8)
    ts = START_MS + (np.arange(low, high) * (SPAN_MS / num_events)).astype(np.int64)
    ts += rng.integers(MAX_DELAY_MS, size=num_rows)

    rows, models = copies(rng, num_rows, REPEAT_SHARE)
    user[rows], item[rows] = user[models], item[models]
    event[rows] = rng.choice(len(EVENTS), len(rows), p=EVENT_SHARES_OF_REPEATS)
    rows, models = copies(rng, num_rows, DUPLICATE_SHARE)
    for column in (user, item, event, ts):
        column[rows] = column[models]

    bad = np.where(rng.random(num_rows) < BAD_SHARE, rng.integers(3, size=num_rows), -1)
    ts = np.where(bad == 2, ts // 1000, ts)  # seconds taken for ms: January 1970
    columns = {"user_id": id_texts("u", user, bad == 0), "item_id": id_texts("i", item, bad == 1)}
    types = pa.DictionaryArray.from_arrays(pa.array(event), pa.array(EVENTS)).cast(pa.string())
    return pa.table({**columns, "timestamp": ts, "event": types})


def draw_users(rng: np.random.Generator, num_rows: int, num_events: int) -> np.ndarray:
    """Numbers of users, int64; those of the hot ones are beyond the others."""
    num_users = max(1, round(num_events * USERS_PER_EVENT))
    user = zipf(rng, num_rows, num_users, num_users * USER_SHIFT_SHARE)
    hot_until = np.cumsum([min(share, MAX_HOT_EVENTS / num_events) for share in HOT_SHARES])
    hot = np.searchsorted(hot_until, rng.random(num_rows), side="right")
    return np.where(hot < len(HOT_SHARES), num_users + hot, user)


def zipf(rng: np.random.Generator, num_draws: int, num: int, shift: float) -> np.ndarray:
    """Draws from 0..num - 1, int64, with P(r) ~ 1 / (r + shift), about: the law of Zipf and Mandelbrot."""
    draws = np.expm1(rng.random(num_draws) * np.log1p(num / shift)) * shift
    return np.minimum(draws.astype(np.int64), num - 1)


def copies(rng: np.random.Generator, num_rows: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows, models): a share of the rows, and for each a row before it that it takes after."""
    rows = np.flatnonzero(rng.random(num_rows) < share)
    models = rows - rng.integers(1, REPEAT_WITHIN, len(rows))
    return rows[models >= 0], models[models >= 0]


def id_texts(prefix: str, numbers: np.ndarray, null: np.ndarray) -> pa.Array:
    """Ids in no order, of 11 characters at most: a multiplication modulo a prime scatters the numbers."""
    scattered = pa.array((numbers + 1) * 48_271 % 2_147_483_647, mask=null)
    return pc.binary_join_element_wise(prefix, scattered.cast(pa.string()), "")


def items_table(rng: np.random.Generator, num_items: int) -> pa.Table:
    """item_id and a title of made-up words, frequent and rare."""
    words = pa.array(["".join(word) for word in rng.choice(SYLLABLES, (NUM_WORDS, 3))])
    lengths = rng.integers(MIN_TITLE_WORDS, MAX_TITLE_WORDS + 1, num_items)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    drawn = words.take(pa.array(zipf(rng, int(offsets[-1]), NUM_WORDS, WORD_SHIFT)))
    titles = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), drawn), " ")
    numbers = rng.permutation(num_items)
    return pa.table({"item_id": id_texts("i", numbers, np.zeros(num_items, bool)), "title": titles})


# --- the measurement ---


@dataclass
class Usage:
    """What a process tree took."""

    seconds: float
    cpu_seconds: float  # user and system time of all its processes
    peak_bytes: int  # resident anonymous memory of all its processes at one time
    outcome: str  # "finished", "exit status N" or "more than N GiB"


def run(folder: Path, engines: list[str], memory: str, cores: int) -> None:
    """Runs the engines one after the other, prints a table and appends the results to FOLDER/results.json."""
    if not (folder / "config.toml").is_file():
        sys.exit(f"error: {folder} holds no log; run first: python bench/etl.py generate {folder}")
    folder = folder.resolve()
    num_rows = sum(pq.read_metadata(file).num_rows for file in folder.glob("log-*.parquet"))
    limit = int(MEMORY_SLACK * bytes_of(memory))
    results = []
    for engine in engines:
        out = folder / "out" / engine
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        load = os.getloadavg()[0]
        usage = measure(command(engine, folder, out, memory, cores), environment(cores), limit, out / "log.txt")
        counts = read_counts(engine, out) if usage.outcome == "finished" else {}
        result = {"engine": engine, "version": importlib.metadata.version(PACKAGES[engine]), "num_rows": num_rows}
        result |= {"cores": cores, "memory": memory, "load_before": load, **vars(usage), **counts}
        result |= {"date": time.strftime("%Y-%m-%d"), "revision": git_revision()}
        results.append(result)
        print(f"{engine}: {usage.outcome}, {usage.seconds:.1f} s; its output is in {out / 'log.txt'}", flush=True)
    append(folder / "results.json", results)
    print(f"\n{num_rows:,} rows, {cores} cores, {memory}; x: times that of the faster peer\n{table(results)}")
    if len({tuple(result[name] for name in COUNTS) for result in results if COUNTS[0] in result}) > 1:
        print("warning: the engines differ in what is left, so they did not do the same job", file=sys.stderr)


def publish(folders: list[Path], results_folder: Path) -> None:
    """Writes etl.json and etl.md: of every folder the last result of each engine, small logs first."""
    results = []
    for folder in folders:
        file = folder / "results.json"
        if not file.is_file():
            sys.exit(f"error: {file} is not there; run first: python bench/etl.py run {folder}")
        results += {result["engine"]: result for result in json.loads(file.read_text())}.values()
    results.sort(key=lambda result: (result["num_rows"], list(PACKAGES).index(result["engine"])))
    sections = []
    for num_rows, group in itertools.groupby(results, key=lambda result: result["num_rows"]):
        group = list(group)
        spark = next((result for result in group if result["engine"] == "spark"), group[0])
        setting = f"{spark['cores']} cores, {spark['memory']}; {spark['date']}, revision {spark['revision'][:9]}"
        sections.append(f"## {num_rows:,} rows\n\n{setting}\n\n{table(group)}\n")
    (results_folder / "etl.json").write_text(json.dumps(results, indent=1) + "\n")
    head = "# etl/build.py beside polars and DuckDB\n\n`bench/etl.py` says how. x: times the faster peer.\n\n"
    (results_folder / "etl.md").write_text(head + "\n".join(sections))


def command(engine: str, folder: Path, out: Path, memory: str, cores: int) -> list[str]:
    bin_folder = Path(sys.executable).parent
    if engine != "spark":
        words = [sys.executable, ROOT / "bench" / "etl_peers.py", engine, folder, out / "work"]
        return [*map(str, words), f"--cores={cores}", f"--memory={memory}"]
    heap = f"{(bytes_of(memory) * 3 // 4) >> 20}m"
    return [
        str(bin_folder / "spark-submit"),
        *(
            "--master",
            f"local[{cores}]",
            "--driver-memory",
            heap,
            "--conf",
            f"spark.local.dir={out / 'spill'}",
        ),
        *(str(ROOT / "etl" / "build.py"), "--config", str(folder / "config.toml")),
        *(f"--work={out / 'work'}", f"--tracking.uri=sqlite:///{out / 'mlflow.db'}"),
    ]


def environment(cores: int) -> dict[str, str]:
    threads = {"POLARS_MAX_THREADS": str(cores), "OMP_NUM_THREADS": str(cores)}
    return {**os.environ, **threads, "PYTHONPATH": str(ROOT)}


def measure(words: list[str], env: dict[str, str], limit: int, log: Path) -> Usage:
    """Runs a command, its output going to `log`; kills its process tree when it exceeds `limit` bytes of memory."""
    start, reaped, peak, cpu, killed = time.monotonic(), reaped_seconds(), 0, {}, False
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            while process.poll() is None:
                tree = process_tree(process.pid)
                for pid in tree:
                    cpu[pid] = max(cpu.get(pid, 0), cpu_seconds(pid))
                peak = max(peak, sum(resident_bytes(pid) for pid in tree))
                if peak > limit and not killed:
                    killed = True
                    kill(tree)
                time.sleep(SAMPLE_SECONDS)
        finally:
            if process.returncode is None:  # interrupted
                kill(process_tree(process.pid))
    outcome = f"exit status {process.returncode}" if process.returncode else "finished"
    outcome = f"more than {limit / 2**30:.1f} GiB" if killed else outcome
    seconds = time.monotonic() - start
    # The samples miss what a process did after the last one, the kernel's sum the processes that nobody waited for.
    return Usage(seconds, max(sum(cpu.values()), reaped_seconds() - reaped), peak, outcome)


def reaped_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def process_tree(root: int) -> list[int]:
    """The process and its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := stat_fields(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    tree, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        tree.append(pid)
        waiting += children.get(pid, [])
    return tree


def stat_fields(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on, proc(5); empty if the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def cpu_seconds(pid: int) -> float:
    """User and system time so far; 0 if the process is gone."""
    ticks = sum(map(int, stat_fields(pid)[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Anonymous and shared memory that is resident, without mapped files; 0 if the process is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return 0


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read_counts(engine: str, out: Path) -> dict[str, int]:
    if engine != "spark":
        return json.loads((out / "work" / "counts.json").read_text())
    counts = json.loads((out / "work" / "corpus" / "manifest.json").read_text())["counts"]
    num_events = sum(counts[f"num_{split}"] for split in ("train", "valid", "test"))
    return {"num_users": counts["num_users"], "num_items": counts["num_items"], "num_events": num_events}


def memory_size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[mg]", text):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 512m or 8g")
    return text


def bytes_of(memory: str) -> int:
    return int(memory[:-1]) * {"m": 2**20, "g": 2**30}[memory[-1]]


def append(file: Path, results: list[dict]) -> None:
    before = json.loads(file.read_text()) if file.is_file() else []
    file.write_text(json.dumps(before + results, indent=1) + "\n")


def table(results: list[dict]) -> str:
    """Markdown; x: times that of the peer that finished first."""
    peers = [r for r in results if r["engine"] != "spark" and r["outcome"] == "finished"]
    best = min(peers, key=lambda r: r["seconds"], default=None)
    lines = [
        "| engine | s | x | CPU-s | x | peak GiB | x | users | items | events | load before |",
        "|---|" + 10 * "---:|",
    ]
    for result in results:
        cells = [f"{result['engine']} {result['version']}"]
        for name, unit in (("seconds", 1), ("cpu_seconds", 1), ("peak_bytes", 2**30)):
            cells.append(f"{result[name] / unit:.1f}")
            cells.append(f"{result[name] / best[name]:.1f}" if best else "")
        if result["outcome"] != "finished":
            cells = [cells[0], f"did not finish: {result['outcome']}", *8 * [""]]
        else:
            cells += [f"{result[name]:,}" for name in COUNTS]
        lines.append("| " + " | ".join([*cells, f"{result['load_before']:.1f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
