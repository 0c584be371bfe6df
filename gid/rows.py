"""Rows of a large matrix, read in pieces, centred and scaled."""

from collections.abc import Iterator

import numpy as np

CHUNK = 16_384  # rows, some MB: stays in the cache


class Rows:
    """Some rows of a matrix, in memory or memory-mapped, standardised when they are read.

    They are centred and scaled as a whole: float32 then holds the differences, and no square overflows.

    Args:
        x: float (n, d).
        members: int, row numbers; all by default.

    Raises:
        ValueError: a row is not finite.
    """

    def __init__(self, x: np.ndarray, members: np.ndarray | None = None):
        self._x, self._members = x, members
        self._shift, self._scale = np.zeros(x.shape[1]), 1.0
        total, low, high = np.zeros(x.shape[1]), np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf)
        for part in self.chunks():
            chunk = self._read(part)
            low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
            with np.errstate(over="ignore", invalid="ignore"):  # said below
                total += chunk.sum(0, dtype=np.float64)
        if len(self):
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                self._refuse()
            self._shift = total / len(self)
            self._scale = 1 / (np.maximum(high - self._shift, self._shift - low).max() or 1)

    def __len__(self) -> int:
        return len(self._x) if self._members is None else len(self._members)

    @property
    def dim(self) -> int:
        return self._x.shape[1]

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self), CHUNK):
            yield slice(start, min(start + CHUNK, len(self)))

    def take(self, index: slice | np.ndarray) -> np.ndarray:
        """float32 (M, d), standardised."""
        return ((self._read(index) - self._shift) * self._scale).astype(np.float32)

    def _read(self, index: slice | np.ndarray) -> np.ndarray:
        return self._x[index if self._members is None else self._members[index]]

    def _refuse(self) -> None:
        bad = np.concatenate([~np.isfinite(self._read(part)).all(axis=1) for part in self.chunks()])
        first = int(np.flatnonzero(bad)[0])
        number = first if self._members is None else int(self._members[first])
        raise ValueError(f"row {number} of the embeddings is not finite; {bad.sum()} such rows")
