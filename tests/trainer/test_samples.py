from collections import Counter

import numpy as np
import pytest

from contract.artifacts import open_artifact
from tests import tiny
from trainer import samples
from trainer.inputs import read_catalog


@pytest.fixture
def room(tmp_path):
    """(config, catalog, block of the first train shard, its users' sequences)."""

    def make(**overrides):
        config = tiny.tiny_config(tmp_path / "work", **overrides)
        users = tiny.write_corpus(config)
        tiny.write_gids(config)
        catalog = read_catalog(open_artifact(config, "corpus"), open_artifact(config, "gid"))
        block = samples.read_shard(config.work_dir / "corpus" / "train-00000.tar")
        return config, catalog, block, {int(u): users[u - 1][:-2].tolist() for u in block.user_idx}

    return make


def test_time_history_is_what_came_before(room):
    config, catalog, block, users = room()
    targets = samples.train_targets(config, block, np.random.default_rng(0))
    assert len(targets) == sum(len(s) - 1 for s in users.values())
    history = samples.train_histories(config, catalog, block, targets, np.random.default_rng(0))
    sequences = list(users.values())
    k = 0
    for sequence in sequences:
        for position in range(1, len(sequence)):
            expected = sequence[max(0, position - 5) : position]
            assert history.item_idx[k][: len(expected)].tolist() == expected
            assert history.item_idx[k][len(expected) :].sum() == 0
            assert history.recency[k][: len(expected)].tolist() == list(range(len(expected), 0, -1))
            # events are an hour apart: log2(1 + 3600 h) for the h-th hour before the latest
            hours = np.arange(len(expected) - 1, -1, -1)
            assert history.gap[k][: len(expected)].tolist() == (1 + np.log2(1 + 3600 * hours).astype(int)).tolist()
            assert history.event[k][: len(expected)].tolist() == [1 + i % 2 for i in expected]
            k += 1
    assert k == len(targets)


def test_set_history_is_everything_but_the_target(room):
    config, catalog, block, users = room(history__order="set", history__train_items="20")
    targets = samples.train_targets(config, block, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    history = samples.train_histories(config, catalog, block, targets, rng)
    k, orders = 0, set()
    for sequence in users.values():
        for target in sequence if len(sequence) > 1 else []:
            row = [i for i in history.item_idx[k].tolist() if i]
            assert sorted(row) == sorted(i for i in sequence if i != target)
            orders.add(tuple(row) == tuple(i for i in sequence if i != target))
            k += 1
    assert k == len(targets)
    assert orders == {True, False}  # shuffled
    assert history.recency.sum() == history.gap.sum() == history.event.sum() == 0


def test_eval_history_ends_before_the_targets(room):
    config, catalog, _, _ = room()
    block = samples.read_shard(config.work_dir / "corpus" / "test-00001.tar")
    history = samples.eval_histories(config, catalog, block, np.random.default_rng(0))
    for row in range(len(block.user_idx)):
        sequence = block.item_idx.row(row)
        expected = sequence[:-1][-5:].tolist()
        assert [i for i in history.item_idx[row].tolist() if i] == expected


def test_negatives_are_of_another_prefix_and_unknown_to_the_user(room):
    config, catalog, block, users = room()
    targets = samples.train_targets(config, block, np.random.default_rng(0))
    drawn = set()
    for seed in range(20):
        negatives = samples.draw_negatives(catalog, block, targets, np.random.default_rng(seed))
        for target, negative in zip(targets, negatives, strict=True):
            user = int(block.user_idx[block.row[target]])
            positive = block.item_idx.values[target]
            assert negative not in users[user]
            assert catalog.gids[negative][:-1].tolist() != catalog.gids[positive][:-1].tolist()
        drawn |= set(negatives.tolist())
    assert drawn == set(range(1, 41))


def test_siblings_share_the_prefix(room):
    _, catalog, _, _ = room()
    items = np.arange(1, 41)
    seen = {int(i): set() for i in items}
    for seed in range(60):
        siblings = samples.draw_siblings(catalog, items, np.random.default_rng(seed))
        for item, sibling in zip(items, siblings, strict=True):
            seen[int(item)].add(int(sibling))
    for item, siblings in seen.items():
        prefix = catalog.gids[item][:-1].tolist()
        expected = {i for i in range(1, 41) if catalog.gids[i][:-1].tolist() == prefix and i != item}
        assert siblings == (expected or {0})


def test_a_set_history_is_a_uniform_sample(room):
    config, catalog, block, users = room(history__order="set", history__train_items="2")
    targets = samples.train_targets(config, block, np.random.default_rng(0))
    rng, drawn = np.random.default_rng(0), [Counter() for _ in targets]
    for _ in range(400):
        history = samples.train_histories(config, catalog, block, targets, rng)
        for counter, row in zip(drawn, history.item_idx.tolist(), strict=True):
            assert len({i for i in row if i}) == sum(i > 0 for i in row)
            counter.update(i for i in row if i)
    for target, counter in zip(targets, drawn, strict=True):
        others = [i for i in users[int(block.user_idx[block.row[target]])] if i != block.item_idx.values[target]]
        assert set(counter) == set(others)
        expected = 400 * min(2, len(others)) / len(others)
        assert all(abs(count - expected) <= 5 * np.sqrt(expected) for count in counter.values())


def test_blocks_hold_so_many_events_at_most_and_together_the_shard(room):
    config, _, whole, _ = room()
    shard = config.work_dir / "corpus" / "train-00000.tar"
    blocks = list(samples.read_blocks(shard, max_events=45))
    assert len(blocks) == 2  # of three members of about 20 events
    assert max(len(block.item_idx.values) for block in blocks) <= 45
    for name in ("user_idx", "ts", "event", "is_target"):
        assert np.concatenate([getattr(block, name) for block in blocks]).tolist() == getattr(whole, name).tolist()
    rows = [block.item_idx.row(i).tolist() for block in blocks for i in range(len(block.item_idx))]
    assert rows == [whole.item_idx.row(i).tolist() for i in range(len(whole.item_idx))]


@pytest.mark.parametrize("change", ["header", "content", "end", "all"])
def test_damaged_shard_is_named(room, change):
    config, *_ = room()
    shard = config.work_dir / "corpus" / "train-00000.tar"
    content = shard.read_bytes()
    damaged = {
        "header": b"x" * 512 + content[512:],
        "content": content[:512] + b"x" * 512 + content[1024:],
        "end": content[:1000],
        "all": b"",
    }
    shard.write_bytes(damaged[change])
    with pytest.raises(ValueError, match=r"train-00000\.tar (cannot be read|is empty).*build the corpus again"):
        samples.read_shard(shard)


def test_missing_shard_is_named(room):
    config, *_ = room()
    for shard in (config.work_dir / "corpus" / "train-00009.tar", "memory://nowhere/train-00000.tar"):
        with pytest.raises(FileNotFoundError, match=r"shard .*/train-0000\d\.tar is missing; build"):
            samples.read_shard(shard)


def test_causal_windows_of_a_long_history_hold_all_of_it_in_the_end(room):
    config, _, block, users = room(history__attention="causal", history__train_items="4")
    met = [set() for _ in users]
    for seed in range(30):
        ends = samples.train_targets(config, block, np.random.default_rng(seed))
        for row, user in enumerate(users.values()):
            begin = block.item_idx.offsets[row]
            mine = ends[(ends >= begin) & (ends < begin + len(user))] - begin
            assert len(mine) == -(-(len(user) - 1) // 4)
            assert (np.diff(mine) > 0).all()
            assert len(user) < 2 or min(4, len(user) - 1) <= mine[0] <= mine[-1] < len(user)
            met[row] |= {target for end in mine for target in range(max(1, end - 3), end + 1)}
    for targets, user in zip(met, users.values(), strict=True):
        assert targets == set(range(1, len(user)))
