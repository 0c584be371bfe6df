import numpy as np
import pytest
import torch

from eval import dense
from tests import tiny
from trainer import loader
from trainer.inputs import item_inputs

INF = float("inf")


@torch.no_grad()
def test_item_vectors_are_those_of_each_item_alone(tmp_path, monkeypatch):
    config, _, catalog, model = tiny.tiny_room(tmp_path / "work")
    monkeypatch.setattr(dense, "ITEMS_AT_ONCE", 7)
    vectors = dense.item_vectors(config, model, catalog, torch.device("cpu"))
    assert vectors.shape == (41, config.model.d_model)
    assert not vectors[0].any()
    for item in (1, 7, 8, 40):
        alone = loader.to_tensors(item_inputs(config, catalog, np.array([item]), key=config.seed))
        expected = model.encode(alone)[0, alone["eos"][0]] * config.model.d_model**-0.5
        assert torch.allclose(vectors[item], expected, atol=1e-6)


def test_the_hybrid_adds_the_ranking_score():
    item = torch.tensor([[1, 2, 3], [3, 0, 0]])
    log_p = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -INF, -INF]])
    vectors = torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 2]])
    users = torch.tensor([[1.0, 2.0], [0, 1]])
    found, score = dense.hybrid(item, log_p, users, vectors, 0.5, k=2)  # 1: -1 + .5, 2: -2 + 1, 3: -3 + 2
    assert found.tolist() == [[1, 2], [3, 0]]
    assert score.tolist() == [[-0.5, -1.0], [0.0, -INF]]
    assert dense.hybrid(item, log_p, users, vectors, 2.0, k=2)[0].tolist() == [[3, 2], [3, 0]]


def test_a_candidate_that_is_there_twice_counts_once():
    item = torch.tensor([[2, 1, 1, 2, 0, 3, 0]])
    log_p = torch.tensor([[-2.0, -1.0, -1.0, -2.0, -0.5, -3.0, -0.5]])
    found, score = dense.hybrid(item, log_p, torch.zeros(1, 2), torch.zeros(4, 2), 1.0, k=4)
    assert found.tolist() == [[1, 2, 3, 0]]
    assert score.tolist() == [[-1.0, -2.0, -3.0, -INF]]


def test_equal_scores_are_ordered_by_item():
    item, log_p = torch.tensor([[9, 4, 7]]), torch.zeros(1, 3)
    assert dense.hybrid(item, log_p, torch.zeros(1, 2), torch.zeros(10, 2), 1.0, 3)[0].tolist() == [[4, 7, 9]]


@pytest.mark.parametrize("masked", [False, True])
def test_search_is_exact_and_leaves_out_what_was_seen(masked):
    generator = torch.Generator().manual_seed(1)
    items, users = torch.randn(61, 8, generator=generator), torch.randn(5, 8, generator=generator)
    score = users @ items.T
    score[:, 0] = -INF
    seen = (torch.tensor([0, 0, 3, 4]), torch.tensor([int(score[0].argmax()), 5, int(score[3].argmax()), 60]))
    if masked:
        score[seen] = -INF
    found = dense.search(dense.build_index(items), users, 10, *(seen if masked else (None, None)))
    assert found.tolist() == score.topk(10).indices.tolist()


def test_fewer_items_than_asked_for():
    items = torch.tensor([[0.0], [1], [2]])
    index = dense.build_index(items)
    seen = torch.tensor([0]), torch.tensor([2])
    assert dense.search(index, torch.ones(2, 1), 4, *seen).tolist() == [[1, 0, 0, 0], [2, 1, 0, 0]]
