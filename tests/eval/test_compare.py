"""Two evaluations compared, as far as their files: both are of the same tiny corpus, with lists that are made up."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.artifacts import open_artifact, stage_output
from eval.compare import compare
from tests import tiny

NUM_USERS = 60


def evaluate(work, lists: dict[int, list[int]], users=range(1, NUM_USERS + 1), num_corpus_items=40, **overrides):
    """A finished evaluation in `work` in which all but the users in `lists` are recommended nothing."""
    config = tiny.tiny_config(work, **overrides)
    sequences = tiny.write_corpus(config, num_items=num_corpus_items)
    with stage_output(config, "eval") as output:
        rows = [lists.get(user, []) for user in users]
        table = {"user_idx": list(users), "item_idx": pa.array(rows, pa.list_(pa.int32()))}
        pq.write_table(pa.table(table), output.path / "recommendations.parquet")
        output.commit({"num_users": NUM_USERS}, {"corpus": open_artifact(config, "corpus").digest})
    return sequences


def found(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if "@" in line}


@pytest.fixture
def works(tmp_path):
    """Two work folders: the first has found the target of one user, at rank 1, the second those of half, at rank 2."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    targets = [sequence[-1] for sequence in evaluate(tmp_path / "a" / "work", {})]
    other = [1 + target % 40 for target in targets]
    evaluate(tmp_path / "a" / "work", {1: [int(targets[0])]})
    half = {user: [int(other[user - 1]), int(targets[user - 1])] for user in range(1, NUM_USERS + 1, 2)}
    evaluate(tmp_path / "b" / "work", half)
    return tmp_path / "a" / "work", tmp_path / "b" / "work"


def test_the_difference_is_the_second_minus_the_first(works):
    lines = found(compare(*works))
    first, second, difference, low, high, verdict = lines["recall@5"]
    assert [float(value) for value in (first, second, difference)] == pytest.approx([1 / 60, 0.5, 29 / 60], abs=1e-4)
    assert 0.3 < float(low) < float(difference) < float(high) < 0.65
    assert verdict == "better"
    assert float(lines["mrr@20"][1]) == 0.25
    assert found(compare(*works[::-1]))["recall@5"][-1] == "worse"
    assert len(lines["arp@5"]) == 2  # more is not better


def test_an_evaluation_does_not_differ_from_itself(works):
    assert found(compare(works[0], works[0]))["ndcg@20"][2:] == ["+0.0000", "+0.0000", "+0.0000"]


def test_only_cutoffs_of_both_are_compared(works, tmp_path):
    evaluate(works[1], {}, eval__cutoffs="10,30", eval__beams="30")
    assert "recall@10" in found(compare(*works))
    assert "recall@5" not in found(compare(*works))
    evaluate(works[1], {}, eval__cutoffs="7")
    with pytest.raises(ValueError, match="no cutoff in common"):
        compare(*works)


def test_what_cannot_be_paired_is_refused(works, tmp_path):
    evaluate(works[1], {}, eval__split="valid")
    with pytest.raises(ValueError, match=r"eval\.split is 'test' in .*--eval\.split=test"):
        compare(*works)
    evaluate(works[1], {}, num_corpus_items=39)
    with pytest.raises(ValueError, match="different corpora"):
        compare(*works)
    with pytest.raises(FileNotFoundError, match=r"run first: deepspeed eval/main\.py"):
        compare(works[0], tmp_path / "nothing")
    evaluate(works[1], {}, users=range(1, 20))
    with pytest.raises(ValueError, match="does not hold the users"):
        compare(*works)


def test_a_corpus_that_was_rebuilt_is_refused(works):
    tiny.write_corpus(tiny.tiny_config(works[0]), num_items=39)
    with pytest.raises(ValueError, match="was rebuilt after the evaluation"):
        compare(*works)


def test_lists_may_be_short(works):
    lists = {user: list(range(1, 1 + user % 25)) for user in range(1, NUM_USERS + 1)}
    evaluate(works[1], lists)
    targets = np.array([sequence[-1] for sequence in tiny.sequences(NUM_USERS, 40)])
    shown = np.array([min(20, user % 25) for user in range(1, NUM_USERS + 1)])
    expected = (targets <= shown).mean()
    assert float(found(compare(*works))["recall@20"][1]) == pytest.approx(expected, abs=1e-4)
