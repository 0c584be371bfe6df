from collections import Counter

import numpy as np
import pytest
import torch

from tests import tiny
from trainer import loader, samples


@pytest.fixture
def room(tmp_path):
    config, corpus, catalog, _ = tiny.tiny_room(tmp_path / "work")
    return config, corpus, catalog


def batches(room, rank=0, world_size=1, steps=range(25), workers=0):
    config, corpus, catalog = room
    epoch_steps = loader.steps_per_epoch(config, corpus)
    data = loader.TrainBatches(
        config, catalog, loader.shard_paths(corpus, "train"), rank, world_size, steps, epoch_steps
    )
    return list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers))


def content(batch, row):
    """What a sample is, whatever the width of its batch."""
    user = {k: v[row][batch["user"]["mask"][row]].tolist() for k, v in batch["user"].items() if v.ndim == 2}
    user.pop("content_row", None)  # a row number within the batch
    items = batch["item"]["item"]
    names = ("positive", "negative", *(["sibling"] if batch["has_sibling"][row] else []))
    drawn = {name: items[batch[name][row]].max().item() for name in names}
    return str((user, batch["gid"][row].tolist(), drawn))


def all_content(*ranks):
    """Samples of each step, ranks one after another."""
    return [[content(b, r) for b in step for r in range(len(b["gid"]))] for step in zip(*ranks, strict=True)]


def test_global_batch_is_the_same_at_any_world_size(room):
    one = all_content(batches(room))
    two = all_content(*(batches(room, rank, 2) for rank in range(2)))
    four = all_content(*(batches(room, rank, 4) for rank in range(4)))
    assert [len(step) for step in one] == [16] * 25
    # A rank sorts its own samples by length.
    assert [sorted(step) for step in one] == [sorted(step) for step in two] == [sorted(step) for step in four]


def test_resumed_steps_are_those_of_the_unbroken_run(room):
    assert all_content(batches(room))[13:] == all_content(batches(room, steps=range(13, 25)))


def test_steps_resumed_on_other_ranks_hold_the_samples_of_the_unbroken_run(room):
    rest = all_content(batches(room))[13:]
    two = all_content(*(batches(room, rank, 2, steps=range(13, 25)) for rank in range(2)))
    assert [sorted(step) for step in two] == [sorted(step) for step in rest]


def test_loader_processes_keep_the_order(room):
    assert all_content(batches(room)) == all_content(batches(room, workers=2))


def test_targets_weigh_what_their_event_type_does(room):
    for batch in batches(room):
        item_idx = 1 + batch["gid"] @ (4 ** torch.arange(2, -1, -1))  # as tests.tiny makes GIDs, and events below
        assert batch["weight"].tolist() == [tiny.EVENT_WEIGHTS[i % 2] for i in item_idx.tolist()]


def test_an_epoch_sees_about_every_target_once(room):
    config, corpus, _ = room
    blocks = [samples.read_shard(shard) for shard in loader.shard_paths(corpus, "train")]
    expected = Counter()
    for block in blocks:
        for target in samples.train_targets(config, block):
            expected[(int(block.item_idx.values[target]), int(block.ts[target]))] += 1
    steps = loader.steps_per_epoch(config, corpus)
    assert steps == sum(expected.values()) // config.train.global_batch
    streams = [loader.Stream(config, loader.shard_paths(corpus, "train"), s, epoch=0) for s in range(4)]
    seen = Counter()
    for stream in streams:
        for _ in range(steps):
            for block, targets in stream.take(4):
                seen.update((int(block.item_idx.values[t]), int(block.ts[t])) for t in targets)
    # Streams are of unequal length: a short one begins again, a long one keeps a rest for the next epoch.
    assert sum((expected - seen).values()) < 0.25 * sum(expected.values())
    orders = {tuple(loader.Stream(config, loader.shard_paths(corpus, "train"), 0, e).take(1)[0][1]) for e in range(9)}
    assert len(orders) > 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_eval_covers_every_user_once_at_any_world_size(room, world_size):
    config, corpus, catalog = room
    ranks = [
        list(loader.eval_batches(config, catalog, corpus, "test", 7, rank, world_size)) for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1  # equally many, for collectives
    users = np.concatenate([b["user_idx"].numpy() for rank in ranks for b in rank])
    assert sorted(users[users > 0]) == list(range(1, 61))
    assert sum(len(b["pair_row"]) for rank in ranks for b in rank) == 60


def test_batch_sizes_that_do_not_divide_are_refused(tmp_path):
    config = tiny.tiny_config(tmp_path / "work", train__global_batch="18")
    with pytest.raises(ValueError, match="use 16 or 20"):
        loader.check_batch_sizes(config, 4, 1)
    with pytest.raises(ValueError, match="3 ranks"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work"), 4, 3)
    with pytest.raises(ValueError, match="2 train shards"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work"), 2, 1)
    with pytest.raises(ValueError, match="micro_batch 5"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work", train__micro_batch="5"), 4, 1)
