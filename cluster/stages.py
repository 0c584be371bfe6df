"""The rows of a plan: each stage's work, time, memory and cost, where it does not fit, and what setting mends it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster import cost
from contract.settings import Config
from trainer.flops import PEAK_BF16

# Bytes of a GPU, by the vendors' data sheets; their peak is in trainer/flops.py.
GPU_MEMORY = {"h100": 80e9, "h200": 141e9, "h800": 80e9, "b200": 180e9, "a100": 80e9, "l40s": 48e9, "l4": 24e9}
GPUS_PER_NODE = 8
NODE_BYTES_PER_SECOND = 1e9  # ASSUMED: network and disk of a machine
FILLED = 0.7  # share of a machine's memory that a plan fills at most
GRADIENTS_PER_STEP = 1e9  # bytes that a step may reduce over the ranks before a note is due
ON_DEVICE = ("layers", "tables", "activations", "logits", "tree", "vectors")  # in training, see `train_bytes`
LARGEST = {"etl": 200e6, "cf": 200e3, "tree": 10e6, "train": 200e3, "eval": 30e3}  # what was run: rows, events, items


@dataclass(frozen=True)
class Machines:
    nodes: int
    cores: int
    memory: float  # GB of a machine
    gpus: int = 0
    gpu: str = "h100"
    mfu: float = 0.3
    decode_mfu: float = 0.05
    step_ms: float = 50.0
    price: float | None = None  # of a GPU for an hour
    node_price: float | None = None

    @property
    def all_cores(self) -> int:
        return self.nodes * self.cores

    @property
    def node_bytes(self) -> float:
        return self.memory * 1e9

    @property
    def peak(self) -> float:
        return self.gpus * PEAK_BF16[self.gpu.upper()]

    @property
    def ranks(self) -> int:
        return self.gpus or self.all_cores

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, GPUS_PER_NODE) if self.gpus else self.cores

    @property
    def rank_bytes(self) -> float:
        """Memory of the device of a rank."""
        return GPU_MEMORY[self.gpu] if self.gpus else self.node_bytes / self.cores

    @property
    def ranks_place(self) -> str:
        return f"{self.gpus} x {self.gpu}" if self.gpus else f"{self.nodes} x {self.cores} cores"

    def nodes_dollars(self, seconds: float, nodes: int) -> float | None:
        return None if self.node_price is None else self.node_price * nodes * seconds / 3600

    def ranks_dollars(self, seconds: float) -> float | None:
        if not self.gpus:
            return self.nodes_dollars(seconds, self.nodes)
        return None if self.price is None else self.price * self.gpus * seconds / 3600


@dataclass(frozen=True)
class Row:
    stage: str
    work: str
    seconds: float
    place: str
    memory: str
    basis: str  # 'measured', 'computed' or 'assumed'
    dollars: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # bytes, FLOPs and counts
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def etl(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    cpu = cost.etl_cpu_seconds(scale.rows)
    python = cost.PYTHON_PER_CORE + cost.PYTHON_PER_ITEM * scale.items
    core = cost.HEAP_PER_CORE + python
    shuffle = cost.SHUFFLE_PER_ROW * scale.rows
    parts = cost.etl_parts(scale.rows)
    splits = max(1.0, scale.rows * cost.PARQUET_PER_ROW / cost.SPARK_SPLIT)
    piece = shuffle / (parts * splits)
    work, corpus = cost.WORK_PER_EVENT * scale.events, cost.CORPUS_PER_EVENT * scale.events
    # Input twice; shuffle and blocks written and read; the corpus written, and its shards read back.
    moved = 2 * cost.PARQUET_PER_ROW * scale.rows + 2 * shuffle + 2 * work
    transfer = moved / machines.nodes / NODE_BYTES_PER_SECOND
    seconds = max(cost.etl_seconds(scale.rows, machines.all_cores), transfer)
    shards = math.ceil(scale.events / 3e6)
    warnings = []
    if core * machines.cores > machines.node_bytes:
        most = int(machines.node_bytes // core)
        warnings.append(
            f"a core takes {size(core)} (heap, and Python with {size(python - cost.PYTHON_PER_CORE)} of the catalog): "
            f"{machines.cores} of them are more than {size(machines.node_bytes)}; "
            + (f"spark.executor.cores for {most} a machine" if most else "machines of more memory")
        )
    if scale.events / config.etl.num_shards > 6.4e6:
        warnings.append(
            f"etl.num_shards = {config.etl.num_shards} makes shards of {scale.events / config.etl.num_shards:.2g} "
            f"events, 6.4e6 were tried; set etl.num_shards = {shards}"
        )
    if piece < 64 << 10 and parts > 1:
        fewer = f"spark.sql.files.maxPartitionBytes = {max(256, round(128 * (64 << 10) / piece / 128) * 128)}m"
        warnings.append(
            f"the shuffle has {parts:,} parts x {splits:,.0f} input splits, pieces of {size(piece)}: random reads. "
            + (
                f"set {fewer}"
                if (64 << 10) / piece < 8
                else "push-based merging (spark.shuffle.push.enabled on YARN) or a remote shuffle service; not tried"
            )
        )
    return Row(
        "etl",
        f"{hours(cpu)} CPU",
        seconds,
        f"{machines.nodes} x {machines.cores} cores",
        f"{size(core)} a core",
        basis(scale.rows, "etl"),
        machines.nodes_dollars(seconds, machines.nodes),
        {"cpu_seconds": cpu, "core_bytes": core, "shuffle_bytes": shuffle, "work_bytes": work, "corpus_bytes": corpus,
         "parts": parts},
        [f"shuffle {size(shuffle / machines.nodes)} of local disk a machine in {parts:,} parts; work folder "
         f"{size(work)} at its peak, corpus {size(corpus)} in {max(shards, 1):,} shards; {size(moved)} moved, "
            f"{hours(transfer)} at {NODE_BYTES_PER_SECOND / 1e9:g} GB/s a machine (assumed)"],
        warnings,
    )  # fmt: skip


def cf(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    events, nodes = cost.train_events(config, scale), scale.users + scale.items
    need = cost.lightgcn_bytes(nodes, events, config.cf)
    room = machines.rank_bytes if machines.gpus else machines.node_bytes
    driver = cost.als_driver_bytes(scale.users, scale.items, config.cf)
    numbers = {"lightgcn_bytes": need, "als_driver_bytes": driver}
    warnings = []
    if config.cf.method == "lightgcn" and need <= room:
        seconds = cost.lightgcn_cpu_seconds(nodes, events, config.cf, config.cf.max_epochs)
        return Row(
            "gid: cf",
            f"lightgcn, {config.cf.max_epochs} epochs",
            seconds,
            "1 core",
            size(need),
            basis(events, "cf"),
            machines.nodes_dollars(seconds, 1),
            numbers,
            ["at most: it stops early by valid Recall@20 (epoch 70 on Phone, 130 on Beauty). A GPU was not measured"],
        )
    if config.cf.method == "lightgcn":
        warnings.append(f"LightGCN takes {size(need)} on one device of {size(room)}; set cf.method = 'als'")
    flops = cost.als_flops(scale.users, scale.items, events, config.cf)
    seconds = flops / cost.ALS_FLOPS_PER_CORE / machines.all_cores
    if driver > machines.node_bytes:
        fitting = int(config.cf.dim * machines.node_bytes / driver)
        warnings.append(
            f"the process that starts ALS holds the factors twice, {size(driver)} of {size(machines.node_bytes)}; "
            + (f"set cf.dim = {fitting}, or " if fitting >= 8 else "")
            + "use a larger machine, or a higher etl.min_user"
        )
    return Row(
        "gid: cf",
        f"als, {flops:.2g} FLOP",
        seconds,
        f"{machines.nodes} x {machines.cores} cores",
        f"{size(driver)} driver",
        "assumed",
        machines.nodes_dollars(seconds, machines.nodes),
        numbers | {"flops": flops},
        [f"als at {cost.ALS_FLOPS_PER_CORE:.0e} FLOP/s a core, which is assumed"],
        warnings,
    )


def neighbours(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    sizes = scale.users, scale.items, cost.train_events(config, scale)
    cpu = cost.neighbours_cpu_seconds(*sizes, config.cf) * bool(config.gid.neighbours)
    spreads = config.cf.method == "als"
    seconds = cpu / (machines.all_cores if spreads else 1)
    shuffle = 8 * cost.neighbour_entries(*sizes) * (spreads and cpu > 0)
    table = 8 * config.gid.neighbours * scale.items
    warnings = []
    if table > machines.node_bytes / 4:
        warnings.append(
            f"the table is {size(table)}, which each machine that ranks maps; set gid.neighbours = "
            f"{max(10, int(config.gid.neighbours * machines.node_bytes / 4 / table))}, or 0"
        )
    return Row(
        "gid: neighbours",
        f"{hours(cpu)} CPU",
        seconds,
        f"{machines.nodes} x {machines.cores} cores" if spreads else "1 core",
        f"{size(table)} on disk",
        "computed",
        machines.nodes_dollars(seconds, machines.nodes if spreads else 1),
        {"cpu_seconds": cpu, "shuffle_bytes": shuffle, "bytes": table},
        [f"shuffle {size(shuffle / machines.nodes)} of local disk a machine"] if shuffle else [],
        warnings,
    )


def tree(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    cpu = cost.tree_cpu_seconds(scale.items, config.cf.dim)
    seconds = cost.tree_seconds(scale.items, config.cf.dim, machines.cores)
    need, levels = cost.tree_bytes(scale.items, config.cf.dim), cost.gid_levels(config, scale)
    warnings = []
    if need > machines.node_bytes:
        warnings.append(
            f"one process holds {size(need)} of {size(machines.node_bytes)}; a smaller cf.dim or a larger machine"
        )
    if seconds > 2 * 3600:
        warnings.append(
            f"one process splits the root alone, then one a core the subtrees: {hours(seconds)}. More machines do not "
            "help; --extend places added items without a rebuild"
        )
    return Row(
        "gid: tree",
        f"{hours(cpu)} CPU, l = {levels}",
        seconds,
        f"1 x {machines.cores} cores",
        size(need),
        basis(scale.items, "tree"),
        machines.nodes_dollars(seconds, 1),
        {"cpu_seconds": cpu, "bytes": need, "levels": levels},
        [],
        warnings,
    )


def train(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    ranks, bf16 = (
        machines.ranks,
        bool(machines.gpus) if config.train.precision == "auto" else (config.train.precision == "bf16"),
    )
    batch, rows = config.train.global_batch, "histories" if config.history.attention == "causal" else "targets"
    steps = config.train.max_steps or config.train.epochs * max(1.0, cost.rows_of_an_epoch(config, scale) // batch)
    targets = steps * batch * cost.targets_of_a_row(config, scale)
    flops, softmax = cost.flops_per_row(config, scale), cost.softmax_flops_per_row(config, scale)
    shortest = machines.step_ms / 1000
    if machines.gpus:
        of_a_step = batch * (flops + softmax) / (machines.peak * machines.mfu)
        seconds = steps * max(of_a_step, shortest)
    else:
        seconds = cost.train_cpu_seconds(config, scale, steps, ranks)
        seconds = (seconds + cost.validation_cpu_seconds(config, scale, steps)) / ranks
    total = steps * batch * (flops + softmax)
    numbers = train_bytes(config, scale, ranks, bf16) | {"flops": total, "targets": targets, "steps": steps}
    warnings = []
    if machines.gpus and of_a_step < shortest / 2:
        enough = max(1, math.ceil(machines.gpus * of_a_step / shortest))
        warnings.append(
            f"{steps:,.0f} steps of {batch} {rows}, {machines.step_ms:g} ms each at least "
            f"(--step-ms, assumed), use {of_a_step / shortest:.1%} of the GPUs; {enough} would be as fast. A larger "
            "train.global_batch, with its train.lr, makes fewer steps"
        )
    device = sum(numbers[name] for name in ON_DEVICE)
    return Row(
        "train",
        f"{total:.2g} FLOP",
        seconds,
        machines.ranks_place,
        f"{size(device)} a rank",
        "assumed" if machines.gpus else basis(cost.train_events(config, scale), "train"),
        machines.ranks_dollars(seconds),
        numbers,
        [
            f"{targets:.3g} targets in {steps:,.0f} steps of {batch} {rows}, {flops:.2g} FLOP for each of these and "
            f"{softmax:.2g} for L_softmax; tables of {sum(cost.table_rows(config, scale).values()):.3g} rows x "
            f"{config.model.d_model}, l = {cost.gid_levels(config, scale)}",
            "a rank holds " + ", ".join(f"{name} {size(numbers[name])}" for name in ON_DEVICE)
            + f"; of its machine, for each rank, {size(numbers['host'])}",
        ],
        warnings + train_warnings(config, scale, machines, numbers, device, softmax / flops),
    )  # fmt: skip


def train_bytes(config: Config, scale: cost.Scale, ranks: int, bf16: bool) -> dict[str, float]:
    """What a rank holds on its device, in main memory, and sends in a step."""
    rows = max(1.0, config.train.global_batch / ranks)
    encoder, decoder = cost.positions(config, scale, rows)
    share = min(1.0, config.train.micro_tokens / encoder) if config.train.micro_tokens else 1.0
    targets = rows * share * cost.targets_of_a_row(config, scale)
    dense, levels = cost.num_dense_weights(config, scale), cost.gid_levels(config, scale)
    exact = config.model.item_table == "exact"
    from_cf = (
        4 * scale.items * (config.cf.dim + config.model.d_model) if exact and config.model.item_init == "cf" else 0
    )
    return {
        "layers": cost.num_layer_weights(config, scale) * cost.dense_bytes_per_weight(config, ranks, bf16),
        "tables": cost.table_bytes(config, scale, ranks, bf16),
        "activations": cost.activation_bytes(config, encoder * share, decoder * share, bf16),
        # float32 of the scores, what is made of them and the gradient; and the random items' vectors
        "logits": (12 * targets + 8 * config.model.d_model) * cost.softmax_items(config, scale),
        "tree": cost.tree_table_bytes(config.gid.branching, levels, scale.items),
        "vectors": cost.item_vector_bytes(config, scale),  # while it validates
        # The catalog; and how likely each item is to be drawn at random.
        "host": (8 * (levels + 2) + 4 + (8 if config.loss.softmax else 0)) * scale.items + from_cf,
        "export": 4 * sum(cost.table_rows(config, scale).values()) * config.model.d_model,
        "gradients": (2 if bf16 else 4) * dense,
    }


def train_warnings(
    config: Config, scale: cost.Scale, machines: Machines, numbers: dict, device: float, softmax_share: float
) -> list[str]:
    warnings, ranks = [], machines.ranks
    rows = cost.table_rows(config, scale)
    if numbers["tables"] > FILLED * machines.rank_bytes / 2:
        if config.train.table_optimizer == "dense":
            each = 4 * sum(rows.values()) * (config.model.d_model + 2) / ranks
            warnings.append(
                f"the item and user tables take {size(numbers['tables'])} on each rank; "
                f"train.table_optimizer = 'rowwise' makes that {size(each)}"
            )
        else:
            warnings.append(f"the row-wise tables take {size(numbers['tables'])} on each rank: use more ranks, or hash")
    largest = max(rows, key=rows.get)
    if numbers["export"] > machines.node_bytes * FILLED:
        setting = "history.user_slots = 0 (no users), or " if largest == "user" else ""
        warnings.append(
            f"rank 0's machine gathers the whole tables at the end, {size(numbers['export'])} of "
            f"{size(machines.node_bytes)}; set {setting}model.{largest}_table = 'hash'"
        )
    if ranks > 1 and numbers["gradients"] > GRADIENTS_PER_STEP and config.train.table_optimizer == "dense":
        warnings.append(
            f"each step reduces {size(numbers['gradients'])} of gradients over the ranks, most of them of the tables; "
            "set train.table_optimizer = 'rowwise'"
        )
    if numbers["host"] * machines.ranks_per_node > machines.node_bytes:
        remedy = "set model.item_init = 'random', " if config.model.item_init == "cf" else ""
        warnings.append(
            f"{machines.ranks_per_node} ranks of a machine hold the catalog's tables once each, together "
            f"{size(numbers['host'] * machines.ranks_per_node)} of {size(machines.node_bytes)}; "
            f"{remedy}fewer ranks a machine, or more memory"
        )
    if numbers["tree"] > 0.1 * machines.rank_bytes and (better := branching(config, scale)) != config.gid.branching:
        levels = cost.gid_length(int(scale.items), better, config.gid.slack)
        warnings.append(
            f"the tree's tables, 8 K^l bytes, take up to {size(numbers['tree'])} of each rank; "
            f"gid.branching = {better} (l = {levels}) makes that "
            f"{size(cost.tree_table_bytes(better, levels, scale.items))}"
        )
    if numbers["vectors"] > 0.2 * machines.rank_bytes:
        warnings.append(
            f"a validation holds vectors and neighbours of all items on each rank, {size(numbers['vectors'])} of "
            f"{size(machines.rank_bytes)}; gid.neighbours = 0 needs no neighbours, eval.mode = 'generative' and "
            "model.codebooks = 'level' no vectors either"
        )
    if softmax_share > 0.5 or numbers["logits"] > 0.2 * machines.rank_bytes:
        warnings.append(
            f"L_softmax ranks each target among {cost.softmax_items(config, scale):,.0f} items: {softmax_share:.1f} "
            f"times the FLOP of the layers, {size(numbers['logits'])} a rank; set fewer train.negatives, "
            "or train.micro_tokens for the memory alone"
        )
    if device > machines.rank_bytes and numbers["activations"] > FILLED * machines.rank_bytes / 2:
        warnings.append(
            f"a pass keeps {size(numbers['activations'])}; set train.micro_tokens, or train.recompute = true"
        )
    elif device > machines.rank_bytes and not warnings:
        warnings.append(f"{size(device)} a rank are more than {size(machines.rank_bytes)}; set train.zero_stage = 3")
    groups = config.train.length_groups
    if config.train.streams % ranks or config.train.global_batch < groups * ranks or config.train.global_batch % ranks:
        batch = max(math.ceil(config.train.global_batch / ranks), groups) * ranks
        warnings.append(
            f"{ranks} ranks do not divide train.streams = {config.train.streams} or train.global_batch = "
            f"{config.train.global_batch}; set train.streams = {ranks}, train.global_batch = {batch} (and tune "
            f"train.lr) and etl.num_shards = {max(ranks, math.ceil(scale.events / 3e6))} or more"
        )
    return warnings


def branching(config: Config, scale: cost.Scale) -> int:
    """The K of the smallest tables."""

    def leaves(k: int) -> int:
        return k ** cost.gid_length(int(scale.items), k, config.gid.slack)

    return min([config.gid.branching, 32, 64, 128, 256], key=leaves)


def evaluate(config: Config, scale: cost.Scale, machines: Machines) -> Row:
    """All users have a held-out target at most, and all of them are scored."""
    beams, width, levels = config.eval.beams, config.model.d_model, cost.gid_levels(config, scale)
    flops = scale.users * cost.rank_flops_per_user(config, scale, beams)
    vectors, search = cost.item_vector_flops(config, scale), cost.search_flops(config, scale, scale.users)
    if machines.gpus:
        batches = math.ceil(scale.users / machines.gpus / config.eval.batch)
        searching = search / (machines.peak * machines.decode_mfu)
        seconds = max(flops / (machines.peak * machines.decode_mfu) + searching, batches * machines.step_ms / 1000)
        seconds += vectors / (machines.peak * machines.mfu)
    else:
        searching = search / cost.search_rate() / machines.all_cores
        seconds = cost.rank_cpu_seconds(config, scale, scale.users, beams) / machines.ranks
    held = cost.item_vector_bytes(config, scale)
    tables = 4 * sum(cost.table_rows(config, scale).values()) * width
    trees = cost.tree_table_bytes(config.gid.branching, levels, scale.items)
    device = held + tables + trees + 4 * cost.num_layer_weights(config, scale)
    lists = scale.users * max(config.eval.cutoffs) * 16 + 4 * scale.events
    notes = [f"{scale.users:.3g} users x {beams} beams; {scale.users / seconds:,.0f} users/s"]
    if search:
        on_gpus, on_cores = "--decode-mfu, assumed", f"{cost.search_rate():.2g} FLOP/s a core"
        rate = on_gpus if machines.gpus else on_cores
        notes.append(f"exact search for the nearest items is {search:.2g} FLOP of these, {hours(searching)} ({rate})")
    warnings = []
    if device > machines.rank_bytes:
        warnings.append(
            f"each rank holds the whole tables, {size(tables)}, the tree, {size(trees)}, and vectors and neighbours of "
            f"all items, {size(held)}: more than {size(machines.rank_bytes)}; gid.neighbours = 0 saves the "
            "neighbours, eval.mode = 'generative' and model.codebooks = 'level' the vectors as well, a hashed table "
            "(model.item_table, model.user_table) the rest"
        )
    if searching > max(3600, 0.5 * seconds):
        warnings.append(
            f"exact search for the nearest items is {search:.2g} FLOP, {hours(searching)}; set eval.mode = "
            "'generative' (the beam alone)"
        )
    if lists > FILLED * machines.node_bytes:
        warnings.append(
            f"rank 0 gathers the lists of all users, {size(lists)} of {size(machines.node_bytes)}: no setting mends "
            "that; score a part of the users (a corpus of a sample of them)"
        )
    slow = [name for name in config.eval.baselines if name != "popularity"]
    if slow and scale.users * scale.items > 1e12:
        warnings.append(
            f"the baselines {', '.join(slow)} score {scale.users * scale.items:.2g} pairs on rank 0's CPU; "
            "set eval.baselines = ['popularity']"
        )
    if machines.ranks > config.etl.num_shards:
        warnings.append(
            f"a shard is decoded by one rank, and {config.etl.num_shards} shards keep {machines.ranks} ranks waiting; "
            f"set etl.num_shards = {machines.ranks} or more"
        )
    return Row(
        "eval",
        f"{flops + vectors + search:.2g} FLOP",
        seconds,
        machines.ranks_place,
        f"{size(device)} a rank",
        "assumed" if machines.gpus else basis(scale.users, "eval"),
        machines.ranks_dollars(seconds),
        {"decode_flops": flops, "vector_flops": vectors, "search_flops": search, "bytes": device, "lists": lists},
        notes,
        warnings,
    )


STAGES: list[Callable[[Config, cost.Scale, Machines], Row]] = [etl, cf, neighbours, tree, train, evaluate]


def basis(amount: float, stage: str) -> str:
    return "measured" if amount <= LARGEST[stage] else "computed"


def size(num_bytes: float) -> str:
    for unit, bytes_ in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= bytes_:
            return (
                f"{num_bytes / bytes_:,.3g} {unit}"
                if num_bytes < 1000 * bytes_
                else f"{num_bytes / bytes_:,.0f} {unit}"
            )
    return f"{num_bytes / 1e3:.0f} kB"


def hours(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.3g} h"
