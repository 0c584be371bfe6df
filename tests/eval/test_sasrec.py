"""SASRec: what it learns from, what it learns, its loss, and the trained model that is kept."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from contract.settings import Config, Eval
from eval.baselines import LeftOut, sasrec
from eval.users import EvalUsers
from tests.eval.rows import ragged
from tests.eval.test_baselines import make_fit, shrink_sasrec


@pytest.fixture(scope="module")
def fit():
    return make_fit()


@pytest.fixture(autouse=True)
def small_sasrec(monkeypatch):
    shrink_sasrec(monkeypatch)


def small(num_items: int = 9, **changes) -> sasrec.SASRec:
    torch.manual_seed(0)
    settings = {"dim": 8, "num_layers": 1, "num_heads": 2, "max_items": 4, "dropout": 0.0}
    return sasrec.SASRec(num_items, **settings | changes).eval()


def test_it_learns_what_comes_next_in_a_circle(fit):
    """Four circles of eight items: the train walks hold every step, the targets are one step further."""
    longer = dataclasses.replace(fit, config=Config(eval=Eval(sasrec_epochs=50)))
    found = sasrec.sasrec(longer, fit.valid, 3, True)
    assert (found.item_idx[:, 0] == fit.valid.targets.values).all()
    assert 1 <= found.settings["epoch"] <= 50


def test_order_matters_and_only_the_latest_items_count(fit):
    users = EvalUsers(np.array([1, 2, 3]), ragged([[1, 2, 3], [3, 2, 1], [30, 20, 1, 2, 3, 4]]), ragged([[4]] * 3))
    model = small(32)
    forward, backward, long = sasrec.user_vectors(model, users.history)
    assert not np.allclose(forward, backward)
    np.testing.assert_allclose(long, sasrec.user_vectors(model, ragged([[1, 2, 3, 4]]))[0], rtol=1e-5)


def test_no_place_sees_a_later_one_or_padding():
    model = small()
    states = model(torch.tensor([[1, 2, 3, 0]]))
    torch.testing.assert_close(states[:, :2], model(torch.tensor([[1, 2]])))
    torch.testing.assert_close(states[:, :3], model(torch.tensor([[1, 2, 3, 5]]))[:, :3])


def test_every_event_but_the_first_is_a_target_once():
    """Sequences of 3, 0, 1, 9 and 2 events, windows of at most 3 places."""
    offsets = np.array([0, 3, 3, 4, 13, 15])
    windows = sasrec.cut_windows(offsets, 3)
    assert ((windows[:, 1] - windows[:, 0]) <= 4).all()
    targets = np.concatenate([np.arange(begin + 1, end) for begin, end in windows])
    assert sorted(targets.tolist()) == [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 14]
    assert [9, 13] in windows.tolist(), "the latest targets of a long sequence see a full window"


def test_batches_hold_every_window_once_and_pad_behind():
    values = np.arange(1, 41)
    windows = np.array([[0, 3], [3, 5], [5, 9], [9, 12], [12, 20], [20, 22], [22, 40]])
    rows = [row for batch in sasrec.batches(values, windows, 2, np.random.default_rng(0)) for row in batch]
    found = sorted(row[row > 0].tolist() for row in rows)
    assert found == sorted(values[begin:end].tolist() for begin, end in windows)
    assert all((row[np.count_nonzero(row) :] == 0).all() for row in rows)


def test_the_loss_of_a_small_catalog_is_the_full_softmax():
    model, items = small(), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    log_q = sasrec.log_proposal(np.arange(10))
    expected = []
    for row in items:
        sequence = row[row > 0]
        for place in range(1, len(sequence)):
            scores = model(sequence[None, :place])[0, -1] @ model.items.weight.T
            expected.append(-F.log_softmax(scores[1:], 0)[sequence[place] - 1])
    torch.testing.assert_close(sasrec.next_item_loss(model, items, log_q), torch.stack(expected).mean())


def test_the_sampled_loss_estimates_the_sum_over_the_catalog_without_bias(monkeypatch):
    """exp(loss + s_t) is the estimate; its mean over many draws is the sum itself."""
    model, items = small(), torch.tensor([[1, 2]])
    log_q = sasrec.log_proposal(np.array([0, 50, 20, 1, 1, 9, 4, 4, 2, 7]))
    assert log_q.exp()[1:].sum().item() == pytest.approx(1)
    with torch.no_grad():
        model.items.weight.mul_(40)  # scores apart, so that the correction matters
        scores = model(items[:, :1])[0, -1] @ model.items.weight.T
        monkeypatch.setitem(sasrec.TRAINING, "full_softmax", 5)
        monkeypatch.setitem(sasrec.TRAINING, "num_negatives", 16)
        estimates = torch.stack([(sasrec.next_item_loss(model, items, log_q) + scores[2]).exp() for _ in range(1000)])
    assert estimates.std() > 0
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - scores[1:].exp().sum()) < 4 * error


def test_a_trained_model_is_kept_and_not_trained_again(fit, tmp_path):
    said = []
    kept = dataclasses.replace(fit, cache=tmp_path / "baselines", digest="a", progress=said.append)
    first = sasrec.sasrec(kept, fit.valid, 5, True)
    trained = len(said)
    again = sasrec.sasrec(kept, fit.valid, 5, True)
    np.testing.assert_array_equal(again.item_idx, first.item_idx)
    assert again.settings == first.settings
    assert len(said) == trained + 1
    assert "as trained before" in said[-1]
    [file] = kept.cache.iterdir()
    assert file.suffix == ".safetensors"
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode, "colleagues use it, too"

    sasrec.sasrec(dataclasses.replace(kept, digest="b"), fit.valid, 5, True)
    assert len(list(kept.cache.iterdir())) == 2, "another corpus is another model"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not weights",
        lambda content: content[:-2] + bytes([content[-2] ^ 16]) + content[-1:],  # of a weight
        lambda content: content.replace(b'"epoch":"', b'"epoci":"'),
    ],
)
def test_a_damaged_file_is_replaced(fit, tmp_path, damage):
    kept = dataclasses.replace(fit, cache=tmp_path, digest="a")
    expected = sasrec.sasrec(kept, fit.valid, 5, True).item_idx
    [file] = tmp_path.iterdir()
    whole = {name: weight.clone() for name, weight in safetensors.torch.load_file(file).items()}
    file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(sasrec.sasrec(kept, fit.valid, 5, True).item_idx, expected)
    torch.testing.assert_close(safetensors.torch.load_file(file), whole, rtol=0, atol=0)


def test_a_model_that_cannot_be_kept_is_used_all_the_same(fit, tmp_path, largest_file):
    said = []
    kept = dataclasses.replace(fit, cache=tmp_path, digest="a", progress=said.append)
    expected = sasrec.sasrec(fit, fit.valid, 5, True).item_idx
    largest_file(1000)
    np.testing.assert_array_equal(sasrec.sasrec(kept, fit.valid, 5, True).item_idx, expected)
    assert "cannot be written" in said[-1]
    assert not list(tmp_path.iterdir())


def test_a_log_without_two_events_of_a_user_teaches_nothing(fit):
    with pytest.raises(LeftOut, match="two train events"):
        sasrec.sasrec(dataclasses.replace(fit, sequences=ragged([[1], [2], [3]])), fit.valid, 5, True)


def test_the_caller_s_random_numbers_are_its_own(fit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sasrec.sasrec(fit, fit.valid, 3, True)
    torch.testing.assert_close(torch.rand(3), expected)
