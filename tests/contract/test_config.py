"""Precedence, checking and round trip of the configuration, and the command line on top of it."""

import dataclasses
import random
from pathlib import Path

import pytest

from contract import cli, config
from contract.disk import write_atomically
from contract.settings import Eval, Train

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> str:
    file = folder / "small.toml"
    file.write_text(text)
    return str(file)


def test_command_line_over_file_over_default(tmp_path):
    file = write(tmp_path, "seed = 5\n[train]\nlr = 0.25\nepochs = 7\n")
    loaded = config.load(file, {"train.lr": "0.5"})
    assert (loaded.train.lr, loaded.train.epochs, loaded.seed) == (0.5, 7, 5)
    assert loaded.train.clip == Train().clip


def test_name_and_work_follow_the_file(tmp_path):
    loaded = config.load(write(tmp_path, ""))
    assert (loaded.name, loaded.work) == ("small", "runs/small")
    assert config.load(write(tmp_path, ""), {"name": "other"}).work == "runs/other"
    assert config.load(write(tmp_path, "work = 'elsewhere'"), {"name": "other"}).work == "elsewhere"


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [("work", "~/runs/x", "{home}/runs/x"), ("data.path", "~", "{home}"), ("etl.tokenizer", "~/t5", "{home}/t5"),
     ("tracking.uri", "sqlite:///~/ml.db", "sqlite:///{home}/ml.db"), ("data.path", "a/~b", "a/~b")],
)  # fmt: skip
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, key, text, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.toml").write_text("")
    loaded = config.load("~/c.toml", {key: text})
    assert config.flatten(loaded)[key] == expected.format(home=tmp_path)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("", "time"),
        ("[etl]\nsplit = 'random'", "set"),
        ("[etl]\nsplit = 'given'", "time"),
        ("[etl]\nsplit = 'given'\nvalid_in_history = false", "set"),
        ("[etl]\nsplit = 'random'\n[history]\norder = 'time'", "time"),
    ],
)
def test_histories_are_sets_where_the_split_is_random(tmp_path, text, order):
    loaded = config.load(write(tmp_path, text))
    assert loaded.history.order == order
    assert config.load(write(tmp_path, config.to_toml(loaded))) == loaded


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[train]\nlearning = 1", {}, "unknown setting 'train.learning'"),
        ("[train]\nepoch = 1", {}, "did you mean 'train.epochs'"),
        ("", {"train.lrr": "1"}, "did you mean 'train.lr'"),
        ("[train]\nepochs = 'many'", {}, "train.epochs = 'many': must be of type int"),
        ("[train]\nepochs = 1.5", {}, "train.epochs = 1.5: must be of type int"),
        ("[train]\nepochs = true", {}, "must be of type int"),
        ("[train]\nepochs = 0", {}, "train.epochs = 0: must be 1 or more"),
        ("[train]\nlr = nan", {}, "train.lr = nan"),
        ("[model]\ndropout = 1.5", {}, "model.dropout = 1.5"),
        ("[gid]\nmethod = 'magic'", {}, "gid.method = 'magic': must be one of 'collaborative', 'content'"),
        ("[eval]\ncutoffs = 5", {}, "eval.cutoffs = 5: must be a list of int"),
        ("[eval]\ncutoffs = [5, 'x']", {}, "must be a list of int"),
        ("[eval]\nbaselines = ['als', 'best']", {}, "'best' is none of 'popularity', 'recent_popularity', 'item_knn'"),
        ("[eval]\ncutoffs = [5, 500]", {}, "eval.beams = 100"),
        ("", {"eval.cutoffs": ""}, "give at least one"),
        ("", {"eval.cutoffs": "5,x"}, "eval.cutoffs=x: must be of type int"),
        ("", {"eval.mask_seen": "maybe"}, "eval.mask_seen=maybe: must be true or false"),
        ("[etl]\nrepeats = 'keep'", {}, "set eval.mask_seen = false"),
        ("[loss]\nrec = 0\nindex = 0\nsoftmax = 0\ncontrastive = 0", {}, "nothing would be learned"),
        ("train = 3", {}, "unknown setting 'train'"),
        ("[train\n", {}, "is not valid TOML"),
        (f"seed = {'1' * 5000}", {}, "is not valid TOML"),
        (f"seed = {'[' * 5000}", {}, "is not valid TOML"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError) as caught:
        config.load(write(tmp_path, text), overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repeats = 'collapse'", "etl.repeats = 'collapse' makes seen items targets"),
        ("repeats = 'keep'\nsplit = 'random'\n[eval]\nmask_seen = false", "into train and test"),
        ("split_shares = [0.8, 0.1]", "give train, valid and test"),
        ("split_shares = [0.8, 0.1, 0.2]", "adding up to 1"),
        ("events = ['a', 'b']\nevent_weights = [1]", "give one for each of etl.events = ['a', 'b']"),
        ("events = ['a', 'b']\nevent_weights = [1, -1]", "none may be negative"),
        ("split = 'otto'", "etl.split = 'otto' needs etl.events"),
        ("split = 'temporal'\n[data]\ntime_unit = 'order'", "goes by the clock"),
    ],
)
def test_etl_settings_that_contradict_each_other(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        config.load(write(tmp_path, f"[etl]\n{text}"))
    assert message in str(caught.value)


def test_whole_numbers_are_fine_in_lists_of_floats(tmp_path):
    loaded = config.load(write(tmp_path, "[etl]\nevents = ['a', 'b']\nevent_weights = [1, 2.5]"))
    assert loaded.etl.event_weights == (1.0, 2.5)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no/such\.toml"):
        config.load("no/such.toml")


def test_overrides_take_the_type_of_their_setting(tmp_path):
    overrides = {"eval.cutoffs": "1, 3", "eval.mask_seen": "False", "train.lr": "1", "data.items": "a.csv,b.csv"}
    loaded = config.load(write(tmp_path, ""), overrides)
    assert loaded.eval.cutoffs == (1, 3)
    assert loaded.eval.mask_seen is False
    assert type(loaded.train.lr) is float
    assert loaded.data.items == ("a.csv", "b.csv")


def test_a_written_config_loads_as_itself(tmp_path):
    overrides = {"train.lr": "1e-05", "data.path": 'a "b" \\c', "data.items": "x,y", "eval.cutoffs": "1", "seed": "3"}
    first = config.load(write(tmp_path, ""), overrides)
    written = tmp_path / "written.toml"
    written.write_text(config.to_toml(first))
    assert config.load(str(written)) == first


ODD = [
    *(
        f"a{chr(code)}b"
        for code in (*range(1, 32), *range(127, 161), 0xFEFF, 0x2028, 0x2029, 0xFFFE, 0x1F600, 0x10FFFF)
    ),
    *(
        '"',
        "'",
        '"""',
        "'" * 3,
        "\\",
        "\\\\",
        '\\"',
        "\\u0041",
        "a\r\nb",
        "\n[train]\nlr = 1",
        "# x",
        " x ",
        "${X}",
        "e\u0301",
    ),
]


def test_every_config_that_is_written_loads_as_itself(tmp_path):
    """Texts of all kinds, some at random, in settings that take any: what a job reads hours later."""
    draw = random.Random(1)
    first, written = config.load(write(tmp_path, "")), tmp_path / "written.toml"
    pieces = [*ODD, *map(chr, draw.sample(range(0x20, 0xD800), 200))]
    for texts in [ODD, *(["".join(draw.choices(pieces, k=20)) for _ in range(20)] for _ in range(5))]:
        changed = config.replace(first, {"data.path": texts[0], "data.text_columns": tuple(texts)})
        write_atomically(written, config.to_toml(changed))
        assert config.load(str(written)) == changed


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.path", "a\0b", "holds a NUL character"),
        ("data.items", "a,b\udce9", "bytes that are not UTF-8"),
        ("name", "a\nb", "holds a control character"),
        ("work", "runs/\x1b[2J", "holds a control character"),
        ("tracking.experiment", "a\x7f", "holds a control character"),
        ("train.lr", "inf", "must be a finite number"),
        ("loss.rec", "1e999", "must be a finite number"),
        ("etl.split_shares", "0.8,nan,0.2", "must be finite numbers"),
        ("etl.event_weights", "1,nan", "must be finite numbers"),
    ],
)
def test_what_no_file_could_keep_is_refused_before_it_is_written(tmp_path, key, text, message):
    with pytest.raises(ValueError, match=f"^{key} = .*{message}"):
        config.load(write(tmp_path, ""), {"etl.events": "a,b", key: text})


def test_a_section_is_json_ready_and_complete(tmp_path):
    section = config.section(config.load(write(tmp_path, "")), "eval", "seed")
    assert section["seed"] == 1
    assert section["eval.cutoffs"] == [5, 10, 20]
    assert set(section) == {"seed"} | {f"eval.{f.name}" for f in dataclasses.fields(Eval)}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.stem)
def test_configs_of_the_project_load(file):
    assert config.load(str(file)).name == file.stem


def test_help_shows_every_setting_with_its_documentation(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"], "What this is.")
    shown = " ".join(capsys.readouterr().out.split())
    assert "What this is." in shown
    for key, _, field in config.fields():
        assert f"--{key} " in shown
        assert " ".join(field.metadata["doc"].split()) in shown


def test_the_command_line_takes_whole_names_only(tmp_path):
    file = write(tmp_path, "")
    parsed, dry_run = cli.parse(["--config", file, "--train.lr=0.5", "--train.epochs", "3", "--local_rank=1"], "")
    assert (parsed.train.lr, parsed.train.epochs, dry_run) == (0.5, 3, False)
    assert cli.parse(["--config", file, "--dry-run"], "")[1] is True
    with pytest.raises(ValueError, match="did you mean 'train"):
        cli.parse(["--config", file, "--train.l=0.5"], "")
    with pytest.raises(SystemExit):
        cli.parse(["--config", file, "stray"], "")


def test_a_changed_config_is_checked_and_leaves_the_other_alone(tmp_path):
    loaded = config.load(write(tmp_path, "seed = 5"))
    changed = config.replace(loaded, {"loss.index": 0.5, "name": "other"})
    assert (changed.loss.index, changed.name, changed.seed) == (0.5, "other", 5)
    assert (loaded.loss.index, loaded.name) == (0.0, "small")
    with pytest.raises(ValueError, match="the encoder would know no item apart"):
        config.replace(loaded, {"model.item_table": "none", "history.content": False})


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, BlockingIOError, ConnectionError])
def test_errors_that_a_user_can_mend_are_one_message(error, capsys, monkeypatch):
    monkeypatch.delenv("COLAREC_TRACEBACK", raising=False)

    def main(argv):
        raise error("what failed\nwhat to do")

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: what failed\n  what to do\n"


def test_our_own_bugs_keep_their_traceback():
    def main(argv):
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        cli.run(main)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-32-le", "utf-7", "cp037", "rot13", "hex", "unicode_escape", "latin1 x", ""]
)
def test_encodings_that_do_not_extend_ascii_are_refused(tmp_path, encoding):
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(ValueError, match=r"data\.encoding = .*: no encoding that extends ASCII, such as utf-8"):
        config.load(str(tmp_path / "c.toml"), {"data.encoding": encoding})
    for name in ("utf-8", "UTF8", "utf-8-sig", "ISO-8859-1", "windows-1252", "shift_jis", "gb18030"):
        assert config.load(str(tmp_path / "c.toml"), {"data.encoding": name}).data.encoding == name
