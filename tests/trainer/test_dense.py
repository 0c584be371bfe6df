import numpy as np
import pytest
import torch

from tests import tiny
from trainer import dense, packing
from trainer.inputs import item_inputs

INF = float("inf")


@pytest.mark.parametrize("which", ["h", "v"])
@torch.no_grad()
def test_item_vectors_are_those_of_each_item_alone(tmp_path, monkeypatch, which):
    config, _, catalog, model = tiny.tiny_room(tmp_path / "work")
    monkeypatch.setattr(dense, "ITEMS_AT_ONCE", 7)
    items = np.array([1, 2, 3, 5, 7, 8, 9, 20, 40])
    vectors = dense.item_vectors(config, model, catalog, torch.device("cpu"), items, which)
    assert vectors.shape == (9, config.model.d_model)
    for row, item in enumerate(items):
        alone = packing.to_tensors(item_inputs(config, catalog, np.array([item]), key=config.seed))
        expected = model.encode(alone)[0, alone["eos"][0]] * config.model.d_model**-0.5
        if which == "v":  # what they are in the input
            tokens = model.token.weight[alone["content_tokens"]].mean(0)
            expected = model.item.weight[item] + tokens
        assert torch.allclose(vectors[row], expected, atol=1e-6)


def test_an_item_is_repeated_where_it_stands_further_left_as_well():
    item = torch.tensor([[2, 1, 1, 2, 5, 2], [3, 3, 4, 0, 0, 4]])
    expected = [[False, False, True, True, False, True], [False, True, False, False, True, True]]
    assert dense.repeated(item).tolist() == expected


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by", ["_by_faiss", "_by_matmul"])
def test_search_is_exact_and_leaves_out_what_was_seen(masked, by, monkeypatch):
    monkeypatch.setattr(dense, "_by_faiss", getattr(dense, by))
    monkeypatch.setattr(dense, "MAX_SCORES", 5 * 13)
    generator = torch.Generator().manual_seed(1)
    items = np.arange(2, 62)
    vectors, users = torch.randn(60, 8, generator=generator), torch.randn(5, 8, generator=generator)
    expected = torch.full((5, 62), -INF)
    expected[:, 2:] = users @ vectors.T
    seen = (torch.tensor([0, 0, 3, 4]), torch.tensor([int(expected[0].argmax()), 5, int(expected[3].argmax()), 60]))
    if masked:
        expected[seen] = -INF
    found, score = dense.Index(vectors, items, 61).search(users, 10, *(seen if masked else (None, None)))
    assert found.tolist() == expected.topk(10).indices.tolist()
    assert torch.allclose(score, expected.topk(10).values, atol=1e-6)


def test_fewer_items_than_asked_for():
    index = dense.Index(torch.tensor([[1.0], [2]]), np.array([1, 2]), 3)
    seen = torch.tensor([0]), torch.tensor([2])
    found, score = index.search(torch.ones(2, 1), 4, *seen)
    assert found.tolist() == [[1, 0, 0, 0], [2, 1, 0, 0]]
    assert score.tolist() == [[1, -INF, -INF, -INF], [2, 1, -INF, -INF]]
