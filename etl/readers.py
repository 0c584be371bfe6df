"""The input of an experiment: which files there are, and the log and the catalog in them as tables of etl.rows.

The formats are in etl.formats; here data.format chooses one.
"""

import glob
import os
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from contract.settings import Config, Data
from etl import formats
from etl.rows import EVENTS, ITEMS, file_names, granule_bytes, no_items

__all__ = [
    "EVENTS", "ITEMS", "file_names", "granule_bytes", "input_bytes", "input_files", "input_patterns", "item_files",
    "log_files", "read_events", "read_items",
]  # fmt: skip

# Bytes of plain text in a byte of a file, by its suffix. An estimate: JSON logs pack to a fifth or a tenth.
TEXT_BYTES = {".gz": 6, ".zst": 6, ".parquet": 8}


def input_patterns(data: Data) -> dict[str, tuple[str, ...]]:
    """{setting: the paths or globs it stands for}, absolute."""
    base = os.path.abspath(data.path)
    if data.format == "colarec":
        return {"data.path": tuple(os.path.join(base, name) for name in formats.COLAREC_FILES)}
    return {
        "data.interactions": tuple(os.path.join(base, name) for name in data.interactions),
        "data.items": tuple(os.path.join(base, name) for name in data.items),
    }


def input_files(data: Data) -> dict[str, list[Path]]:
    """{setting: the files that are there}, each once, sorted by path; a folder stands for the files in it.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: no interactions are configured, all interaction files are empty, or Spark cannot open one.
    """
    found = {}
    for setting, patterns in input_patterns(data).items():
        found[setting] = sorted({file for pattern in patterns for file in _expand(setting, pattern)})
    log = log_files(found)
    if not log:
        raise ValueError("data.interactions is empty: name at least one file of the log")
    if not any(file.stat().st_size for file in log):
        raise ValueError(f"the log is empty: no bytes in {', '.join(map(str, log[:3]))}")
    for file in (file for files in found.values() for file in files):
        if ":" in file.name:
            raise ValueError(f"{file}: Spark cannot open files with ':' in their names; rename it")
    return found


def log_files(files: dict[str, list[Path]]) -> list[Path]:
    """The files that the order of `read_events` is over, of what `input_files` gives."""
    return next(iter(files.values()))


def item_files(files: dict[str, list[Path]]) -> list[Path]:
    """The files that the order of `read_items` is over, of what `input_files` gives."""
    return list(files.values())[-1]


def input_bytes(files: list[Path]) -> int:
    """About how many bytes the files would have as plain text."""
    return sum(file.stat().st_size * TEXT_BYTES.get(file.suffix, 1) for file in files)


def read_events(spark: SparkSession, config: Config, files: dict[str, list[Path]]) -> DataFrame:
    """The log as `EVENTS`; `files` as `input_files` gives them.

    Raises:
        ValueError: a column of the mapping is missing, or etl.split asks for what the input does not hold.
    """
    formats.check_split(config)
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
    return formats.READ_ITEMS[format_](spark, data, item_files(files))


def _expand(setting: str, pattern: str) -> list[Path]:
    files = []
    for name in glob.glob(pattern, recursive=True):
        path = Path(name)
        folder, inside = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
        files += [f for f in inside if f.is_file() and not _is_hidden(f.relative_to(folder))]
    if not files:
        hint = setting if setting == "data.path" else f"{setting} (and data.path)"
        raise FileNotFoundError(f"{pattern} does not exist or matches no file; set {hint}")
    return files


def _is_hidden(path: Path) -> bool:
    """Spark's own rule: _SUCCESS, _delta_log/, .part-0.crc are no data."""
    return any(part.startswith((".", "_")) for part in path.parts)
