"""The evaluation as its users call it, on the tiny corpus."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from contract.artifacts import open_artifact, stage_output
from contract.config import to_toml
from contract.settings import BASELINES
from eval.main import main, refuse_unfinished
from tests import tiny
from trainer.main import main as train

ENV = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def trained(tmp_path, group):
    """(config, its file, the users' sequences) of a work folder whose model has been trained."""
    config = tiny.tiny_config(tmp_path / "work", train__epochs="1")
    users = tiny.write_corpus(config)
    tiny.write_gids(config)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    train(["--config", str(file)])
    return config, file, users


def test_one_rank_and_two_give_the_same_numbers(trained):
    config, file, users = trained
    main(["--config", str(file), "--eval.hybrid=4"])
    one = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    lists = pq.read_table(config.work_dir / "eval" / "recommendations.parquet").to_pylist()
    # The launcher ends a rank's process without a word of its own on success.
    words = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29519", "eval/main.py"]
    done = subprocess.run(
        [sys.executable, *words, "--config", str(file), "--eval.hybrid=4"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    assert two["models"] == one["models"]
    assert two["lead"] == one["lead"]
    assert pq.read_table(config.work_dir / "eval" / "recommendations.parquet").to_pylist() == lists

    assert [row["user_idx"] for row in lists] == list(range(1, 61))
    hits = 0
    for row, sequence in zip(lists, users, strict=True):
        assert row["item_id"] == [f"i{i}" for i in row["item_idx"]]
        assert row["score"] == sorted(row["score"], reverse=True)
        assert not set(row["item_idx"]) & set(sequence[:-1].tolist())  # seen items are masked
        hits += sequence[-1] in row["item_idx"][:10]
    assert one["models"]["ColaRec"]["recall@10"]["mean"] == pytest.approx(hits / 60)
    names = {"ColaRec", "ColaRec, generative", "ColaRec, dense", "popularity", "item_knn", "lightgcn"}
    assert set(one["models"]) == names
    assert two["slices"] == one["slices"]
    assert two["curves"] == one["curves"]
    assert one["num_users"] == 60
    page = (config.work_dir / "eval" / "report.html").read_text()
    assert "10 users" in page
    assert re.search(r"\bitem \d+\b", page)  # the texts
    assert not re.search(r"\b[iu]\d+\b", page)  # raw ids of items and users


def test_every_baseline_is_in_the_table(trained):
    config, file, _ = trained
    main(["--config", str(file), f"--eval.baselines={','.join(BASELINES)}"])
    results = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    assert list(results["models"]) == ["ColaRec", *BASELINES]
    assert results["protocol"]["ease"].startswith("lambda ")
    [kept] = (config.work_dir / "baselines").iterdir()
    assert kept.name.startswith("sasrec-")


def test_the_hybrid_is_shown_beside_its_parts(trained):
    config, file, _ = trained
    main(["--config", str(file)])
    alone = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    main(["--config", str(file), "--eval.hybrid=0.5"])
    learned = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    main(["--config", str(file), "--eval.hybrid=0.5", "--eval.neighbours=1"])
    results = json.loads((config.work_dir / "eval" / "metrics.json").read_text())
    parts = ["without neighbours", "generative", "dense"]
    assert list(results["models"])[:4] == ["ColaRec", *(f"ColaRec, {part}" for part in parts)]
    assert [*learned["models"]][:3] == ["ColaRec", "ColaRec, generative", "ColaRec, dense"]
    assert results["models"]["ColaRec, generative"] == alone["models"]["ColaRec"]
    assert results["models"]["ColaRec"] != alone["models"]["ColaRec"]
    assert all(lead["over"] in ("popularity", "item_knn", "lightgcn") for lead in results["lead"].values())
    assert results["protocol"]["decoding"].endswith(
        "with as many by h(X_u) . v_i and by c, the neighbours, ranked by (log p + 0.5 h(X_u) . v_i) / 1.5 + 1 c"
    )


def test_a_model_of_another_history_is_refused(trained):
    _, file, _ = trained
    with pytest.raises(ValueError, match=r"built with history\.order = 'time', the config says 'set'"):
        main(["--config", str(file), "--history.order=set"])


def test_a_model_of_an_earlier_tree_is_refused(trained):
    config, file, _ = trained
    open_artifact(config, "model")
    tiny.write_gids(config, num_items=39)
    with pytest.raises(ValueError, match="built from another gid/"):
        main(["--config", str(file)])


def test_dry_run_writes_nothing(trained, capsys):
    config, file, _ = trained
    main(["--config", str(file), "--dry-run", "--eval.beams=33"])
    output = capsys.readouterr().out
    assert "beams = 33" in output
    assert f"writes              {config.work_dir / 'eval'}" in output
    assert not (config.work_dir / "eval").exists()


def test_a_model_that_is_being_trained_anew_is_refused(tmp_path):
    """As when the launcher of its training was killed, and told the chain of no error."""
    config = tiny.tiny_config(tmp_path / "work")
    with stage_output(config, "model"), pytest.raises(BlockingIOError, match=r"another run is writing .*work/model"):
        refuse_unfinished(config)
    refuse_unfinished(config)
    (config.work_dir / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is being trained anew, and .*/checkpoints holds how far that came"):
        refuse_unfinished(config)
