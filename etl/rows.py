"""From files to rows in the order of the input, and from rows to the two tables that every format gives.

Events (`EVENTS`), one row per event of the input, the unusable ones too:
    user_id string, item_id string, ts long (ms; null: the input has none), event string (null: none),
    split byte (0 train, 1 valid, 2 test; null: not given), order long (the place in the input),
    reason string (why the row cannot be used; null: it can), raw string (the input row, if it cannot)

Items (`ITEMS`):
    item_id string, text string (the texts, a line each, not normalised), order, reason, raw

What lies between the two is a table with a column `block` (see `order`), `broken` (a reason that is known from the
row as a whole, or null) and `raw`, and with the fields of the format.
"""

import bisect
import csv
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from etl import parquet
from etl.files import first_line, folder_keys, is_utf8
from etl.values import REPLACEMENT, bad_id, bad_text, event_text, id_text

EVENTS = ("user_id", "item_id", "ts", "event", "split", "order", "reason", "raw")
ITEMS = ("item_id", "text", "order", "reason", "raw")

GRANULE_BYTES = 1 << 20
ROW_BITS = 33  # what Spark's monotonically_increasing_id leaves to the rows of a partition
MAX_GRANULES = 1 << (63 - ROW_BITS)

# Milliseconds in one unit of data.time_unit, as a fraction.
_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000), "order": (1, 1)}
MAX_DOUBLE_AS_LONG = 2.0**62
UTF8 = "utf-8"  # the default of data.encoding
_CORRUPT = "_corrupt"
_END = "_end_of_line"


# --- the order of the input ---


def granule_bytes(spark: SparkSession) -> int:
    """Bytes of a granule: 1 MiB, or less where Spark's settings allow smaller splits of a file.

    Spark splits files at multiples of min(maxPartitionBytes, max(openCostInBytes, ...)), so that no two splits of a
    file begin in the same granule.
    """
    settings = spark._jsparkSession.sessionState().conf()  # the public conf gives texts such as "128MB"
    return max(1, min(GRANULE_BYTES, settings.filesMaxPartitionBytes(), settings.filesOpenCostInBytes()))


def first_granules(files: list[Path], granule_bytes: int) -> list[int]:
    """The number of each file's first granule: granules are numbered through the files, at least one a file.

    Raises:
        ValueError: there are more granules than an order can number.
    """
    *firsts, total = itertools.accumulate((max(1, -(-f.stat().st_size // granule_bytes)) for f in files), initial=0)
    if total > MAX_GRANULES:
        raise ValueError(
            f"the input has {total:,} granules of {granule_bytes:,} bytes, at most {MAX_GRANULES:,} can be numbered; "
            "raise spark.sql.files.openCostInBytes and maxPartitionBytes to 1m or more"
        )
    return firsts


def file_names(files: list[Path], granule_bytes: int) -> Callable[[int], str]:
    """A function from an `order` to the name of the file it is in; it can be pickled.

    `files` are all files of the table, sorted by path as `readers.input_files` gives them.
    """
    return functools.partial(_name_at, first_granules(files, granule_bytes), [file.name for file in files])


def _name_at(firsts: list[int], names: list[str], order: int) -> str:
    return names[bisect.bisect_right(firsts, order >> ROW_BITS) - 1]


def order() -> Column:
    """The place of a row in the input, as one long: granule << 33 | row.

    It sorts as the files by path and the rows in them. A task reads the blocks of files given to it one after the
    other, each from its start to its end, and counts the rows as they come: of two rows of a block the later one has
    the higher count. Two blocks of a file never begin in the same granule, and the granules grow along the file and
    from file to file: of two blocks the later one has the higher granule, whichever tasks read them. Call this after
    the last explode: it is the rows at this point of the plan that are counted.
    """
    row = F.monotonically_increasing_id().bitwiseAND(F.lit((1 << ROW_BITS) - 1))
    return F.col("block").bitwiseOR(row)


def _with_block(scan: DataFrame, columns: list[Column], among: list[Path], keys: Iterable[str] = ()) -> DataFrame:
    """`columns` of the files that `scan` reads, and block long: the granule where the row's block begins, << 33.

    With `keys` also keys struct<of a string each>: what the folders of the row's file say of them.
    """
    spark, size, keys = scan.sparkSession, granule_bytes(scan.sparkSession), list(dict.fromkeys(keys))
    of_file = {}
    for file, first in zip(among, first_granules(among, size), strict=True):
        of_file[str(file)] = (first, tuple(map(folder_keys(file).get, keys)) if keys else None)
    # _metadata spells a path as inputFiles does (Java's URI, encoded), but for the empty host.
    of_uri = [
        (uri.replace("file:///", "file:/", 1), *of_file[unquote(urlsplit(uri).path)]) for uri in scan.inputFiles()
    ]
    fields = T.StructType([T.StructField(key, T.StringType()) for key in keys])
    table = T.StructType().add("_file", "string").add("_first", "long").add("keys", fields if keys else "string")
    firsts = F.broadcast(spark.createDataFrame(of_uri, table))
    begin = F.floor(F.col("_metadata.file_block_start") / size)
    rows = scan.select(*columns, F.col("_metadata.file_path").alias("_file"), begin.alias("_begin"))
    # A left join and a check: an inner join would lose the rows of a file that is not found.
    known = F.coalesce("_first", F.raise_error(F.concat(F.lit("no granule for "), "_file")))
    block = F.shiftleft(known + F.col("_begin"), ROW_BITS)
    rows = rows.join(firsts, "_file", "left").withColumn("block", block).drop("_file", "_first", "_begin")
    return rows if keys else rows.drop("keys")


def keys_among(files: list[Path], names: Iterable[str]) -> list[str]:
    """Those of the names that a folder around one of the files has as its key."""
    found = set().union(*map(folder_keys, files))
    return [name for name in dict.fromkeys(names) if name in found]


# --- rows of files: each gives row struct<the columns>, block, broken, raw ---


def read_lines(
    spark: SparkSession,
    files: list[Path],
    among: list[Path] | None = None,
    whole: bool = False,
    encoding: str = UTF8,
    keys: Iterable[str] = (),
) -> DataFrame:
    """raw string, block; blank lines are no rows. Plain text, or packed as .gz, .zst or .bz2.

    `among`: all files of the table, where `files` are but some of them. `whole`: each file is one row. `keys`: see
    `_with_block`.
    """
    if not whole:
        _refuse_utf16(files[0])
    scan = spark.read.text(_unglobbed(files), wholetext=whole)
    rows = _with_block(scan, [F.col("value").alias("raw")], among or files, keys)
    if not is_utf8(encoding):
        rows = rows.withColumn("raw", decoded(F.col("raw").cast("binary"), encoding))
    return rows.where(F.trim("raw") != "")


def json_rows(lines: DataFrame, fields: T.StructType) -> DataFrame:
    """JSON lines; what a field of type string holds is read as text, whatever it is.

    A field that `lines` have in keys (of `_with_block`) is that where the line does not say it.
    """
    # from_json takes the first value of a text and does not look at what follows it. As a value within an object that
    # ends with a field of ours, a line is parsed to its end: that field is missing when anything else is on the line.
    enclosing = T.StructType([T.StructField("row", fields), T.StructField(_END, T.StringType())])
    enclosed = F.concat(F.lit('{"row":'), "raw", F.lit(f',"{_END}":""}}'))
    keys = [column for column in lines.columns if column == "keys"]
    said = F.from_json(enclosed, enclosing, {"mode": "PERMISSIVE"}).alias("parsed")
    parsed = lines.select("block", "raw", *keys, said)
    is_object = F.col("parsed.row").isNotNull() & (F.coalesce(f"parsed.{_END}", F.lit("missing")) == "")
    broken = F.when(~is_object, F.lit("not one JSON object"))
    row = F.col("parsed.row")
    for key in lines.schema["keys"].dataType.names if keys else ():
        row = row.withField(quoted(key), F.coalesce(row[key], F.col(f"keys.{quoted(key)}")))
    return parsed.select(row.alias("row"), "block", broken.alias("broken"), "raw")


def csv_rows(
    spark: SparkSession,
    files: list[Path],
    columns: list[str],
    setting: str,
    delimiter: str = ",",
    multiline: bool = False,
    among: list[Path] | None = None,
    encoding: str = UTF8,
) -> DataFrame:
    """CSV with a header, the same in all files; quotes in a quoted field are doubled. A column that the header has
    not is taken from the keys of the files' folders.

    Fields hold line breaks with `multiline` alone: such files are not split, and raw is the row itself in ragged rows
    only. Without it a line that repeats the header, as in files put together, is no row.

    Raises:
        ValueError: a file has another header, or a column (named in `setting`) is missing.
    """
    names, header = _csv_header(files, delimiter, encoding)
    keys = keys_among(files, set(columns) - set(names))
    require(columns, [*names, *keys], files[0], setting)
    # Columns by position: a header may hold names that are empty, or differ in nothing but case.
    schema = ", ".join([*(f"c{index} STRING" for index in range(len(names))), f"{_CORRUPT} STRING"])
    options = {"sep": delimiter, "escape": '"', "mode": "PERMISSIVE", "columnNameOfCorruptRecord": _CORRUPT}
    if multiline:
        # Spark decodes few encodings; as Latin-1, one character a byte, it keeps the bytes of the others.
        charset = "utf-8" if is_utf8(encoding) else "iso-8859-1"
        scan = spark.read.csv(_unglobbed(files), schema, header=True, multiLine=True, encoding=charset, **options)
        parsed = _with_block(scan, [F.struct("*").alias("parsed")], among or files, keys)
        if not is_utf8(encoding):
            fields = [decoded(F.col(f"parsed.{name}"), encoding).alias(name) for name in scan.columns]
            parsed = parsed.withColumn("parsed", F.struct(*fields))
    else:
        lines = read_lines(spark, files, among, encoding=encoding, keys=keys)
        # The header has been decoded in Python.
        line = F.make_valid_utf8("raw") if REPLACEMENT in header else F.col("raw")
        parsed = lines.where(line != F.lit(header)).withColumn("parsed", F.from_csv("raw", schema, options))
    place = {name: f"keys.{quoted(name)}" for name in keys} | {name: f"parsed.c{names.index(name)}" for name in names}
    row = F.struct(*(F.col(place[name]).alias(name) for name in dict.fromkeys(columns)))
    broken = F.when(F.col(f"parsed.{_CORRUPT}").isNotNull(), F.lit(f"not {len(names)} CSV fields"))
    if not multiline and names[-1] in columns:
        broken = broken.when(_open_quote(delimiter), F.lit("a quote that is not closed (data.multiline)"))
    raw = F.coalesce(f"parsed.{_CORRUPT}", F.to_json(row)) if multiline else F.col("raw")
    return parsed.select(row.alias("row"), "block", broken.alias("broken"), raw.alias("raw"))


def parquet_rows(spark: SparkSession, files: list[Path], columns: list[str], setting: str) -> DataFrame:
    """Parquet; the columns keep their types, integers of several widths become the widest.

    Only these columns are read. In a file that lacks one it is the key of the file's folder, or else null.

    Raises:
        ValueError: no file has a column (named in `setting`), or its types do not go together.
    """
    names = list(dict.fromkeys(columns))
    keys = keys_among(files, names)
    groups, types, there = parquet.plan(files, names, keys)
    require(names, [*there, *keys], files[0], setting)
    parts = []
    for group in groups:
        scan = spark.read.schema(group.schema).parquet(*_unglobbed(group.files))
        lacking = [name for name in keys if name not in group.columns]
        stored = F.struct(*group.values()) if group.columns else F.lit(None)
        rows = _with_block(scan, [stored.alias("stored")], files, lacking)
        values = [
            F.col(f"stored.{quoted(name)}") if name in group.columns
            else F.col(f"keys.{quoted(name)}") if name in lacking
            else F.lit(None)
            for name in names
        ]  # fmt: skip
        row = F.struct(*(value.cast(types[name]).alias(name) for name, value in zip(names, values, strict=True)))
        parts.append(rows.select(row.alias("row"), "block"))
    rows = functools.reduce(DataFrame.unionByName, parts)
    nothing = F.lit(None).cast("string")
    return rows.select("row", "block", nothing.alias("broken"), F.to_json("row").alias("raw"))


def _refuse_utf16(file: Path) -> None:
    """Raises ValueError for a file in UTF-16 or UTF-32, in which every other byte of ASCII is 0."""
    try:
        line = first_line(file)
    except ValueError:  # damaged: Spark's error tells where
        return
    if "\0" in line[:1000]:
        raise ValueError(f"{file} is not text, or in UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 old > new")


def require(columns: list[str], available: list[str], file: Path, setting: str) -> None:
    """Raises ValueError when one of the columns, which `setting` asks for, is not available in the file."""
    for name in columns:
        if name not in available:
            raise ValueError(f"{file} has no column {json.dumps(name)} ({setting}); it has: {', '.join(available)}")


def quoted(name: str) -> str:
    """A column name as Spark's expressions take it, whatever characters it holds."""
    return "`" + name.replace("`", "``") + "`"


def _unglobbed(files: list[Path]) -> list[str]:
    """Spark takes paths as globs; these mean themselves."""
    return [re.sub(r"[\\\[\]{}*?]", r"\\\g<0>", str(file)) for file in files]


def _csv_header(files: list[Path], delimiter: str, encoding: str) -> tuple[list[str], str]:
    """(names, line). Empty files, which some writers leave, have no header."""
    lines = [(file, line) for file in files if (line := first_line(file, encoding))]
    (first, header), *rest = lines or [(files[0], "")]
    _refuse_utf16(first)
    for file, other in rest:
        if other != header:
            raise ValueError(
                f"the CSV header of {file} ({other}) is not that of {first} ({header}); make them the same"
            )
    return [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])], header


def _open_quote(delimiter: str) -> Column:
    """Whether the last field of the line begins with a quote that is not closed in it: it goes on in the next line."""
    sep = re.escape(delimiter)
    closed, plain = '"(?:[^"]|"")*+"', f'(?!"|{sep})(?:(?!{sep}).)*+'
    return F.col("raw").rlike(f'^(?:(?:{closed}|{plain}|){sep})*+"(?:[^"]|"")*+$')


def decoded(text: Column, encoding: str) -> Column:
    """The text, of bytes or of a character for each byte (Latin-1), with U+FFFD for what cannot be decoded."""

    @F.arrow_udf(T.StringType())
    def decode(texts: pa.Array) -> pa.Array:
        found = (text.encode("latin-1") if isinstance(text, str) else text for text in texts.to_pylist())
        return pa.array([text if text is None else text.decode(encoding, "replace") for text in found], pa.string())

    return decode(text)


# --- the two tables ---


def to_events(
    rows: DataFrame,
    user_id: Column,
    item_id: Column,
    time: Column | None = None,
    unit: str = "ms",
    event: Column | None = None,
    split: Column | None = None,
) -> DataFrame:
    """`EVENTS` of rows that hold one event each; rows without ids or with a time that cannot be read get a reason.

    The ids and the event type are as etl.values has them, of any type. `time` is a number or a text in `unit`, or of
    one of Spark's types of time; None: the input has no times.
    """
    user, item, event_, type_ = _types(rows, user_id, item_id, _or_null(event), _or_null(time))
    no_ids = F.coalesce(bad_id(user_id, user, "user id"), bad_id(item_id, item, "item id"))
    parsed = rows.withColumn("broken", F.coalesce("broken", no_ids, _bad_event(event, event_))).select(
        id_text(user_id, user).alias("user_id"),
        id_text(item_id, item).alias("item_id"),
        milliseconds(_or_null(time), type_, unit).alias("ts"),
        event_text(_or_null(event), event_).alias("event"),
        _or_null(split).cast("byte").alias("split"),
        order().alias("order"),
        "broken",
        _or_null(time).cast("string").alias("time"),
        "raw",
    )
    no_time = F.when(F.coalesce(F.trim("time"), F.lit("")) == "", F.lit("no timestamp"))
    bad_time = no_time.when(F.col("ts").isNull(), F.lit(f"timestamp not in unit '{unit}'"))
    reason = F.coalesce("broken", _bad_id("user_id"), _bad_id("item_id"), *([] if time is None else [bad_time]))
    return _with_reason(parsed, reason).select(*EVENTS)


def to_items(rows: DataFrame, item_id: Column, texts: list[Column]) -> DataFrame:
    """`ITEMS` of rows that hold one item each. The texts are strings; null and empty ones are left out."""
    text = F.make_valid_utf8(F.concat_ws("\n", *(F.nullif(text, F.lit("")) for text in texts)))
    (type_,) = _types(rows, item_id)
    parsed = rows.withColumn("broken", F.coalesce("broken", bad_id(item_id, type_, "item id"))).select(
        id_text(item_id, type_).alias("item_id"), text.alias("text"), order().alias("order"), "broken", "raw"
    )
    return _with_reason(parsed, F.coalesce("broken", _bad_id("item_id"))).select(*ITEMS)


def no_items(spark: SparkSession) -> DataFrame:
    """`ITEMS` without a row: a log without a catalog."""
    return spark.createDataFrame([], "item_id string, text string, order long, reason string, raw string")


def milliseconds(time: Column, type_: T.DataType, unit: str) -> Column:
    """Time as long ms, null where it cannot be read. The try_ functions: one bad row must not end the job."""
    if isinstance(type_, (T.TimestampType, T.TimestampNTZType, T.DateType)) or unit == "iso":
        # Spark takes a time of the day, "12:30", for one of today.
        dated = F.when(time.rlike(r"^\s*[+-]?[0-9]{4}"), time)
        stamp = F.try_to_timestamp(dated) if isinstance(type_, T.StringType) else time.cast("timestamp")
        return F.unix_millis(stamp)
    text = F.trim(time.cast("string"))
    factor, divisor = _MS[unit]
    whole = F.try_multiply(text.try_cast("long"), F.lit(factor))
    # In integers: nanoseconds of today are more than a double holds exactly.
    floored = F.call_function("div", whole - F.pmod(whole, F.lit(divisor)), F.lit(divisor))
    exact = F.when(whole.isNotNull(), floored if divisor > 1 else whole)
    number = text.try_cast("double") * factor / divisor  # 1396396800.25, 1.4e9
    # False of NaN as well, which Spark orders last.
    return F.coalesce(exact, F.when(F.abs(number) < MAX_DOUBLE_AS_LONG, F.floor(number)))


def _or_null(column: Column | None) -> Column:
    return F.lit(None) if column is None else column


def _types(rows: DataFrame, *columns: Column) -> list[T.DataType]:
    return [field.dataType for field in rows.select(*(c.alias(str(n)) for n, c in enumerate(columns))).schema]


def _bad_event(event: Column | None, type_: T.DataType) -> Column:
    """The reason why there is no event type in it, or null. A truth value is one."""
    if event is None or isinstance(type_, T.BooleanType):
        return F.lit(None).cast("string")
    if not isinstance(type_, T.StringType):
        reason = bad_id(event, type_, "event type")
        return F.when(~reason.endswith("a fraction"), reason)
    unreadable = ~F.is_valid_utf8(event) | F.contains(event, F.lit(REPLACEMENT))
    return F.coalesce(bad_text(event, "event type"), F.when(unreadable, F.lit("event type not in UTF-8")))


def _bad_id(name: str) -> Column:
    """The reason why the id cannot be used, or null. Two ids that are not UTF-8 would look the same."""
    readable = F.is_valid_utf8(name) & ~F.contains(F.col(name), F.lit(REPLACEMENT))
    missing = F.when(F.coalesce(F.col(name), F.lit("")) == "", F.lit(f"no {name.replace('_', ' ')}"))
    return missing.when(~readable, F.lit(f"{name.replace('_', ' ')} not in UTF-8"))


def _with_reason(rows: DataFrame, reason: Column) -> DataFrame:
    """Adds `reason`; `raw` stays only where it is needed, or the whole input would travel with the events."""
    raw = F.when(F.col("reason").isNotNull(), F.make_valid_utf8("raw"))
    return rows.withColumn("reason", reason).withColumn("raw", raw)
