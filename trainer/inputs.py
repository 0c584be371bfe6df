"""Encoder inputs X_u and X_i as arrays of ids, built by vectorised lookups; nothing is tokenised here.

An encoder position holds any of: a token (task, content or eos), an atomic item, an atomic user, and the time
features of an item. Every one has its own id array (B, L), 0 for none; the model adds the embeddings up.

    X_u = [task_u, c_1 .. c_n, eos]          c_i = [item slot, content tokens]
    X_i = [task_i, c_i, user slots, eos]

With causal attention X_u has no eos: h(X_u) is the state at c_n, and the state at c_t is that of a user with t items.
With encoding 'pooled' c_i is the item slot alone, and the mean of its content tokens is added there; without
history.content it is the slot and nothing else. The slot is there even where the model has no item embeddings
(model.item_table = "none"): it is where the time features stand.
"""

import functools
from dataclasses import dataclass

import numpy as np

from contract import schema
from contract.artifacts import Artifact
from contract.schema import Ragged
from contract.settings import Config
from gid import neighbours
from gid.neighbours import Neighbours
from gid.tree import GidTree

NUM_GAP_BUCKETS = 32


@dataclass(frozen=True)
class Catalog:
    """What is looked up by item_idx (row 0 is padding), and the sizes that the model derives from the artifacts."""

    tokens: Ragged  # content token ids of an item
    users: Ragged  # sampled train users of an item
    gids: np.ndarray  # int64 (I + 1, l)
    group: np.ndarray  # int64 (I + 1,): row of `siblings`
    siblings: Ragged  # items that share an l-1 prefix
    popularity: np.ndarray  # float32 (I + 1,): share of an item in the train events
    vocab_size: int  # content tokens; the task tokens follow
    num_users: int
    events_per_user: float  # train events of a user, on average
    event_weights: np.ndarray  # float32 (E + 1,): of a target by its event type, 1 on average; types are 1..E
    has_time: bool  # timestamps are dates, so that gaps between them mean something
    neighbours: Neighbours | None = None  # which items the same people take; None where gid/ does not know

    @functools.cached_property
    def negative_cdf(self) -> np.ndarray:
        """float64 (I + 1,): the distribution that L_softmax draws from, item_idx <= i with probability [i].

        By the square root of popularity, between uniform draws and draws by popularity: an item without train events
        is as likely as one with the fewest.
        """
        popularity = self.popularity[1:].astype(np.float64)
        root = np.sqrt(np.maximum(popularity, popularity[popularity > 0].min(initial=1.0)))
        cdf = np.concatenate([[0.0], np.cumsum(root)])
        return cdf / cdf[-1]

    def prefix(self, item_idx: np.ndarray, branching: int) -> np.ndarray:
        """int64: the l-1 prefixes of items as numbers, whose digits to the base K are the codes."""
        return self.gids[item_idx, :-1] @ branching ** np.arange(self.gids.shape[1] - 2, -1, -1)

    @property
    def num_items(self) -> int:
        return len(self.gids) - 1

    @property
    def num_events(self) -> int:
        return len(self.event_weights) - 1

    @property
    def task_user(self) -> int:
        return self.vocab_size

    @property
    def task_item(self) -> int:
        return self.vocab_size + 1


def _event_weights(manifest: dict) -> list[float]:
    """A corpus from before there were weights weighs all events alike."""
    return manifest.get("event_weights", [1.0] * len(manifest["events"]))


def _events_per_user(corpus: Artifact) -> float:
    shards = corpus.manifest["shards"]["train"]
    return sum(shard["num_events"] for shard in shards) / max(1, sum(shard["num_users"] for shard in shards))


def read_catalog(corpus: Artifact, gid: Artifact) -> Catalog:
    num_items = corpus.counts["num_items"]
    gids = schema.read_gids(gid.path)
    if len(gids) != num_items + 1:
        raise ValueError(f"{gid.path} has {len(gids) - 1} GIDs for {num_items} items; run: python gid/build.py")
    tree, num_train = GidTree(gids), schema.read_num_train(corpus.path, num_items)
    return Catalog(
        tokens=schema.map_tokens(corpus.path, num_items),
        users=schema.map_item_users(corpus.path, num_items),
        gids=gids,
        group=tree.group.numpy(),
        siblings=tree.siblings(),
        popularity=(num_train / max(1, num_train.sum())).astype(np.float32),
        vocab_size=corpus.counts["vocab_size"],
        num_users=corpus.counts["num_users"],
        events_per_user=_events_per_user(corpus),
        event_weights=np.array([1.0, *_event_weights(corpus.manifest)], np.float32),
        has_time=corpus.manifest["time_unit"] != "order",
        neighbours=neighbours.read(gid.path),
    )


@dataclass(frozen=True)
class History:
    """The items that the encoder sees of B users, oldest first, left-aligned in n columns; 0 pads."""

    item_idx: np.ndarray  # int64 (B, n)
    event: np.ndarray  # int64 (B, n)
    recency: np.ndarray  # int64 (B, n): 1 for the latest item, 2 for the one before ...; 0 without order, or causal
    gap: np.ndarray  # int64 (B, n): see gap_bucket; 0 without time


def gap_bucket(milliseconds: np.ndarray) -> np.ndarray:
    """log2 of the seconds between an event and the user's latest one, as 1..NUM_GAP_BUCKETS - 1.

    Measured from the latest event of the history and not from the target, whose time must not be known.
    """
    return 1 + np.minimum(np.log2(1 + np.maximum(milliseconds, 0) / 1000), NUM_GAP_BUCKETS - 2).astype(np.int64)


def user_inputs(config: Config, catalog: Catalog, history: History) -> dict[str, np.ndarray]:
    """X_u of B users; see `_assemble` for the arrays."""
    features = {"event": history.event, "recency": history.recency, "gap": history.gap}
    return _assemble(config, catalog, catalog.task_user, history.item_idx, features, ends=_ends(config))


def item_inputs(config: Config, catalog: Catalog, item_idx: np.ndarray, key: int) -> dict[str, np.ndarray]:
    """X_i of items (B,). The users in its slots depend on (key, item) alone, not on the batch around it."""
    lengths = catalog.users.lengths_at(item_idx)
    num_slots = np.minimum(lengths, config.history.user_slots)
    start = (_mix(item_idx.astype(np.uint64), key) % np.maximum(lengths, 1).astype(np.uint64)).astype(np.int64)
    column = np.arange(config.history.user_slots)
    # A circular window into a row whose order is random already: distinct users, no sort.
    position = catalog.users.offsets[item_idx][:, None] + (start[:, None] + column) % np.maximum(lengths, 1)[:, None]
    filled = column < num_slots[:, None]
    slots = np.zeros((len(item_idx), config.history.user_slots), np.int64)
    slots[filled] = catalog.users.values[position[filled]]
    return _assemble(config, catalog, catalog.task_item, item_idx[:, None].astype(np.int64), {}, slots)


def user_lengths(config: Config, catalog: Catalog, item_idx: np.ndarray) -> np.ndarray:
    """int64 (B,): the positions that X_u takes of histories item_idx (B, n)."""
    segments = _segment_lengths(config, catalog, item_idx, np.zeros(len(item_idx), np.int64))
    return 1 + segments.sum(1) + _ends(config)


def _ends(config: Config) -> bool:
    """Whether X_u has an eos."""
    return config.history.attention != "causal"


def item_lengths(config: Config, catalog: Catalog, item_idx: np.ndarray) -> np.ndarray:
    """int64 (B,): the positions that X_i takes of items (B,)."""
    num_users = np.minimum(catalog.users.lengths_at(item_idx), config.history.user_slots)
    return 2 + _segment_lengths(config, catalog, item_idx[:, None], num_users).sum(1) + num_users


def _segment_lengths(config: Config, catalog: Catalog, item_idx: np.ndarray, num_users: np.ndarray) -> np.ndarray:
    """int64 (B, n): lengths of the segments c_i, an item slot plus, unless pooled, its content tokens; 0 left out."""
    lengths = (item_idx > 0).astype(np.int64)
    if config.history.encoding == "tokens":
        if config.history.content:
            lengths += catalog.tokens.lengths_at(item_idx)  # item 0 has none
        room = config.history.max_tokens - 2 - num_users[:, None]
        lengths[np.cumsum(lengths[:, ::-1], 1)[:, ::-1] > room] = 0
    return lengths


def length_groups(lengths: np.ndarray, num_groups: int) -> list[tuple[int, int, int]]:
    """Cuts rows sorted by length into exactly `num_groups` runs (begin, end, width), each padded to its own width, so
    that all positions together are the fewest.

    Args:
        lengths: int64 (B,), ascending, B >= num_groups.
    """
    # Cuts between equal lengths save nothing; some are there only so that the runs are enough.
    cuts = np.union1d(np.flatnonzero(np.diff(lengths)) + 1, [*range(num_groups), len(lengths)])
    rows = cuts - cuts[:, None]
    positions_IJ = np.where(rows > 0, rows * lengths[cuts - 1], np.inf)  # of the run from cut i to cut j
    fewest_J, choices = positions_IJ[0], []
    for _ in range(num_groups - 1):
        total_IJ = fewest_J[:, None] + positions_IJ
        choices.append(total_IJ.argmin(0))
        fewest_J = total_IJ.min(0)
    last, groups = len(cuts) - 1, []
    for choice_J in [*reversed(choices), np.zeros(len(cuts), np.int64)]:
        groups.append((int(cuts[choice_J[last]]), int(cuts[last]), int(lengths[cuts[last] - 1])))
        last = choice_J[last]
    return groups[::-1]


def _assemble(
    config: Config,
    catalog: Catalog,
    task: int,
    item_idx: np.ndarray,
    features: dict[str, np.ndarray],
    user_slots: np.ndarray | None = None,
    ends: bool = True,
) -> dict[str, np.ndarray]:
    """Lays out [task, c_1 .. c_n, user slots, eos], without eos unless it `ends` so.

    Args:
        item_idx: int64 (B, n), left-aligned; 0 pads.
        features: int64 (B, n) each, put at the item slots.
        user_slots: int64 (B, m), left-aligned; 0 pads.

    Returns:
        mask: bool (B, L); eos: int64 (B,), its position or else the last one; int64 (B, L) each of token, item, user
        and the features.
        With encoding 'pooled' and content also content_tokens (T,) and content_offsets (R,), the bags of the distinct
        items, and content_row (B, L), 1 + the bag of a position.

    When the content does not fit history.max_tokens, the oldest items are left out.
    """
    batch, _ = item_idx.shape
    num_users = (user_slots > 0).sum(1) if user_slots is not None else np.zeros(batch, np.int64)
    lengths = _segment_lengths(config, catalog, item_idx, num_users)
    start = 1 + np.cumsum(lengths, 1) - lengths
    end = 1 + lengths.sum(1)
    eos = end + num_users - (not ends)
    width = int(eos.max()) + 1

    arrays = {name: np.zeros((batch, width), np.int64) for name in ("token", "item", "user", "event", "recency", "gap")}
    arrays["token"][:, 0] = task
    if ends:
        arrays["token"][np.arange(batch), eos] = schema.EOS
    row, column = np.nonzero(lengths)
    slot = start[row, column]
    arrays["item"][row, slot] = item_idx[row, column]
    for name, values in features.items():
        arrays[name][row, slot] = values[row, column]
    if user_slots is not None:
        user_row, user_column = np.nonzero(user_slots)
        arrays["user"][user_row, end[user_row] + user_column] = user_slots[user_row, user_column]
    if config.history.content and config.history.encoding == "pooled":
        items, bag = np.unique(item_idx[row, column], return_inverse=True)
        arrays["content_row"] = np.zeros((batch, width), np.int64)
        arrays["content_row"][row, slot] = 1 + bag
        arrays |= content_bags(config, catalog, items)
    elif config.history.content:
        items = item_idx[row, column]
        counts = catalog.tokens.lengths_at(items)
        position = np.repeat(slot + 1, counts) + ragged_arange(counts)
        arrays["token"][np.repeat(row, counts), position] = catalog.tokens.take(items).values
    arrays["mask"] = np.arange(width) <= eos[:, None]
    arrays["eos"] = eos
    return arrays


def content_bags(config: Config, catalog: Catalog, item_idx: np.ndarray) -> dict[str, np.ndarray]:
    """The content tokens of items (N,), int64 (T,), and where those of each begin, int64 (N,); none without content."""
    if not config.history.content:
        return {}
    counts = catalog.tokens.lengths_at(item_idx)
    return {
        "content_tokens": catalog.tokens.take(item_idx).values.astype(np.int64),
        "content_offsets": np.cumsum(counts) - counts,
    }


def items_of_prefix(catalog: Catalog, item_idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items that share the l-1 prefix of each of items (S,), int64 (S, C), 0 where there are no more; and the
    column of the item itself, int64 (S,)."""
    group = catalog.group[item_idx]
    begin, count = catalog.siblings.offsets[group], catalog.siblings.lengths_at(group)
    column = np.arange(count.max(initial=1))
    place = np.minimum(begin[:, None] + column, len(catalog.siblings.values) - 1)
    items = np.where(column < count[:, None], catalog.siblings.values[place], 0)
    return items, (items == item_idx[:, None]).argmax(1)


def ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """0..lengths[0]-1, 0..lengths[1]-1, ... as one int64 array."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 finaliser of uint64 values under a key: a fixed hash, so that a draw needs no generator state."""
    with np.errstate(over="ignore"):
        z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
