"""What is refused, skipped and handed to SLURM, where there is no SLURM."""

import shlex
import subprocess

import pytest

from cluster import chain, sites, submit
from contract import config as config_module
from contract.artifacts import open_artifact, stage_output
from tests import tiny


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    (tmp_path / "run.toml").write_text("")


def write_profile(folder, text):
    (folder / "site.toml").write_text(text)
    return str(folder / "site.toml")


def dry_run(folder, capsys, profile, *settings):
    words = [str(folder / "run.toml"), "--profile", write_profile(folder, profile), "--dry-run"]
    submit.main([*words, f"--work={folder / 'work'}", *settings])
    return capsys.readouterr().out


def test_the_profiles_that_come_with_the_project_fit_the_defaults(tmp_path, capsys):
    for profile in sites.FOLDER.glob("*.toml"):
        submit.main([str(tmp_path / "run.toml"), "--profile", profile.stem, "--dry-run", f"--work={tmp_path / 'work'}"])
        assert capsys.readouterr().out.count("sbatch --parsable") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nnode = 2", "unknown setting 'node'; did you mean 'nodes'?"),
        ("partion = 'x'", "unknown setting 'partion'; did you mean 'partition'?"),
        ("[train]\nnodes = 0", "train.nodes = 0: must be 1 or more"),
        ("[train]\ngpus = '8'", "train.gpus = '8': must be of type int"),
        ("train = 3", "train = 3: must be a table"),
        ("mounts = '/data'", "mounts = '/data': must be a list of texts"),
        ("runtime = 'docker'", "must be 'pyxis' or 'apptainer'"),
        ("x = ", "is not valid TOML"),
        ("[train]\nhours = nan", "train.hours = nan: must be a finite number"),
        ('account = "a\\u0007"', "account: 'a\\x07' holds a control character"),
        ('modules = ["a\\nb"]', "modules: 'a\\nb' holds a control character"),
        ('env = {A = "\\u0000"}', "env: '\\x00' holds a control character"),
        ('env = {"A; touch x;" = "1"}', "env: 'A; touch x;' is no name of a variable"),
        ('env = {"$(touch x)" = "1"}', "is no name of a variable"),
        ('env = {"9A" = "1"}', "is no name of a variable"),
        ('env = {"" = "1"}', "is no name of a variable"),
        ('env = {"Ä" = "1"}', "is no name of a variable"),
        ('env = {"A\\n" = "1"}', "is no name of a variable"),
        ('env = {UID = "0"}', "UID is set by the jobs' script itself"),
        (
            'env = {MLFLOW_TRACKING_PASSWORD = "s3cr3t"}',
            "MLFLOW_TRACKING_PASSWORD would be written into the jobs' files",
        ),
        ('env = {HF_TOKEN = "s3cr3t"}', "export it in the shell that submits"),
        ('env = {AWS_SECRET_ACCESS_KEY = "s3cr3t", N = 3}', "env: must be a table of texts"),
        ('env = {HTTPS_PROXY = "http://me:s3cr3t@proxy:3128"}', "env holds a name or a password before '@'"),
        ('spark = ["--conf", "spark.hadoop.fs.s3a.secret.key=s3cr3t"]', "spark.hadoop.fs.s3a.secret.key would be"),
        ('sbatch = ["--export=ALL,WANDB_API_KEY=s3cr3t"]', "WANDB_API_KEY would be written"),
    ],
)
def test_a_profile_that_is_wrong_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"profile .*site\.toml") as error:
        sites.load(write_profile(tmp_path, text))
    assert message in str(error.value)
    assert "s3cr3t" not in str(error.value)


def test_a_job_sets_no_variable_that_a_profile_may_set(tmp_path):
    config = config_module.load(str(tmp_path / "run.toml"), {"work": str(tmp_path / "work")})
    text = chain.Link(config, sites.load("cpu"), "train").settings()
    names = [line.partition("=")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(names) > 10
    for name in names:
        with pytest.raises(ValueError, match=f"{name} is set by the jobs' script itself"):
            sites.load(write_profile(tmp_path, f'env = {{{name} = "1"}}'))
    env = {"TOKENIZERS_PARALLELISM": "false", "_A1": "tab\there\nand a line", "GOOGLE_APPLICATION_CREDENTIALS": "/f"}
    lines = [f"{name} = {config_module.toml_value(value)}" for name, value in env.items()]
    assert sites.load(write_profile(tmp_path, "[env]\n" + "\n".join(lines))).env == env


def test_a_profile_that_is_not_there_names_those_that_are():
    with pytest.raises(FileNotFoundError, match="cpu, gpu"):
        sites.load("nowhere")


def test_all_that_cannot_fit_is_said_at_once(tmp_path, capsys):
    with pytest.raises(ValueError) as error:
        dry_run(
            tmp_path,
            capsys,
            "[etl]\nnodes = 2\nmin_nodes = 3\n[gid]\nranks = 2\ncpus = 2\n"
            "[train]\nnodes = 3\ngpus = 2\ncpus = 1\nhours = 0.05",
            "--train.global_batch=100",
        )
    for message in (
        "etl: min_nodes = 3 is more than nodes = 2",
        "gid: it is one process",
        "train: 2 ranks a node need as many CPUs, and have cpus = 1",
        "train: 3 x 2 ranks do not divide train.streams = 8",
        "train: hours = 0.05 leave nothing before signal_seconds = 300",
        "train: train.global_batch = 100 is no multiple of train.streams = 8",
    ):
        assert message in str(error.value)


def test_training_works_on_the_numbers_of_nodes_that_divide_the_streams(tmp_path):
    config = config_module.load(str(tmp_path / "run.toml"), {"train.streams": "8"})
    profile = sites.load(write_profile(tmp_path, "[train]\nnodes = 4\nmin_nodes = 1\nranks = 2\ncpus = 2"))
    assert chain.Link(config, profile, "train").node_counts() == [4, 2, 1]
    assert chain.Link(config, sites.load(write_profile(tmp_path, "[eval]\nnodes = 3")), "eval").node_counts() == [3]


def test_a_stage_is_due_when_it_or_one_before_it_does_not_match(tmp_path, capsys):
    config = tiny.tiny_config(tmp_path / "work")
    assert submit.due(config, None) == ["etl", "gid", "train", "eval"]
    tiny.write_corpus(config)
    assert submit.due(config, None) == ["gid", "train", "eval"]
    tiny.write_gids(config)
    assert submit.due(config, None) == ["train", "eval"]
    assert submit.due(config, "gid") == ["gid", "train", "eval"]
    tiny.write_corpus(config, num_users=30)
    assert submit.due(config, None) == ["gid", "train", "eval"]
    assert "built from another corpus/" in capsys.readouterr().out


def test_a_model_that_was_trained_otherwise_is_trained_again(tmp_path):
    config = tiny.tiny_config(tmp_path / "work", train__lr="0.001", train__workers="1")
    tiny.write_corpus(config)
    tiny.write_gids(config)
    inputs = {name: open_artifact(config, name).digest for name in ("corpus", "gid")}
    with stage_output(config, "model") as output:
        (output.path / "weights").write_text("")
        output.commit({}, inputs, training={"train": vars(config.train)})
    assert submit.missing(config, "model") == ""
    assert submit.missing(tiny.tiny_config(tmp_path / "work", train__lr="0.001", train__workers="2"), "model") == ""
    other = tiny.tiny_config(tmp_path / "work", train__lr="0.002")
    assert "was trained with train.lr = 0.001, the config says 0.002" in submit.missing(other, "model")


def test_what_the_jobs_are_told_survives_the_shell(tmp_path):
    """Of values with spaces and quotes, and of a container under both runtimes."""
    text = "container = 'a b.sqsh'\nmounts = ['/data', '/x:/y']\nmodules = ['cuda/12']\nenv = {NAME = \"it's $HOME\"}\n"
    config = config_module.load(str(tmp_path / "run.toml"), {"work": str(tmp_path / "my work")})

    def told(text):
        link = chain.Link(config, sites.load(write_profile(tmp_path, text)), "eval")
        (tmp_path / "eval.sh").write_text(link.settings())
        show = 'source "$1"; printf "%s\\n" "$LOGS" "$NAME" "${MODULES[@]}" -- "${SRUN[@]}" -- "${EXEC[@]}"'
        words = ["bash", "-euc", show, "bash", str(tmp_path / "eval.sh")]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()

    logs, name, module, _, *rest = told(text)
    assert (logs, name, module) == (str(tmp_path / "my work" / "logs"), "it's $HOME", "cuda/12")
    assert rest[0] == "--container-image=a b.sqsh"
    assert rest[2:4] == ["--container-mounts=/data:/data,/x:/y", "--"]
    prefix = told(text + "runtime = 'apptainer'\n[eval]\ngpus = 1")
    assert prefix[prefix.index("--") + 2 :][:3] == ["apptainer", "exec", "--nv"]
    assert shlex.join(prefix[-5:]) == "--bind /data:/data --bind /x:/y 'a b.sqsh'"


@pytest.mark.parametrize(
    ("limit", "expected"), [("infinite", 0), ("30:00", 30), ("1:30:00", 90), ("7-00:00:00", 10080), ("n/a", 0)]
)
def test_time_limits_as_sinfo_prints_them(limit, expected):
    assert chain.minutes(limit) == expected


@pytest.mark.parametrize(
    ("gres", "expected"), [("(null)", 0), ("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gpu:a:4,gpu:b:2,nvme:1", 6)]
)
def test_gpus_of_a_node_as_sinfo_prints_them(gres, expected):
    assert chain.gpus(gres) == expected
