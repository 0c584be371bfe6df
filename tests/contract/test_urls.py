"""Which URLs hold a secret, and where none may ever appear."""

import json
import sys

import pytest

from contract import cli, config, outbox, urls
from contract.settings import Config

SECRETS = [
    ("http://name:s3cr3t@host:5000", "http://***@host:5000"),
    ("https://s3cr3t@host/path", "https://***@host/path"),
    ("http://name:s3c/r3t@host:5000", "http://***@host:5000"),
    ("http://name%3As3cr3t@host", "http://***@host"),
    ("HTTP://name:s3cr3t@[::1]:5000/", "HTTP://***@[::1]:5000/"),
    ("sftp://name:s3cr3t@host/x", "sftp://***@host/x"),
    ("s3a://KEY:s3cr3t@bucket/log", "s3a://***@bucket/log"),
    ("postgresql+psycopg2://me:s3cr3t@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
    ("simplecache::https://me:s3cr3t@host/x", "simplecache::https://***@host/x"),
    ("zip://a.zip::https://me:s3cr3t@host/x", "zip://a.zip::https://***@host/x"),
    ("https://proxy/https://me:s3cr3t@host/", "https://proxy/https://***@host/"),
    ("https://host/x?sv=1&sig=s3cr3t", "https://host/x?sv=1&sig=***"),
    ("https://host/x?X-Amz-Signature=s3cr3t&v=2", "https://host/x?X-Amz-Signature=***&v=2"),
    ("https://host/x#access_token=s3cr3t", "https://host/x#access_token=***"),
    ("abfs://box@host/x?AccountKey=s3cr3t", "abfs://box@host/x?AccountKey=***"),
]
HARMLESS = [
    "sqlite:///runs/mlflow.db",
    "sqlite:////data/a:b@c/mlflow.db",
    "http://127.0.0.1:5000",
    "http://[::1]:5000/path?page=2&keyword=x&design=1&author=me",
    "abfs://container@account.dfs.core.windows.net/shards",
    "sftp://name@host/x",
    "s3://bucket/user:1@home/x",
    "databricks://profile",
    "runs/2024-01@12:30",
    "",
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_a_secret_in_a_url_is_seen_and_hidden(url, shown):
    assert urls.secret(url, is_url=True)
    assert urls.hidden(f"cannot open '{url}': no") == f"cannot open '{shown}': no"


@pytest.mark.parametrize("url", HARMLESS)
def test_other_urls_are_left_alone(url):
    assert urls.secret(url, is_url=True) == ""
    assert urls.hidden(f"cannot open {url}: no") == f"cannot open {url}: no"


@pytest.mark.parametrize("url", [*(url for url, _ in SECRETS), "name:s3cr3t@host:5000", "http:/name:s3cr3t@host"])
@pytest.mark.parametrize("key", ["tracking.uri", "data.shards_url"])
def test_a_setting_with_a_secret_is_refused_without_repeating_it(tmp_path, capsys, monkeypatch, key, url):
    section, _, name = key.partition(".")
    (tmp_path / "a.toml").write_text(f"[{section}]\n{name} = {json.dumps(url)}\n")
    (tmp_path / "b.toml").write_text("")
    monkeypatch.delenv("COLAREC_TRACEBACK", raising=False)
    for words in (["a.toml"], ["b.toml", f"--{key}={url}"]):
        monkeypatch.setattr(sys, "argv", ["main.py", "--config", f"{tmp_path}/{words[0]}", *words[1:]])
        with pytest.raises(SystemExit):
            cli.run(lambda argv: cli.parse(argv, ""))
        said = "".join(capsys.readouterr())
        assert f"error: {key} holds " in said
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said
        assert "s3c" not in said
    with pytest.raises(ValueError, match=f"{key} holds "):
        config.replace(config.load(str(tmp_path / "b.toml")), {key: url})


def test_every_setting_and_every_error_is_free_of_secrets(tmp_path, capsys, monkeypatch):
    url = "https://me:s3cr3t@host/x"
    (tmp_path / "a.toml").write_text("")
    texts = [key for key, type_, _ in config.fields(Config) if type_ in (str, tuple[str, ...])]
    assert {"data.path", "data.interactions", "model.init", "name"} <= set(texts)
    words = [f"--{key}={url}" for key in texts] + [
        f"--train.epochs={url}",
        f"tracking.uri={url}",
        f"--trcking.uri={url}",
    ]
    words += [f"--config={url}"]
    for word in words:
        monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(tmp_path / "a.toml"), word])
        with pytest.raises(SystemExit):
            cli.run(lambda argv: cli.parse(argv, ""))
        said = capsys.readouterr().err
        assert "error: " in said
        assert "s3cr3t" not in said


def test_a_queue_of_before_is_sent_without_the_password_that_it_names(tmp_path, capsys):
    folder = tmp_path / outbox.QUEUE / "run"
    folder.mkdir(parents=True)
    (folder / outbox.URI).write_text("http://me:s3cr3t@127.0.0.1:9")
    (folder / outbox.RECORDS).write_text('\n{"time": 1, "status": "FINISHED"}')
    with pytest.raises(ConnectionError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used") as error:
        outbox.main([str(tmp_path)])
    assert "s3cr3t" not in "".join(capsys.readouterr()) + str(error.value)
    assert (folder / outbox.URI).read_text() == "http://127.0.0.1:9"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"run": 0o700, outbox.URI: 0o600, outbox.RECORDS: 0o600}
