"""Literal rows for tests."""

import numpy as np

from contract.schema import Ragged


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged(np.array([value for row in rows for value in row], np.int32), np.cumsum([0, *map(len, rows)]))
