"""What each stage takes, from the size of the log and the config: CPU seconds, FLOPs and bytes.

Rates come from bench/results/*.json, read when they are needed, or stand below with the page that they were measured
for. They are of one CPU core of the machine of those benches. tests/cluster/test_cost.py compares what comes out with
measured points that nothing here was fitted to. Symbols: R rows of the log, E train events, U users, I items, d =
cf.dim, D = model.d_model, K^l = codes and levels of a GID.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from contract import config as config_module
from contract.config import Cf, Config
from gid.hierarchy import gid_length
from gid.lightgcn import memory_need
from trainer.flops import decoder_flops, encoder_flops, step_flops
from trainer.model import ColaRec, ColaRecConfig

RESULTS = Path(__file__).parents[1] / "bench" / "results"

# docs/etl.md, "Memory and disk": 9M rows, of which 6.1M are left. Bytes.
HEAP_PER_CORE = PYTHON_PER_CORE = 10**9
SHUFFLE_PER_ROW = 42
WORK_PER_EVENT, CORPUS_PER_EVENT = 67 * 9 / 6.1, 39 * 9 / 6.1  # work folder at its peak; what of it stays
PYTHON_PER_ITEM = 40  # of each core's worker (computed there)
# docs/etl.md, "Which settings": 107 parts of 256 MiB at 200M rows; Parquet of 18 bytes a row.
PLAIN_PER_ROW, PARQUET_PER_ROW = 107 * 2**28 / 200e6, 18
SPARK_SPLIT = 128 << 20  # spark.sql.files.maxPartitionBytes, its default
ALS_FLOPS_PER_CORE = 1e9  # ASSUMED: nobody measured Spark's ALS here
SEARCH_FLOPS_PER_CORE = 20e9  # ASSUMED: of exact search in FAISS, float32
INTERPRETER = 0.45e9  # bytes of a process with torch, transformers and deepspeed imported
TREE_START, TREE_MEMORY = 3.0, 0.24e9  # CPU seconds and bytes of the interpreters, see `tree_cpu_seconds`


@dataclass(frozen=True)
class Scale:
    """How much there is."""

    rows: float  # of the log
    users: float  # that are left
    items: float
    kept: float  # share of the rows that are left
    tokens: float  # content tokens of an item

    @property
    def events(self) -> float:
        return self.rows * self.kept


def measured(name: str):
    """The content of bench/results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def train_events(config: Config, scale: Scale) -> float:
    """E: what the split leaves to training; all of them are targets."""
    if config.etl.split == "leave_one_out":
        return max(scale.events - 2 * scale.users, 0.1 * scale.events)
    if config.etl.split in ("random", "given"):
        return scale.events * config.etl.split_shares[0]
    return scale.events  # the last days are a small part


# ETL


@functools.cache
def _spark() -> dict[int, dict]:
    return {row["num_rows"]: row for row in measured("etl") if row["engine"] == "spark"}


def etl_kept() -> float:
    """The share of the bench's log that the hygiene and the 5-core leave."""
    largest = max(_spark().values(), key=lambda row: row["num_rows"])
    return largest["num_events"] / largest["num_rows"]


def etl_cpu_seconds(rows: float) -> float:
    """A line through the runs of 1M and 20M rows."""
    few, many = (_spark()[n] for n in (1_000_000, 20_000_000))
    slope = (many["cpu_seconds"] - few["cpu_seconds"]) / (many["num_rows"] - few["num_rows"])
    return few["cpu_seconds"] + slope * (rows - few["num_rows"])


def etl_seconds(rows: float, cores: int) -> float:
    """Starting, which more cores do not shorten, and the rest at the share of the cores that the 20M run used."""
    few, many = (_spark()[n] for n in (1_000_000, 20_000_000))
    work = etl_cpu_seconds(rows) - etl_cpu_seconds(0)
    start = few["seconds"] - (etl_cpu_seconds(few["num_rows"]) - etl_cpu_seconds(0)) / few["cores"]
    used = (etl_cpu_seconds(many["num_rows"]) - etl_cpu_seconds(0)) / (many["seconds"] - start) / many["cores"]
    return start + work / (cores * min(1.0, used))


def etl_parts(rows: float) -> int:
    """Parts of the one shuffle."""
    return max(1, round(rows * PLAIN_PER_ROW / 2**28))


# GIDs


def gid_levels(config: Config, scale: Scale) -> int:
    return config.gid.length or gid_length(int(scale.items), config.gid.branching, config.gid.slack)


def lightgcn_step_seconds(num_nodes: float, events: float, cf: Cf) -> float:
    """CPU seconds of a step: 2 L products with the 2 E entries of A, and Adam and the sums over N rows.

    Two constants, from two graphs of bench/results/scale.json that no cache holds; small ones take a third of that.
    """
    rows = {r["users"]: r for r in measured("scale") if r["what"] == "lightgcn step" and r["users"] > 20_000}
    sparse, dense = rows[200_000], rows[100_000]
    (a, b), (c, d) = [
        (r["events"] * r["dim"] * r["layers"], (r["users"] + r["items"]) * r["dim"]) for r in (sparse, dense)
    ]
    per_entry = (sparse["cpu_seconds"] * d - dense["cpu_seconds"] * b) / (a * d - b * c)
    per_value = (sparse["cpu_seconds"] - per_entry * a) / b
    return per_entry * events * cf.dim * cf.num_layers + per_value * num_nodes * cf.dim


def lightgcn_cpu_seconds(num_nodes: float, events: float, cf: Cf, epochs: int) -> float:
    return epochs * math.ceil(events / cf.batch) * lightgcn_step_seconds(num_nodes, events, cf)


def lightgcn_bytes(num_nodes: float, events: float, cf: Cf) -> float:
    return memory_need(int(num_nodes), int(events), cf)


def als_flops(users: float, items: float, events: float, cf: Cf) -> float:
    """Each interaction adds d^2 to a normal equation of its user and of its item; each of these takes d^3 / 3."""
    return cf.als_iterations * (4 * events * cf.dim**2 + (users + items) * (cf.dim**2 + cf.dim**3 / 3))


def als_driver_bytes(users: float, items: float, cf: Cf) -> float:
    """docs/gid.md: the process that starts it holds the result twice."""
    return 2 * 4 * (users + items) * cf.dim


@functools.cache
def _trees() -> dict[int, dict]:
    return {row["items"]: row for row in measured("gid")["trees"]}


def tree_cpu_seconds(items: float, dim: int) -> float:
    """Linear from the tree of 10M x 64, which is 30% full as trees usually are; emptier ones take half of that."""
    row = _trees()[10_000_000]
    return TREE_START + (row["cpu_seconds"] - TREE_START) * items / row["items"] * dim / 64


def tree_seconds(items: float, dim: int, cores: int) -> float:
    """The root is split in one process, and takes the share of the whole that it had at 1M items."""
    splits = measured("gid")["splits"]
    root = next(r for r in splits if r["items"] == 1_000_000 and r["method"] == "ours" and r["kind"] == "tight")
    serial = sum(root["seconds"]) / len(root["seconds"]) / _trees()[1_000_000]["cpu_seconds"]
    return tree_cpu_seconds(items, dim) * (serial + (1 - serial) / cores)


def tree_bytes(items: float, dim: int) -> float:
    """The embeddings, and what the run of 10M items held beside them for each item."""
    row = _trees()[10_000_000]
    beside = (row["peak_gb"] * 2**30 - TREE_MEMORY) / row["items"] - 4 * 64
    return TREE_MEMORY + items * (4 * dim + beside)


# The model


def model_config(config: Config, scale: Scale, tables: bool = False) -> ColaRecConfig:
    """The model's shape; without `tables` as if there were no items and users."""
    m = config.model
    return ColaRecConfig(
        num_tokens=config.etl.vocab_size + 2,
        num_items=int(scale.items) if tables else 1,
        num_users=int(scale.users) if tables and config.history.user_slots else 0,
        gid_length=gid_levels(config, scale),
        branching=config.gid.branching,
        **{name: getattr(m, name) for name in ("d_model", "d_ff", "d_kv", "num_heads", "tie_codebooks")},
        num_encoder_layers=m.num_encoder_layers,
        num_decoder_layers=m.num_decoder_layers,
        loss_weights=vars(config.loss),
    )


def num_layer_weights(config: Config, scale: Scale) -> int:
    """Weights of all but the item and user tables, counted on the model itself."""
    with torch.device("meta"):
        model = ColaRec(model_config(config, scale))
    tables = {id(p) for table in (model.item, model.user) for p in table.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def table_rows(config: Config, scale: Scale) -> dict[str, float]:
    """Rows of the item and the user table."""
    ids = {"item": scale.items, "user": scale.users if config.history.user_slots else 0}
    kind = {"item": config.model.item_table, "user": config.model.user_table}
    return {name: config.model.hash_rows if n and kind[name] == "hash" else n for name, n in ids.items()}


def lengths(config: Config, scale: Scale, eval_items: bool = False) -> tuple[float, float]:
    """Mean encoder positions of X_u and X_i, as if all users had equally many events."""
    history, per_user = config.history, train_events(config, scale) / scale.users
    most = history.eval_items if eval_items else history.train_items
    if eval_items:
        seen = min(per_user, most)
    elif history.order == "set":
        seen = min(max(per_user - 1, 0), most)
    else:  # the mean over the targets 0 .. n - 1 of min(t, most)
        capped = min(per_user, most)
        seen = (capped * max(capped - 1, 0) / 2 + max(per_user - most, 0) * most) / max(per_user, 1)
    item = 1 if history.encoding == "pooled" else 1 + scale.tokens
    bound = math.inf if history.encoding == "pooled" else history.max_tokens
    return min(2 + seen * item, bound), min(2 + item + history.user_slots, bound)


def items_of_a_batch(config: Config, scale: Scale, targets: float) -> float:
    """Distinct items of so many targets, as if they were drawn uniformly."""
    loss = config.loss
    drawn = targets * (2 * bool(loss.index or loss.bpr or loss.softmax or loss.contrastive) + bool(loss.contrastive))
    return -scale.items * math.expm1(-drawn / scale.items)


def flops_per_target(config: Config, scale: Scale) -> float:
    """Of a step's forward and backward pass (trainer/flops.py)."""
    user, item = lengths(config, scale)
    targets = config.train.global_batch
    drawn = items_of_a_batch(config, scale, targets)
    decoded = drawn * 2 / 3 if config.loss.contrastive else drawn  # siblings are encoded only
    sums = {"user": (targets, user), "item": (drawn, item), "decoded item": (decoded, item)}
    sums = {name: (n, n * length, n * length**2) for name, (n, length) in sums.items() if n}
    return step_flops(model_config(config, scale), sums) / targets


def softmax_flops_per_target(config: Config, scale: Scale) -> float:
    """Of L_softmax, which trainer/flops.py leaves out: every target against the items of all ranks."""
    if not config.loss.softmax:
        return 0.0
    return 3 * 2 * items_of_a_batch(config, scale, config.train.global_batch) * config.model.d_model


def decode_flops(shape: ColaRecConfig, length: float, beams: int) -> float:
    """A user's beam search: the encoder over `length` positions, keys and values of these, and the beams of each level,
    of which there are K^t at most."""
    once = shape.num_decoder_layers * 4 * length * shape.d_model * shape.num_heads * shape.d_kv
    of_a_code = (decoder_flops(shape, 1, length) - once) / shape.gid_length
    codes = sum(min(beams, shape.branching**level) for level in range(shape.gid_length))
    return encoder_flops(shape, length, length**2) + once + codes * of_a_code


def decode_flops_per_user(config: Config, scale: Scale, beams: int) -> float:
    return decode_flops(model_config(config, scale), lengths(config, scale, eval_items=True)[0], beams)


def item_vector_flops(config: Config, scale: Scale) -> float:
    """h(X_i) of one item."""
    _, length = lengths(config, scale)
    return encoder_flops(model_config(config, scale), length, length**2)


# Memory of training


def table_bytes(config: Config, scale: Scale, ranks: int, bf16: bool) -> float:
    """On each rank, of the item and the user table (trainer/tables.py)."""
    rows, width = sum(table_rows(config, scale).values()), config.model.d_model
    if config.train.table_optimizer == "rowwise":
        return 4 * rows * (width + 2) / ranks
    return rows * width * dense_bytes_per_weight(config, ranks, bf16)


def dense_bytes_per_weight(config: Config, ranks: int, bf16: bool) -> float:
    """Weights, gradients, and AdamW's moments (and in bf16 the fp32 weights), over the ranks as the ZeRO stage says."""
    weights, gradients, state = (2, 2, 12) if bf16 else (4, 4, 8)
    stage = config.train.zero_stage
    return (
        weights / (ranks if stage >= 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + state / (ranks if stage >= 1 else 1)
    )


def activation_bytes(config: Config, positions: float, bf16: bool) -> float:
    """What a pass keeps for its backward pass, on a CPU: so many values a position, layer and unit of the width, from
    the official shape of bench/results/train.json."""
    precision = "bf16" if bf16 else "fp32"
    row = next(
        r
        for r in measured("train")
        if (r["who"], r["shape"], r.get("train.precision")) == ("ours", "official", precision)
    )
    weights = 68e6  # of that shape on Phone, tables included
    kept = row["peak_gb"] * 1e9 - 16 * weights - INTERPRETER
    padded = row["batch"] * row["tokens_per_s"] / row["samples_per_s"] / (1 - row["padding"])
    return kept / (padded * 6 * 512) * positions * config.model.num_encoder_layers * config.model.d_model


# Rates of a CPU core


def optimizer_cpu_seconds(num_weights: float) -> float:
    """AdamW's step over dense weights: bench/results/tables.json, 1M rows of 64."""
    row = next(r for r in measured("tables")["cases"] if (r["ids"], r["width"], r["optimizer"]) == (10**6, 64, "dense"))
    return row["cpu_seconds"] / (row["rows"] * row["width"]) * num_weights


def train_cpu_seconds(config: Config, scale: Scale, targets: float, ranks: int) -> float:
    """Of all ranks together, for so many targets, on a core each, without validation."""
    steps, flops = targets / config.train.global_batch, targets * flops_per_target(config, scale)
    of_a_step = _step_overhead() + optimizer_cpu_seconds(num_dense_weights(config, scale))
    return flops / train_rate(config) + steps * ranks * of_a_step


def num_dense_weights(config: Config, scale: Scale) -> float:
    """Weights that AdamW holds: all, but for row-wise tables."""
    tables = 0 if config.train.table_optimizer == "rowwise" else sum(table_rows(config, scale).values())
    return num_layer_weights(config, scale) + tables * config.model.d_model


def train_rate(config: Config) -> float:
    """FLOP per second of a core: a power of the width through the two shapes of bench/results/train.json."""
    widths = {"small": 128, "official": 512}
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    rates = {
        widths[r["shape"]]: r["tflops"] * 1e12 * r["samples_per_cpu_s"] / r["samples_per_s"]
        for r in measured("train")
        if r["who"] == "ours" and r["device"] == "CPU, 1 thread" and r["train.precision"] == precision
        if r["shape"] in widths
    }
    return _power(rates, config.model.d_model)


def decode_cpu_seconds(config: Config, scale: Scale, users: float, beams: int) -> float:
    return users * decode_flops_per_user(config, scale, beams) / decode_rate(config.model.d_model)


def decode_rate(width: int) -> float:
    """FLOP per second of a core in beam search: bench/results/scale.json, 100 beams on Phone."""
    rows = [r for r in measured("scale") if r["what"] == "decode" and (r["data"], r["beams"]) == ("phone", 100)]
    flops = [decode_flops(ColaRecConfig(**r["model"]), r["positions_per_user"], 100) for r in rows]
    rates = [n / r["cpu_seconds_per_user"] for n, r in zip(flops, rows, strict=True)]
    return _power(dict(zip([r["model"]["d_model"] for r in rows], rates, strict=True)), width)


def published_run(name: str) -> tuple[float, int, int]:
    """Seconds of training, ranks and steps of the run in bench/results/<name>.json."""
    trained = re.match(r"(\d+) min on (\d+) x cpu, (\d+) steps", measured(name)["protocol"]["trained"])
    minutes, ranks, steps = map(int, trained.groups())
    return 60.0 * minutes, ranks, steps


@functools.cache
def _step_overhead() -> float:
    """CPU seconds of a step and rank that the run on Phone took beside FLOPs, AdamW and validation."""
    config, scale = published_case("phone")
    seconds, ranks, steps = published_run("phone")
    seconds -= validation_cpu_seconds(config, scale, steps)
    seconds -= steps * config.train.global_batch * flops_per_target(config, scale) / train_rate(config) / ranks
    return seconds / steps - optimizer_cpu_seconds(num_dense_weights(config, scale))


def validation_cpu_seconds(config: Config, scale: Scale, steps: float) -> float:
    """Beam search before the first step and every `train.eval_every` of them."""
    every = config.train.eval_every or train_events(config, scale) / config.train.global_batch
    users = min(config.train.eval_users or scale.users, scale.users)
    return (1 + round(steps / every)) * decode_cpu_seconds(config, scale, users, config.train.eval_beams)


def published_case(name: str) -> tuple[Config, Scale]:
    """The config of a published run and what it was trained on: users, items and events of its corpus/manifest.json."""
    users, items, num_train = {
        "phone": (27_879, 10_429, 137_277),
        "beauty": (22_363, 12_101, 153_776),
        "demo": (2_354, 1_097, 24_080),
    }[name]
    config = config_module.load(str(RESULTS.parents[1] / "configs" / f"{name}.toml"))
    rows = num_train / config.etl.split_shares[0] if config.etl.split == "given" else num_train + 2 * users
    return config, Scale(rows, users, items, kept=1.0, tokens=config.etl.max_item_tokens)


def _power(values: dict[int, float], width: float) -> float:
    """A power of the width through two points, kept within 64 and 512, the widths that were run."""
    (x, y), (u, v) = sorted(values.items())
    return y * (min(max(width, 64), 512) / x) ** (math.log(v / y) / math.log(u / x))
