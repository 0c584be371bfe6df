"""Reading the users of an evaluation back from shards."""

import dataclasses

import numpy as np
import pytest

from contract.artifacts import open_artifact
from eval.users import EvalUsers, read_eval_users
from tests.eval.rows import ragged
from tests.tiny import tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus_and_sequences(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("users") / "work")
    sequences = write_corpus(config)
    return open_artifact(config, "corpus"), sequences


@pytest.mark.parametrize(("split", "num_later"), [("valid", 1), ("test", 0)])
def test_users_of_all_shards_in_order(corpus_and_sequences, split, num_later):
    corpus, sequences = corpus_and_sequences
    users = read_eval_users(corpus, split)
    assert len(corpus.manifest["shards"][split]) > 1
    assert users.user_idx.tolist() == list(range(1, len(sequences) + 1))
    for row, sequence in enumerate(sequences):
        known = sequence[: len(sequence) - num_later].tolist()
        assert users.history.row(row).tolist() == known[:-1]
        assert users.targets.row(row).tolist() == known[-1:]


def test_a_user_in_two_shards_is_refused(corpus_and_sequences):
    corpus, _ = corpus_and_sequences
    shards = corpus.manifest["shards"]
    twice = corpus.manifest | {"shards": shards | {"test": shards["test"] + shards["test"][:1]}}
    with pytest.raises(ValueError, match="a user is twice in the test shards"):
        read_eval_users(dataclasses.replace(corpus, manifest=twice), "test")


def test_a_split_without_users_is_refused(corpus_and_sequences):
    corpus, _ = corpus_and_sequences
    nobody = corpus.manifest | {"shards": corpus.manifest["shards"] | {"valid": []}}
    with pytest.raises(ValueError, match="no valid users"):
        read_eval_users(dataclasses.replace(corpus, manifest=nobody), "valid")


def test_the_shares_of_the_ranks_are_all_users():
    users = EvalUsers(np.array([3, 5, 9]), ragged([[1, 2], [], [4]]), ragged([[7], [8, 9], [6]]))
    share = users.take(np.arange(1, 3))
    assert share.user_idx.tolist() == [5, 9]
    assert [share.history.row(i).tolist() for i in range(2)] == [[], [4]]
    assert [share.targets.row(i).tolist() for i in range(2)] == [[8, 9], [6]]
    assert len(users.take(np.arange(0))) == 0
