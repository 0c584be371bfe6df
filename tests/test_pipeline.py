"""The four stages, one after another, called as their users call them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq

from contract.settings import BASELINES

BIN = Path(sys.executable).parent
CONFIG = """
[data]
format = "jsonl"
path = "{data}"
interactions = ["events-*.jsonl.gz"]
items = ["items.jsonl"]
time_unit = "ms"
event_column = "event"
text_columns = ["title", "description"]

[etl]
events = ["view", "cart", "purchase"]
vocab_size = 300
num_shards = 4

[cf]
dim = 16
max_epochs = 10

[model]
d_model = 32
num_encoder_layers = 1
num_decoder_layers = 1

[train]
epochs = 1
streams = 4

[eval]
beams = 20
sasrec_epochs = 2
"""


def test_from_a_log_to_a_table(tmp_path):
    (tmp_path / "shop.toml").write_text(CONFIG.format(data=tmp_path / "log"))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = ["--config", str(tmp_path / "shop.toml"), f"--work={tmp_path / 'work'}", f"--tracking.uri={uri}"]
    ranks = ["--num_accelerators", "2", "--master_port", "29531"]
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }

    def call(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    generate = [sys.executable, "etl/generate.py", str(tmp_path / "log"), "--users", "300", "--items", "150"]
    call(*generate)
    call(str(BIN / "spark-submit"), "--driver-java-options", "-XX:TieredStopAtLevel=1", "etl/build.py", *settings)
    call(sys.executable, "gid/build.py", *settings)
    call(str(BIN / "deepspeed"), *ranks, "trainer/main.py", *settings)
    output = call(str(BIN / "deepspeed"), *ranks, "eval/main.py", *settings)

    corpus = json.loads((tmp_path / "work" / "corpus" / "manifest.json").read_text())["counts"]
    assert corpus["num_rows_bad"] > 0  # the generated log has dirty rows
    metrics = json.loads((tmp_path / "work" / "eval" / "metrics.json").read_text())
    parts = ("without neighbours", "generative", "dense")
    models = ["ColaRec", *(f"ColaRec, {part}" for part in parts), *BASELINES]
    assert list(metrics["models"]) == models
    for model, values in metrics["models"].items():
        assert f"{values['recall@10']['mean']:.4f}" in output, model
    lists = pq.read_table(tmp_path / "work" / "eval" / "recommendations.parquet")
    assert lists.num_rows == corpus["num_test"]
    assert set(lists["item_id"].combine_chunks().flatten().to_pylist()) <= set(
        pq.read_table(tmp_path / "work" / "corpus" / "items.parquet")["item_id"].to_pylist()
    )
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("colarec").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == dict.fromkeys(
        ("shop/etl", "shop/gid", "shop/train", "shop/eval"), "FINISHED"
    )
    for run in runs:
        assert run.data.params["train.epochs"] == "1"
        assert run.data.params["etl.vocab_size"] == "300"
