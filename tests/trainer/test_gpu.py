"""The model and its decoding give on a CUDA device what they give on the CPU."""

import numpy as np
import pytest
import torch

from gid.tree import GidTree
from tests import tiny
from trainer import dense, loader, packing
from trainer.beam import beam_search

pytestmark = pytest.mark.gpu


@pytest.fixture
def room(tmp_path):
    return tiny.tiny_room(tmp_path / "work")


def test_losses_and_gradients(room):
    config, corpus, catalog, model = room
    shards = loader.shard_paths(corpus, "train")
    (batch,) = next(iter(loader.TrainBatches(config, catalog, shards, 0, 1, range(1), 10)))
    found = {}
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        losses = model(packing.to_device(batch, torch.device(device)))
        losses["loss"].backward()
        gradients = {name: p.grad.cpu().clone() for name, p in model.named_parameters()}
        found[device] = ({name: loss.item() for name, loss in losses.items()}, gradients)
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    for name, gradient in found["cpu"][1].items():
        assert torch.allclose(found["cuda"][1][name], gradient, rtol=1e-3, atol=1e-5), name


def test_beam_search(room):
    config, corpus, catalog, model = room
    tiny.move_from_start(model)
    batch = next(loader.eval_batches(config, catalog, corpus, "test", 7, 0, 1))
    found = {}
    for device in ("cpu", "cuda"):
        tree, on_device = GidTree(catalog.gids, 4).to(device), packing.to_device(batch, torch.device(device))
        every = np.arange(1, catalog.num_items + 1)
        v = dense.item_vectors(config, model.to(device), catalog, torch.device(device), every, "v")
        item, _ = beam_search(model, tree, on_device["user"], 20, 10, v_ID=torch.nn.functional.pad(v, (0, 0, 1, 0)))
        found[device] = item.cpu()
    assert torch.equal(found["cuda"], found["cpu"])
