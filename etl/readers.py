"""The input of an experiment: which files there are, and the log and the catalog in them as tables of etl.rows.

The formats are in etl.formats; here data.format chooses one.
"""

from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from contract.settings import Config, Data
from etl import files as input_
from etl import formats
from etl.rows import EVENTS, ITEMS, file_names, granule_bytes, no_items

__all__ = [
    "EVENTS", "ITEMS", "file_names", "granule_bytes", "input_bytes", "input_files", "input_patterns", "item_files",
    "log_files", "read_events", "read_items",
]  # fmt: skip


def input_patterns(data: Data) -> dict[str, tuple[str, ...]]:
    """{setting: the paths or globs it stands for}, absolute."""
    if data.format == "colarec":
        return {"data.path": tuple(input_.absolute(data.path, name) for name in formats.COLAREC_FILES)}
    return {
        "data.interactions": tuple(input_.absolute(data.path, name) for name in data.interactions),
        "data.items": tuple(input_.absolute(data.path, name) for name in data.items),
    }


def input_files(data: Data) -> dict[str, list[Path]]:
    """{setting: the files that are there}, each once, sorted by path; a folder stands for the files in it.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: no interactions are configured, all interaction files are empty, a file is not what data.format
            says, or Spark cannot open it.
    """
    found = {}
    for setting, patterns in input_patterns(data).items():
        found[setting] = input_.once(file for pattern in patterns for file in _expand(setting, pattern))
    log = log_files(found)
    if not log:
        raise ValueError("data.interactions is empty: name at least one file of the log")
    for file in (file for files in found.values() for file in files):
        if ":" in file.name:
            raise ValueError(f"{file}: Spark cannot open files with ':' in their names; rename it")
    for setting, files in found.items():
        format_ = (data.items_format or data.format) if setting == "data.items" else data.format
        for file in files:
            input_.check_format(file, format_)
    if all(map(input_.is_empty, log)):
        raise ValueError(f"the log is empty: no bytes in {', '.join(map(str, log[:3]))}")
    return found


def log_files(files: dict[str, list[Path]]) -> list[Path]:
    """The files that the order of `read_events` is over, of what `input_files` gives."""
    return next(iter(files.values()))


def item_files(files: dict[str, list[Path]]) -> list[Path]:
    """The files that the order of `read_items` is over, of what `input_files` gives."""
    return list(files.values())[-1]


def input_bytes(files: list[Path]) -> int:
    """About how many bytes the files would have as plain text."""
    return sum(map(input_.text_bytes, files))


def read_events(spark: SparkSession, config: Config, files: dict[str, list[Path]]) -> DataFrame:
    """The log as `EVENTS`; `files` as `input_files` gives them.

    Raises:
        ValueError: a column of the mapping is missing, or etl.split asks for what the input does not hold.
    """
    formats.check_split(config)
    _tell_case_apart(spark)
    return formats.READ_EVENTS[config.data.format](spark, config, log_files(files))


def read_items(spark: SparkSession, data: Data, files: dict[str, list[Path]]) -> DataFrame:
    """The item texts as `ITEMS`; no rows when there are no files.

    Raises:
        ValueError: a column of the mapping is missing, or the format has no item texts.
    """
    if not item_files(files):
        return no_items(spark)
    format_ = data.items_format or data.format
    if format_ not in formats.READ_ITEMS:
        raise ValueError(
            f"data.items are given, but the format {format_!r} has no item texts; "
            f"say theirs in data.items_format ({', '.join(formats.READ_ITEMS)}), or leave data.items empty"
        )
    _tell_case_apart(spark)
    return formats.READ_ITEMS[format_](spark, data, item_files(files))


def _tell_case_apart(spark: SparkSession) -> None:
    """Columns may differ in nothing but case. For the session, as the files are read when Spark comes to it."""
    spark.conf.set("spark.sql.caseSensitive", "true")


def _expand(setting: str, pattern: str) -> list[Path]:
    if not (files := input_.expand(pattern)):
        hint = setting if setting == "data.path" else f"{setting} (and data.path)"
        raise FileNotFoundError(f"{pattern} does not exist or matches no file; set {hint}")
    return files
