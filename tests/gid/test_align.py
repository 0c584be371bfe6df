import numpy as np
import pytest

from gid.align import align_codes
from gid.hierarchy import build_tree, leaf_sse, prefix_of


@pytest.fixture
def grid():
    """64 items on a grid of 4 x 4 x 4 steps, each level's shorter than the last, and GIDs with shuffled codes."""
    rng = np.random.default_rng(0)
    true = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    steps = [np.linalg.qr(rng.standard_normal((12, 4)))[0].T * size for size in (100.0, 10.0, 1.0)]
    embeddings = sum(steps[level][true[:, level]] for level in range(3))
    shuffled = true.copy()
    for level in (1, 2):
        prefix = prefix_of(true, level)
        numbering = np.stack([rng.permutation(4) for _ in range(prefix.max() + 1)])
        shuffled[:, level] = numbering[prefix, true[:, level]]
    return embeddings.astype(np.float32), true, shuffled


def test_a_code_is_the_same_step_below_every_node(grid):
    embeddings, true, shuffled = grid
    aligned = align_codes(embeddings, shuffled, 4)
    assert (aligned[:, 0] == true[:, 0]).all()
    for level in (1, 2):
        pairs = set(zip(true[:, level].tolist(), aligned[:, level].tolist(), strict=True))
        assert len(pairs) == 4  # one name for each step, whatever the prefix
        assert len(set(zip(true[:, level].tolist(), shuffled[:, level].tolist(), strict=True))) > 4


@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_tree_stays_as_it_is(length, monkeypatch):
    monkeypatch.setattr("gid.align.ROWS_AT_ONCE", 50)
    monkeypatch.setattr("gid.align.SAMPLE", 5)
    embeddings = np.random.default_rng(1).standard_normal((300, 6)).astype(np.float32)
    gids = build_tree(embeddings, 20 if length == 2 else 8, length)
    aligned = align_codes(embeddings, gids, 20 if length == 2 else 8)
    assert len(np.unique(aligned, axis=0)) == len(gids)
    assert aligned.min() >= 0
    assert aligned.max() < (20 if length == 2 else 8)
    for level in range(1, length):
        together = lambda codes, level=level: prefix_of(codes, level)[:, None] == prefix_of(codes, level)  # noqa: E731
        assert (together(aligned) == together(gids)).all()
    assert leaf_sse(embeddings, aligned) == pytest.approx(leaf_sse(embeddings, gids))
    assert (align_codes(embeddings, gids, 20 if length == 2 else 8) == aligned).all()


def test_items_that_are_all_alike_keep_different_gids():
    gids = build_tree(np.zeros((30, 3), np.float32), 4, 3)
    assert len(np.unique(align_codes(np.zeros((30, 3), np.float32), gids, 4), axis=0)) == 30
