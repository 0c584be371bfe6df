import dataclasses
import itertools
from collections import Counter, defaultdict

import fsspec
import numpy as np
import pytest
import torch

from contract import config as config_module
from contract.artifacts import open_artifact
from contract.schema import Ragged
from tests import tiny
from trainer import inputs, loader, packing, samples


@pytest.fixture
def room(tmp_path):
    config, corpus, catalog, _ = tiny.tiny_room(tmp_path / "work")
    return config, corpus, catalog


def with_train(room, **changes):
    config, *rest = room
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes)), *rest


def batches(room, rank=0, world_size=1, steps=range(25), workers=0):
    """For each step the micro-batches of a rank."""
    config, corpus, catalog = room
    epoch_steps = loader.steps_per_epoch(config, corpus)
    data = loader.TrainBatches(
        config, catalog, loader.shard_paths(corpus, "train"), rank, world_size, steps, epoch_steps
    )
    packed = torch.utils.data.DataLoader(data, batch_size=None, collate_fn=packing.pack, num_workers=workers)
    return [packing.unpack(step, torch.device("cpu")) for step in packed]


def content(batch, row):
    """What a sample is, whatever the width of its batch."""
    names = ("token", "item", "user", "event", "recency", "gap")
    user = {name: batch["user"][name][row][batch["user"]["mask"][row]].tolist() for name in names}
    items = batch["item"]["item"]
    names = ("positive", "negative", *(["sibling"] if batch["sibling_weight"][row] else []))
    drawn = {name: items[batch[name][row]].max().item() for name in names}
    return str((user, batch["next_gid"][row].tolist(), drawn))


def all_content(*ranks):
    """The samples of each step over all ranks and micro-batches, in any order; those that only fill up are left out."""
    return [
        sorted(content(b, r) for b in itertools.chain(*step) for r in range(len(b["next_gid"])) if b["weight"][r] > 0)
        for step in zip(*ranks, strict=True)
    ]


def test_global_batch_is_the_same_at_any_world_size(room):
    one = all_content(batches(room))
    assert [len(step) for step in one] == [16] * 25
    assert one == all_content(*(batches(room, rank, 2) for rank in range(2)))
    assert one == all_content(*(batches(room, rank, 4) for rank in range(4)))


def test_micro_batches_partition_the_rank_batch(room):
    whole, budget = batches(room), 150
    cut = batches(with_train(room, micro_tokens=budget))
    assert all_content(cut) == all_content(whole)
    assert {len(step) for step in whole} == {1}
    assert min(len(step) for step in cut) > 1
    for batch in itertools.chain(*cut):
        assert sum(batch[side]["mask"].numel() for side in ("user", "item")) <= budget
        assert batch["num_tokens"] == sum(int(batch[side]["mask"].sum()) for side in ("user", "item"))
    lengths = torch.cat([batch["user"]["eos"] for batch in cut[0]])
    assert torch.equal(lengths, lengths.sort().values)


def test_a_target_beyond_the_budget_is_a_micro_batch_of_its_own(room):
    cut = batches(with_train(room, micro_tokens=1))
    assert [len(step) for step in cut] == [16] * 25
    assert all_content(cut) == all_content(batches(room))


def test_weights_add_up_to_the_shares_of_the_step(room):
    for whole, *cut in zip(
        batches(room), *(batches(with_train(room, micro_tokens=60), rank, 2) for rank in range(2)), strict=True
    ):
        expected = {
            "weight": np.mean([tiny.EVENT_WEIGHTS[i % 2] for i in targets(whole[0])]),
            "index_weight": 2.0,
            "sibling_weight": float((whole[0]["sibling_weight"] > 0).sum()) / 16,
        }
        for name, value in expected.items():
            ranks = [sum(batch[name].sum().item() for batch in step) for step in cut]
            assert np.mean(ranks) == pytest.approx(value, rel=1e-5)
            assert whole[0][name].sum().item() == pytest.approx(value, rel=1e-5)


def targets(batch):
    """item_idx of the targets, from GIDs as tests.tiny makes them."""
    return (1 + batch["next_gid"] @ (4 ** torch.arange(2, -1, -1))).tolist()


@pytest.mark.parametrize("encoding", ["tokens", "pooled"])
def test_rows_of_a_batch_are_in_groups_of_like_length(room, encoding):
    config, *rest = room
    config = dataclasses.replace(config, history=dataclasses.replace(config.history, encoding=encoding, max_tokens=10))
    for (batch,) in batches((config, *rest)):
        for side in ("user", "item"):
            lengths, groups = batch[side]["eos"] + 1, batch[side]["groups"]
            assert torch.equal(lengths, lengths.sort().values)
            assert [begin for begin, _, _ in groups] == [0, *(end for _, end, _ in groups[:-1])]
            assert groups[-1][1] == len(lengths)
            assert [width for _, _, width in groups] == [lengths[begin:end].max() for begin, end, _ in groups]
        item_idx = batch["item"]["item"].max(1).values
        assert len(item_idx.unique()) == len(item_idx)


def test_padding_stays_below_a_tenth_where_lengths_are_skewed(room):
    config, corpus, catalog = with_train(room, global_batch=128, length_groups=8, micro_tokens=8000)
    config = dataclasses.replace(config, history=dataclasses.replace(config.history, encoding="tokens"))
    lengths = np.minimum(np.random.default_rng(0).geometric(0.05, catalog.num_items), 100)
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    catalog = dataclasses.replace(catalog, tokens=Ragged(np.full(offsets[-1], 3), offsets))
    found = list(itertools.chain(*batches((config, corpus, catalog))))
    num_tokens = sum(batch["num_tokens"] for batch in found)
    assert num_tokens > 0.9 * sum(batch["num_positions"] for batch in found)
    assert num_tokens < 0.8 * sum(batch[side]["mask"].numel() for batch in found for side in ("user", "item"))


def test_length_groups_are_the_best_cut():
    rng = np.random.default_rng(0)
    for num_rows, num_groups, longest in itertools.product((4, 9), (1, 2, 4), (1, 3, 20)):
        lengths = np.sort(rng.integers(1, longest + 1, num_rows))
        best = min(
            sum((end - begin) * lengths[end - 1] for begin, end in itertools.pairwise((0, *inner, num_rows)))
            for inner in itertools.combinations(range(1, num_rows), num_groups - 1)
        )
        groups = inputs.length_groups(lengths, num_groups)
        assert len(groups) == num_groups
        assert sum((end - begin) * width for begin, end, width in groups) == best


def test_resumed_steps_are_those_of_the_unbroken_run(room):
    assert all_content(batches(room))[13:] == all_content(batches(room, steps=range(13, 25)))


def test_steps_resumed_on_other_ranks_hold_the_samples_of_the_unbroken_run(room):
    rest = all_content(batches(room))[13:]
    two = all_content(*(batches(room, rank, 2, steps=range(13, 25)) for rank in range(2)))
    assert [sorted(step) for step in two] == [sorted(step) for step in rest]


def test_loader_processes_keep_the_order(room):
    assert all_content(batches(room)) == all_content(batches(room, workers=2))


def test_packed_micro_batches_are_what_they_were(room):
    config, corpus, catalog = with_train(room, micro_tokens=150)
    data = loader.TrainBatches(config, catalog, loader.shard_paths(corpus, "train"), 0, 1, range(3), 10)
    for micros in data:
        found = packing.unpack(packing.pack(micros), torch.device("cpu"))
        assert len(found) == len(micros) > 1
        for before, after in zip(micros, found, strict=True):
            assert_equal(before, after)


def test_packing_keeps_ids_of_any_size():
    ids = {str(bits): torch.tensor([0, 2**bits - 1, 2**bits]) for bits in (6, 7, 15, 31, 40)}
    micro = ids | {"none": torch.zeros(0, 3, dtype=torch.int64), "share": torch.tensor([0.1, -2.0]), "shard": "a"}
    (found,) = packing.unpack(packing.pack([micro]), torch.device("cpu"))
    assert_equal(micro, found)


def assert_equal(before, after):
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for name in before:
            assert_equal(before[name], after[name])
    elif torch.is_tensor(before):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    else:
        assert before == after


def test_shards_at_a_url_give_the_same_batches(room):
    config, corpus, catalog = room
    for file in corpus.path.glob("*.tar"):
        fsspec.filesystem("memory").pipe(f"/shards/{file.name}", file.read_bytes())
        file.unlink()  # need not be in the corpus any more
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, shards_url="memory://shards"))
    corpus = open_artifact(elsewhere, "corpus")
    remote = batches((elsewhere, corpus, catalog))
    for file in (shard["file"] for shard in corpus.manifest["shards"]["train"]):
        (corpus.path / file).write_bytes(fsspec.filesystem("memory").cat(f"/shards/{file}"))
    assert all_content(remote) == all_content(batches((config, dataclasses.replace(corpus, shards_url=""), catalog)))

    fsspec.filesystem("memory").pipe("/shards/train-00001.tar", b"of another corpus")
    with pytest.raises(ValueError, match=r"memory://shards/train-00001\.tar has 17 bytes, not \d+; copy the \.tar"):
        loader.shard_paths(corpus, "train")
    fsspec.filesystem("memory").rm("/shards/train-00001.tar")
    with pytest.raises(ValueError, match=r"memory://shards/train-00001\.tar is missing; copy"):
        loader.shard_paths(corpus, "train")


def test_targets_weigh_what_their_event_type_does(room):
    for (batch,) in batches(room):
        assert (batch["weight"] * 16).tolist() == [tiny.EVENT_WEIGHTS[i % 2] for i in targets(batch)]


def test_an_epoch_sees_about_every_target_once(room):
    config, corpus, _ = room
    blocks = [samples.read_shard(shard) for shard in loader.shard_paths(corpus, "train")]
    expected = Counter()
    for block in blocks:
        for target in samples.train_targets(config, block, np.random.default_rng(0)):
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


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((1, 1), "no user of the corpus has two train events.*less is held out"),
     ((1, 3), "no user in .*/0.tar has two train events, but users in other shards .* fewer train.streams than 2")],
)  # fmt: skip
def test_a_stream_without_a_target_says_what_helps(tmp_path, lengths, message):
    shards = [str(tmp_path / f"{number}.tar") for number in range(2)]
    for number, length in enumerate(lengths):
        tiny._write_shard(tmp_path / f"{number}.tar", [(1, np.arange(1, 1 + length))], "train")
    config = tiny.tiny_config(tmp_path / "work", train__streams="2")
    streams = [loader.Stream(config, shards, stream, epoch=0) for stream in range(2)]
    empty = next(stream for stream in streams if stream._order.tolist() == [0])
    with pytest.raises(ValueError, match=message):
        empty.take(1)


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


def test_eval_batches_hold_the_targets_and_histories_of_their_users(room):
    config, corpus, catalog = room
    sequences, found = tiny.sequences(60, 40), 0
    for batch in loader.eval_batches(config, catalog, corpus, "test", 7, 0, 1):
        for row, user_idx in enumerate(batch["user_idx"].tolist()):
            *history, _ = sequences[user_idx - 1].tolist()
            assert batch["seen_item"][batch["seen_row"] == row].tolist() == history
            shown = batch["user"]["item"][row]
            assert shown[shown > 0].tolist() == history[-config.history.eval_items :]
            found += 1
    assert found == 60


def test_batch_sizes_that_do_not_divide_are_refused(tmp_path):
    config = tiny.tiny_config(tmp_path / "work", train__global_batch="18")
    with pytest.raises(ValueError, match="use 16 or 20"):
        loader.check_batch_sizes(config, 4, 1)
    with pytest.raises(ValueError, match="3 ranks"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work"), 4, 3)
    with pytest.raises(ValueError, match="2 train shards"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work"), 2, 1)
    with pytest.raises(ValueError, match=r"length_groups = 5 is more than the 4 targets"):
        loader.check_batch_sizes(tiny.tiny_config(tmp_path / "work", train__length_groups="5"), 4, 4)


def test_log_q_tells_how_often_an_item_is_drawn(tmp_path):
    config, corpus, catalog, _ = tiny.tiny_room(tmp_path / "work")
    shards = loader.shard_paths(corpus, "train")
    batches = [batch for (batch,) in loader.TrainBatches(config, catalog, shards, 0, 1, range(600), 10)]
    drawn, rate = np.zeros(catalog.num_items + 1), np.zeros(catalog.num_items + 1)
    for batch in batches:
        items = batch["candidate"]["item"][batch["random"]].numpy()
        np.add.at(drawn, items, 1)
        rate[items] = np.exp(batch["log_q"])
    assert rate.sum() == pytest.approx(config.train.negatives, rel=1e-5)
    root = np.sqrt(np.maximum(catalog.popularity, catalog.popularity[catalog.popularity > 0].min()))[1:]
    assert rate[1:] == pytest.approx(root / root.sum() * config.train.negatives, rel=1e-4)
    assert drawn / len(batches) == pytest.approx(rate, rel=0.25)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_softmax_is_over_each_item_once_when_as_many_would_be_drawn(tmp_path, world_size):
    config, corpus, catalog, _ = tiny.tiny_room(tmp_path / "work", train__negatives="40")
    shards = loader.shard_paths(corpus, "train")
    items = []
    for rank in range(world_size):
        ((batch,),) = loader.TrainBatches(config, catalog, shards, rank, world_size, range(1), 10)
        items += batch["candidate"]["item"][batch["random"]].tolist()
        assert not batch["log_q"].any()
    assert sorted(items) == list(range(1, catalog.num_items + 1))
    with_more = tiny.tiny_config(tmp_path / "work", train__negatives="39")
    ((batch,),) = loader.TrainBatches(with_more, catalog, shards, 0, 1, range(1), 10)
    assert batch["log_q"].all()


@pytest.fixture
def causal(tmp_path):
    """(config, corpus, catalog) with causal attention and windows of 5 items, fewer than some users have."""
    settings = {"history__attention": "causal", "history__train_items": "5", "train__length_groups": "1"}
    return tiny.tiny_room(tmp_path / "work", **settings)[:3]


def test_causal_windows_have_a_target_after_every_item(causal):
    config, corpus, catalog = causal
    users = {tuple(s[:-2].tolist()) for s in tiny.sequences(60, 40)}
    shards = loader.shard_paths(corpus, "train")
    met = set()
    for (batch,) in loader.TrainBatches(config, catalog, shards, 0, 1, range(8), 100):
        rows = defaultdict(list)
        item = batch["candidate"]["item"][batch["next"]]
        for row, at, target in zip(batch["next_row"].tolist(), batch["next_at"].tolist(), item.tolist(), strict=True):
            rows[row].append((at, target))
        for row, targets in rows.items():
            history = [i for i in batch["user"]["item"][row].tolist() if i]
            assert [at for at, _ in targets] == list(range(1, len(history) + 1))
            window = (*history, targets[-1][1])
            assert [target for _, target in targets] == list(window[1:])
            owners = [u for u in users if any(u[i : i + len(window)] == window for i in range(len(u)))]
            assert len(window) in {min(len(user), 6) for user in owners}
            met |= set(owners)
            at, positive = int(batch["at"][row]), int(batch["item"]["item"][batch["positive"][row], 1])
            assert window[at] == positive
            assert batch["user"]["eos"][row] == len(history)
        assert batch["next_gid"].tolist() == catalog.gids[item].tolist()
    assert len(met) > 50


def test_causal_sets_come_in_an_order_of_their_own_in_each_epoch(causal):
    config, corpus, catalog = causal
    config = config_module.replace(config, {"history.order": "set"})
    users = [set(s[:-2].tolist()) for s in tiny.sequences(60, 40)]
    shards, orders = loader.shard_paths(corpus, "train"), defaultdict(set)
    for (batch,) in loader.TrainBatches(config, catalog, shards, 0, 1, range(12), 4):
        item = batch["candidate"]["item"][batch["next"]]
        assert not batch["user"]["event"].any()
        assert not batch["user"]["gap"].any()
        for row in range(len(batch["user"]["item"])):
            targets = item[batch["next_row"] == row].tolist()
            window = (int(batch["user"]["item"][row, 1]), *targets)
            assert [i for i in batch["user"]["item"][row].tolist() if i] == list(window[:-1])
            assert len(set(window)) == len(window)
            assert any(user >= set(window) and len(window) == min(len(user), 6) for user in users)
            orders[frozenset(window)].add(window)
    assert sum(map(len, orders.values())) > 1.5 * len(orders)


def test_an_item_that_a_user_has_twice_is_in_a_set_once():
    items = Ragged(np.array([4, 4, 7, 5, 4, 9], np.int32), np.array([0, 3, 3, 6]))
    ts = np.arange(6)
    block = samples.Block(np.array([1, 2, 3]), items, ts, np.ones(6, np.int8), ts < 0, "shard")
    seen = set()
    for seed in range(20):
        shuffled = samples.in_random_order(block, np.random.default_rng(seed))
        assert shuffled.item_idx.offsets.tolist() == [0, 2, 2, 5]
        assert sorted(shuffled.item_idx.row(0)) == [4, 7]
        assert sorted(shuffled.item_idx.row(2)) == [4, 5, 9]
        assert (items.values[shuffled.ts] == shuffled.item_idx.values).all()
        seen.add(tuple(shuffled.ts[:2]))
    assert seen == {(0, 2), (1, 2), (2, 0), (2, 1)}


def test_causal_gaps_are_those_to_the_event_before(causal):
    config, corpus, catalog = causal
    batch = next(loader.eval_batches(config, catalog, corpus, "test", 60, 0, 1))
    items, gaps = batch["user"]["item"], batch["user"]["gap"]
    # Events are an hour apart; what is before the window is known, of a user's first event nothing is.
    assert set(gaps[:, 2:][items[:, 2:] > 0].tolist()) == {1 + int(np.log2(3601))}
    assert batch["user"]["recency"].sum() == 0
