"""The Recommender, on the tiny corpus and a model that has been trained a little."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.decode_peer import GeneratePeer, PrefixTree, generate
from contract import config as config_module
from contract.artifacts import STAGES, open_artifact
from contract.config import to_toml
from gid.tree import GidTree
from tests import tiny
from tests.trainer import runs
from trainer import dense, distributed, loader
from trainer.beam import beam_search
from trainer.main import main as train
from trainer.recommender import Candidates, Recommender, load, with_chosen_weights

CPU = torch.device("cpu")
INF = float("inf")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, group):
    """(config, inputs) of a work folder with a model."""
    folder = tmp_path_factory.mktemp("decode")
    config = tiny.tiny_config(folder / "work", train__epochs="2", eval__hybrid="0.5", eval__neighbours="2")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    (folder / "run.toml").write_text(to_toml(config))
    train(["--config", str(folder / "run.toml")])
    return config, {need: open_artifact(config, need) for need in STAGES["eval"].needs}


@pytest.fixture
def recommender(trained):
    """A function (only, **settings of [eval]) -> Recommender."""
    config, inputs = trained

    def make(only=None, **settings):
        return load(dataclasses.replace(config, eval=dataclasses.replace(config.eval, **settings)), inputs, CPU, only)

    return make


def batches(recommender, inputs, size):
    return loader.eval_batches(recommender.config, recommender.catalog, inputs["corpus"], "test", size, 0, 1)


@torch.no_grad()
def exact_scores(recommender, batch, mode):
    """(B, I + 1) of all items, from the model's training code and counted pair by pair; -inf for those seen."""
    model, catalog = recommender.model, recommender.catalog
    states = model.encode(batch["user"])
    vectors = dense.item_vectors(recommender.config, model, catalog, CPU, np.arange(1, 41), "v")
    near = dense.user_vectors(model, states, batch["user"]) @ vectors.T
    log_p = tiny.log_p_of_all_items(recommender.config, model, catalog, batch).sum(-1)
    c = c_of_all_items(catalog.neighbours, batch["user"]["item"].tolist())[:, 1:]
    w, w_c = recommender.config.eval.hybrid, recommender.config.eval.neighbours
    both = (log_p + w * near) / (1 + w)
    scores = {"dense": near, "generative": log_p, "without_neighbours": both, "hybrid": both + w_c * c}
    total = torch.nn.functional.pad(scores[mode], (1, 0), value=-INF)
    total[batch["seen_row"], batch["seen_item"]] = -INF
    return total


def c_of_all_items(table, histories):
    """float32 (B, I + 1), see trainer/neighbours.py; column 0 is meaningless."""
    n = torch.zeros(len(histories), len(table.item_IK))
    for row, history in enumerate(histories):
        for item in history:
            for neighbour, weight in zip(table.item_IK[item], table.weight_IK[item], strict=True):
                n[row, int(neighbour)] += float(weight)
    assert (n > 0).any(1).all()
    return torch.log1p(n / n.amax(1, keepdim=True) / 0.3)


def assert_best(item, score, expected):
    """The lists are the best by the expected scores, but for the order of items that are as good as equal."""
    best = expected.topk(item.shape[1])
    assert torch.allclose(score, best.values, atol=1e-4)
    assert torch.allclose(expected.gather(1, item.long()), best.values, atol=1e-4)
    assert all(len(set(row)) == len(row) for row in item.tolist())


def candidates(item, log_p, near, c=None):
    """Those of tensors (B, N), all of which the beam found."""
    again = dense.repeated(item) | (item == 0)
    return Candidates((item, log_p), (item[:, :0], near[:, :0]), item, log_p, near, c, again, again)


def test_the_hybrid_is_a_mean_of_log_p_and_the_ranking_score_and_adds_the_neighbours():
    item = torch.tensor([[1, 2, 3], [3, 0, 0]])
    log_p = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -INF, -INF]])
    near = torch.tensor([[1.0, 2.0, 4.0], [2.0, 9.0, 9.0]])
    c = torch.tensor([[0.0, 2.0, 0.0], [3.0, 9.0, 9.0]])
    found, score = candidates(item, log_p, near).best(0.5, 0.0, k=2)  # 1: -.5 / 1.5, 2: -1 / 1.5, 3: -1 / 1.5
    assert found.tolist() == [[1, 2], [3, 0]]
    assert score.tolist() == [pytest.approx([-0.5 / 1.5, -1 / 1.5]), pytest.approx([0.0, -INF])]
    assert candidates(item, log_p, near).best(2.0, 0.0, k=2)[0].tolist() == [[3, 2], [3, 0]]
    found, score = candidates(item, log_p, near, c).best(0.5, 2.0, k=2)  # 2: -1 / 1.5 + 4
    assert found.tolist() == [[2, 1], [3, 0]]
    assert score.tolist() == [pytest.approx([-1 / 1.5 + 4, -0.5 / 1.5]), pytest.approx([6.0, -INF])]
    found, score = candidates(item, log_p, near, c).best(0.0, 0.25, k=3)  # near weighs nothing: 2: -2 + .5
    assert found.tolist() == [[1, 2, 3], [3, 0, 0]]
    assert score.tolist() == [[-1.0, -1.5, -3.0], [-0.25, -INF, -INF]]


def test_what_a_part_alone_found_is_ranked_where_the_part_weighs_anything():
    """Of the beam 1 and 2, of the search 2 and 3, of the neighbours 3 and 4."""
    item = torch.tensor([[1, 2, 2, 3, 3, 4]])
    log_p, near = torch.tensor([[-1.0, -2, -2, -3, -3, -4]]), torch.tensor([[1.0, 1, 1, 9, 9, 1]])
    c, again = torch.tensor([[0.0, 0, 0, 1, 1, 9]]), torch.tensor([[0, 0, 1, 0, 1, 0]]) == 1
    without_near = torch.tensor([[0, 0, 1, 1, 0, 0]]) == 1
    parts = (item[:, :2], log_p[:, :2]), (item[:, 2:4], near[:, 2:4])
    found = Candidates(*parts, item, log_p, near, c, again, without_near)
    assert found.best(0.0, 0.0, 4)[0].tolist() == [[1, 2, 0, 0]]
    assert found.best(1.0, 0.0, 4)[0].tolist() == [[3, 1, 2, 0]]
    assert found.best(0.0, 1.0, 5)[0].tolist() == [[4, 1, 2, 3, 0]]  # 3 is of the neighbours as well; -1, -2, -2
    assert found.best(1.0, 1.0, 5)[0].tolist() == [[4, 3, 1, 2, 0]]


def test_without_a_weight_of_the_search_its_finds_are_no_candidates(trained, recommender):
    made = recommender(beams=5, hybrid=0.0)
    for batch in batches(made, trained[1], 60):
        states = made.model.encode(batch["user"])
        parts = made.candidates(batch, 5, states)
        log_p = exact_scores(made, batch, "generative")
        c = c_of_all_items(made.catalog.neighbours, batch["user"]["item"].tolist())
        c[batch["seen_row"], batch["seen_item"]] = -INF
        c[:, 0] = -INF
        counted = [[i for i in row.topk(5).indices.tolist() if row[i] > 0] for row in c]
        shown, alone = made.recommend(batch, 5), 0
        for row, generated in enumerate(parts.generated[0].tolist()):
            allowed = {*generated, *counted[row]}
            alone += len(set(parts.near[0][row].tolist()) - allowed)
            best = sorted(allowed, key=lambda i: log_p[row, i] + 2 * c[row, i], reverse=True)[:5]
            assert shown["item_idx"][row].tolist() == best
            assert parts.best(0.0, 0.0, 5)[0][row].tolist() == generated
        assert alone > 5


def test_a_candidate_that_is_there_twice_counts_once():
    item = torch.tensor([[2, 1, 1, 2, 0, 3, 0]])
    log_p = torch.tensor([[-2.0, -1.0, -1.0, -2.0, -0.5, -3.0, -0.5]])
    found, score = candidates(item, log_p, torch.zeros(1, 7)).best(1.0, 0.0, k=4)
    assert found.tolist() == [[1, 2, 3, 0]]
    assert score.tolist() == [[-0.5, -1.0, -1.5, -INF]]


def test_equal_scores_are_ordered_by_item():
    item, log_p = torch.tensor([[9, 4, 7]]), torch.zeros(1, 3)
    assert candidates(item, log_p, torch.zeros(1, 3)).best(1.0, 0.0, 3)[0].tolist() == [[4, 7, 9]]


@pytest.mark.parametrize("mode", ["hybrid", "generative", "dense"])
@pytest.mark.parametrize("width", [{"exhaustive": True, "beams": 5}, {"beams": 40}, {"beams": 40, "hybrid": 0.0}])
def test_exhaustive_lists_are_the_best_of_all_items(trained, recommender, mode, width):
    made = recommender(mode=mode, **width)
    for batch in batches(made, trained[1], 7):
        found = made.recommend(batch, 10)
        assert found["item_idx"].dtype == torch.int32
        assert_best(found["item_idx"], found["score"], exact_scores(made, batch, mode))
        parts = ("generative", "dense", "without_neighbours") if mode == "hybrid" else ()
        assert set(found) == {"item_idx", "score", *parts}
        for part in parts:
            expected = exact_scores(made, batch, part)
            assert_best(found[part], expected.gather(1, found[part].long()), expected)


def test_lists_without_neighbours_are_those_that_no_weight_gives(trained, recommender):
    made, plain = recommender(beams=8), recommender(beams=8, neighbours=0.0)
    for batch in batches(made, trained[1], 60):
        found, expected = made.recommend(batch, 8), plain.recommend(batch, 8)
        assert "without_neighbours" not in expected
        assert torch.equal(found["without_neighbours"], expected["item_idx"])
        assert not torch.equal(found["item_idx"], expected["item_idx"])


def test_a_weight_of_neighbours_needs_some(trained, recommender):
    made = recommender()
    catalog = dataclasses.replace(made.catalog, neighbours=None)
    with pytest.raises(ValueError, match=r"eval.neighbours = 2, but gid/ has no neighbours"):
        Recommender(made.config, catalog, made.model, CPU)
    unset = dataclasses.replace(made.config, eval=dataclasses.replace(made.config.eval, neighbours=-1.0))
    Recommender(unset, catalog, made.model, CPU)


@pytest.mark.parametrize("mode", ["hybrid", "generative", "dense"])
def test_scores_of_given_items_are_those_that_rank(trained, recommender, mode):
    made = recommender(mode=mode, beams=8)
    for batch in batches(made, trained[1], 7):
        found = made.recommend(batch, 8)
        items = torch.nn.functional.pad(found["item_idx"], (0, 1))
        score = made.score(batch, items)
        assert torch.allclose(score[:, :8], found["score"], atol=1e-5)
        assert (score[:, 8] == -INF).all()
        item = batch["seen_item"][:1].expand(len(items), 1)  # seen items have a score as well
        assert torch.isfinite(made.score(batch, item)).all()


def test_a_hybrid_without_weight_is_generative(trained, recommender):
    made, plain = recommender(hybrid=0.0, neighbours=0.0, beams=8), recommender(mode="generative", beams=8)
    for batch in batches(made, trained[1], 60):
        found, expected = made.recommend(batch, 8), plain.recommend(batch, 8)
        assert set(found) == {"item_idx", "score"}
        assert torch.equal(found["item_idx"], expected["item_idx"])
        assert torch.equal(found["score"], expected["score"])


def test_without_a_weight_set_the_one_of_the_best_validation_ranks(trained, recommender):
    config, inputs = trained
    chosen = config_module.replace(config, {"eval.hybrid": -1.0})
    model = with_best(inputs["model"], {"ndcg@10": 0.1, "hybrid": 8.0, "neighbours": 2.0})
    assert with_chosen_weights(chosen, model) == config_module.replace(config, {"eval.hybrid": 8.0})
    both = config_module.replace(chosen, {"eval.neighbours": -1.0})
    assert with_chosen_weights(both, model).eval.neighbours == 2
    assert with_chosen_weights(config, model) == config  # 0.5 is set

    made = load(chosen, inputs | {"model": model}, CPU)
    batch = next(batches(made, inputs, 60))
    found, expected = made.recommend(batch, 8), recommender(hybrid=8.0).recommend(batch, 8)
    for name in ("item_idx", "score"):
        assert torch.equal(found[name], expected[name])


def test_a_model_that_no_weight_was_chosen_for_ranks_by_the_beam_alone(trained, recommender):
    config, inputs = trained
    model = with_best(inputs["model"], {"ndcg@10": 0.1})  # trained with eval.mode = "generative"
    unset = config_module.replace(config, {"eval.hybrid": -1.0, "eval.neighbours": -1.0})
    made = load(unset, inputs | {"model": model}, CPU)
    batch = next(batches(made, inputs, 60))
    found, expected = made.recommend(batch, 8), recommender(mode="generative").recommend(batch, 8)
    assert set(found) == {"item_idx", "score"}
    assert torch.equal(found["item_idx"], expected["item_idx"])


def with_best(model, best):
    """The artifact of a model of which its best validation measured something else."""
    counts = model.counts | {"best": best}
    return dataclasses.replace(model, manifest=model.manifest | {"counts": counts})


def test_lists_do_not_depend_on_the_size_of_a_batch(trained, recommender):
    made, lists = recommender(beams=8), {}
    for size in (1, 4, 60):
        of_user = {}
        for batch in batches(made, trained[1], size):
            found = made.recommend(batch, 8)
            columns = [found[name].tolist() for name in ("item_idx", "generative", "dense", "score")]
            of_user |= dict(zip(batch["user_idx"].tolist(), zip(*columns, strict=True), strict=True))
        lists[size] = [of_user[user] for user in range(1, 61)]
    for size in (1, 4):
        for alone, together in zip(lists[size], lists[60], strict=True):
            assert alone[:3] == together[:3]
            assert alone[3] == pytest.approx(together[3], abs=1e-5)


@pytest.mark.parametrize("mode", ["hybrid", "generative", "dense"])
def test_candidates_alone_are_ranked(trained, recommender, mode):
    only = np.array([40, 7, 8, 9, 22, 7, 15, 31, 2])
    narrow, wide = recommender(only, mode=mode, beams=5), recommender(only, mode=mode, beams=8)
    for batch in batches(narrow, trained[1], 7):
        found = narrow.recommend(batch, 5)
        assert set(found["item_idx"].unique().tolist()) <= {0, *only.tolist()}
        assert (found["item_idx"][:, 0] > 0).all()
        found = wide.recommend(batch, 10)  # a beam as wide as the candidates: all of them are scored
        expected = exact_scores(wide, batch, mode)
        expected[:, np.setdiff1d(np.arange(41), only)] = -INF
        best = expected.topk(10)
        assert torch.equal(found["item_idx"] > 0, best.values > -INF)
        assert torch.allclose(found["score"], best.values, atol=1e-4)
    with pytest.raises(ValueError, match="item_idx 1 is no candidate"):
        wide.score(batch, torch.ones(len(found["item_idx"]), 1))


@pytest.mark.parametrize(
    ("only", "message"), [([], "no candidates"), ([0, 3], r"1\.\.40; .* 0\.\.3"), ([41], r"41\.\.41")]
)
def test_what_is_no_candidate_is_refused(recommender, only, message):
    with pytest.raises(ValueError, match=message):
        recommender(np.array(only, np.int64))


@pytest.mark.parametrize("beams", [3, 11])
def test_generate_of_transformers_finds_the_same_beams(trained, recommender, beams):
    made = recommender(mode="generative")
    v = F.pad(dense.item_vectors(made.config, made.model, made.catalog, CPU, np.arange(1, 41), "v"), (0, 0, 1, 0))
    peer, prefixes = GeneratePeer(made.model, made.catalog.gids, v), PrefixTree(made.catalog.gids)
    tree = GidTree(made.catalog.gids, 4)
    for batch in batches(made, trained[1], 15):
        with torch.no_grad():
            states = made.model.encode(batch["user"])
        item, _ = beam_search(made.model, tree, batch["user"], beams, beams, states_BLD=states, v_ID=v)
        assert torch.equal(item, generate(peer, prefixes, states, batch["user"]["mask"], beams))


@pytest.mark.gpu
def test_a_gpu_gives_the_lists_of_the_cpu(trained, recommender):
    made = recommender(beams=8)
    moved = load(made.config, trained[1], torch.device("cuda"))
    for batch in batches(made, trained[1], 60):
        expected, found = made.recommend(batch, 8), moved.recommend(batch, 8)
        for name in ("item_idx", "generative", "dense"):
            assert found[name].cpu().tolist() == expected[name].tolist()
        assert torch.allclose(found["score"].cpu(), expected["score"], atol=1e-4)


def test_item_vectors_of_two_ranks_are_those_of_one(trained, recommender, monkeypatch):
    config, _ = trained
    monkeypatch.setattr(dense, "ITEMS_AT_ONCE", 7)
    one = dense.item_vectors(config, recommender().model, recommender().catalog, CPU, np.arange(1, 41), "v").numpy()
    processes = runs.start(2, [__file__, str(config.work_dir)])
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    for rank in range(2):
        assert np.array_equal(np.load(config.work_dir / f"vectors-{rank}.npy"), one)


def write_vectors(work: Path) -> None:
    """On each of two ranks."""
    dense.ITEMS_AT_ONCE = 7
    config = tiny.tiny_config(work)
    inputs = {need: open_artifact(config, need) for need in STAGES["eval"].needs}
    with distributed.process_group(timeout=120) as (rank, _, device):
        made = load(dataclasses.replace(config, eval=dataclasses.replace(config.eval, hybrid=1.0)), inputs, device)
        np.save(work / f"vectors-{rank}.npy", made._index.vectors_CD.numpy())


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]))
