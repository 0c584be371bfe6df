"""A model is logged, served and asked over HTTP, as its users do."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc import scoring_server

from contract.config import to_toml
from contract.schema import FIRST_MS
from eval import served
from eval.serving import SIGNATURE, main
from tests import tiny
from tests.eval.test_people import write_tokenizer
from trainer.main import main as train

MS = 1_700_000_000_000  # a time in 2023


@pytest.fixture(scope="module")
def logged(tmp_path_factory, group):
    """(folder, what logging it printed) of a tiny model that is in MLflow and nowhere else."""
    folder = tmp_path_factory.mktemp("serving")
    config = tiny.tiny_config(folder / "work", train__epochs="1", eval__hybrid="2")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    file = folder / "run.toml"
    file.write_text(to_toml(config))
    train(["--config", str(file)])
    write_tokenizer(folder / "work" / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        main(["--config", str(file)])
    (folder / "work").rename(folder / "elsewhere")  # all it needs is in MLflow
    check_what_is_logged(folder)
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def url(logged):
    """Of a server of the model, started by the command that logging it prints."""
    folder, printed = logged
    command = printed.strip().splitlines()[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert command.endswith("--port 5001")
    command = "exec env " + command.replace("5001", str(port))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, (folder / "serve.log").read_text()
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@pytest.fixture(scope="module")
def model(logged):
    """What MLflow's server loads, whoever starts it."""
    found = served.Served()
    found.load_context(SimpleNamespace(artifacts={served.WORK: str(logged[0] / "logged/artifacts/work")}))
    return found


def refusal(model: served.Served, *people: dict) -> str:
    """Why there are no lists for them; the body goes the way of MLflow's server."""
    body = json.loads(json.dumps({"dataframe_records": people}))
    frame = _enforce_schema(scoring_server.infer_and_parse_data(body, SIGNATURE.inputs), SIGNATURE.inputs)
    with pytest.raises(mlflow.MlflowException) as error:
        model.predict(None, frame)
    assert error.value.get_http_status_code() == 400
    assert len(error.value.message) < 400
    return error.value.message


def check_what_is_logged(folder: Path) -> None:
    """Neither pickles nor the log of events."""
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    model = Path(mlflow.artifacts.download_artifacts("models:/tiny/1", dst_path=str(folder / "logged")))
    names = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    assert "artifacts/work/model/model.safetensors" in names
    assert not [name for name in names if name.endswith((".pkl", ".tar")) or "interactions" in name]
    assert "item_embeddings.npy" not in {name.rpartition("/")[2] for name in names}


def test_requests_over_http(url):
    def post(body: bytes, content_type: str = "application/json") -> tuple[int, list[dict] | str]:
        """HTTP status; the lists, or the reason why there are none."""
        request = urllib.request.Request(url, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)["predictions"]
        except urllib.error.HTTPError as error:
            told = error.read().decode()
            assert len(told) < 700
            assert "Traceback" not in told
            assert not any(place in told for place in (str(Path.home()), "/tmp", "site-packages", ".py"))
            return error.code, json.loads(told)["message"]

    def ask(*people: dict) -> tuple[int, list[dict] | str]:
        return post(json.dumps({"dataframe_records": people}).encode())

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
        {"history": ["i9", "some wool"], "timestamps": [FIRST_MS, FIRST_MS + 1], "events": ["view", "purchase"]},
    )
    assert status == 200
    assert lists[0]["item_id"] == first["item_id"]
    assert lists[0]["score"] == pytest.approx(first["score"], abs=1e-4)
    assert lists[1]["item_id"] == [second]
    assert lists[2]["item_id"] == [best, second]  # in the same order and with the same scores; i3 is seen
    assert lists[2]["score"] == pytest.approx(first["score"][:2], abs=1e-4)
    assert len(lists[3]["item_id"]) == 10
    assert "i9" not in lists[3]["item_id"]

    split = {"columns": ["k", "history"], "data": [[1, ["i3", "i4"]], [5, ["i3", "i4"]]]}
    status, lists = post(json.dumps({"dataframe_split": split}).encode())
    assert status == 200
    assert [found["item_id"] for found in lists] == [[best], first["item_id"]]

    good = {"history": ["i3"]}
    for wrong, reason in [
        ({"history": ["i3"], "exclude": ["i77"]}, "row 2: exclude: item 'i77' is unknown; did you mean 'i7'"),
        ({"history": ["i3"], "timestamps": [2**63]}, "row 2: timestamps[0] = 9223372036854775808 is in the future"),
        ({"history": ["\ud83d"]}, r"row 2: '\ud83d' is no text: it holds half a surrogate pair"),
        ({"history": ["x" * 1_000_000]}, "row 2: history[0] has 1,000,000 characters"),
        ({"k": 3}, "row 2: history is missing"),
        ({"history": ["i3"], "exlude": ["i7"]}, "'exlude' is unknown; did you mean 'exclude'"),
    ]:
        status, message = ask(good, wrong)
        assert (status, message[: len(reason)]) == (400, reason)
    for body, content_type, status, reason in [
        (b"history\ni3\n", "text/csv", 415, "Content-Type 'text/csv': send JSON"),
        (b"{" * 1_000, "application/json", 400, "the body is not JSON"),
        (b"[" * 100_000, "application/json", 400, "the body is not JSON"),
        (b'{"dataframe_records": [{"history": [NaN]}]}', "application/json", 400, "the body is not JSON: NaN"),
        (b'{"dataframe_records": [{"history": [' + b"9" * 5000 + b"]}]}", "application/json", 400, "the body is not"),
        (b"\xff" * 1_000_000, "application/json", 400, "the body is not JSON"),
        (b" " * 5_000_000, "application/json", 413, "the body of the request is larger than 4,194,304 bytes"),
    ]:
        assert post(body, content_type)[0] == status
        assert post(body, content_type)[1].startswith(reason)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"history": []}, "history is empty"),
        ({"history": None}, "history is missing"),
        ({"history": "i3"}, "history = 'i3' is not a list of texts"),
        ({"history": {"i3": 1}}, "history = {'i3': 1} is not a list of texts"),
        ({"history": ["i3", ""]}, "an entry of the history is empty"),
        ({"history": ["i3", None]}, "history[1] = null is not a text"),
        ({"history": ["i3", float("nan")]}, "history[1] = nan is not a text"),
        ({"history": [7.0]}, "history[0] = 7.0 is not a text"),
        ({"history": ["i3", 7]}, "history[1] = 7 is not a text"),
        ({"history": [True]}, "history[0] = true is not a text"),
        ({"history": [["i3"]]}, "history[0] = ['i3'] is not a text"),
        ({"history": ["字"]}, "'字' is no item id, and none of its words"),
        ({"history": ["i3", "i77"]}, "item 'i77' is unknown; did you mean 'i7'? Nor is it a word"),
        ({"history": ["some\ud800wool"]}, r"'some\ud800wool' is no text"),
        ({"history": ["i3"] * 1001}, "history has 1,001 entries; give at most 1,000"),
        ({"history": ["wool " * 2001]}, "history[0] has 10,005 characters; give at most 10,000"),
        ({"k": 0}, "k = 0 is not a whole number within 1..20"),
        ({"k": 21}, "k = 21 is not a whole number within 1..20"),
        ({"k": 2.5}, "k = 2.5 is not"),
        ({"k": True}, "k = true is not"),
        ({"k": "3"}, "k = '3' is not"),
        ({"k": float("inf")}, "k = inf is not"),
        ({"k": 10**30}, "k = 1000"),
        ({"k": [3]}, "k = [3] is not"),
        ({"exclude": ["i77"]}, "exclude: item 'i77' is unknown; did you mean 'i7'"),
        ({"exclude": ["i7\udfff"]}, r"exclude: item 'i7\udfff' is unknown; did you mean 'i7'"),
        ({"exclude": ["x" * 100_000]}, "exclude: item 'xxx"),
        ({"exclude": "i7"}, "exclude = 'i7' is not a list of texts"),
        ({"exclude": [7]}, "exclude[0] = 7 is not a text"),
        ({"exclude": ["i7"] * 10_001}, "exclude has 10,001 entries"),
        ({"only": []}, "only has no items"),
        ({"only": ["i7", None]}, "only[1] = null is not a text"),
        ({"events": ["buy"]}, "event 'buy' is unknown; there are: view, purchase"),
        ({"events": [None]}, "events[0] = null is not a text"),
        ({"events": ["view", "view"]}, "events has 2 entries, history 1"),
        ({"timestamps": [MS, MS]}, "timestamps has 2 entries, history 1"),
        ({"timestamps": MS}, f"timestamps = {MS}.0 is not a list"),
        ({"timestamps": ["today"]}, "timestamps[0] = 'today' is not a whole number"),
        ({"timestamps": [str(MS)]}, f"timestamps[0] = '{MS}' is not a whole number"),
        ({"timestamps": [float(MS)]}, f"timestamps[0] = {float(MS)} is not a whole number"),
        ({"timestamps": [False]}, "timestamps[0] = false is not a whole number"),
        ({"timestamps": [MS // 1000]}, f"timestamps[0] = {MS // 1000} is before 1995; give milliseconds"),
        ({"timestamps": [FIRST_MS - 1]}, f"timestamps[0] = {FIRST_MS - 1} is before 1995"),
        ({"timestamps": [-1]}, "timestamps[0] = -1 is negative"),
        ({"timestamps": [MS * 1000]}, f"timestamps[0] = {MS * 1000} is in the future; give milliseconds"),
        ({"timestamps": [2 * MS]}, f"timestamps[0] = {2 * MS} is in the future"),
        ({"timestamps": [2**63]}, "timestamps[0] = 9223372036854775808 is in the future"),
        ({"history": ["i3", "i4"], "timestamps": [MS, MS - 1]}, "timestamps go back in time"),
    ],
)
def test_values_are_checked_before_anything_coerces_them(model, wrong, reason):
    assert refusal(model, {"history": ["i3"]}, {"history": ["i3"]} | wrong).startswith(f"row 2: {reason}")


def test_a_request_has_limits_whoever_serves_the_model(model, monkeypatch):
    assert refusal(model, *[{"history": ["i3"]}] * 257).startswith("the request has 257 rows; give at most 256")
    monkeypatch.setattr(served, "MAX_SECONDS", -1)
    assert "took more than -1 seconds; give fewer rows" in refusal(model, {"history": ["i3"]})
