"""Finding a Java that Spark can use, and the files that make Spark work without an environment."""

import os
import subprocess
from pathlib import Path

import pytest

from etl import setup_spark

JAVA = """\
#!/bin/sh
[ "$1" = --add-modules=jdk.incubator.vector ] || exit 9
[ {status} = 0 ] || {{ echo "Error occurred during initialization of boot layer"; exit {status}; }}
echo "    java.home = {home}
    java.specification.version = {version}" >&2
"""


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def make_java(home: Path, version: str, status: int = 0) -> Path:
    program(home / "bin" / "java", JAVA.format(home=home, version=version, status=status))
    return home


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(
    ("version", "status", "fits"),
    [("17", 0, True), ("25", 0, True), ("16", 0, False), ("1.8", 0, False), ("21", 1, False)],
    ids=["17", "25", "16", "8", "without the vector module"],
)
@pytest.mark.parametrize("where", ["PATH", "JAVA_HOME"])
def test_java_must_be_recent_and_have_the_vector_module(no_java, monkeypatch, tmp_path, where, version, status, fits):
    home = make_java(tmp_path / "jdk", version, status)
    monkeypatch.setenv(where, str(home / "bin" if where == "PATH" else home))
    assert setup_spark.find_java_home() == (home if fits else None)


def test_java_home_goes_before_the_path_as_it_does_in_spark(no_java, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(make_java(tmp_path / "new", "21") / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(make_java(tmp_path / "old", "11")))
    assert setup_spark.find_java_home() is None


def test_no_java(no_java):
    assert setup_spark.find_java_home() is None


def test_the_java_wrapper_drops_what_the_runtime_does_not_know(tmp_path):
    runtime = tmp_path / "a runtime"
    program(runtime / "bin" / "java", '#!/bin/sh\nprintf "<%s>" "$@"\n')
    (runtime / "lib").mkdir()
    home = setup_spark.write_java_home(runtime, tmp_path / "home")
    words = ["-cp", "a b*", "--add-modules=jdk.incubator.vector", "-Dx=", "", "Main", "$(exit 3)"]
    printed = subprocess.run([home / "bin" / "java", *words], capture_output=True, text=True, check=True).stdout
    assert printed == "<-cp><a b*><-Dx=><><Main><$(exit 3)>"
    assert (home / "lib").resolve() == runtime / "lib"
    setup_spark.write_java_home(runtime, home)  # again, over the old one


def sourced(spark_home: Path, *words: str, **environment: str) -> dict[str, str]:
    """The variables that spark-class, called with these words, exports after conf/spark-env.sh."""
    script = f"set -a; . {spark_home}/conf/spark-env.sh; env"
    environment = {"PATH": os.environ["PATH"], **environment}
    call = ["bash", "-c", script, "spark-class", *words]
    lines = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in lines.splitlines())


def test_spark_env_fills_in_what_is_not_set(tmp_path):
    setup_spark.write_conf(tmp_path, Path("/fit java"), unfit_java="/old java")
    env = sourced(tmp_path)
    assert (env["JAVA_HOME"], env["SPARK_LOCAL_IP"]) == ("/fit java", "127.0.0.1")
    assert Path(env["PYSPARK_PYTHON"]).is_absolute()
    mine = {"JAVA_HOME": "/mine", "SPARK_LOCAL_IP": "10.0.0.1", "PYSPARK_PYTHON": "/my/python"}
    assert sourced(tmp_path, **mine).items() >= mine.items()
    assert sourced(tmp_path, JAVA_HOME="/old java")["JAVA_HOME"] == "/fit java"


SUBMIT = "org.apache.spark.deploy.SparkSubmit"


@pytest.mark.parametrize(
    ("words", "local"),
    [
        ([SUBMIT, "pyspark-shell"], True),
        ([SUBMIT, "--master", "local[2]", "etl/build.py", "--tracking.uri=sqlite:///a.db"], True),
        ([SUBMIT, "--master", "spark://host:7077", "etl/build.py"], False),
        ([SUBMIT, "--master=yarn", "etl/build.py"], False),
        ([SUBMIT, "--master", "k8s://https://host:6443", "etl/build.py"], False),
        ([SUBMIT, "--properties-file", "/opt/spark/conf/spark.properties", "etl/build.py"], False),
        (["org.apache.spark.deploy.master.Master"], False),
        (["org.apache.spark.deploy.worker.Worker", "spark://host:7077"], False),
    ],
)
def test_only_a_run_on_this_machine_alone_keeps_to_the_loopback(tmp_path, words, local):
    setup_spark.write_conf(tmp_path, Path("/fit java"), unfit_java="")
    assert sourced(tmp_path, *words).get("SPARK_LOCAL_IP") == ("127.0.0.1" if local else None)
    assert ("SPARK_LOCAL_IP" in sourced(tmp_path, SUBMIT, MASTER="spark://host:7077")) is False


def test_find_spark_home_asks_no_python(tmp_path):
    setup_spark.write_find_spark_home(tmp_path / "py spark", tmp_path)
    script = f'. {tmp_path}/find-spark-home; echo "$SPARK_HOME"'
    found = subprocess.run(["bash", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
    assert found == f"{tmp_path / 'py spark'}\n"
