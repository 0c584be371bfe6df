"""Hashed and row-wise tables, alone and in training."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.multiprocessing
from torch import nn
from torch.utils.checkpoint import checkpoint

from contract.config import to_toml
from eval.main import main as evaluate
from tests import tiny
from tests.trainer import runs
from trainer import tables
from trainer.initial import init_codes, init_items
from trainer.main import main as train
from trainer.model import EMBEDDING_STD, ColaRec, ColaRecConfig
from trainer.tables import Addresses, RowwiseEmbedding, Shard

ALONE = Shard(0, 1)


def one_table(num_rows=50, width=4, functions=0, shard=ALONE, seed=3) -> RowwiseEmbedding:
    return RowwiseEmbedding(Addresses(num_rows, functions), width, 0.1, shard, seed)


def hashed(**sizes) -> ColaRecConfig:
    return ColaRecConfig(item_table="hash", **sizes)


# Hashing


def test_splitmix64_gives_the_published_numbers():
    """The first outputs from seed 1234567, as the algorithm's page on Rosetta Code lists them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = tables.splitmix64(torch.arange(1, 5), 1234567)
    assert [x % 2**64 for x in outputs.tolist()] == expected


def test_rows_of_literal_ids():
    """They are part of every trained model: they must never change."""
    ids = torch.tensor([[0, 1, 2], [3, 10**9, 2**40]])
    assert Addresses(1_000_003, 2).rows(ids).tolist() == [
        [[0, 0], [843080, 583424], [333498, 61083]],
        [[384655, 244642], [481713, 555265], [956011, 152376]],
    ]
    assert Addresses(5).rows(torch.tensor([0, 5])).tolist() == [[0], [5]]


def test_two_ids_seldom_share_all_rows():
    num_ids, num_rows = 20_000, 1000
    rows, _ = Addresses(num_rows, 2).rows(torch.arange(1, num_ids + 1)).sort(1)
    assert rows.min() == 1
    assert rows.max() == num_rows
    # Of n^2 / 2 pairs, 2 / R^2 share both: were the functions alike, it would be 1 / R of the pairs, 500 times as many.
    _, counts = (rows[:, 0] * (num_rows + 1) + rows[:, 1]).unique(return_counts=True)
    expected = num_ids**2 / num_rows**2
    assert (counts * (counts - 1)).sum() / 2 == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("functions", [1, 2, 4])
def test_hashed_vectors_start_like_exact_ones(functions):
    config = hashed(num_items=2000, hash_functions=functions, hash_rows=5000, d_model=32)
    for shard in (None, ALONE):
        vectors = ColaRec(config, shard).item(torch.arange(2001)).detach()
        assert vectors[0].abs().sum() == 0
        assert vectors[1:].std() == pytest.approx(EMBEDDING_STD, rel=0.03)
        assert vectors[1:].mean() == pytest.approx(0, abs=0.001)


def test_the_vector_of_an_id_is_the_sum_of_its_rows():
    table = ColaRec(hashed(num_items=100, hash_functions=3, hash_rows=30)).item
    ids = torch.tensor([[7, 0], [99, 7]])
    for row, id in zip(table(ids).flatten(0, 1), ids.flatten(), strict=True):
        assert torch.allclose(row, sum(table.weight[r] for r in table.addresses.rows(id)), atol=1e-6)
    table(ids).sum().backward()
    assert table.weight.grad[0].abs().sum() == 0


# The row-wise optimizer


def row_wise_adam(weight, gradients, lrs):
    """The formula of FBGEMM's PARTIAL_ROWWISE_ADAM with beta_1 = 0, a row, a step, and a number at a time.

    `gradients`: a {row: list} per step.
    """
    weight = [list(map(float, row)) for row in weight]
    moment, count = [0.0] * len(weight), [0] * len(weight)
    for gradient, lr in zip(gradients, lrs, strict=True):
        for row, g in gradient.items():
            count[row] += 1
            moment[row] = 0.999 * moment[row] + 0.001 * sum(x * x for x in g) / len(g)
            unbiased = moment[row] / (1 - 0.999 ** count[row])
            weight[row] = [w - lr * x / (math.sqrt(unbiased) + 1e-8) for w, x in zip(weight[row], g, strict=True)]
    return torch.tensor(weight)


def test_it_follows_the_formula():
    table = one_table()
    model, before, rng = nn.ModuleDict({"item": table}), table.weight.clone(), torch.Generator().manual_seed(0)
    gradients, lrs = [], [0.1, 0.05, 0.02, 0.02]
    for lr in lrs:
        ids = torch.randint(1, 9, (3, 4), generator=rng)
        ids[0, 0] = 0
        slope = torch.randn(3, 4, 4, generator=rng)
        (table(ids) * slope).sum().backward()
        gradients.append({id: slope[ids == id].sum(0).tolist() for id in ids.unique().tolist() if id})
        tables.step(model, lr, clip=1e9)
    assert torch.allclose(table.weight, row_wise_adam(before, gradients, lrs), atol=1e-6)
    touched = sorted(set().union(*gradients))
    assert table.num_updates.nonzero().flatten().tolist() == touched
    untouched = torch.ones(51, dtype=torch.bool).index_fill(0, torch.tensor(touched), False)
    assert torch.equal(table.weight[untouched], before[untouched])
    assert table.weight[0].abs().sum() == 0


def test_the_gradient_is_that_of_a_dense_table():
    """Also where an id, or a row of several ids, occurs more than once."""
    table = one_table(num_rows=12, functions=2)
    dense = tables.HashEmbedding(table.addresses, 4)
    with torch.no_grad():
        dense.weight.copy_(table.whole())
    for ids in (torch.randint(0, 40, (5, 6)), torch.randint(0, 40, (2, 3))):
        slope = torch.randn(*ids.shape, 4)
        assert torch.allclose(table(ids), dense(ids), atol=1e-6)
        (table(ids) * slope).sum().backward()
        (dense(ids) * slope).sum().backward()
    own, gradient = table.take_gradient()
    assert torch.allclose(torch.zeros(13, 4).index_copy(0, own, gradient), dense.weight.grad, atol=1e-5)
    assert len(table.take_gradient()[0]) == 0  # it was taken


def test_accumulated_gradients_equal_the_whole_batch():
    ids, slope = torch.randint(0, 51, (8, 5)), torch.randn(8, 5, 4)
    found = []
    for parts in (1, 4):
        table = one_table()
        for part, part_slope in zip(ids.chunk(parts), slope.chunk(parts), strict=True):
            ((table(part) * part_slope).sum((1, 2)).mean() / parts).backward()
        tables.step(nn.ModuleDict({"item": table}), 0.1, clip=1.0)
        found.append(table.weight)
    assert torch.allclose(*found, atol=1e-6)


def test_the_norm_over_all_tables_is_clipped():
    model = nn.ModuleDict({"item": one_table(), "user": one_table()})
    (3 * model["item"](torch.tensor([1]))).sum().backward()
    (4 * model["user"](torch.tensor([2]))).sum().backward()
    assert tables.step(model, 0.1, clip=0.5).item() == pytest.approx(10)  # sqrt(4 * 3^2 + 4 * 4^2)
    # v = 0.001 g^2 after the first step, and g is clipped to a twentieth.
    assert model["item"].second_moment[1].item() == pytest.approx(0.001 * (3 / 20) ** 2, rel=1e-4)
    assert model["user"].second_moment[2].item() == pytest.approx(0.001 * (4 / 20) ** 2, rel=1e-4)


def test_a_repeated_forward_pass_counts_once():
    found = []
    for reentrant in (None, False, True):
        table, ids = one_table(), torch.tensor([[4, 5], [5, 6]])
        if reentrant is None:
            output = table(ids).square()
        else:
            # What a reentrant checkpoint recomputes needs an input that requires a gradient.
            one = torch.ones(1, requires_grad=True)
            output = checkpoint(
                lambda one, table=table, ids=ids: (table(ids) * one).square(), one, use_reentrant=reentrant
            )
        output.sum().backward()
        found.append(table.take_gradient()[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("factor", "apply"), [(1.0, False), (math.nan, True), (math.inf, True)])
def test_a_step_that_is_skipped_or_not_finite_leaves_no_trace(factor, apply):
    model = nn.ModuleDict({"item": one_table(), "user": one_table()})
    before = {name: value.clone() for name, value in tables.state(model).items()}
    (model["item"](torch.tensor([1])) * factor).sum().backward()
    model["user"](torch.tensor([1])).sum().backward()
    tables.step(model, 0.1, clip=1.0, apply=apply)
    assert tables.step(model, 0.1, clip=1.0) == 0  # nothing is left of it
    for name, value in tables.state(model).items():
        assert torch.equal(value, before[name])


def test_evaluation_hands_out_no_leaves():
    table = one_table()
    with torch.no_grad():
        assert not table(torch.tensor([1])).requires_grad
    assert not table.eval()(torch.tensor([1])).requires_grad
    assert len(table.take_gradient()[0]) == 0


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does():
    found, generator = {}, torch.Generator().manual_seed(0)
    ids, slope = torch.randint(0, 2**40, (64, 20), generator=generator), torch.randn(64, 20, 4, generator=generator)
    for device in ("cpu", "cuda"):
        model = nn.ModuleDict({"item": one_table(functions=2)}).to(device)
        for _ in range(3):
            (model["item"](ids.to(device)) * slope.to(device)).sum().backward()
            tables.step(model, 0.1, clip=1.0)
        found[device] = model["item"].whole()
    assert torch.equal(Addresses(10**6, 3).rows(ids.cuda()).cpu(), Addresses(10**6, 3).rows(ids))
    assert torch.allclose(found["cuda"], found["cpu"], atol=1e-5)


# Ranks


def test_the_start_is_the_same_over_any_number_of_ranks():
    whole = one_table(num_rows=53).weight
    for world_size in (2, 3):
        for rank in range(world_size):
            part = one_table(num_rows=53, shard=Shard(rank, world_size))
            assert torch.equal(part.weight, whole[rank::world_size])
    assert not torch.equal(one_table(num_rows=53, seed=4).weight, whole)


@pytest.mark.parametrize("world_size", [1, 3])
def test_filling_the_state_restores_a_table(world_size):
    """Place j of rank q is row q + j * world_size, which is all that a checkpoint knows of it."""
    table = one_table(num_rows=52)
    table(torch.arange(0, 53, 2)).square().sum().backward()
    tables.step(nn.ModuleDict({"item": table}), 0.1, clip=1.0)
    for rank in range(world_size):
        part = one_table(num_rows=52, shard=Shard(rank, world_size), seed=99)
        state = tables.state(nn.ModuleDict({"item": part}))
        assert state.keys() == {f"item.{name}" for name in ("weight", "second_moment", "num_updates")}
        for name, values in state.items():
            values.copy_(getattr(table, name.removeprefix("item."))[rank::world_size])
        for row in range(rank, 53, world_size):
            assert torch.equal(part.weight[row // world_size], table.weight[row])
        # The next update of a row goes on from its moment and count.
        row = torch.tensor([rank + 2 * world_size])
        for each, own in ((table, row), (part, row // world_size)):
            each.update(own, torch.ones(1, 4), 0.1)
        assert torch.equal(part.weight[2], table.weight[row[0]])


def two_steps(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """(the whole table after two steps on this rank's part of fixed batches, their norms)"""
    rng = torch.Generator().manual_seed(1)
    table, norms = one_table(num_rows=33, functions=2, shard=shard), []
    for _ in range(2):
        ids, slope = torch.randint(0, 100, (8, 5), generator=rng), torch.randn(8, 5, 4, generator=rng)
        ids[4:] %= 3  # the second rank has few rows, and none of some owners
        own_ids, own_slope = (x.chunk(shard.world_size)[shard.rank] for x in (ids, slope))
        (table(own_ids) + own_slope).square().sum((1, 2)).mean().backward()  # its gradient tells what was looked up
        norms.append(tables.step(nn.ModuleDict({"item": table}), 0.1, clip=0.5))
    return table.whole(), torch.stack(norms)


def as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    tables._SENT = 20  # so that `whole` needs several pieces
    torch.save(two_steps(Shard(rank, 2)), f"{folder}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(as_rank, (str(tmp_path),), nprocs=2)
    (table, norms), (nothing, other_norms) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    expected, expected_norms = two_steps(ALONE)
    assert torch.allclose(table, expected, atol=1e-6)
    assert torch.allclose(norms, expected_norms, rtol=1e-5)
    assert torch.equal(norms, other_norms)
    assert nothing is None


# The model and its training


def test_cf_start_of_row_wise_items_is_that_of_dense_ones(tmp_path):
    *_, catalog, dense = tiny.tiny_room(tmp_path / "work")
    sharded = ColaRec(dense.config, Shard(1, 2))
    embeddings, gids = torch.randn(41, 8), torch.from_numpy(catalog.gids)
    for model in (dense, sharded):
        init_codes(model, gids, init_items(model, embeddings, seed=1), seed=1)
    assert torch.equal(sharded.item.weight, dense.item.weight[1::2])
    assert torch.equal(sharded.code_vectors[0][0, :3], dense.code_vectors[0][0, :3])  # the fourth leads to no item
    assert torch.equal(sharded.code_biases[1], dense.code_biases[1])


def test_without_user_slots_there_is_no_user_table(tmp_path):
    *_, dense = tiny.tiny_room(tmp_path / "work", history__user_slots="0", model__user_table="hash")
    for model in (dense, ColaRec(dense.config, ALONE)):
        assert model.user.weight.shape == (1, 16)


@pytest.fixture
def work(tmp_path, group):
    """The config file of a tiny corpus, with hashed row-wise tables."""
    overrides = {"item_table": "hash", "user_table": "hash", "hash_rows": "64"}
    config = tiny.tiny_config(
        tmp_path / "work",
        train__table_optimizer="rowwise",
        train__lr="1e-2",
        train__best="loss",
        **{f"model__{name}": value for name, value in overrides.items()},
    )
    tiny.write_corpus(config)
    tiny.write_gids(config)
    (tmp_path / "run.toml").write_text(to_toml(config))
    return tmp_path / "run.toml"


def trained(work) -> tuple[dict, dict[str, torch.Tensor]]:
    """(counts of the model, its weights)"""
    model = work.parent / "work" / "model"
    counts = json.loads((model / "manifest.json").read_text())["counts"]
    assert counts["best_epoch"] > 0  # these are not the weights from before the first step
    return counts, safetensors.torch.load_file(model / "model.safetensors")


def test_it_learns_and_is_evaluated(work):
    train(["--config", str(work), "--train.epochs=20"])
    counts, weights = trained(work)
    assert counts["best"]["rec"] < 1.0  # by chance 1.386
    assert weights["item.weight"].shape == weights["user.weight"].shape == (65, 16)
    evaluate(["--config", str(work)])
    metrics = json.loads((work.parent / "work" / "eval" / "metrics.json").read_text())["models"]
    assert metrics["ColaRec"]["ndcg@10"]["mean"] > 2 * metrics["popularity"]["ndcg@10"]["mean"]


def test_zero_3_and_two_ranks_that_accumulate_give_the_weights_of_one(work):
    words = ["--config", str(work), "--model.item_table=exact", "--train.max_steps=11", "--train.best=ndcg"]
    train(words)
    expected_counts, expected = trained(work)
    assert expected_counts["num_parameters"] == sum(x.numel() for x in expected.values())

    train([*words, "--train.zero_stage=3"])
    compare(trained(work), expected_counts, expected)

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", "--master_port=29519"]
    two_ranks = [*launcher, "trainer/main.py", *words, "--train.micro_tokens=60"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(two_ranks, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    compare(trained(work), expected_counts, expected)


def compare(found: tuple[dict, dict], counts: dict, weights: dict) -> None:
    """Sums are taken in another order, which Adam's division by the gradient's size amplifies."""
    assert found[0]["best"]["rec"] == pytest.approx(counts["best"]["rec"], abs=2e-4)
    assert found[1].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found[1][name], weight, atol=1e-4), name


def test_a_resumed_run_goes_on_with_its_rows(work, tmp_path):
    settings = {"train.table_optimizer": "rowwise", "model.item_table": "hash", "model.hash_rows": "64"}
    whole = runs.fit(shutil.copytree(work.parent / "work", tmp_path / "whole"), settings)[0]["train/loss"]
    first = runs.fit(work.parent / "work", settings, stop=8)[0]["train/loss"]
    second = runs.fit(work.parent / "work", settings, resume=True)[0]["train/loss"]
    assert len(whole) == 20
    assert first + second == whole
