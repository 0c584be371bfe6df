import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import schema
from contract.artifacts import open_artifact, stage_output
from contract.config import load
from gid import build, neighbours

NUM_USERS, NUM_ITEMS = 60, 41


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    """One database for all tests: MLflow takes seconds to create it."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture
def toml(tmp_path, tracking_uri):
    """A config and a corpus of two tastes; item 41 is cold, with the words of the second taste."""
    file = tmp_path / "tiny.toml"
    file.write_text(f"""
work = "{tmp_path / "work"}"
[cf]
dim = 8
num_layers = 2
max_epochs = 10
[gid]
branching = 4
[tracking]
uri = "{tracking_uri}"
""")
    rng = np.random.default_rng(0)
    interactions = []
    for u in range(1, NUM_USERS + 1):
        liked = rng.permutation(20)[:7] + (1 if u % 2 else 21)
        splits = [schema.TRAIN] * 5 + [schema.VALID, schema.TEST]
        interactions += [(u, int(i), t, 0, s) for t, (i, s) in enumerate(zip(liked, splits, strict=True))]
    num_train = np.zeros(NUM_ITEMS + 1, int)
    for _, i, _, _, split in interactions:
        num_train[i] += split == schema.TRAIN
    write_corpus(load(str(file)), interactions, num_train, NUM_ITEMS)
    return file


def write_corpus(config, interactions, num_train, num_items, order=None):
    """`order`: item_idx of each item, where it is not its number; numbers beyond the first corpus are new items."""
    rng = np.random.default_rng(1)
    order = order if order is not None else np.arange(num_items + 1)
    items = [
        (
            int(order[i]),
            f"item-{i}",
            "",
            (rng.integers(5, size=4) + (3 if i <= 20 else 8)).tolist(),
            int(num_train[i]),
            0,
        )
        for i in range(1, num_items + 1)
    ]
    interactions = [(u, int(order[i]), *rest) for u, i, *rest in interactions]
    with stage_output(config, "corpus") as output:
        write(items, schema.ITEMS, output.path / "items.parquet")
        (output.path / "interactions").mkdir()
        write(interactions, schema.INTERACTIONS, output.path / "interactions" / "part-0.parquet")
        output.commit({"num_users": NUM_USERS, "num_items": num_items}, {"raw": "none"})


def write(rows, table_schema, path):
    pq.write_table(pa.table(dict(zip(table_schema.names, zip(*rows, strict=True), strict=True)), table_schema), path)


def test_builds_gids_and_embeddings_from_a_corpus(toml, capsys):
    build.main(["--config", str(toml)])
    config = load(str(toml))
    gid = open_artifact(config, "gid")
    assert gid.manifest["inputs"] == {"corpus": open_artifact(config, "corpus").digest}
    gids = schema.read_gids(gid.path)
    assert gids.shape == (NUM_ITEMS + 1, 3)
    assert len(np.unique(gids[1:], axis=0)) == NUM_ITEMS
    users = np.load(gid.path / "user_embeddings.npy", mmap_mode="r", allow_pickle=False)
    items = np.load(gid.path / "item_embeddings.npy", mmap_mode="r", allow_pickle=False)
    assert (users.shape, users.dtype) == ((NUM_USERS + 1, 8), np.float32)
    assert (items.shape, items.dtype) == ((NUM_ITEMS + 1, 8), np.float32)
    assert not users[0].any()
    assert not items[0].any()
    # the score separates the tastes, and the cold item's content places it with the second
    scores = users[1:] @ items[1:].T
    assert scores[0::2, :20].mean() > scores[0::2, 20:].mean()
    assert scores[1::2, 20:].mean() > scores[1::2, :20].mean()
    assert scores[1::2, 40].mean() > scores[0::2, 40].mean()
    counts = gid.counts
    assert (counts["num_items"], counts["num_cold"], counts["branching"], counts["length"]) == (NUM_ITEMS, 1, 4, 3)
    assert counts["num_leaves"] == len(np.unique(gids[1:, :2], axis=0))
    assert counts["largest_cluster_per_level"] == [
        int(np.unique(gids[1:, :level], axis=0, return_counts=True)[1].max()) for level in (1, 2)
    ]
    assert all(a <= b for a, b in zip(counts["largest_cluster_per_level"], counts["capacity_per_level"], strict=True))
    assert counts["leaf_sse"] < counts["leaf_sse_random"]
    assert "valid recall@20" in capsys.readouterr().out


def test_too_small_a_tree_fails_before_any_training(toml, capsys):
    with pytest.raises(ValueError, match=r"41 items do not fit .* set gid.length = 3 or more"):
        build.main(["--config", str(toml), "--gid.length=2"])
    assert "lightgcn" not in capsys.readouterr().out
    assert not (load(str(toml)).work_dir / "gid").exists()


def test_neighbours_are_kept_unless_none_are_asked_for(toml):
    build.main(["--config", str(toml), "--cf.max_epochs=1", "--gid.neighbours=7"])
    path = load(str(toml)).work_dir / "gid"
    found = neighbours.read(path)
    assert found.item_IK.shape == found.weight_IK.shape == (NUM_ITEMS + 1, 7)
    one, other = found.item_IK[1:21], found.item_IK[21:41]  # the tastes share no users
    assert 1 <= one.max() <= 20 < other[other > 0].min()
    assert not found.item_IK[41].any()
    build.main(["--config", str(toml), "--cf.max_epochs=1", "--gid.neighbours=0"])
    assert neighbours.read(path) is None


def test_als_has_the_same_neighbours(toml, monkeypatch):
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    tables = []
    for words in (["--cf.max_epochs=1"], ["--cf.method=als", "--cf.als_iterations=2"]):
        build.main(["--config", str(toml), "--gid.neighbours=40", *words])
        path = load(str(toml)).work_dir / "gid"
        found, table = neighbours.read(path), np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
        np.add.at(table, (np.arange(NUM_ITEMS + 1)[:, None], found.item_IK), found.weight_IK)
        tables.append(table)
    np.testing.assert_allclose(*tables, rtol=1e-5)
    assert not (path / "cooccurrence").exists()


def test_an_extended_tree_has_the_neighbours_of_its_own_corpus(toml, monkeypatch):
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    path, tables = load(str(toml)).work_dir / "gid", []
    for method in ("lightgcn", "als"):  # in memory and by Spark
        words = ["--config", str(toml), "--cf.max_epochs=1", "--gid.neighbours=4", f"--cf.method={method}"]
        build.main(words)
        tables.append(np.array(neighbours.read(path).weight_IK))
        build.main([*words, "--extend"])
        tables.append(np.array(neighbours.read(path).weight_IK))
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], rtol=1e-5)


@pytest.mark.parametrize("num_items", [200, 20_000])  # no room for the embeddings, or for the table before them
def test_without_room_it_ends_with_one_message(toml, largest_file, num_items):
    config, rows = load(str(toml)), np.zeros((num_items + 1, 8), np.float32)
    made = build.Made(np.zeros((num_items, 3), np.int16), rows, rows, rows, {})
    items = schema.Items([f"{i}" for i in range(num_items + 1)], schema.ragged(pa.array([[]])), np.zeros(num_items + 1))
    largest_file(6000)
    message = r"/\.gid\.tmp.* cannot be written: File too large; make room, or write elsewhere with --work"
    with pytest.raises(ValueError, match=message), stage_output(config, "gid") as output:
        build.write(output, made, items)
    assert not list(config.work_dir.glob("*gid*tmp"))


def test_random_gids_and_dry_run(toml, capsys):
    build.main(["--config", str(toml), "--gid.method=random", "--cf.max_epochs=1", "--dry-run"])
    assert "writes" in capsys.readouterr().out
    config = load(str(toml), {"gid.method": "random", "cf.max_epochs": "1"})
    assert not (config.work_dir / "gid").exists()
    build.main(["--config", str(toml), "--gid.method=random", "--cf.max_epochs=1"])
    gids = schema.read_gids(open_artifact(config, "gid").path)
    assert len(np.unique(gids[1:], axis=0)) == NUM_ITEMS


@pytest.mark.parametrize(("method", "width", "mixed"), [("content", 8, 2), ("fused", 16, 10)])  # by chance: 16
def test_trees_of_content_keep_what_they_cluster(toml, method, width, mixed):
    build.main(["--config", str(toml), f"--gid.method={method}", "--cf.max_epochs=5"])
    gid = open_artifact(load(str(toml), {"gid.method": method, "cf.max_epochs": "5"}), "gid")
    clustered = np.load(gid.path / "tree_embeddings.npy", allow_pickle=False)
    assert clustered.shape == (NUM_ITEMS + 1, width)
    gids = schema.read_gids(gid.path)[1:]
    # the two tastes use other words: clusters of the first level hardly mix them
    tastes = np.zeros((2, 4), int)
    np.add.at(tastes, ((np.arange(NUM_ITEMS) >= 20).astype(int), gids[:, 0]), 1)
    assert tastes.min(0).sum() <= mixed
    page = (gid.path / "report.html").read_text()
    assert "41 items as paths of 3 codes out of 4" in page
    assert "http" not in page.replace("http-equiv", "")  # it needs nothing else


def test_extend_keeps_every_old_gid_by_item_id(toml, capsys):
    build.main(["--config", str(toml), "--cf.max_epochs=5"])
    config = load(str(toml), {"cf.max_epochs": "5"})
    folder = config.work_dir / "gid"
    before = dict(zip(schema.read_item_ids(folder)[1:], schema.read_gids(folder)[1:].tolist(), strict=True))
    # a later corpus: five items more, all of them with other numbers, and nothing known of the interactions of two
    num_items = NUM_ITEMS + 5
    order = np.concatenate([[0], np.random.default_rng(3).permutation(num_items) + 1])
    interactions = [(u, 1 + u % num_items, 0, 0, schema.TRAIN) for u in range(1, NUM_USERS + 1)]
    write_corpus(config, interactions, np.ones(num_items + 1, int), num_items, order)
    with pytest.raises(ValueError, match="another corpus"):
        open_artifact(config, "gid")
    build.main(["--config", str(toml), "--cf.max_epochs=5", "--extend", "--gid.rebuild_share=0"])
    gid = open_artifact(load(str(toml), {"cf.max_epochs": "5", "gid.rebuild_share": "0"}), "gid")
    after = dict(zip(schema.read_item_ids(gid.path)[1:], schema.read_gids(gid.path)[1:].tolist(), strict=True))
    assert len(after) == num_items
    assert before.items() <= after.items()
    assert len(set(map(tuple, after.values()))) == num_items
    assert (gid.counts["num_kept"], gid.counts["num_added"], gid.counts["num_removed"]) == (NUM_ITEMS, 5, 0)
    # the new items, 42 to 46, have the words of the second taste, and go where its items are
    second = {before[f"item-{i}"][0] for i in range(21, 41)}
    assert sum(after[f"item-{i}"][0] in second for i in range(42, 47)) >= 4
    assert "were displaced by full clusters" in capsys.readouterr().out
    users = np.load(gid.path / "user_embeddings.npy", allow_pickle=False)
    items = np.load(gid.path / "item_embeddings.npy", allow_pickle=False)
    np.testing.assert_allclose(users[1], items[order[2]], rtol=1e-6)


def test_extend_refuses_a_random_tree(toml):
    settings = ["--config", str(toml), "--gid.method=random", "--cf.max_epochs=1"]
    build.main(settings)
    with pytest.raises(ValueError, match="without --extend"):
        build.main([*settings, "--extend"])
