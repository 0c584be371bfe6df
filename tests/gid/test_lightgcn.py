import numpy as np
import pytest
import torch

from contract.settings import Cf
from gid import lightgcn
from gid.lightgcn import Adjacency, Negatives, PopularNegatives, ValidRecall, bpr_loss, check_memory, propagate

CPU = torch.device("cpu")
# 3 users, 4 items; item 3 is seen by one user only.
USER = np.array([0, 0, 1, 1, 2, 2])
ITEM = np.array([0, 1, 1, 2, 0, 3])


def dense_layer_mean(e0: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Equations 7 and 8 on dense matrices: E(k+1) = D^-1/2 A D^-1/2 E(k)."""
    ratings = torch.zeros(3, 4)
    ratings[USER, ITEM] = 1
    a = torch.cat([torch.cat([torch.zeros(3, 3), ratings], 1), torch.cat([ratings.T, torch.zeros(4, 4)], 1)])
    d = torch.diag(a.sum(1).rsqrt())
    layers = [e0]
    for _ in range(num_layers):
        layers.append(d @ a @ d @ layers[-1])
    return torch.stack(layers).mean(0)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_propagation_and_its_gradient_equal_the_dense_formula(num_layers):
    e0 = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    ours, dense = e0.clone().requires_grad_(), e0.clone().requires_grad_()
    out = propagate(Adjacency(USER, ITEM, 3, 4, CPU), ours, num_layers)
    expected = dense_layer_mean(dense, num_layers)
    torch.testing.assert_close(out, expected)
    # a loss that is not linear, so that the gradient depends on where it is taken
    (out.square() * weights).sum().backward()
    (expected.square() * weights).sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad)


def test_loss_equals_equation_15_by_hand():
    e0 = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    triples = torch.tensor([[0, 2], [1, 3], [2, 1]])
    loss = bpr_loss(Adjacency(USER, ITEM, 3, 4, CPU), e0, triples, 3, Cf(num_layers=2, l2=0.1))
    e = dense_layer_mean(e0, 2)
    expected = 0.0
    for u, i, j in triples.T.tolist():
        difference = e[u] @ e[3 + i] - e[u] @ e[3 + j]
        norms = e0[u].square().sum() + e0[3 + i].square().sum() + e0[3 + j].square().sum()
        expected += (-torch.log(torch.sigmoid(difference)) + 0.1 / 2 * norms) / 2
    torch.testing.assert_close(loss, expected)


def test_the_gradient_is_the_same_on_any_number_of_threads_to_the_last_bit():
    rng = np.random.default_rng(0)
    user, item = np.unique(rng.integers(0, [300, 40], (4000, 2)), axis=0).T
    adjacency = Adjacency(user, item, 300, 40, CPU)
    triples = torch.from_numpy(rng.integers(0, 40, (3, 4096)))  # few nodes, many times each
    threads, gradients = torch.get_num_threads(), []
    try:
        for number in (1, 4, 4, 4):
            torch.set_num_threads(number)
            e0 = torch.randn(340, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            bpr_loss(adjacency, e0, triples, 300, Cf(num_layers=2)).backward()
            gradients.append(e0.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_negatives_are_uniform_over_exactly_the_unseen_items():
    rng = np.random.default_rng(0)
    seen = rng.random((20, 9)) < rng.random((20, 1))
    seen[3], seen[4] = True, False  # a user of everything, and one of nothing
    user, item = seen.nonzero()
    shuffled = rng.permutation(len(user))
    negatives = Negatives(user[shuffled], item[shuffled], 20, 9)
    assert negatives.has_negative.tolist() == (~seen).any(1).tolist()
    asked = torch.from_numpy(np.repeat(np.flatnonzero((~seen).any(1)), 3000))
    drawn = negatives.sample(asked, torch.Generator().manual_seed(0))
    counts = np.zeros((20, 9))
    np.add.at(counts, (asked.numpy(), drawn.numpy()), 1)
    assert not counts[seen].any()
    expected = 3000 / (~seen).sum(1, keepdims=True).clip(1) * ~seen
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()


def test_popular_negatives_follow_the_counts_of_the_unseen_items():
    # item 0 has 16 users, item 1 has 1, item 2 has 81, item 3 none but the asked user's own
    user = np.concatenate([np.arange(1, 17), [1], np.arange(1, 82), [0, 82]])
    item = np.concatenate([np.zeros(16), [1], np.full(81, 2), [3, 3]]).astype(int)
    everything = np.full(3, 83), np.array([0, 1, 2])  # user 83 lacks item 3 alone, which he is asked for
    negatives = PopularNegatives(np.append(user, everything[0]), np.append(item, everything[1]), 84, 4)
    drawn = negatives.sample(torch.zeros(40_000, dtype=torch.int64), torch.Generator().manual_seed(0))
    share = np.bincount(drawn.numpy(), minlength=4) / 40_000
    expected = np.array([17, 2, 82, 0]) ** 0.75
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)
    last = negatives.sample(torch.full((50,), 83), torch.Generator().manual_seed(0))
    assert (last == 3).all()


def test_memory_is_estimated_before_training():
    cf = Cf(dim=64, batch=8192)
    check_memory(1000, 5000, cf, available=4 * (12 * 1000 * 64 + 16 * 5000 * 64 + 30 * 5000))
    with pytest.raises(ValueError, match=r'= 10\.8 GiB for N = 3000000 .* 8\.0 GiB are free.* cf.method = "als"'):
        check_memory(3_000_000, 20_000_000, cf, available=8 << 30)


def test_training_needs_the_memory_that_there_is(monkeypatch):
    train, valid = blocks(num_blocks=2, users_per_block=5, items_per_block=8, seed=0)
    monkeypatch.setattr(lightgcn, "available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"and 0\.0 GiB are free"):
        lightgcn.fit(train, valid, 10, 16, Cf(dim=4), seed=1)
    monkeypatch.undo()
    assert 1 << 20 < lightgcn.available_memory(CPU) < 1 << 50


def test_valid_recall_masks_train_items_and_counts_unknown_items_as_missed(monkeypatch):
    monkeypatch.setattr(lightgcn, "RECALL_AT", 2)
    monkeypatch.setattr(lightgcn, "MAX_SCORES", 4)  # one user per block
    train = np.array([0, 0, 1, 2]), np.array([0, 1, 0, 3])
    # user 0: items 0 and 1 are masked, top 2 of the rest is {2, 3}; user 2: item 0 and one unknown to train
    valid = np.array([2, 0, 2]), np.array([0, 2, -1])
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 1.0, 9.0]])
    recall = ValidRecall(train, valid, 4, CPU)(scores, torch.eye(4))
    assert recall == pytest.approx((1 / 1 + 1 / 2) / 2)


def blocks(num_blocks: int, users_per_block: int, items_per_block: int, seed: int):
    """Users who like the items of their own block only: half of them in train, one in valid. Ids start at 1."""
    rng = np.random.default_rng(seed)
    train, valid = [], []
    for u in range(num_blocks * users_per_block):
        liked = rng.permutation(items_per_block)[: items_per_block // 2 + 1] + u % num_blocks * items_per_block
        train += [(u + 1, i + 1) for i in liked[1:]]
        valid.append((u + 1, liked[0] + 1))
    return tuple(np.array(train).T), tuple(np.array(valid).T)


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_learns_blocks_that_popularity_cannot_see(negatives):
    train, valid = blocks(num_blocks=10, users_per_block=20, items_per_block=30, seed=0)
    cf = Cf(dim=16, batch=512, max_epochs=20, lr=0.01, negatives=negatives)
    # item 301 is cold, user 201 has no interactions
    found = lightgcn.fit(train, valid, 201, 301, cf, seed=1)
    popularity = np.bincount(train[1], minlength=302)[1:301]
    top = np.argsort(-popularity)[:20] + 1
    assert np.isin(valid[1], top).mean() < 0.2
    assert found.valid_recall > 0.8
    assert not found.items[[0, 301]].any()
    assert not found.users[[0, 201]].any()
    again = lightgcn.fit(train, valid, 201, 301, cf, seed=1)
    np.testing.assert_array_equal(found.items, again.items)


def test_returns_the_embeddings_of_the_best_measurement_and_stops_by_patience():
    train, valid = blocks(num_blocks=4, users_per_block=15, items_per_block=12, seed=1)
    cf = Cf(dim=8, batch=64, max_epochs=500, eval_every=2, patience=3, lr=0.05, l2=0)
    history = []
    found = lightgcn.fit(train, valid, 60, 48, cf, 1, lambda epoch, loss, recall: history.append((epoch, recall)))
    assert history[-1][0] < 500
    assert history[-1][0] == found.best_epoch + 6
    assert found.valid_recall == max(recall for _, recall in history)
    # all users, items and interactions occur in train, so that dense ids are ids minus 1
    recall = ValidRecall((train[0] - 1, train[1] - 1), (valid[0] - 1, valid[1] - 1), 48, CPU)
    assert recall(torch.from_numpy(found.users[1:]), torch.from_numpy(found.items[1:])) == found.valid_recall


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (([], []), ([1], [1]), "no train interactions"),
        (([1], [1]), ([], []), "early stopping"),
        (([1, 1, 2, 2], [1, 2, 1, 2]), ([1], [1]), "every item"),
    ],
)
def test_refuses_what_it_cannot_learn_from(train, valid, message):
    train, valid = (tuple(np.array(part, np.int64) for part in pairs) for pairs in (train, valid))
    with pytest.raises(ValueError, match=message):
        lightgcn.fit(train, valid, 2, 2, Cf(max_epochs=1), seed=1)


def test_says_when_training_diverges():
    train, valid = blocks(num_blocks=2, users_per_block=5, items_per_block=8, seed=0)
    with pytest.raises(ValueError, match=r"lower cf.lr"):
        lightgcn.fit(train, valid, 10, 16, Cf(dim=4, lr=1e30, max_epochs=5, eval_every=5), seed=1)
