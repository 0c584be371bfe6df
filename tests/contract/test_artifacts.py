"""An artifact is complete or absent, whatever happens to the process that writes it."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import artifacts, config, disk, seal
from contract.artifacts import open_artifact, stage_output
from contract.settings import Config

# Writes an artifact, then says so and waits to be killed, holding the lock.
WRITER = """
import sys, time
from contract import config
from contract.artifacts import stage_output
with stage_output(config.load(sys.argv[1]), "corpus") as output:
    (output.path / "data.bin").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def settings(tmp_path):
    return load(tmp_path)


def load(folder: Path, **overrides: str) -> Config:
    file = folder / "small.toml"
    file.write_text(f'work = "{folder / "work"}"')
    return config.load(str(file), {key.replace("__", "."): value for key, value in overrides.items()})


def build(settings, name: str, content: bytes = b"content", inputs: dict | None = None):
    with stage_output(settings, name) as output:
        (output.path / "part").mkdir()
        (output.path / "part" / "data.bin").write_bytes(content)
        return output.commit({"num_items": 3}, inputs or {}, shards=["a"])


def hidden(settings) -> set[str]:
    """What is left in the work folder beside artifacts and locks."""
    return {file.name for file in settings.work_dir.iterdir() if file.suffix in (".tmp", ".old")}


@contextlib.contextmanager
def writer(settings):
    """A second process in the middle of writing corpus/."""
    command = [sys.executable, "-c", WRITER, str(settings.work_dir.parent / "small.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_what_was_committed_is_opened(settings):
    built = build(settings, "corpus")
    opened = open_artifact(settings, "corpus")
    assert opened == built
    assert opened.counts == {"num_items": 3}
    assert opened.manifest["shards"] == ["a"]
    assert (opened.path / "part" / "data.bin").read_bytes() == b"content"
    assert opened.manifest["config"]["etl.min_user"] == settings.etl.min_user
    assert hidden(settings) == set()


def test_the_digest_is_that_of_the_files(settings):
    digest = build(settings, "corpus").digest
    assert build(settings, "corpus").digest == digest
    assert build(settings, "corpus", b"other").digest != digest


@pytest.mark.parametrize(("name", "command"), [("corpus", "spark-submit etl/build.py"), ("gid", "python gid/build.py")])
def test_a_missing_artifact_names_the_command(settings, name, command):
    with pytest.raises(FileNotFoundError, match=f"run first: {command} --config"):
        open_artifact(settings, name)


def test_without_manifest_no_artifact(settings):
    build(settings, "corpus").path.joinpath(artifacts.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        open_artifact(settings, "corpus")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"cOntent"), "differs from its checksum"),
        (lambda file: file.write_bytes(b"content and more"), "has 16 bytes, not 7"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["a byte", "the size", "the file"],
)
def test_files_that_differ_from_the_manifest_are_refused(settings, damage, message):
    damage(build(settings, "corpus").path / "part" / "data.bin")
    with pytest.raises(ValueError, match=rf"data\.bin {message}.*run again: spark-submit"):
        open_artifact(settings, "corpus")


def test_a_damaged_manifest_is_refused(settings):
    manifest = build(settings, "corpus").path / artifacts.MANIFEST
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        open_artifact(settings, "corpus")


def test_a_manifest_with_a_flipped_bit_is_refused_by_name(settings):
    manifest = build(settings, "corpus").path / artifacts.MANIFEST
    content, before = manifest.read_bytes(), open_artifact(settings, "corpus")
    harmless = 0
    for place in range(0, len(content), 7):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            assert open_artifact(settings, "corpus") == before
            harmless += 1  # a white space is another one
        except ValueError as error:
            refused = str(error)
        assert refused.startswith(f"{manifest} is damaged (")
        assert refused.endswith("; run again: spark-submit etl/build.py --config <your config>")
    assert harmless < 0.1 * len(content) / 7


def test_a_manifest_of_an_earlier_version_is_refused_until_it_is_sealed(settings, capsys):
    built = build(settings, "corpus")
    manifest = built.path / artifacts.MANIFEST
    manifest.write_text(json.dumps(built.manifest))  # without a checksum
    with pytest.raises(
        ValueError, match=r"manifest.json is damaged \(it has no checksum of itself\); run again: spark"
    ):
        open_artifact(settings, "corpus")
    seal.main([str(settings.work_dir)])
    assert capsys.readouterr().out == f"{manifest} is sealed now\n"
    assert open_artifact(settings, "corpus") == built
    seal.main([str(settings.work_dir)])
    assert capsys.readouterr().out == f"{manifest} has a checksum\n"
    manifest.write_text(json.dumps(built.manifest))
    (built.path / "part" / "data.bin").write_bytes(b"cOntent")
    with pytest.raises(ValueError, match=r"data.bin differs from its checksum, by the manifest"):
        seal.main([str(settings.work_dir)])
    with pytest.raises(FileNotFoundError, match="holds no artifacts"):
        seal.main([str(built.path)])


NUMBERS = np.random.default_rng(0).random(5000)
WRITERS = {
    "report.html": lambda file: file.write_text("x" * 5000),
    "table.npy": lambda file: disk.save_array(file, NUMBERS),
    "table.parquet": lambda file: pq.write_table(pa.table({"x": NUMBERS}), file),  # its error names no file
    "manifest.json": lambda file: disk.write_record(file, {"x": NUMBERS.tolist()}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_without_room_a_stage_ends_with_one_message_and_leaves_nothing(settings, largest_file, name):
    largest_file(4000)
    message = r"/\.corpus\.tmp.* cannot be written: File too large; make room, or write elsewhere with --work"
    with pytest.raises(ValueError, match=message), stage_output(settings, "corpus") as output:
        WRITERS[name](output.path / name)
    assert {file.name for file in settings.work_dir.iterdir()} == {".corpus.lock"}


def test_other_settings_of_the_stage_are_refused_by_name(settings, tmp_path):
    build(settings, "corpus")
    with pytest.raises(ValueError, match=r"built with etl\.min_user = 5, the config says 3"):
        open_artifact(load(tmp_path, etl__min_user="3"), "corpus")
    # Settings that did not shape the corpus may change.
    open_artifact(load(tmp_path, train__lr="0.5"), "corpus")


def test_a_setting_that_the_artifact_does_not_know_is_not_compared(settings):
    manifest = build(settings, "corpus").path / artifacts.MANIFEST
    content = disk.read_record(manifest, "")
    del content["config"]["etl.min_user"]
    disk.write_record(manifest, content)
    open_artifact(settings, "corpus")


def test_an_artifact_of_another_input_is_refused(settings):
    corpus = build(settings, "corpus")
    build(settings, "gid", inputs={"corpus": corpus.digest})
    open_artifact(settings, "gid")
    build(settings, "corpus", b"another")
    with pytest.raises(ValueError, match="built from another corpus/"):
        open_artifact(settings, "gid")


def test_a_failing_stage_leaves_the_artifact_before_it(settings):
    before = build(settings, "corpus")

    def fail():
        with stage_output(settings, "corpus") as output:
            (output.path / "data.bin").write_bytes(b"half")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert open_artifact(settings, "corpus") == before
    assert hidden(settings) == set()


def test_a_stage_that_does_not_commit_leaves_nothing(settings):
    with stage_output(settings, "corpus"):
        pass
    assert hidden(settings) == set()
    with pytest.raises(FileNotFoundError):
        open_artifact(settings, "corpus")


def test_a_second_process_is_refused_while_the_first_writes(settings):
    with writer(settings) as process:
        with pytest.raises(BlockingIOError, match=f"pid {process.pid} "), stage_output(settings, "corpus"):
            pass
        build(settings, "gid")  # another artifact is free


def test_a_killed_writer_leaves_the_old_artifact_and_no_lock(settings):
    before = build(settings, "corpus")
    with writer(settings) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert open_artifact(settings, "corpus") == before
    after = build(settings, "corpus", b"after")
    assert open_artifact(settings, "corpus") == after
    assert hidden(settings) == set()


def test_a_work_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written.*choose --work"), stage_output(load(tmp_path), "corpus"):
        pass


def test_a_kill_between_the_two_renames_of_a_commit_loses_nothing(settings):
    build(settings, "corpus", b"first")
    (settings.work_dir / "corpus").rename(settings.work_dir / ".corpus.old")
    with pytest.raises(RuntimeError), stage_output(settings, "corpus"):
        raise RuntimeError("the next run fails as well")
    assert (open_artifact(settings, "corpus").path / "part" / "data.bin").read_bytes() == b"first"
    assert hidden(settings) == set()


def test_a_log_that_was_moved_is_the_same_log(tmp_path):
    build(load(tmp_path, data__path="here"), "corpus")
    open_artifact(load(tmp_path, data__path="there"), "corpus")
