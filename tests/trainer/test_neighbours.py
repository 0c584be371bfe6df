"""The neighbours of a history: tensor code against sums over pairs."""

import numpy as np
import pytest
import torch

from gid import neighbours
from trainer.neighbours import FLOOR, Neighbours

INF = float("inf")
# Item 1 has the neighbours 2 and 3, item 2 has 1 and 3, item 4 has 5; 3 and 5 have none.
ITEM = np.array([[0, 0], [2, 3], [3, 1], [0, 0], [5, 0], [0, 0]], np.int32)
WEIGHT = np.array([[0, 0], [4, 1], [3, 2], [0, 0], [7, 0], [0, 0]], np.float32)


def table(only=(1, 2, 3, 4, 5)):
    may_be_found = torch.zeros(6, dtype=torch.bool)
    may_be_found[list(only)] = True
    return Neighbours(neighbours.Neighbours(ITEM, WEIGHT), may_be_found)


def log1p(share):
    return pytest.approx(np.log1p(share / FLOOR), rel=1e-5)


def test_weights_add_up_over_a_history():
    found = table().of(torch.tensor([[0, 1, 0, 2], [4, 0, 0, 0], [3, 0, 0, 0]]))
    every = torch.arange(6).expand(3, -1)
    both, one, none = found.scores(every).tolist()
    assert both[1:] == [log1p(2 / 4), log1p(1), log1p(4 / 4), 0, 0]  # n is 2, 4, 1 + 3
    assert one[1:] == [0, 0, 0, 0, log1p(1)]
    assert none == [0] * 6


def test_an_item_twice_in_a_history_counts_twice():
    once, twice = (table().of(torch.tensor([row])).scores(torch.tensor([[1, 2, 3]])) for row in ([1, 2, 0], [1, 2, 2]))
    assert once[0].tolist() == [log1p(2 / 4), log1p(1), log1p(1)]
    assert twice[0].tolist() == [log1p(4 / 7), log1p(4 / 7), log1p(1)]


def test_the_best_are_candidates_not_seen_and_ties_go_by_item():
    history = torch.tensor([[1, 2], [4, 0]])
    of = table().of(history)
    item, score = table().best(of, 4)
    assert item.tolist() == [[2, 3, 1, 0], [5, 0, 0, 0]]
    assert score[0].tolist() == [log1p(1), log1p(1), log1p(0.5), -INF]
    item, _ = table().best(of, 4, torch.tensor([0, 1]), torch.tensor([2, 5]))
    assert item.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]]
    item, _ = table(only=(1, 5)).best(of, 2)
    assert item.tolist() == [[1, 0], [5, 0]]


def test_a_history_without_items_has_none():
    of = table().of(torch.zeros(2, 3, dtype=torch.long))
    assert not of.scores(torch.tensor([[1, 2], [3, 4]])).any()
    assert not table().best(of, 3)[0].any()
