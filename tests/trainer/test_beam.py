import dataclasses
import math

import numpy as np
import pytest
import torch

from gid.tree import GidTree
from tests import tiny
from trainer import dense, loader
from trainer import model as model_module
from trainer.beam import all_items, beam_search, gid_log_p
from trainer.initial import init_codes


@pytest.fixture
def room(tmp_path):
    """A function (codebooks, **overrides) -> (model with weights far from its start, tree, catalog, an eval batch)."""

    def make(codebooks="prefix", **overrides):
        overrides |= {"model__num_decoder_layers": "2", "model__codebooks": codebooks}
        make.config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work", **overrides)
        tiny.move_from_start(model)
        batch = next(loader.eval_batches(make.config, catalog, corpus, "test", 7, 0, 1))
        return model, GidTree(catalog.gids, make.config.gid.branching), catalog, batch

    return make


@torch.no_grad()
def enumerate_items(room, model, catalog, batch) -> torch.Tensor:
    """(B, I + 1): log p of every item's GID, by the model's training code."""
    log_p = tiny.log_p_of_all_items(room.config, model, catalog, batch).sum(-1)
    return torch.nn.functional.pad(log_p, (1, 0), value=-math.inf)


def leaves(room, model, catalog):
    """v_i of all items, where leaves are items."""
    if not model.config.leaves_are_items:
        return None
    every = np.arange(1, catalog.num_items + 1)
    v = dense.item_vectors(room.config, model, catalog, torch.device("cpu"), every, "v")
    return torch.nn.functional.pad(v, (0, 0, 1, 0))


@pytest.mark.parametrize(
    ("codebooks", "settings"),
    [("level", {}), ("prefix", {}), ("prefix", {"history__attention": "causal"}), ("prefix", {"gid__branching": "7"})],
)
def test_wide_beam_equals_full_enumeration(room, codebooks, settings):
    model, tree, catalog, batch = room(codebooks, **settings)
    scores, v = enumerate_items(room, model, catalog, batch), leaves(room, model, catalog)
    assert scores[:, 1:].std() > 0.5
    item, score = beam_search(model, tree, batch["user"], num_beams=1000, num_results=40, v_ID=v)
    expected = scores.sort(descending=True, dim=1)
    assert torch.equal(item, expected.indices[:, :40])
    assert torch.allclose(score, expected.values[:, :40], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_random_trees_with_ties_and_seen_items(room, seed):
    """Codes 0 and 1 mean the same on the last level, so that items which differ in it alone are equally probable."""
    model, _, catalog, batch = room("level")
    with torch.no_grad():
        model.head_TKD[2, 1] = model.head_TKD[2, 0]
    rng = np.random.default_rng(seed)
    paths = np.stack(np.unravel_index(rng.permutation(64)[:40], (4, 4, 4)), 1)
    catalog = dataclasses.replace(catalog, gids=np.concatenate([np.zeros((1, 3), np.int64), paths]))
    scores = enumerate_items(room, model, catalog, batch)
    scores[batch["seen_row"], batch["seen_item"]] = -math.inf
    rounded = scores.double().round(decimals=4) - torch.arange(41) * 1e-7
    assert (scores[:, 1:].double().round(decimals=4).sort(1).values.diff(dim=1) == 0).any()
    expected = rounded.sort(descending=True, dim=1).indices[:, :25]
    seen = batch["seen_row"], batch["seen_item"]
    item, score = beam_search(model, GidTree(catalog.gids, 4), batch["user"], 1000, 25, *seen)
    assert torch.equal(item, expected)
    assert torch.allclose(score, scores.gather(1, expected), atol=1e-4)


@pytest.mark.parametrize("codebooks", ["level", "prefix"])
@pytest.mark.parametrize("rows_at_once", [1, 30, 10_000])
def test_all_items_are_scored_once_in_parts_of_any_size(room, rows_at_once, codebooks):
    model, _, catalog, batch = room(codebooks)
    v = leaves(room, model, catalog)
    some = np.array([3, 4, 7, 20, 21, 22, 39])
    tree = GidTree(catalog.gids, 4, some)
    parts = list(all_items(model, tree, model.encode(batch["user"]), batch["user"]["mask"], rows_at_once, v))
    items = torch.cat([item for item, _ in parts])
    assert sorted(items.tolist()) == some.tolist()
    assert (len(parts) > 1) == (rows_at_once < 10_000)
    expected = enumerate_items(room, model, catalog, batch)[:, items]
    assert torch.allclose(torch.cat([log_p for _, log_p in parts], 1), expected, atol=1e-4)


@pytest.mark.parametrize("codebooks", ["level", "prefix"])
@torch.no_grad()
def test_log_p_of_given_items_is_that_of_enumeration(room, codebooks):
    model, tree, catalog, batch = room(codebooks)
    states = model.encode(batch["user"])
    items = torch.randint(1, catalog.num_items + 1, (len(states), 9), generator=torch.Generator().manual_seed(0))
    gids, v = torch.from_numpy(catalog.gids)[items], leaves(room, model, catalog)
    found = gid_log_p(model, tree, states, batch["user"]["mask"], items, gids, v)
    expected = enumerate_items(room, model, catalog, batch).gather(1, items)
    assert torch.allclose(found.sum(-1), expected, atol=1e-4)


@pytest.mark.parametrize("codebooks", ["level", "prefix"])
def test_narrow_beam_follows_the_best_prefixes(room, codebooks):
    """Beam search on the enumerated probabilities, written with loops."""
    model, tree, catalog, batch = room(codebooks)
    num_beams = 3
    item, score = beam_search(model, tree, batch["user"], num_beams, num_results=5, v_ID=leaves(room, model, catalog))
    every = tiny.log_p_of_all_items(room.config, model, catalog, batch)
    for row in range(len(every)):
        log_p = {}  # of every prefix, from the items under it
        for i in range(1, catalog.num_items + 1):
            for t in range(1, 4):
                log_p[tuple(catalog.gids[i, :t].tolist())] = every[row, i - 1, :t].sum().item()
        beams = [()]
        for t in range(1, 4):
            grown = [p for p in log_p if len(p) == t and p[:-1] in beams]
            beams = sorted(grown, key=log_p.get, reverse=True)[: num_beams if t < 3 else 5]
        of_gid = {tuple(catalog.gids[i].tolist()): i for i in range(1, catalog.num_items + 1)}
        assert item[row].tolist() == [of_gid[p] for p in beams]
        assert score[row].tolist() == pytest.approx([log_p[p] for p in beams], abs=1e-4)


def test_seen_items_are_left_out_and_the_rest_moves_up(room):
    model, tree, catalog, batch = room()
    v = leaves(room, model, catalog)
    free, _ = beam_search(model, tree, batch["user"], 1000, 40, v_ID=v)
    masked, score = beam_search(model, tree, batch["user"], 1000, 40, batch["seen_row"], batch["seen_item"], v_ID=v)
    for row in range(len(free)):
        seen = set(batch["seen_item"][batch["seen_row"] == row].tolist())
        assert seen
        expected = [i for i in free[row].tolist() if i not in seen]
        assert masked[row].tolist() == expected + [0] * len(seen)
        assert torch.isinf(score[row, len(expected) :]).all()


def test_more_results_than_items_are_padded(room):
    model, tree, catalog, batch = room()
    item, score = beam_search(model, tree, batch["user"], 1000, 50, v_ID=leaves(room, model, catalog))
    assert (item[:, :40] > 0).all()
    assert (item[:, 40:] == 0).all()
    assert torch.isinf(score[:, 40:]).all()


def test_equal_scores_are_ordered_by_item(room):
    model, _, catalog, batch = room("level")
    with torch.no_grad():
        model.head_TKD[:] = 0.0
    # Paths in an order unlike that of the items.
    gids = catalog.gids.copy()
    gids[1:] = gids[1:][np.random.default_rng(0).permutation(catalog.num_items)]
    item, _ = beam_search(model, GidTree(gids, 4), batch["user"], 1000, 40)
    assert item.tolist() == [list(range(1, 41))] * len(item)


def test_every_beam_ends_in_a_real_item_when_the_tree_is_sparse(room):
    model, _, catalog, batch = room()
    gids = np.array([[0, 0, 0], [0, 1, 0], [3, 2, 1]])  # two items; most codes lead nowhere
    v = leaves(room, model, catalog)[:3]
    item, _ = beam_search(model, GidTree(gids, 4), batch["user"], num_beams=10, num_results=3, v_ID=v)
    assert [sorted(row) for row in item.tolist()] == [[0, 1, 2]] * len(item)


@pytest.mark.parametrize("attention", ["full", "causal"])
@torch.no_grad()
def test_before_training_the_tree_ranks_as_the_dense_search_does(room, monkeypatch, attention):
    """With a vector for every item below each code, d_t = h(X) and the last norm at 0: p(GID | X) is softmax(h . v)."""
    monkeypatch.setattr(model_module, "ITEMS_PER_VECTOR", 0.1)
    model, tree, catalog, batch = room(history__attention=attention, model__code_vectors="16")
    for weights in (model.decoder.final_layer_norm.weight, *model.code_vectors):
        weights.zero_()
    v = leaves(room, model, catalog)
    init_codes(model, torch.from_numpy(catalog.gids), v, seed=3)
    states, user = model.encode(batch["user"]), batch["user"]
    expected = (dense.user_vectors(model, states, user) @ v[1:].T).log_softmax(-1)
    log_p = tiny.log_p_of_all_items(room.config, model, catalog, batch).sum(-1)
    assert expected.std() > 0.5
    assert torch.allclose(log_p, expected, atol=5e-3)  # parts without an item have next to no probability, not none
    item, score = beam_search(model, tree, user, 1000, 40, v_ID=v)
    assert torch.allclose(expected.gather(1, item - 1), expected.sort(descending=True, dim=1).values, atol=5e-3)
    assert torch.allclose(score, expected.gather(1, item - 1), atol=5e-3)
    narrow, _ = beam_search(model, tree, user, 8, 1, v_ID=v)
    assert torch.equal(narrow[:, 0], expected.argmax(1) + 1)
