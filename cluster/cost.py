"""What each stage takes, from the size of the log and the config: CPU seconds, FLOPs and bytes.

Rates come from bench/results/*.json, read when they are needed, or stand below with the page that they were measured
for. They are of one CPU core of the machine of those benches. tests/cluster/test_cost.py compares what comes out with
measured points that nothing here was fitted to. Symbols: R rows of the log, E train events, U users, I items, d =
cf.dim, D = model.d_model, K^l = codes and levels of a GID.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from contract import config as config_module
from contract.settings import Cf, Config
from gid.cooccurrence import MAX_ITEMS, MAX_USERS
from gid.hierarchy import gid_length
from gid.lightgcn import memory_need
from trainer.flops import decoder_flops, encoder_flops, step_flops, teacher_flops
from trainer.model import ColaRec, ColaRecConfig, vectors_per_code

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
INTERPRETER = 0.58e9  # bytes of a process that has imported the trainer, and holds no model
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
    """E: what the split leaves to training."""
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
def _neighbours() -> dict[str, dict]:
    return {row["who"]: row for row in measured("scale") if row["what"] == "neighbours"}


def neighbour_entries(users: float, items: float, events: float) -> float:
    """What gid/cooccurrence.py multiplies: for each pair that it draws of an item and a user, the items of the user;
    as if all had equally many."""
    return min(events, items * MAX_USERS) * min(events / users, MAX_ITEMS)


def neighbours_cpu_seconds(users: float, items: float, events: float, cf: Cf) -> float:
    """Linear in the entries: the rows of bench/results/scale.json, in memory and by Spark."""
    row = _neighbours()["spark" if cf.method == "als" else "memory"]
    entries = neighbour_entries(users, items, events) if cf.method == "als" else events * events / users
    return row["cpu_seconds"] * entries / _neighbours()["spark"]["entries"]


@functools.cache
def _trees() -> dict[int, dict]:
    return {row["items"]: row for row in measured("gid")["trees"] if row["device"] == "CPU"}


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
        **{name: getattr(m, name) for name in ("d_model", "d_ff", "d_kv", "num_heads", "codebooks")},
        code_vectors=vectors_per_code(config, int(scale.items), gid_levels(config, scale)),
        num_encoder_layers=m.num_encoder_layers,
        num_decoder_layers=m.num_decoder_layers,
        loss_weights=config.loss.weights,
        distil=config.loss.distil,
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
    rows = {"hash": config.model.hash_rows, "none": 0}
    return {name: rows.get(kind[name], n) if n else 0 for name, n in ids.items()}


def rows_of_an_epoch(config: Config, scale: Scale) -> float:
    """What `train.global_batch` counts: windows of users with causal attention, otherwise targets."""
    if config.history.attention == "causal":
        return max(scale.users, (train_events(config, scale) - scale.users) / config.history.train_items)
    first = scale.users if config.history.order == "time" else 0  # a user's first event has nothing before it
    return max(1.0, train_events(config, scale) - first)


def targets_of_a_row(config: Config, scale: Scale) -> float:
    """With causal attention every event of a window but the first, as if all users had equally many events."""
    if config.history.attention == "full":
        return 1.0
    return min(max(train_events(config, scale) / scale.users - 1, 1.0), config.history.train_items)


def lengths(config: Config, scale: Scale, eval_items: bool = False) -> tuple[float, float]:
    """Mean encoder positions of X_u and X_i, as if all users had equally many events."""
    history, per_user = config.history, train_events(config, scale) / scale.users
    if eval_items:
        seen = min(per_user, history.eval_items)
    elif history.attention == "causal":
        seen = targets_of_a_row(config, scale)  # each comes after an item
    elif history.order == "set":
        seen = min(max(per_user - 1, 0), history.train_items)
    else:  # the mean over the targets 1 .. n - 1 of min(t, most)
        most = history.train_items
        capped = min(max(per_user - 1, 1), most)
        seen = (capped * (capped + 1) / 2 + max(per_user - 1 - most, 0) * most) / max(per_user - 1, 1)
    item, bound = 1.0, math.inf
    if history.encoding == "tokens":
        item, bound = 1 + scale.tokens * history.content, history.max_tokens
    ends = 1 if history.attention == "causal" else 2  # task and eos
    return min(ends + seen * item, bound), min(2 + item + history.user_slots, bound)


def items_of_a_batch(config: Config, scale: Scale, rows: float) -> float:
    """Distinct items X_i of so many rows, as if they were drawn uniformly."""
    loss = config.loss
    drawn = rows * (2 * bool(loss.index or loss.bpr or loss.contrastive) + bool(loss.contrastive))
    return -scale.items * math.expm1(-drawn / scale.items)


def step_lengths(config: Config, scale: Scale, rows: float) -> dict[str, tuple[float, float, float]]:
    """Of so many rows, as `trainer.loader.TrainBatches` counts them: number, sum of lengths and of their squares."""
    user, item = lengths(config, scale)
    items, targets = items_of_a_batch(config, scale, rows), targets_of_a_row(config, scale)
    # What a target is decoded from: with causal attention the task and 1 .. targets items.
    read = 1 + (targets + 1) / 2 if config.history.attention == "causal" else user
    decoded = items * 2 / 3 if config.loss.contrastive else items  # siblings are encoded only
    sums = {"user": (rows, user), "decoded user": (rows * targets, read)}
    sums |= {"item": (items, item), "decoded item": (decoded, item)} if items else {}
    return {name: (n, n * length, n * length**2) for name, (n, length) in sums.items()}


def positions(config: Config, scale: Scale, rows: float) -> tuple[float, float]:
    """Of the encoder and of the decoder in a pass over so many rows, without padding."""
    sums, loss = step_lengths(config, scale, rows), config.loss
    encoder = sum(sums[name][1] for name in ("user", "item") if name in sums)
    gids = bool(loss.rec) * sums["decoded user"][0] + bool(loss.index) * sums.get("decoded item", (0,))[0]
    return encoder, gid_levels(config, scale) * gids


def flops_per_row(config: Config, scale: Scale) -> float:
    """Of a step's forward and backward pass (trainer/flops.py)."""
    rows = config.train.global_batch
    return step_flops(model_config(config, scale), step_lengths(config, scale, rows)) / rows


def softmax_flops_per_row(config: Config, scale: Scale) -> float:
    """Of L_softmax and of the teacher of L_rec, which a step of trainer/flops.py leaves out: every target against the
    random items of all ranks."""
    targets, items = targets_of_a_row(config, scale), softmax_items(config, scale)
    taught = teacher_flops(model_config(config, scale), targets, items) if config.loss.rec else 0.0
    return 3 * 2 * targets * items * config.model.d_model + taught


def softmax_items(config: Config, scale: Scale) -> float:
    """That L_softmax ranks a target among: those drawn at random, or all where there are no more."""
    return min(config.train.negatives, scale.items) if config.loss.softmax else 0.0


def decode_flops(shape: ColaRecConfig, length: float, beams: int) -> float:
    """A user's beam search: the encoder over `length` positions, keys and values of these, and the beams of each level,
    of which there are K^t at most."""
    codes = sum(min(beams, shape.branching**level) for level in range(shape.gid_length))
    return encoder_flops(shape, length, length**2) + code_flops(shape, length, codes)


def code_flops(shape: ColaRecConfig, length: float, codes: float) -> float:
    """Keys and values of the encoder's states, and so many codes one at a time."""
    once = shape.num_decoder_layers * 4 * length * shape.d_model * shape.num_heads * shape.d_kv
    return once + codes * (decoder_flops(shape, 1, length, length) - once) / shape.gid_length


def rank_flops_per_user(config: Config, scale: Scale, beams: int) -> float:
    """What `trainer.recommender` decodes to rank a user's items, with so many beams; `search_flops` comes on top."""
    shape, length = model_config(config, scale), lengths(config, scale, eval_items=True)[0]
    ranks_by = config.eval.ranks_by
    if ranks_by == "dense":
        return encoder_flops(shape, length, length**2)
    if config.eval.exhaustive or beams >= scale.items:
        return decode_flops(shape, length, int(scale.items))
    flops = decode_flops(shape, length, beams)
    if ranks_by == "hybrid":  # log p of as many near items, and of as many neighbours; a prefix is decoded once
        others = beams * (1 + _has_neighbours(config))
        codes = sum(min(others, shape.branching**level) for level in range(shape.gid_length))
        flops += code_flops(shape, length, codes)
    return flops


def _has_neighbours(config: Config) -> bool:
    return bool(config.gid.neighbours and config.eval.neighbours)


def search_flops(config: Config, scale: Scale, users: float) -> float:
    """Of the exact search for the nearest items."""
    return 0.0 if config.eval.ranks_by == "generative" else 2 * users * scale.items * config.model.d_model


def tree_table_bytes(branching: int, levels: int, items: float) -> float:
    """Of `gid.tree.GidTree` on a device, at most."""
    return 8 * branching**levels + 12 * items


def item_vector_flops(config: Config, scale: Scale) -> float:
    """Of the vectors of all items: h(X_i), or v_i, which is only looked up, where L_softmax is trained."""
    if config.eval.ranks_by == "generative" or config.loss.softmax:
        return 0.0
    _, length = lengths(config, scale)
    return scale.items * encoder_flops(model_config(config, scale), length, length**2)


def item_vector_bytes(config: Config, scale: Scale) -> float:
    """On each rank, in an evaluation and in every validation: vectors, two tables of their places for the search, GIDs
    of 2 bytes, and the neighbours."""
    searches = config.eval.ranks_by != "generative"
    vectors = searches or config.model.codebooks == "prefix"
    neighbours = config.gid.neighbours * (config.eval.ranks_by == "hybrid" and _has_neighbours(config))
    per_item = 4 * config.model.d_model * vectors + 16 * searches + 2 * gid_levels(config, scale) + 8 * neighbours
    return scale.items * per_item


# Memory of training


def table_bytes(config: Config, scale: Scale, ranks: int, bf16: bool) -> float:
    """On each rank, of the item and the user table (trainer/tables.py)."""
    rows, width = sum(table_rows(config, scale).values()), config.model.d_model
    if config.train.table_optimizer == "rowwise":
        return 4 * rows * (width + 2) / ranks
    return rows * width * dense_bytes_per_weight(config, ranks, bf16)


def dense_bytes_per_weight(config: Config, ranks: int, bf16: bool) -> float:
    """Weights, gradients, and AdamW's moments (and in bf16 the fp32 weights, and the averages that `train.ema` keeps),
    over the ranks as the ZeRO stage says; and the copy that is validated where the weights are in parts or averaged."""
    weights, gradients, state = (2, 2, 12) if bf16 else (4, 4, 8)
    stage, averages = config.train.zero_stage, config.train.ema > 0
    return (
        weights / (ranks if stage >= 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + (state + 4 * averages) / (ranks if stage >= 1 else 1)
        + 4 * (averages or stage == 3)
    )


def activation_bytes(config: Config, encoder: float, decoder: float, bf16: bool) -> float:
    """What a pass over so many positions keeps for its backward pass, on a CPU: so many values a position, layer and
    unit of the width, from the official shape of bench/results/train.json."""
    precision = "bf16" if bf16 else "fp32"
    row = next(
        r
        for r in measured("train")
        if (r["who"], r["shape"], r.get("train.precision")) == ("ours", "official", precision)
    )
    weights = 68e6  # of that shape on Phone, tables included
    kept = row["peak_gb"] * 1e9 - 16 * weights - INTERPRETER
    padded = row["batch"] * row["tokens_per_s"] / row["samples_per_s"] / (1 - row["padding"])
    decoded = row["batch"] * 3 * 3  # codes of three GIDs of three levels
    model = config.model
    layers = encoder * model.num_encoder_layers + decoder * model.num_decoder_layers
    return kept / ((padded + decoded) * 6 * 512) * layers * model.d_model


# Rates of a CPU core


def optimizer_cpu_seconds(num_weights: float) -> float:
    """AdamW's step over dense weights: bench/results/tables.json, 1M rows of 64."""
    row = next(r for r in measured("tables")["cases"] if (r["ids"], r["width"], r["optimizer"]) == (10**6, 64, "dense"))
    return row["cpu_seconds"] / (row["rows"] * row["width"]) * num_weights


def train_cpu_seconds(config: Config, scale: Scale, steps: float, ranks: int) -> float:
    """Of all ranks together, on a core each, without validation."""
    flops = flops_per_row(config, scale) + softmax_flops_per_row(config, scale)
    of_a_rank = _small_steps()[1] + optimizer_cpu_seconds(num_dense_weights(config, scale))
    return steps * (config.train.global_batch * flops / train_rate(config) + ranks * of_a_rank)


def num_dense_weights(config: Config, scale: Scale) -> float:
    """Weights that AdamW holds: all, but for row-wise tables."""
    tables = 0 if config.train.table_optimizer == "rowwise" else sum(table_rows(config, scale).values())
    return num_layer_weights(config, scale) + tables * config.model.d_model


def train_rate(config: Config) -> float:
    """FLOP per second of a core: the default shape in bench/results/scale.json, the two wider ones of train.json."""
    widths = {"small": 128, "official": 512}
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    rates = {
        widths[r["shape"]]: r["tflops"] * 1e12 * r["samples_per_cpu_s"] / r["samples_per_s"]
        for r in measured("train")
        if r["who"] == "ours" and r["device"] == "CPU, 1 thread" and r["train.precision"] == precision
        if r["shape"] in widths
    }
    return _between({64: _small_steps()[0]} | rates, config.model.d_model)


@functools.cache
def _small_steps() -> tuple[float, float]:
    """FLOP per second of a core at width 64, and CPU seconds of a step and rank beside FLOPs and AdamW: a line through
    the steps of two batches on Phone."""
    points = []
    for variant in ("as it is", "large batch"):
        config, scale, row = measured_steps("phone", variant)
        points.append((row["flops"] + config.train.global_batch * softmax_flops_per_row(config, scale), row))
    (few, small), (many, large) = points
    rate = (many - few) / (large["cpu_seconds"] - small["cpu_seconds"])
    return rate, small["cpu_seconds"] - few / rate - optimizer_cpu_seconds(num_dense_weights(config, scale))


def rank_cpu_seconds(config: Config, scale: Scale, users: float, beams: int) -> float:
    """Of all ranks together: the vectors of the items, and each user's decoding and search."""
    seconds = item_vector_flops(config, scale) / train_rate(config)
    seconds += users * rank_flops_per_user(config, scale, beams) / decode_rate(config.model.d_model)
    return seconds + search_flops(config, scale, users) / search_rate()


def search_rate() -> float:
    """FLOP per second of a core in exact search (FAISS): 1M items of 64, 120 results."""
    (row,) = (r for r in measured("scale") if r["what"] == "search")
    return 2 * row["users"] * row["items"] * row["width"] / row["cpu_seconds"]


def decode_rate(width: int) -> float:
    """FLOP per second of a core in beam search: bench/results/scale.json, 100 beams on Phone."""
    rows = [r for r in measured("scale") if r["what"] == "decode" and (r["data"], r["beams"]) == ("phone", 100)]
    flops = [decode_flops(ColaRecConfig(**r["model"]), r["positions_per_user"], 100) for r in rows]
    rates = [n / r["cpu_seconds_per_user"] for n, r in zip(flops, rows, strict=True)]
    return _between(dict(zip([r["model"]["d_model"] for r in rows], rates, strict=True)), width)


def validation_cpu_seconds(config: Config, scale: Scale, steps: float) -> float:
    """Ranking the sample before the first step and every `train.eval_every` of them."""
    every = config.train.eval_every or rows_of_an_epoch(config, scale) / config.train.global_batch
    users = min(config.train.eval_users or scale.users, scale.users)
    beams = max(config.train.eval_beams, *config.eval.cutoffs)
    return (1 + round(steps / every)) * rank_cpu_seconds(config, scale, users, beams)


def measured_steps(data: str, variant: str) -> tuple[Config, Scale, dict]:
    """A row of training steps in bench/results/scale.json, with the config and the data that it was measured on."""
    (row,) = (r for r in measured("scale") if r["what"] == "train" and (r["data"], r["variant"]) == (data, variant))
    return as_run(data, row["settings"]), corpus_scale(row["users"], row["items"], row["events"]), row


def as_run(data: str, settings: dict) -> Config:
    """configs/<data>.toml under the settings of a run, but for those that are no more."""
    config = config_module.load(str(RESULTS.parents[1] / "configs" / f"{data}.toml"))
    known = config_module.flatten(config)
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in known}
    return config_module.replace(config, settings | {"etl.split": "given", "etl.split_shares": (1.0, 0.0, 0.0)})


def corpus_scale(num_users: int, num_items: int, num_train: int) -> Scale:
    """That of a corpus for a config of `as_run`, which takes all rows for train events."""
    return Scale(num_train, num_users, num_items, kept=1.0, tokens=30)


def _between(values: dict[int, float], width: float) -> float:
    """A power of the width between the widths that were measured; beyond them what the nearest one has."""
    widths = sorted(values)
    return math.exp(np.interp(math.log(width), np.log(widths), np.log([values[w] for w in widths])))
