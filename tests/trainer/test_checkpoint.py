"""States on disk: which of them count, what a full disk leaves, and who writes what."""

import os
import resource
import shutil

import pytest
import safetensors.torch
import torch

from contract import disk
from tests import tiny
from tests.trainer import runs
from trainer import checkpoint


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, group):
    """A work folder with a run that was stopped after step 10 of 20, and its losses."""
    work = runs.write_data(tmp_path_factory.mktemp("checkpoint") / "work")
    return work, runs.fit(work, {"train.save_every": "4"}, stop=10)[0]["train/loss"]


@pytest.fixture(scope="module")
def rest(stopped, tmp_path_factory):
    """The losses of steps 9 to 20 of the unbroken run."""
    work = tmp_path_factory.mktemp("unbroken") / "work"
    shutil.copytree(stopped[0], work)
    losses = runs.fit(work)[0]["train/loss"]
    assert losses[:10] == stopped[1]
    return losses[8:]


@pytest.fixture
def work(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "work")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "part-00000.safetensors differs from its checksum": lambda folder: flip(folder / "part-00000.safetensors"),
    "part-00000.safetensors has 1000 bytes, not ": lambda folder: os.truncate(folder / "part-00000.safetensors", 1000),
    "part-00000.safetensors is missing": lambda folder: (folder / "part-00000.safetensors").unlink(),
    "it has no state.json: it was never completed": lambda folder: (folder / "state.json").unlink(),
    "state.json is damaged": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"skipped": 0', '"skipped": 1')
    ),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(work, rest, capsys, problem):
    folder = work / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-10", "step-8"]
    DAMAGE[problem](folder / "step-10")
    losses = runs.fit(work, {"train.save_every": "6"}, resume=True)[0]["train/loss"]
    output = capsys.readouterr().out
    assert f"checkpoint step-10 is not used: {problem}" in output
    assert "goes on from step 8" in output
    assert losses == rest
    # The damaged one lay ahead of the next one written.
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-18", "step-20"]


def test_without_a_whole_checkpoint_it_says_what_to_do(work):
    for folder in (work / "checkpoints").glob("step-*"):
        flip(folder / "part-00000.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole; start over with --train.resume=false"):
        runs.fit(work, resume=True)


def test_damaged_best_weights_are_noticed(work, capsys):
    flip(work / "checkpoints" / "best.safetensors")
    runs.fit(work, resume=True)
    assert "the best weights so far are damaged" in capsys.readouterr().out
    best = disk.read_record(work / "checkpoints" / "best.json", "")
    assert best == disk.fingerprint(work / "checkpoints" / "best.safetensors")


def test_best_weights_damaged_after_the_last_validation_are_made_again(work, capsys):
    losses, training = runs.fit(work, resume=True)
    flip(work / "checkpoints" / "best.json")
    with pytest.raises(ValueError, match=r"best.safetensors or its .json is damaged; the same command goes on"):
        training.checkpoints.best_weights()
    _, training = runs.fit(work, resume=True)
    assert training.state["best"]["rec"] == losses["valid/rec"][-1]
    training.checkpoints.best_weights()


LOST = {
    "run.json is missing": lambda file: file.unlink(),
    "run.json is damaged (it differs from its checksum)": lambda file: file.write_text(
        file.read_text().replace('"run_id": "run"', '"run_id": "ruo"')
    ),
    "run.json is damaged ('utf-8' codec can't decode": lambda file: file.write_bytes(b"\xfb" + file.read_bytes()[1:]),
    "run.json is damaged (it has no checksum of itself)": lambda file: file.write_text('{"run_id": "run"}'),
}


@pytest.mark.parametrize("problem", LOST)
def test_checkpoints_without_a_whole_run_json_are_gone_on_with(work, rest, capsys, problem):
    LOST[problem](work / "checkpoints" / "run.json")
    assert runs.fit(work, {"train.save_every": "1000"}, resume=True)[0]["train/loss"] == rest[2:]
    output = capsys.readouterr().err
    assert problem in output
    assert "step-10 says of which run it was" in output


def test_checkpoints_of_which_nothing_says_what_they_are_stay_until_they_are_given_up(work):
    folder = work / "checkpoints"
    inputs = {"corpus": disk.read_record(folder / "run.json", "")["settings"]["digest of corpus/"]}
    flip(folder / "run.json")
    for step in folder.glob("step-*"):
        flip(step / "state.json")
    with pytest.raises(ValueError, match=r"run.json is damaged .*start over with --train.resume=false.*no checkpoint"):
        checkpoint.Checkpoints(tiny.tiny_config(work), inputs).find()
    assert len(list(folder.glob("step-*"))) == 2
    given_up = checkpoint.Checkpoints(tiny.tiny_config(work, train__resume="false"), inputs)
    assert given_up.find() == ""
    given_up.create("anew")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_what_else_lies_beside_checkpoints_is_left_alone(work, rest):
    folder = work / "checkpoints"
    others = {
        "step-40.bak",
        "step-",
        "step-x",
        "step-007",
        "step--8",
        "step-8 (copy)",
        "step-\N{ARABIC-INDIC DIGIT THREE}",
    }
    for name in others:
        shutil.copytree(folder / "step-8", folder / name)
    (folder / "notes.txt").write_text("compare step 8 with the run of Monday")
    losses, training = runs.fit(work, {"train.save_every": "6"}, resume=True)
    assert losses["train/loss"] == rest[2:]
    assert {path.name for path in folder.glob("step-*")} == others | {"step-18", "step-20"}
    training.checkpoints.remove()
    assert {path.name for path in folder.iterdir()} == others | {"notes.txt"}


def test_a_disk_without_room_leaves_the_checkpoint_before(work, rest, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = r"checkpoint step-12 in .* cannot be written: .*; step-10 is whole, and the same command goes on"
        with pytest.raises(ValueError, match=message):
            runs.fit(work, {"train.save_every": "12", "train.eval_every": "1000"}, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (work / "checkpoints").glob("*step-*")] == ["step-10"]
    assert runs.fit(work, resume=True)[0]["train/loss"] == rest[2:]


def test_other_settings_are_refused_but_not_those_that_shape_nothing(work):
    inputs = {"corpus": disk.read_record(work / "checkpoints/run.json", "")["settings"]["digest of corpus/"]}
    known = {"train__max_steps": "20", "train__zero_stage": "3", "train__micro_tokens": "150", "train__workers": "2"}
    assert checkpoint.Checkpoints(tiny.tiny_config(work, **known), inputs).find() == "run"
    with pytest.raises(ValueError, match=r"train.lr = 0.003, this one has 0.5; set it back"):
        checkpoint.Checkpoints(tiny.tiny_config(work, **known, train__lr="0.5"), inputs).find()
    assert checkpoint.Checkpoints(tiny.tiny_config(work, train__resume="false"), inputs).find() == ""


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_ranks_write_parts_of_like_size(world_size):
    sizes = {f"p{i}": size for i, size in enumerate([1000, 10, 600, 500, 400, 7, 300, 200, 100, 3])}
    rank_of = checkpoint.deal(sizes, world_size)
    assert rank_of.keys() == sizes.keys()
    loads = [sum(sizes[name] for name in sizes if rank_of[name] == rank) for rank in range(world_size)]
    assert max(loads) <= max(1000, 1.1 * sum(sizes.values()) / world_size)


@pytest.mark.parametrize(("num_writers", "world_size"), [(1, 3), (3, 2), (2, 2), (4, 1)])
def test_rows_of_tables_are_dealt_anew(tmp_path, num_writers, world_size):
    table = torch.randn(11, 3)
    for writer in range(num_writers):
        part = {"items": table[writer::num_writers].contiguous()}
        safetensors.torch.save_file(part, tmp_path / f"rows-{writer:05d}.safetensors")
    for rank in range(world_size):
        own = {"items": torch.zeros_like(table[rank::world_size])}
        checkpoint.read_rows(tmp_path, num_writers, own, rank, world_size)
        assert torch.equal(own["items"], table[rank::world_size])


def test_rows_are_saved_and_checked_with_the_rest(work, capsys):
    _, training = runs.fit(work, resume=True)
    checkpoints, engine = training.checkpoints, training.engine
    table = torch.arange(12.0).view(6, 2)
    for step in (21, 22):
        checkpoints.save(engine, training.state | {"step": step}, rows={"users": table + step})
    flip(checkpoints.path / "step-22" / "rows-00000.safetensors")
    rows = {"users": torch.zeros(6, 2)}
    assert checkpoints.load(engine, print, rows)["step"] == 21
    assert "step-22 is not used: rows-00000.safetensors differs" in capsys.readouterr().out
    assert torch.equal(rows["users"], table + 21)
