import dataclasses
import math

import numpy as np
import pytest
import torch

from gid.tree import GidTree
from tests import tiny
from trainer import loader
from trainer.beam import all_items, beam_search, gid_log_p


@pytest.fixture
def room(tmp_path):
    """A function (**overrides) -> (model with weights far from its start, tree, catalog, an eval batch)."""

    def make(**overrides):
        config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work", model__num_decoder_layers="2", **overrides)
        with torch.no_grad():
            model.codebook_TKD.mul_(30)  # probabilities that differ clearly between codes and between users
            model.start_D.mul_(10)
        batch = next(loader.eval_batches(config, catalog, corpus, "test", 7, 0, 1))
        return model, GidTree(catalog.gids, config.gid.branching), catalog, batch

    return make


@torch.no_grad()
def enumerate_items(model, catalog, batch) -> torch.Tensor:
    """(B, I + 1): log p of every item's GID, by the model's training code."""
    states = model.encode(batch["user"])
    scores = []
    for item in range(catalog.num_items + 1):
        gid = torch.from_numpy(catalog.gids[item]).expand(len(states), -1)
        scores.append(-model.gid_loss(states, batch["user"]["mask"], gid).sum(1))
    scores = torch.stack(scores, 1)
    scores[:, 0] = -math.inf
    return scores


@pytest.mark.parametrize("tied", ["true", "false"])
def test_wide_beam_equals_full_enumeration(room, tied):
    model, tree, catalog, batch = room(model__tie_codebooks=tied)
    scores = enumerate_items(model, catalog, batch)
    assert scores[:, 1:].std() > 0.5
    item, score = beam_search(model, tree, batch["user"], num_beams=1000, num_results=40)
    expected = scores.sort(descending=True, dim=1)
    assert torch.equal(item, expected.indices[:, :40])
    assert torch.allclose(score, expected.values[:, :40], atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_random_trees_with_ties_and_seen_items(room, seed):
    """Codes 0 and 1 mean the same on the last level, so that items which differ in it alone are equally probable."""
    model, _, catalog, batch = room()
    with torch.no_grad():
        model.codebook_TKD[2, 1] = model.codebook_TKD[2, 0]
    rng = np.random.default_rng(seed)
    paths = np.stack(np.unravel_index(rng.permutation(64)[:40], (4, 4, 4)), 1)
    catalog = dataclasses.replace(catalog, gids=np.concatenate([np.zeros((1, 3), np.int64), paths]))
    scores = enumerate_items(model, catalog, batch)
    scores[batch["seen_row"], batch["seen_item"]] = -math.inf
    rounded = scores.double().round(decimals=4) - torch.arange(41) * 1e-7
    assert (scores[:, 1:].double().round(decimals=4).sort(1).values.diff(dim=1) == 0).any()
    expected = rounded.sort(descending=True, dim=1).indices[:, :25]
    seen = batch["seen_row"], batch["seen_item"]
    item, score = beam_search(model, GidTree(catalog.gids, 4), batch["user"], 1000, 25, *seen)
    assert torch.equal(item, expected)
    assert torch.allclose(score, scores.gather(1, expected), atol=1e-4)


@pytest.mark.parametrize("rows_at_once", [1, 30, 10_000])
def test_all_items_are_scored_once_in_parts_of_any_size(room, rows_at_once):
    model, _, catalog, batch = room()
    some = np.array([3, 4, 7, 20, 21, 22, 39])
    tree = GidTree(catalog.gids, 4, some)
    parts = list(all_items(model, tree, model.encode(batch["user"]), batch["user"]["mask"], rows_at_once))
    items = torch.cat([item for item, _ in parts])
    assert sorted(items.tolist()) == some.tolist()
    assert (len(parts) > 1) == (rows_at_once < 10_000)
    expected = enumerate_items(model, catalog, batch)[:, items]
    assert torch.allclose(torch.cat([log_p for _, log_p in parts], 1), expected, atol=1e-4)


@torch.no_grad()
def test_log_p_of_given_items_is_that_of_enumeration(room):
    model, _, catalog, batch = room()
    states = model.encode(batch["user"])
    items = torch.randint(1, catalog.num_items + 1, (len(states), 9), generator=torch.Generator().manual_seed(0))
    found = gid_log_p(model, states, batch["user"]["mask"], torch.from_numpy(catalog.gids)[items])
    expected = enumerate_items(model, catalog, batch).gather(1, items)
    assert torch.allclose(found, expected, atol=1e-4)


def test_narrow_beam_follows_the_best_prefixes(room):
    """Beam search on the enumerated probabilities, written with loops."""
    model, tree, catalog, batch = room()
    states = model.encode(batch["user"])
    num_beams = 3
    item, score = beam_search(model, tree, batch["user"], num_beams, num_results=5)
    for row in range(len(states)):
        inputs = {"states": states[row : row + 1], "mask": batch["user"]["mask"][row : row + 1]}
        log_p = {}  # of every prefix, from the items under it
        for i in range(1, catalog.num_items + 1):
            gid = torch.from_numpy(catalog.gids[i : i + 1])
            losses = -model.gid_loss(inputs["states"], inputs["mask"], gid)[0].detach()
            for t in range(1, 4):
                log_p[tuple(gid[0, :t].tolist())] = losses[:t].sum().item()
        beams = [()]
        for t in range(1, 4):
            grown = [p for p in log_p if len(p) == t and p[:-1] in beams]
            beams = sorted(grown, key=log_p.get, reverse=True)[: num_beams if t < 3 else 5]
        of_gid = {tuple(catalog.gids[i].tolist()): i for i in range(1, catalog.num_items + 1)}
        assert item[row].tolist() == [of_gid[p] for p in beams]
        assert score[row].tolist() == pytest.approx([log_p[p] for p in beams], abs=1e-4)


def test_seen_items_are_left_out_and_the_rest_moves_up(room):
    model, tree, _, batch = room()
    free, _ = beam_search(model, tree, batch["user"], 1000, 40)
    masked, score = beam_search(model, tree, batch["user"], 1000, 40, batch["seen_row"], batch["seen_item"])
    for row in range(len(free)):
        seen = set(batch["seen_item"][batch["seen_row"] == row].tolist())
        assert seen
        expected = [i for i in free[row].tolist() if i not in seen]
        assert masked[row].tolist() == expected + [0] * len(seen)
        assert torch.isinf(score[row, len(expected) :]).all()


def test_more_results_than_items_are_padded(room):
    model, tree, _, batch = room()
    item, score = beam_search(model, tree, batch["user"], 1000, 50)
    assert (item[:, :40] > 0).all()
    assert (item[:, 40:] == 0).all()
    assert torch.isinf(score[:, 40:]).all()


def test_equal_scores_are_ordered_by_item(room):
    model, _, catalog, batch = room()
    with torch.no_grad():
        model.codebook_TKD[:] = 0.0
    # Paths in an order unlike that of the items.
    gids = catalog.gids.copy()
    gids[1:] = gids[1:][np.random.default_rng(0).permutation(catalog.num_items)]
    item, _ = beam_search(model, GidTree(gids, 4), batch["user"], 1000, 40)
    assert item.tolist() == [list(range(1, 41))] * len(item)


def test_every_beam_ends_in_a_real_item_when_the_tree_is_sparse(room):
    model, _, _, batch = room()
    gids = np.array([[0, 0, 0], [0, 1, 0], [3, 2, 1]])  # two items; most codes lead nowhere
    item, _ = beam_search(model, GidTree(gids, 4), batch["user"], num_beams=10, num_results=3)
    assert [sorted(row) for row in item.tolist()] == [[0, 1, 2]] * len(item)
