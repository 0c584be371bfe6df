"""A model is logged, served by MLflow and asked over HTTP, as its users do."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest

from contract.config import to_toml
from eval.serving import main
from tests import tiny
from tests.eval.test_people import write_tokenizer
from trainer.main import main as train


@pytest.fixture
def url(tmp_path, group, capsys):
    """Of the invocations of a server of a tiny model, started by the command that logging it prints."""
    config = tiny.tiny_config(tmp_path / "work", train__epochs="1", eval__hybrid="2")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    train(["--config", str(file)])
    write_tokenizer(tmp_path / "work" / "corpus")
    main(["--config", str(file)])
    command = capsys.readouterr().out.strip().splitlines()[-1]
    (tmp_path / "work").rename(tmp_path / "elsewhere")  # all it needs is in MLflow
    check_what_is_logged(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert command.endswith("--port 5001")
    command = "exec env " + command.replace("5001", str(port))
    log = (tmp_path / "serve.log").open("w")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    server = subprocess.Popen(
        ["bash", "-c", command], cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, (tmp_path / "serve.log").read_text()
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def check_what_is_logged(folder: Path) -> None:
    """Neither pickles nor the log of events."""
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    model = Path(mlflow.artifacts.download_artifacts("models:/tiny/1", dst_path=str(folder / "logged")))
    names = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    assert "artifacts/work/model/model.safetensors" in names
    assert not [name for name in names if name.endswith((".pkl", ".tar")) or "interactions" in name]
    assert "item_embeddings.npy" not in {name.rpartition("/")[2] for name in names}


def test_requests_over_http(url):
    def ask(*people: dict) -> tuple[int, list[dict] | str]:
        """HTTP status; the lists, or the reason why there are none."""
        body = json.dumps({"dataframe_records": people}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)["predictions"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["message"]

    status, (first,) = ask({"history": ["i3", "i4"], "k": 5})
    assert status == 200
    assert len(first["item_id"]) == 5
    assert first["score"] == sorted(first["score"], reverse=True)
    assert first["title"] == [f"item {item_id[1:]}" for item_id in first["item_id"]]
    assert not {"i3", "i4"} & set(first["item_id"])

    # Rows do not depend on each other; what one has not asked for is not there.
    best, second = first["item_id"][:2]
    status, lists = ask(
        {"history": ["i3", "i4"], "k": 5},
        {"history": ["i3", "i4"], "k": 1, "exclude": [best]},
        {"history": ["i3", "i4"], "only": [second, "i3", best]},
        {"history": ["i9", "some wool"], "timestamps": [0, 86_400_000], "events": ["view", "purchase"]},
    )
    assert status == 200
    assert lists[0]["item_id"] == first["item_id"]
    assert lists[0]["score"] == pytest.approx(first["score"], abs=1e-4)
    assert lists[1]["item_id"] == [second]
    assert lists[2]["item_id"] == [best, second]  # in the same order and with the same scores; i3 is seen
    assert lists[2]["score"] == pytest.approx(first["score"][:2], abs=1e-4)
    assert len(lists[3]["item_id"]) == 10
    assert "i9" not in lists[3]["item_id"]

    good = {"history": ["i3"]}
    for wrong, reason in [
        ({"history": []}, "row 2: history is empty"),
        ({"history": ["i3", ""]}, "row 2: an entry of the history is empty"),
        ({"history": ["i3", "字"]}, "row 2: '字' is no item id, and none of its words"),
        ({"history": ["i3"], "k": 0}, "is not a whole number within 1..20"),
        ({"history": ["i3"], "k": 2.5}, "k = 2.5 is not a whole number"),
        ({"history": ["i3"], "exclude": ["i77"]}, "row 2: exclude: item 'i77' is unknown; did you mean 'i7'"),
        ({"history": ["i3"], "exclude": "i7"}, "row 2: exclude = 'i7' is not a list of texts"),
        ({"history": ["i3"], "only": []}, "row 2: only has 0 items"),
        ({"history": ["i3"], "events": ["buy"]}, "row 2: event 'buy' is unknown; there are: view, purchase"),
        ({"history": ["i3"], "timestamps": [1, 2]}, "row 2: timestamps has 2 entries, history 1"),
        ({"history": ["i3"], "timestamps": ["today"]}, "timestamps = ['today'] is not a list of whole numbers"),
        ({"history": ["i3", "i4"], "timestamps": [2, 1]}, "row 2: timestamps go back in time"),
        ({"history": "i3"}, "Failed to convert column history"),
        ({"history": ["i3"], "k": "ten"}, "row 2: k = 'ten' is not a whole number"),
    ]:
        status, message = ask(good, wrong)
        assert status == 400, (wrong, message)
        assert reason in message
    status, message = ask({"k": 3})
    assert status == 400
    assert "missing inputs ['history']" in message
