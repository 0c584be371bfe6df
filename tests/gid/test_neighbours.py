"""What the same people take, as tables."""

import numpy as np
import scipy.sparse as sp

from gid import neighbours


def pairs(num_users=80, num_items=30, seed=0):
    rng = np.random.default_rng(seed)
    taken = rng.random((num_users, num_items)) < rng.random(num_items) * 0.4
    taken[:, 7] = False  # nobody takes it
    user, item = np.nonzero(taken)
    return user + 1, item + 1


def test_the_heaviest_come_first_and_are_those_of_the_similarity():
    user, item = pairs()
    found = neighbours.find(user, item, 80, 30, count=5)
    train = sp.csr_matrix((np.ones(len(user)), (user, item)), (81, 31))
    expected = neighbours.similarity(train, 6, neighbours.K1, neighbours.B).toarray()  # one of them is the item itself
    dense = np.zeros((31, 31))
    dense[np.arange(31)[:, None], found.item_IK] = found.weight_IK
    dense[:, 0] = 0
    np.testing.assert_allclose(dense, expected, rtol=1e-6)
    assert (np.diff(found.weight_IK, axis=1) <= 0).all()
    assert not (found.item_IK == np.arange(31)[:, None])[1:].any()
    assert ((found.item_IK > 0) == (found.weight_IK > 0)).all()
    assert found.item_IK.dtype == np.int32
    assert found.weight_IK.dtype == np.float32


def test_items_that_nobody_takes_have_none():
    found = neighbours.find(*pairs(), 80, 30, count=5)
    assert not found.item_IK[[0, 8]].any()
    assert not (found.item_IK == 8).any()


def test_written_tables_are_read_again(tmp_path):
    assert neighbours.read(tmp_path) is None
    found = neighbours.find(*pairs(), 80, 30, count=5)
    neighbours.write(tmp_path, found)
    for again, part in zip(neighbours.read(tmp_path), found, strict=True):
        np.testing.assert_array_equal(again, part)
