import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import schema
from contract.settings import Cf
from contract.spark import spark_session
from gid import als


def write_interactions(corpus, rows):
    (corpus / "interactions").mkdir(parents=True)
    columns = dict(zip(schema.INTERACTIONS.names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns, schema.INTERACTIONS), corpus / "interactions" / "part-0.parquet")


@pytest.fixture(scope="module")
def spark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        with spark_session("test") as session:
            yield session


def test_factors_solve_the_normal_equations_and_tell_tastes_apart(spark, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for u in range(1, 31):
        liked = rng.permutation(10)[:6] + (1 if u % 2 else 11)
        rows += [(u, int(i), 0, 0, schema.TRAIN) for i in liked[:5]] + [(u, int(liked[5]), 0, 0, schema.VALID)]
    write_interactions(tmp_path, rows)
    cf = Cf(dim=4, als_iterations=12, als_alpha=5.0, als_reg=0.1)
    found = als.fit(
        spark, tmp_path, 31, 21, cf, seed=1, scratch=tmp_path / "s"
    )  # user 31 and item 21 are unknown to train
    assert not (tmp_path / "s").exists()
    assert found.users.shape == (32, 4)
    assert found.items.shape == (22, 4)
    assert not found.users[[0, 31]].any()
    assert not found.items[[0, 21]].any()
    assert found.valid_recall == 1.0  # the other taste's ten items rank below the five left of one's own
    scores = found.users[1:31] @ found.items[1:21].T
    assert scores[0::2, :10].mean() > 0.6
    assert abs(scores[0::2, 10:].mean()) < 0.2
    # the last step of ALS solves for the users, given the items (Hu et al., equation 4; lambda scaled by n_u)
    y = found.items[1:21].astype(np.float64)
    for u in (1, 2):
        mine = np.isin(np.arange(1, 21), [i for user, i, *_, split in rows if user == u and split == schema.TRAIN])
        left = y.T @ y + (y[mine].T * 5.0) @ y[mine] + 0.1 * 5 * np.eye(4)
        expected = np.linalg.solve(left, y[mine].sum(0) * (1 + 5.0))
        np.testing.assert_allclose(found.users[u], expected, rtol=2e-3, atol=2e-4)


def test_needs_train_interactions(spark, tmp_path):
    write_interactions(tmp_path, [(1, 1, 0, 0, schema.VALID)])
    with pytest.raises(ValueError, match="no train interactions"):
        als.fit(spark, tmp_path, 1, 1, Cf(), seed=1, scratch=tmp_path / "scratch")
