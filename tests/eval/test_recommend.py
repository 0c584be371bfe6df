"""Recommendations as their users ask for them, on the tiny corpus."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contract.artifacts import exclusively, open_artifact
from contract.config import to_toml
from eval import people
from eval.items import read_names
from eval.parts import Parts
from eval.recommend import main
from tests import tiny
from trainer.main import main as train
from trainer.recommender import load

ENV = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, group):
    """(config, its file, the users' sequences) of a work folder whose model has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.tiny_config(folder / "work", train__epochs="1", eval__hybrid="2")
    users = tiny.write_corpus(config)
    tiny.write_gids(config)
    file = folder / "run.toml"
    file.write_text(to_toml(config))
    train(["--config", str(file)])
    return config, file, users


def rows(file) -> list[dict]:
    return pq.read_table(file).to_pylist()


def test_all_users_on_one_rank_and_on_two(trained, tmp_path):
    config, file, users = trained
    main(["--config", str(file), "--out", str(tmp_path / "one.parquet"), "-k", "6", "--titles"])
    one = rows(tmp_path / "one.parquet")
    words = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29523"]
    words += ["eval/recommend.py", "--config", str(file), "--out", str(tmp_path / "two.parquet"), "-k", "6", "--titles"]
    done = subprocess.run([sys.executable, *words], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "two.parquet") == one

    assert [row["user_idx"] for row in one] == list(range(1, 61))
    for row, sequence in zip(one, users, strict=True):
        assert row["user_id"] == f"u{row['user_idx']}"
        assert row["item_id"] == [f"i{i}" for i in row["item_idx"]]
        assert row["title"] == [f"item {i}" for i in row["item_idx"]]
        assert len(row["item_idx"]) == 6
        assert row["score"] == sorted(row["score"], reverse=True)
        assert not set(row["item_idx"]) & set(sequence.tolist())  # all that is known is history

    # The same of a user who is told as a person.
    inputs = {need: open_artifact(config, need) for need in ("corpus", "gid", "model")}
    recommender = load(config, inputs, torch.device("cpu"))
    reader = people.Reader(config, inputs["corpus"], recommender.catalog, read_names(inputs["corpus"].path))
    for user in (1, 17):
        acts = [reader.act(f"i{i}", 3_600_000 * t, tiny.EVENTS[i % 2]) for t, i in enumerate(users[user - 1])]
        found = recommender.recommend(people.batch_of(config, recommender.catalog, [acts]), 6)
        assert found["item_idx"][0].tolist() == one[user - 1]["item_idx"]
        np.testing.assert_allclose(found["score"][0], one[user - 1]["score"], rtol=1e-5)


def test_users_of_a_file_and_some_items(trained, tmp_path, capsys):
    _, file, users = trained
    (tmp_path / "ids.txt").write_text("u9\nu2\nnobody\nu9\n")
    (tmp_path / "items.txt").write_text("\n".join(f"i{i}" for i in range(1, 9)))
    words = ["--users", str(tmp_path / "ids.txt"), "--only", str(tmp_path / "items.txt"), "--exclude", "i2,i3"]
    main(["--config", str(file), "--out", str(tmp_path / "some.parquet"), "-k", "20", *words])
    some = rows(tmp_path / "some.parquet")
    assert [row["user_id"] for row in some] == ["u2", "u9"]
    for row in some:
        left = set(range(1, 9)) - {2, 3} - set(users[row["user_idx"] - 1].tolist())
        assert set(row["item_idx"]) == left
    output = capsys.readouterr().out
    assert "1 of 4 ids are of no user: nobody" in output
    assert "1 ids are there again" in output
    assert (tmp_path / "some.unknown.txt").read_text() == "nobody\n"


def test_seen_items_come_again_when_they_are_not_masked(trained, tmp_path):
    _, file, users = trained
    words = ["--out", str(tmp_path / "all.parquet"), "-k", "20", "--eval.mask_seen=false"]
    main(["--config", str(file), *words])
    lists = rows(tmp_path / "all.parquet")
    assert any(set(row["item_idx"]) & set(users[row["user_idx"] - 1].tolist()) for row in lists)


def test_a_run_that_was_stopped_goes_on(trained, tmp_path, monkeypatch, capsys):
    _, file, _ = trained
    out = tmp_path / "recs.parquet"
    main(["--config", str(file), "--out", str(tmp_path / "unbroken.parquet")])
    words, write = ["--config", str(file), "--out", str(out)], Parts.write

    def interrupted(parts: Parts, part: int, table: pa.Table) -> None:
        if part == 3:
            raise KeyboardInterrupt
        write(parts, part, table)

    monkeypatch.setattr(Parts, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not out.exists()
    assert "3 of 9 parts are kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds parts with k = 20, now it is 5"):
        main([*words, "-k", "5"])

    part = Parts(out).file(1)
    part.write_bytes(part.read_bytes().replace(b"PAR1", b"PAR2"))

    def recorded(parts: Parts, part: int, table: pa.Table) -> None:
        written.append(part)
        write(parts, part, table)

    written = []
    monkeypatch.setattr(Parts, "write", recorded)
    main(words)
    assert written == [1, 3, 4, 5, 6, 7, 8]
    assert pq.read_table(out) == pq.read_table(tmp_path / "unbroken.parquet")
    main(words)
    assert written == [1, 3, 4, 5, 6, 7, 8]
    assert "is there already" in capsys.readouterr().out


def test_two_do_not_write_one_table(trained, tmp_path):
    _, file, _ = trained
    out = tmp_path / "recs.parquet"
    with exclusively(out, "--out"), pytest.raises(BlockingIOError, match=r"writing .*recs.parquet .*--out"):
        main(["--config", str(file), "--out", str(out)])


def test_a_person_is_shown_a_table(trained, capsys):
    _, file, _ = trained
    main(["--config", str(file), "--history", "i3, i4", "--history", "i9", "-k", "4", "--exclude", "i10"])
    output = capsys.readouterr().out.splitlines()
    assert output[1:5] == ["history, oldest first", "  item i3  item 3", "  item i4  item 4", "  item i9  item 9"]
    assert output[6].split() == ["rank", "score", "item", "title"]
    table = [line.split() for line in output[7:]]
    assert [row[0] for row in table] == ["1", "2", "3", "4"]
    assert not {row[2] for row in table} & {"i3", "i4", "i9", "i10"}
    assert all(row[3:] == ["item", row[2][1:]] for row in table)


def test_what_cannot_be_is_refused(trained, tmp_path):
    _, file, _ = trained

    def call(*words: str) -> None:
        main(["--config", str(file), "--out", str(tmp_path / "recs.parquet"), *words])

    with pytest.raises(ValueError, match=r"-k 21: .* at most eval.beams = 20"):
        call("-k", "21")
    with pytest.raises(ValueError, match="-k 0: must be 1 or more"):
        call("-k", "0")
    with pytest.raises(ValueError, match="goes without --users, --out"):
        call("--history", "i3")
    with pytest.raises(ValueError, match="--exclude: item 'i77' is unknown; did you mean 'i7'"):
        call("--exclude", "i77")
    with pytest.raises(FileNotFoundError, match="no such file"):
        call("--users", str(tmp_path / "ids.txt"))
    with pytest.raises(ValueError, match="is empty"):
        main(["--config", str(file), "--history", "i3,,i4"])
    assert [file.name for file in tmp_path.iterdir()] in ([], [".recs.parquet.lock"])
