"""The settings of an experiment, by section: what `contract.config` reads from a file and the command line.

Every field carries its documentation, which `--help` prints. What can be derived
(vocabulary size, GID length, the DeepSpeed dict, the number of steps) is derived and has no field.
"""

from dataclasses import dataclass, field
from pathlib import Path

BASELINES = ("popularity", "recent_popularity", "item_knn", "als", "ease", "lightgcn", "sasrec")


def _opt(default, doc: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A setting: its default, one line of documentation, and what it may be (bounds included)."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Data:
    """Where the raw log is and how to read it."""

    format: str = _opt(
        "jsonl",
        "format of the interactions: csv, jsonl or parquet with the columns named below (text may be .gz or .zst), "
        "or a public release as it is: 'colarec' (the authors' files), 'otto' (sessions), 'amazon' (reviews and "
        "metadata of 2014, 2018, 2023), 'foodcom' (RAW_*.csv), 'tencentgr' (seq/ and item_feat/)",
        ("csv", "jsonl", "parquet", "colarec", "otto", "amazon", "foodcom", "tencentgr"),
    )
    path: str = _opt(
        "", "folder that the paths below are relative to (colarec: the release's folder); ~ is the home folder"
    )
    interactions: tuple[str, ...] = _opt(
        (),
        "interaction files or folders, relative to path; globs allowed, but a path that is there as it is written is "
        "that. Folders named key=value give columns of that name to files that lack them",
    )
    items: tuple[str, ...] = _opt(
        (), "item files or folders, relative to path; globs allowed; empty: the items have no texts"
    )
    items_format: str = _opt(
        "",
        "format of the item files; empty: the same as format",
        ("", "csv", "jsonl", "parquet", "amazon", "foodcom", "tencentgr"),
    )
    user_column: str = _opt("user_id", "interaction column of the user")
    item_column: str = _opt("item_id", "interaction and item column of the item")
    time_column: str = _opt("timestamp", "interaction column of the time")
    time_unit: str = _opt(
        "s",
        "unit of the time where it is a number or a text (columns of a time type say theirs); "
        "'order': only the order within a user is known, so no dates are checked and "
        "time gaps are not used; public releases have their own",
        ("s", "ms", "us", "ns", "iso", "order"),
    )
    event_column: str = _opt("", "interaction column of the event type; empty: all events are alike")
    split_column: str = _opt(
        "",
        "interaction column that says train, valid or test, for etl.split = 'given'; empty: none (csv, jsonl, parquet)",
    )
    text_columns: tuple[str, ...] = _opt(("title",), "item columns whose text is the content, in this order")
    shards_url: str = _opt(
        "",
        "folder or any URL that fsspec opens (s3://..., gs://...) with a copy of the .tar files of corpus/, read from "
        "there in training and evaluation; empty: read from corpus/",
    )
    encoding: str = _opt(
        "utf-8",
        "encoding of the text files, log and items: utf-8, latin-1, cp1252, shift_jis, ... any that Python knows and "
        "that extends ASCII",
    )
    delimiter: str = _opt(",", "what separates the fields of a CSV file", (",", ";", "|", "\t"))
    multiline: bool = _opt(
        False,
        "quoted fields of CSV files hold line breaks; a file is then read by one task, and a quote that is not closed "
        "swallows the rows after it",
    )


@dataclass(frozen=True)
class Etl:
    """From the log to corpus/."""

    events: tuple[str, ...] = _opt((), "event types to keep, weakest first; empty: all that occur")
    event_weights: tuple[float, ...] = _opt(
        (), "weight of each of etl.events as a training target, in their order; empty: all weigh 1"
    )
    repeats: str = _opt(
        "first",
        "several events of a user on an item: 'first' keeps the first only; 'collapse' the first of each run of the "
        "same item; 'keep' all that differ in time or type (these two need eval.mask_seen = false)",
        ("first", "collapse", "keep"),
    )
    min_user: int = _opt(5, "k-core: events a user must have; 0: no limit", low=0)
    min_item: int = _opt(5, "k-core: events an item must have; 0: keep the whole catalog, cold items too", low=0)
    max_user_events: int = _opt(1000, "only the latest rows of a user count, at most so many", low=1)
    max_daily_events: int = _opt(0, "leave out users with more rows than this on any day (UTC): bots; 0: none", low=0)
    max_bad_share: float = _opt(
        0.01, "stop when a larger share of the rows is unusable, or of the texts cannot be decoded", low=0, high=1
    )
    max_unknown_share: float = _opt(
        0.9,
        "stop when a larger share of the events is of items that data.items do not have, as where the ids of the "
        "two are spelt differently",
        low=0,
        high=1,
    )
    pseudonym_key: str = _opt(
        "",
        "name of the environment variable that holds a secret; user ids are then replaced by their HMAC-SHA256 under "
        "it; empty: ids stay",
    )
    split: str = _opt(
        "leave_one_out",
        "'leave_one_out': a user's last event is test, the one before valid; 'temporal': the last etl.test_days are "
        "test, the etl.valid_days before them valid; 'otto': the same days, as OTTO's sessions are split; 'random': "
        "by etl.split_shares of each user; 'given': as the input says",
        ("leave_one_out", "temporal", "otto", "random", "given"),
    )
    test_days: float = _opt(7.0, "days before the log's last event that are test ('temporal', 'otto')", low=0)
    valid_days: float = _opt(7.0, "days before those that are valid ('temporal', 'otto')", low=0)
    split_shares: tuple[float, ...] = _opt((0.8, 0.1, 0.1), "train, valid and test share of a user ('random')")
    valid_in_history: bool = _opt(True, "valid items are part of the history (and of the seen items) at test time")
    tokenizer: str = _opt("", "folder of a SentencePiece model (spiece.model) to use; empty: train one on the texts")
    vocab_size: int = _opt(8000, "SentencePiece vocabulary, pieces; reduced when the text does not hold so many", low=1)
    max_item_tokens: int = _opt(30, "content tokens kept of an item", low=1)
    max_text: int = _opt(2000, "characters kept of an item's text", low=1)
    max_users_per_item: int = _opt(64, "train users sampled per item for the user slots", low=1)
    num_shards: int = _opt(16, "WebDataset shards per split; the tasks that write them can be as many at once", low=1)

    @property
    def in_time_order(self) -> bool:
        """Train is earlier than valid, and valid than test: not so in a random split, one that is given included."""
        return self.split != "random" and (self.split != "given" or self.valid_in_history)


@dataclass(frozen=True)
class Cf:
    """The collaborative embeddings."""

    method: str = _opt(
        "lightgcn",
        "'lightgcn': on one device; 'als': Spark's implicit ALS, where the graph is too large (docs/gid.md says when)",
        ("lightgcn", "als"),
    )
    dim: int = _opt(64, "embedding size", low=1)
    num_layers: int = _opt(3, "propagation layers", low=0)
    negatives: str = _opt(
        "uniform",
        "what LightGCN ranks below a user's item: 'uniform' over the items unknown to the user, or by 'popularity', "
        "the number of train interactions to the power of 0.75",
        ("uniform", "popularity"),
    )
    lr: float = _opt(2e-2, "Adam learning rate", low=1e-9)
    l2: float = _opt(1e-2, "L2 weight of the layer-0 embeddings of a batch", low=0)
    batch: int = _opt(8192, "interactions per step", low=1)
    max_epochs: int = _opt(200, "epochs at most", low=1)
    eval_every: int = _opt(5, "epochs between two measurements of valid Recall@20", low=1)
    patience: int = _opt(5, "stop after so many measurements without a better valid Recall@20", low=1)
    als_iterations: int = _opt(15, "rounds of ALS", low=1)
    als_alpha: float = _opt(40.0, "confidence of an interaction in ALS, beside 1 for none", low=0)
    als_reg: float = _opt(0.1, "L2 weight of ALS, times the interactions of the row", low=0)


@dataclass(frozen=True)
class Gid:
    """The tree and its paths."""

    method: str = _opt(
        "collaborative",
        "what items of like prefix share: 'collaborative': their users (the paper); 'content': their words; "
        "'fused': both, whitened; 'random': nothing",
        ("collaborative", "content", "fused", "random"),
    )
    branching: int = _opt(32, "K, children of a node and codes per level", low=2, high=32767)
    length: int = _opt(0, "l, tokens of a GID; 0: the least l with K^l >= items * slack", low=0)
    slack: float = _opt(1.25, "room for growth when l is derived, times the number of items", low=1)
    headroom: float = _opt(
        0.75, "inner clusters are filled to at most this share of K^(l-t) when that is feasible", low=0.01, high=1
    )
    neighbours: int = _opt(
        100,
        "items kept as neighbours of each item, those that the same people take, for the ranking (eval.neighbours); "
        "0: none",
        low=0,
    )
    rebuild_share: float = _opt(
        0.1, "--extend says that a rebuild is due when more of the added items than this were displaced", low=0, high=1
    )


@dataclass(frozen=True)
class History:
    """What the encoder sees of a user."""

    order: str = _opt(
        "time",
        "'time': what came before the target, in time order, with recency, time gap and event type embedded; "
        "'set': a sample of the user's other items (the paper). When nothing is said, 'set' where etl.split is "
        "'random', or 'given' with etl.valid_in_history = false, as the order of such a split tells nothing",
        ("time", "set"),
    )
    encoding: str = _opt(
        "pooled",
        "'pooled': one encoder position per item (atomic embedding + mean of its content tokens); "
        "'tokens': every content token is a position (the paper)",
        ("pooled", "tokens"),
    )
    attention: str = _opt(
        "causal",
        "'causal': the encoder reads a history once, from left to right (a set in a new random order in each epoch), "
        "and every item in it but the first is a target (encoding 'pooled'); 'full': in both directions, anew for each "
        "target (the paper)",
        ("causal", "full"),
    )
    content: bool = _opt(True, "the encoder reads the items' texts; false: items are known by their embeddings alone")
    train_items: int = _opt(20, "history items at training, at most", low=1)
    eval_items: int = _opt(20, "history items at evaluation, at most", low=1)
    max_tokens: int = _opt(256, "encoder positions, at most (encoding 'tokens')", low=1)
    user_slots: int = _opt(0, "users sampled into X_i, the encoder input of an item; 0: none", low=0)


@dataclass(frozen=True)
class Model:
    """T5 encoder-decoder."""

    d_model: int = _opt(64, "width", low=1)
    d_ff: int = _opt(256, "width of the feed-forward layers", low=1)
    d_kv: int = _opt(16, "width of a head", low=1)
    num_heads: int = _opt(4, "attention heads", low=1)
    num_encoder_layers: int = _opt(2, "encoder layers", low=1)
    num_decoder_layers: int = _opt(2, "decoder layers", low=1)
    dropout: float = _opt(0.3, "dropout rate", low=0, high=0.99)
    codebooks: str = _opt(
        "prefix",
        "what the codes after a prefix are to the decoder: 'prefix': some vectors of each code after each prefix, and "
        "in place of the last codes the items themselves, v_i, of which only those below the prefix compete; 'level': "
        "a codebook of each level, whatever the prefix (the paper)",
        ("prefix", "level"),
    )
    code_vectors: int = _opt(
        4,
        "vectors of a code after a prefix, each for a part of the items below, three and more on average (codebooks "
        "'prefix')",
        low=1,
    )
    item_init: str = _opt(
        "cf",
        "start of the atomic item embeddings: 'cf': the CF embeddings under a random rotation; 'random', as hashed "
        "ones always do",
        ("cf", "random"),
    )
    init: str = _opt("", "T5 checkpoint that the layers start from: a folder or a name on the hub; empty: at random")
    lora_rank: int = _opt(0, "rank of the adapters (LoRA) that are trained in place of the T5 layers; 0: none", low=0)
    item_table: str = _opt(
        "exact",
        "atomic item embeddings: 'exact': a row per item; 'hash': the sum of model.hash_functions rows of a table of "
        "model.hash_rows; 'none': items are known by their content alone",
        ("exact", "hash", "none"),
    )
    user_table: str = _opt(
        "exact", "the same for the users in the slots of X_i; history.user_slots = 0: no table", ("exact", "hash")
    )
    hash_functions: int = _opt(2, "rows that a hashed embedding is the sum of", low=1, high=16)
    hash_rows: int = _opt(1_000_000, "rows of a hashed table", low=1)


@dataclass(frozen=True)
class Loss:
    """Weights of the losses; 0 switches one off and saves its forward passes."""

    rec: float = _opt(1.0, "cross-entropy of the target's GID given the user", low=0)
    index: float = _opt(0.0, "cross-entropy of an item's GID given the item, for positive and negative item", low=0)
    bpr: float = _opt(0.0, "the user ranks the positive above the negative item (the paper's ranking loss)", low=0)
    softmax: float = _opt(
        1.0,
        "cross-entropy of the positive given the user, among train.negatives items drawn at random, corrected for how "
        "often they are drawn",
        low=0,
    )
    contrastive: float = _opt(0.0, "an item is nearer to one of the same l-1 prefix than to the negative item", low=0)
    distil: float = _opt(
        0.8,
        "share of the ranking score's own distribution in the codes that loss.rec asks for, where L_softmax trains "
        "that score and codebooks are of prefixes: the decoder then learns from the score and leaves the encoder "
        "alone; 0: the codes of the target and nothing else, as in the paper",
        low=0,
        high=1,
    )

    @property
    def weights(self) -> dict[str, float]:
        """{loss: its weight}."""
        return {name: weight for name, weight in vars(self).items() if name != "distil"}


@dataclass(frozen=True)
class Train:
    """DeepSpeed training."""

    epochs: int = _opt(25, "passes over the training targets; with causal attention, over the users", low=1)
    max_steps: int = _opt(0, "stop after so many optimizer steps; 0: epochs decide", low=0)
    global_batch: int = _opt(64, "targets per optimizer step, over all ranks; with causal attention, histories", low=1)
    negatives: int = _opt(
        4096,
        "items drawn at random for the softmax of a step, over all ranks; all items where there are no more",
        low=0,
    )
    micro_tokens: int = _opt(
        0,
        "encoder positions per forward pass of a rank, users and items together, padding counted; the rank's targets "
        "of a step are cut into so many passes as that takes; 0: one pass",
        low=0,
    )
    length_groups: int = _opt(
        4,
        "encoder passes over a forward pass's users, and over its items, by length: more pad less; 8 for 'tokens'",
        low=1,
    )
    lr: float = _opt(4e-3, "peak AdamW learning rate", low=1e-9)
    weight_decay: float = _opt(0.01, "AdamW weight decay of matrices, not of norms and embeddings", low=0)
    schedule: str = _opt(
        "linear",
        "learning rate after the warm-up: falls to 0 linearly or as a half cosine, or stays",
        ("linear", "cosine", "constant"),
    )
    warmup: float = _opt(0.05, "share of the steps with a rising learning rate", low=0, high=1)
    clip: float = _opt(1.0, "gradient norm, at most", low=1e-9)
    ema: float = _opt(
        0.999,
        "decay per step of an average of the weights that is validated and kept instead of them; 0: none",
        low=0,
        high=0.999999,
    )
    non_finite: str = _opt(
        "stop",
        "at a loss or gradient that is not finite: 'stop', or 'skip' the step on all ranks",
        ("stop", "skip"),
    )
    max_skipped: int = _opt(10, "stop after so many skipped steps all the same", low=0)
    table_optimizer: str = _opt(
        "dense",
        "of the item and user tables: 'dense': AdamW, as of the rest; 'rowwise': row-wise Adam, which touches only "
        "the rows of a batch and shards them over the ranks",
        ("dense", "rowwise"),
    )
    zero_stage: int = _opt(1, "DeepSpeed ZeRO stage", (0, 1, 2, 3))
    precision: str = _opt("auto", "'auto': bf16 on GPUs that have it, else fp32", ("auto", "fp32", "bf16"))
    recompute: bool = _opt(
        False, "keep only the inputs of the layers and compute the rest again in the backward pass: less memory"
    )
    compile: bool = _opt(False, "torch.compile the T5 layers; the first steps then take minutes")
    streams: int = _opt(8, "independent data streams; the number of ranks must divide it", low=1)
    workers: int = _opt(0, "loader processes per rank", low=0)
    log_every: int = _opt(20, "steps between two lines of progress and metrics", low=1)
    save_every: int = _opt(500, "steps between two checkpoints; every validation ends with one as well", low=1)
    keep_last: int = _opt(2, "checkpoints kept: when the newest is damaged, the one before it is used", low=1)
    resume: bool = _opt(True, "go on from <work>/checkpoints; false: delete it and start over")
    eval_every: int = _opt(0, "steps between two validations; 0: one each epoch", low=0)
    eval_users: int = _opt(10_000, "valid users of a validation, always the same sample; 0: all", low=0)
    eval_beams: int = _opt(20, "beam width at validation", low=1)
    best: str = _opt(
        "ndcg", "the weights kept are those of the highest valid 'ndcg'@10 or lowest 'loss'", ("ndcg", "loss")
    )
    patience: int = _opt(0, "stop after so many validations without better ones; 0: never", low=0)
    timeout: int = _opt(1800, "seconds that a rank waits for the others", low=1)


@dataclass(frozen=True)
class Eval:
    """Decoding and metrics."""

    split: str = _opt("test", "users and targets to score", ("valid", "test"))
    cutoffs: tuple[int, ...] = _opt((5, 10, 20), "k of recall@k, ndcg@k, mrr@k, arp@k and coverage@k")
    mode: str = _opt(
        "hybrid",
        "what ranks the items: 'generative': log p(GID); 'dense': the ranking score h(X_u) . v_i; 'hybrid': both, "
        "see eval.hybrid",
        ("hybrid", "generative", "dense"),
    )
    exhaustive: bool = _opt(
        False, "log p of all items instead of a beam's; always so when the beam is as wide as the catalog"
    )
    beams: int = _opt(100, "beam width", low=1)
    hybrid: float = _opt(
        -1.0,
        "weight w of h(X_u) . v_i, the ranking score, beside the log-probability: (log p + w h . v) / (1 + w), over "
        "the best of the beam and the best by that score; 0: of the beam's, by log p, as in the paper; -1: what ranks "
        "the valid users best",
        low=-1,
    )
    neighbours: float = _opt(
        -1.0,
        "weight of the neighbours of a history's items beside that; 0: none, as in the paper; -1: what ranks the valid "
        "users best",
        low=-1,
    )
    batch: int = _opt(256, "users decoded at once by a rank", low=1)
    mask_seen: bool = _opt(True, "items of a user's history are never recommended")
    baselines: tuple[str, ...] = _opt(BASELINES, "rankings reported beside ColaRec, see docs/baselines.md", BASELINES)
    sasrec_epochs: int = _opt(30, "epochs that SASRec is trained for, at most; they take most of the time", low=1)

    @property
    def ranks_by(self) -> str:
        """`mode`, which is 'generative' as well where nothing else of the hybrid weighs anything."""
        return "generative" if self.mode == "hybrid" and not (self.hybrid or self.neighbours) else self.mode


@dataclass(frozen=True)
class Tracking:
    """MLflow."""

    uri: str = _opt("sqlite:///runs/mlflow.db", "MLflow tracking URI: sqlite:///path or http(s)://server")
    experiment: str = _opt("colarec", "MLflow experiment")
    log_model: bool = _opt(True, "keep the trained model (weights, config, card) in MLflow as well")
    parent: str = _opt("", "MLflow run under which the runs of the stages are shown, see eval/ablate.py; empty: none")
    system_every: int = _opt(
        30,
        "seconds between two samples of what training uses of the first machine (CPU, memory, disk, GPUs); 0: none",
        low=0,
    )


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = _opt("", "name of the experiment; empty: the name of the config file")
    work: str = _opt("", "folder of its artifacts; empty: runs/<name>")
    seed: int = _opt(1, "seed of every random choice", low=0)
    data: Data = field(default_factory=Data)
    etl: Etl = field(default_factory=Etl)
    cf: Cf = field(default_factory=Cf)
    gid: Gid = field(default_factory=Gid)
    history: History = field(default_factory=History)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def work_dir(self) -> Path:
        return Path(self.work).absolute()
