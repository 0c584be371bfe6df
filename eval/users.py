"""The users that an evaluation scores: what is known of them, and what they chose next."""

from dataclasses import dataclass

import numpy as np

from contract.artifacts import Artifact
from contract.schema import NO_TIME, Ragged
from trainer.loader import shard_paths
from trainer.samples import read_shard


@dataclass(frozen=True)
class EvalUsers:
    """N users with T targets, in ascending order of user_idx."""

    user_idx: np.ndarray  # int64 (N,)
    history: Ragged  # int32 item_idx, in time order; the seen items
    targets: Ragged  # int32 item_idx, at least one per user
    # What only slices and OTTO's metric look at; see `read_eval_users`.
    last_ts: np.ndarray | None = None  # int64 (N,): of the last event of the history, NO_TIME where unknown
    target_ts: np.ndarray | None = None  # int64 (T,), NO_TIME where unknown
    target_event: np.ndarray | None = None  # int8 (T,): 0 unknown, else 1 + position in the corpus manifest's "events"

    def __len__(self) -> int:
        return len(self.user_idx)

    def take(self, rows: np.ndarray) -> "EvalUsers":
        """The users of these rows (ascending), for example a rank's share: `np.arange(rank, len(users), world)`."""

        def of_targets(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else Ragged(values, self.targets.offsets).take(rows).values

        return EvalUsers(
            self.user_idx[rows],
            self.history.take(rows),
            self.targets.take(rows),
            None if self.last_ts is None else self.last_ts[rows],
            of_targets(self.target_ts),
            of_targets(self.target_event),
        )


def read_eval_users(corpus: Artifact, split: str) -> EvalUsers:
    """Reads all shards of the split, 'valid' or 'test'.

    At test time the history holds the valid items when etl.valid_in_history is set: the shards are written so.

    Raises:
        ValueError: the split has no users, a user occurs twice, or a shard cannot be read.
    """
    blocks = [read_shard(path) for path in shard_paths(corpus, split)]
    if not blocks:
        raise ValueError(f"{corpus.path} has no {split} users: all items of all users are in other splits")
    user_idx, ts, event, is_target = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("user_idx", "ts", "event", "is_target")
    )
    lengths = np.concatenate([block.item_idx.lengths for block in blocks])
    items = Ragged(np.concatenate([block.item_idx.values for block in blocks]), _offsets(lengths))
    history = _select(items, ~is_target)
    last = np.maximum(history.offsets[1:] - 1, 0)
    history_ts = np.append(ts[~is_target], NO_TIME)  # so that there is one when all histories are empty
    users = EvalUsers(
        user_idx,
        history,
        _select(items, is_target),
        np.where(history.lengths > 0, history_ts[last], NO_TIME),
        ts[is_target],
        event[is_target],
    ).take(np.argsort(user_idx))
    if (np.diff(users.user_idx) == 0).any():
        raise ValueError(f"{corpus.path}: a user is twice in the {split} shards; run again: spark-submit etl/build.py")
    return users


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """int64 (N + 1,): where the rows of these lengths begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _select(rows: Ragged, keep: np.ndarray) -> Ragged:
    """The values where `keep` is true, in the same rows."""
    return Ragged(rows.values[keep], _offsets(keep)[rows.offsets])
