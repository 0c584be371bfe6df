"""One reader per input format. All give the same two tables.

Events (`read_events`), one row per input row, the unusable ones too:
    user_id string, item_id string, ts long (ms; null: the input has none), event string (null: none),
    split byte (null: not given), order struct<file, block, row> (the input order, whatever the parallelism),
    reason string (why the row cannot be used; null: it can), raw string (the row, if it cannot)

Items (`read_items`):
    item_id string, text string (the text columns joined, not normalised), order, reason, raw
"""

import glob
import gzip
import json
import os
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from contract import schema
from contract.config import Config, Data

EVENTS = ("user_id", "item_id", "ts", "event", "split", "order", "reason", "raw")
ITEMS = ("item_id", "text", "order", "reason", "raw")

# The release of the paper: file -> split. Only train has times.
COLAREC_FILES = {"train_time_inter.csv": schema.TRAIN, "valid_inter.csv": schema.VALID, "test_inter.csv": schema.TEST}
COLAREC_ITEMS = "corpus_512.json"

# Milliseconds in one unit of data.time_unit, as a fraction.
_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "order": (1, 1)}
_CORRUPT = "_corrupt"
MAX_DOUBLE_AS_LONG = 2.0**62


def input_patterns(data: Data) -> dict[str, tuple[str, ...]]:
    """{setting: the paths or globs it stands for}, absolute."""
    base = os.path.abspath(data.path)
    if data.format == "colarec":
        return {"data.path": tuple(os.path.join(base, name) for name in (*COLAREC_FILES, COLAREC_ITEMS))}
    return {
        "data.interactions": tuple(os.path.join(base, name) for name in data.interactions),
        "data.items": tuple(os.path.join(base, name) for name in data.items),
    }


def input_files(data: Data) -> dict[str, list[Path]]:
    """{setting: the files that are there}, sorted; a folder stands for the files in it.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: no interactions or no items are configured, or all interaction files are empty.
    """
    found = {}
    for setting, patterns in input_patterns(data).items():
        if not patterns:
            raise ValueError(f"{setting} is empty: name at least one file (both the log and the item texts are needed)")
        found[setting] = [file for pattern in patterns for file in _expand(setting, pattern)]
    log = next(iter(found.values()))
    if not any(file.stat().st_size for file in log):
        raise ValueError(f"the log is empty: no bytes in {', '.join(map(str, log[:3]))}")
    return found


def _expand(setting: str, pattern: str) -> list[Path]:
    files = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [f for f in inside if f.is_file() and not f.name.startswith((".", "_"))]
    if not files:
        hint = setting if setting == "data.path" else f"{setting} (and data.path)"
        raise FileNotFoundError(f"{pattern} does not exist or matches no file; set {hint}")
    return files


def read_events(spark: SparkSession, config: Config, files: dict[str, list[Path]]) -> DataFrame:
    """The log in the format of data.format; `files` as `input_files` gives them.

    Raises:
        ValueError: a column of the mapping is missing, or etl.split asks for what the format does not hold.
    """
    data = config.data
    if (config.etl.split == "given") != (data.format == "colarec"):
        raise ValueError(
            f"etl.split = {config.etl.split!r} with data.format = {data.format!r}: a split is given in the "
            "colarec format and only there, and its valid and test rows have no times to split by"
        )
    if data.format == "colarec":
        return _colarec_events(spark, data)
    columns = [data.user_column, data.item_column, data.time_column]
    columns += [data.event_column] if data.event_column else []
    rows = READ[data.format](spark, files["data.interactions"], columns, "data.*_column")
    return _to_events(rows, data, split=None, has_time=True)


def read_items(spark: SparkSession, data: Data, files: dict[str, list[Path]]) -> DataFrame:
    """The item texts. Raises ValueError when a column of the mapping is missing."""
    if data.format == "colarec":
        return _colarec_items(spark, data)
    read = READ[data.items_format or data.format]
    rows = read(spark, files["data.items"], [data.item_column, *data.text_columns], "data.item_column/text_columns")
    item_id = F.col(f"row.{_quoted(data.item_column)}").cast("string")
    text = F.concat_ws(" ", *(F.col(f"row.{_quoted(name)}") for name in data.text_columns))
    return _to_items(rows, item_id, text)


# --- formats: each gives row struct<the columns, strings where the format has no types>, order, broken, raw ---


def _read_jsonl(spark: SparkSession, files: list[Path], columns: list[str], setting: str) -> DataFrame:
    """JSON lines, plain or gzipped. What a column holds is read as text; lists of texts are joined with spaces."""
    lines = _read_lines(spark, files)
    fields = [T.StructField(name, T.StringType()) for name in dict.fromkeys(columns)]
    parsed = F.from_json(
        "raw",
        T.StructType([*fields, T.StructField(_CORRUPT, T.StringType())]),
        {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": _CORRUPT},
    )
    # from_json takes the first object of a line and lets arrays and trailing text pass.
    one_object = F.col("raw").rlike(r"^\s*\{.*\}\s*$")
    rows = lines.select(parsed.alias("row"), "order", "raw", one_object.alias("one_object"))
    broken = F.when(~F.col("one_object") | F.col(f"row.{_CORRUPT}").isNotNull(), F.lit("not one JSON object"))
    texts = [_joined_list(F.col(f"row.{_quoted(f.name)}")).alias(f.name) for f in fields]
    return rows.select(F.struct(*texts).alias("row"), "order", broken.alias("broken"), "raw")


def _joined_list(text: Column) -> Column:
    """'["a","b"]' -> 'a b'; any other text stays as it is."""
    return F.when(
        text.startswith("["), F.coalesce(F.array_join(F.from_json(text, "array<string>"), " "), text)
    ).otherwise(text)


def _read_csv(spark: SparkSession, files: list[Path], columns: list[str], setting: str) -> DataFrame:
    """CSV with a header line, the same in all files. Fields hold no line breaks."""
    header = _csv_header(files)
    names = _csv_fields(header)
    _require(columns, names, files[0], setting)
    parsed = F.from_csv(
        F.col("raw"),
        ", ".join(f"{_quoted(name)} STRING" for name in [*names, _CORRUPT]),
        {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": _CORRUPT, "escape": '"'},
    )
    lines = _read_lines(spark, files).where(F.col("raw") != F.lit(header))
    broken = F.when(F.col(f"row.{_CORRUPT}").isNotNull(), F.lit(f"not {len(names)} CSV fields"))
    return lines.select(parsed.alias("row"), "order", "raw").select("row", "order", broken.alias("broken"), "raw")


def _read_parquet(spark: SparkSession, files: list[Path], columns: list[str], setting: str) -> DataFrame:
    """Parquet; columns keep their types, lists of texts are joined with spaces."""
    table = spark.read.parquet(*map(str, files))
    _require(columns, table.columns, files[0], setting)
    values = [
        (
            F.concat_ws(" ", name) if isinstance(table.schema[name].dataType, T.ArrayType) else F.col(_quoted(name))
        ).alias(name)
        for name in dict.fromkeys(columns)
    ]
    row = F.struct(*values)
    nothing = F.lit(None).cast("string")
    return table.select(row.alias("row"), _order().alias("order"), nothing.alias("broken"), F.to_json(row).alias("raw"))


READ = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}


def _colarec_events(spark: SparkSession, data: Data) -> DataFrame:
    """The three interaction files of the release; only train has times, in seconds."""
    parts = []
    for name, split in COLAREC_FILES.items():
        has_time = split == schema.TRAIN
        columns = ["user_id", "item_id", "time"] if has_time else ["user_id", "item_id"]
        rows = _read_csv(spark, [Path(data.path, name).absolute()], columns, "data.format = 'colarec'")
        mapping = Data(user_column="user_id", item_column="item_id", time_column="time", time_unit="s")
        parts.append(_to_events(rows, mapping, split, has_time))
    train, valid, test = parts
    return train.unionByName(valid).unionByName(test)


def _colarec_items(spark: SparkSession, data: Data) -> DataFrame:
    """One JSON object keyed by item id, with the text under "content"."""
    file = Path(data.path, COLAREC_ITEMS).absolute()
    whole = spark.read.text(str(file), wholetext=True)
    items = F.explode(F.from_json("value", "map<string, struct<content: string>>")).alias("item_id", "row")
    rows = whole.select(items, _order().alias("order")).withColumn("broken", F.lit(None).cast("string"))
    return _to_items(rows.withColumn("raw", F.to_json("row")), F.col("item_id"), F.col("row.content"))


# --- shared by the formats ---


def _to_events(rows: DataFrame, data: Data, split: int | None, has_time: bool) -> DataFrame:
    """The common columns; rows without ids or with a time that cannot be read get a reason."""
    user_id, item_id = (
        F.trim(F.col(f"row.{_quoted(name)}").cast("string")) for name in (data.user_column, data.item_column)
    )
    time = F.col(f"row.{_quoted(data.time_column)}") if has_time else F.lit(None).cast("string")
    type_ = rows.schema["row"].dataType[data.time_column].dataType if has_time else T.StringType()
    event = F.col(f"row.{_quoted(data.event_column)}").cast("string") if data.event_column else F.lit(None)
    parsed = rows.select(
        user_id.alias("user_id"),
        item_id.alias("item_id"),
        _milliseconds(time, type_, data.time_unit).alias("ts"),
        event.cast("string").alias("event"),
        F.lit(split).cast("byte").alias("split"),
        "order",
        "broken",
        time.cast("string").alias("time"),
        "raw",
    )
    reason = (
        F.when(F.col("broken").isNotNull(), F.col("broken"))
        .when(F.coalesce("user_id", F.lit("")) == "", F.lit("no user id"))
        .when(F.coalesce("item_id", F.lit("")) == "", F.lit("no item id"))
    )
    if has_time:
        reason = reason.when(F.coalesce(F.trim("time"), F.lit("")) == "", F.lit("no timestamp"))
        reason = reason.when(F.col("ts").isNull(), F.lit(f"timestamp not in unit '{data.time_unit}'"))
    return _with_reason(parsed, reason).select(*EVENTS)


def _to_items(rows: DataFrame, item_id: Column, text: Column) -> DataFrame:
    parsed = rows.select(F.trim(item_id).alias("item_id"), text.alias("text"), "order", "broken", "raw")
    reason = F.when(F.col("broken").isNotNull(), F.col("broken")).when(
        F.coalesce("item_id", F.lit("")) == "", F.lit("no item id")
    )
    return _with_reason(parsed, reason).select(*ITEMS)


def _with_reason(rows: DataFrame, reason: Column) -> DataFrame:
    """Adds `reason`; `raw` stays only where it is needed, or the whole input would travel with the events."""
    return rows.withColumn("reason", reason).withColumn("raw", F.when(F.col("reason").isNotNull(), F.col("raw")))


def _milliseconds(time: Column, type_: T.DataType, unit: str) -> Column:
    """Time as long ms, null where it cannot be read. The try_ functions: one bad row must not end the job."""
    if isinstance(type_, (T.TimestampType, T.TimestampNTZType, T.DateType)) or unit == "iso":
        stamp = F.try_to_timestamp(time) if isinstance(type_, T.StringType) else time.cast("timestamp")
        return F.unix_millis(stamp)
    text = F.trim(time.cast("string"))
    factor, divisor = _MS[unit]
    whole = F.try_multiply(text.try_cast("long"), F.lit(factor))
    exact = F.when(whole.isNotNull(), F.floor(whole / divisor) if divisor > 1 else whole)
    number = text.try_cast("double") * factor / divisor  # 1396396800.25, 1.4e9
    # False of NaN as well, which Spark orders last.
    return F.coalesce(exact, F.when(F.abs(number) < MAX_DOUBLE_AS_LONG, F.floor(number)))


def _read_lines(spark: SparkSession, files: list[Path]) -> DataFrame:
    """raw string, order; blank lines are no rows."""
    lines = spark.read.text([str(file) for file in files])
    return lines.select(F.col("value").alias("raw"), _order().alias("order")).where(F.trim("raw") != "")


def _order() -> Column:
    """Sorts as the files, by path, and the rows in them: a task reads a block from its start to its end."""
    return F.struct(
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.file_block_start").alias("block"),
        F.monotonically_increasing_id().alias("row"),
    )


def _csv_header(files: list[Path]) -> str:
    header = _first_line(files[0])
    for file in files[1:]:
        if _first_line(file) != header:
            raise ValueError(f"the CSV header of {file} is not that of {files[0]} ({header}); make them the same")
    return header


def _first_line(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig") as f:
        return f.readline().rstrip("\r\n")


def _csv_fields(header: str) -> list[str]:
    return [name.strip().strip('"') for name in header.split(",")]


def _require(columns: list[str], available: list[str], file: Path, setting: str) -> None:
    for name in columns:
        if name not in available:
            raise ValueError(f"{file} has no column {json.dumps(name)} ({setting}); it has: {', '.join(available)}")


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
