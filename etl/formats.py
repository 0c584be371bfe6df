"""The input formats, each as a function from paths to the events, and one to the items, of etl.rows.

csv, jsonl and parquet hold one event, or one item, a row; the [data] settings say which column is what. The others
are public releases as they are downloaded, whose layout needs no settings. Which releases the layouts were checked
against is said at each.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from contract import schema
from contract.settings import Config, Data
from etl import parquet
from etl.files import first_line
from etl.rows import (
    csv_rows,
    json_rows,
    keys_among,
    parquet_rows,
    quoted,
    read_lines,
    require,
    to_events,
    to_items,
)
from etl.values import bad_csv_id, bad_json_id, plain_text

MAPPED = ("csv", "jsonl", "parquet")

# The release of the ColaRec authors: file -> split. Only train has times.
COLAREC_SPLITS = {"train_time_inter.csv": schema.TRAIN, "valid_inter.csv": schema.VALID, "test_inter.csv": schema.TEST}
COLAREC_ITEMS = "corpus_512.json"
COLAREC_FILES = (*COLAREC_SPLITS, COLAREC_ITEMS)

TENCENT_ACTIONS = ("exposure", "click", "conversion")  # action_type 0, 1, 2


def check_split(config: Config) -> None:
    """Raises ValueError when the input has no split that etl.split = 'given' could take, or no times for another."""
    data, split = config.data, config.etl.split
    if split == "given" and not (data.format == "colarec" or (data.split_column and data.format in MAPPED)):
        raise ValueError(
            f"etl.split = 'given', but the input has no split: set data.split_column ({', '.join(MAPPED)}), "
            "use the colarec format, or choose another etl.split"
        )
    if data.format == "colarec" and split not in ("given", "random"):
        raise ValueError(
            f"etl.split = {split!r} with data.format = 'colarec': its valid and test rows have no times to split by; "
            "set etl.split to 'given' or 'random'"
        )


# --- csv, jsonl, parquet ---


def mapped_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """One event a row, in the columns that [data] names."""
    data = config.data
    given = data.split_column if config.etl.split == "given" else ""
    columns = [data.user_column, data.item_column, data.time_column, data.event_column, given]
    rows = _mapped_rows(spark, data.format, data, files, [name for name in columns if name], "data.*_column")
    rows = _with_bad_ids(rows, data.format, user_id=data.user_column, item_id=data.item_column)
    user_id, item_id, time = map(_field, columns[:3])
    event = _field(data.event_column) if data.event_column else None
    if not given:
        return to_events(rows, user_id, item_id, time, data.time_unit, event)
    number = F.array_position(F.lit(list(schema.SPLITS)), F.trim(_field(given).cast("string")))
    split = F.nullif(number, F.lit(0)) - 1
    unknown = F.when(split.isNull(), F.lit(f"no split, which is {', '.join(schema.SPLITS)}"))
    rows = rows.withColumn("broken", F.coalesce("broken", unknown))
    return to_events(rows, user_id, item_id, time, data.time_unit, event, split)


def mapped_items(spark: SparkSession, data: Data, files: list[Path]) -> DataFrame:
    """One item a row, in the columns that [data] names; lists of texts are joined with spaces."""
    columns = [data.item_column, *data.text_columns]
    format_ = data.items_format or data.format
    rows = _mapped_rows(spark, format_, data, files, columns, "data.item_column/text_columns")
    rows = _with_bad_ids(rows, format_, item_id=data.item_column)
    types = rows.schema["row"].dataType
    texts = [plain_text(_field(name), types[name].dataType) for name in data.text_columns]
    return to_items(rows, _field(data.item_column), texts)


def _mapped_rows(
    spark: SparkSession, format_: str, data: Data, files: list[Path], columns: list[str], setting: str
) -> DataFrame:
    if format_ == "parquet":
        return parquet_rows(spark, files, columns, setting)
    if format_ == "csv":
        return csv_rows(spark, files, columns, setting, data.delimiter, data.multiline, encoding=data.encoding)
    keys = keys_among(files, columns)
    return json_rows(read_lines(spark, files, encoding=data.encoding, keys=keys), _strings(columns))


def _field(name: str) -> Column:
    return F.col(f"row.{quoted(name)}")


def _strings(names: Iterable[str]) -> T.StructType:
    return T.StructType([T.StructField(name, T.StringType()) for name in dict.fromkeys(names)])


def _with_bad_ids(rows: DataFrame, format_: str, **names: str) -> DataFrame:
    """Gives rows a reason in `broken` whose ids are numbers of JSON or CSV that are none. `names`: user_id="column"."""
    if format_ == "parquet":  # where the types tell
        return rows
    reasons = []
    for id_, name in names.items():
        text, what = _field(name), id_.replace("_", " ")
        csv = format_ == "csv"
        reasons.append(bad_csv_id(text, what) if csv else bad_json_id(text, F.col("raw"), name, what))
    return rows.withColumn("broken", F.coalesce("broken", *reasons))


# --- the release of the ColaRec authors ---


def colarec_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """The three interaction files, times in seconds. Checked against the release."""
    parts = []
    for file in (file for file in files if file.name in COLAREC_SPLITS):
        split = COLAREC_SPLITS[file.name]
        time = ["time"] if split == schema.TRAIN else []
        rows = csv_rows(
            spark,
            [file],
            ["user_id", "item_id", *time],
            "data.format = 'colarec'",
            among=files,
            encoding=config.data.encoding,
        )
        parts.append(
            to_events(
                rows,
                F.col("row.user_id"),
                F.col("row.item_id"),
                F.col("row.time") if time else None,
                "s",
                split=F.lit(split) if config.etl.split == "given" else None,
            )
        )
    return functools.reduce(DataFrame.unionByName, parts)


def colarec_items(spark: SparkSession, data: Data, files: list[Path]) -> DataFrame:
    """One JSON object keyed by item id, over many lines, with the text under "content". Checked against the release."""
    (file,) = (file for file in files if file.name == COLAREC_ITEMS)
    whole = read_lines(spark, [file], files, whole=True, encoding=data.encoding)
    items = F.from_json("raw", "map<string, struct<content: string>>")
    rows = whole.select("block", F.explode_outer(items).alias("item_id", "item"))
    broken = F.when(F.col("item_id").isNull(), F.lit("not one JSON object"))
    raw = F.to_json(F.struct("item_id", "item"))
    return to_items(rows.withColumns({"broken": broken, "raw": raw}), F.col("item_id"), [F.col("item.content")])


# --- OTTO sessions ---


def otto_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """Sessions of github.com/otto-de/recsys-dataset: {"session": 0, "events": [{"aid": 1, "ts": ms, "type": ..}, ..]}.

    The event types are clicks, carts and orders; there are no item texts. A line that cannot be read is one bad row,
    and so is an event that lacks something in a line that can. Checked against lines of the release and its README.
    """
    event = T.ArrayType(_strings(["aid", "ts", "type"]))
    session = T.StructType([*_strings(["session"]).fields, T.StructField("events", event)])
    lines = json_rows(read_lines(spark, files, encoding=config.data.encoding), session)
    # Columns of their own, and the line only where nothing is read of it: what is here is repeated for each event.
    unread = F.col("broken").isNotNull() | (F.coalesce(F.size("row.events"), F.lit(0)) < 1)
    line = F.when(unread, F.col("raw")).alias("line")
    sessions = lines.select("block", F.col("row.session"), F.col("row.events"), "broken", line)
    rows = sessions.select("block", "session", F.explode_outer("events").alias("event"), "broken", "line")
    lacking = F.when(F.col("event").isNull(), F.lit("no readable event")).when(
        F.coalesce("event.type", F.lit("")) == "", F.lit("no event type")
    )
    rows = rows.withColumn("raw", F.coalesce("line", F.to_json(F.struct("session", "event"))))
    rows = rows.withColumn("broken", F.coalesce("broken", lacking))
    return to_events(rows, F.col("session"), F.col("event.aid"), F.col("event.ts"), "ms", F.col("event.type"))


# --- Amazon reviews ---


def amazon_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """Reviews of the releases of 2014, 2018 and 2023, told apart by what is in them; ratings are not used.

    2014 and 2018: JSON lines with reviewerID, asin, unixReviewTime (s); 2023: JSON lines with user_id, parent_asin,
    timestamp (ms), or its k-core tables, CSV files with a header of these names. The files of ratings without a
    header, whose columns differ from release to release, are not read. Checked against published examples.
    """
    columns, encoding = ["user_id", "parent_asin", "timestamp"], config.data.encoding
    csv_files = [file for file in files if first_line(file).startswith("user_id,")]
    json_files = [file for file in files if file not in csv_files]
    parts = []
    if csv_files:
        parts.append(csv_rows(spark, csv_files, columns, "data.format = 'amazon'", among=files, encoding=encoding))
    if json_files:
        fields = _strings(["reviewerID", "asin", "unixReviewTime", *columns])
        rows = json_rows(read_lines(spark, json_files, files, encoding=encoding), fields)
        # asin is there in 2023 too, of a variant of the parent, which the metadata describe.
        user_id = F.coalesce("row.user_id", "row.reviewerID").alias("user_id")
        item_id = F.coalesce("row.parent_asin", "row.asin").alias("parent_asin")
        seconds = F.concat(F.trim("row.unixReviewTime"), F.lit("000"))
        ms = F.coalesce("row.timestamp", seconds).alias("timestamp")
        parts.append(rows.select(F.struct(user_id, item_id, ms).alias("row"), "block", "broken", "raw"))
    events = [to_events(rows, *(F.col(f"row.{name}") for name in columns)) for rows in parts]
    return functools.reduce(DataFrame.unionByName, events)


def amazon_items(spark: SparkSession, data: Data, files: list[Path]) -> DataFrame:
    """Metadata of the releases of 2014, 2018 and 2023: title, brand (2023: store) and categories.

    2014: lines that are Python literals, asin, title, brand, categories [[..], ..]; 2018: JSON lines, asin, title,
    brand, category [..]; 2023: JSON lines, parent_asin, title, store, categories [..]. Checked against published
    examples.
    """
    literal_files = [file for file in files if first_line(file).lstrip().startswith("{'")]
    json_files = [file for file in files if file not in literal_files]
    parts = []
    if literal_files:
        parts.append(_literal_rows(read_lines(spark, literal_files, files, encoding=data.encoding)))
    if json_files:
        parts.append(_metadata_rows(read_lines(spark, json_files, files, encoding=data.encoding)))
    texts = [F.col(name) for name in ("title", "brand", "categories")]
    items = [to_items(rows, F.col("item_id"), texts) for rows in parts]
    return functools.reduce(DataFrame.unionByName, items)


def _metadata_rows(lines: DataFrame) -> DataFrame:
    """Metadata of 2018 and 2023 -> block, item_id, title, brand, categories, broken, raw."""
    lists = [T.StructField(name, T.ArrayType(T.StringType())) for name in ("category", "categories")]
    texts = _strings(["asin", "parent_asin", "title", "brand", "store"]).fields
    return json_rows(lines, T.StructType([*texts, *lists])).select(
        "block",
        F.coalesce("row.parent_asin", "row.asin").alias("item_id"),
        "row.title",
        F.coalesce("row.brand", "row.store").alias("brand"),
        F.array_join(F.coalesce("row.category", "row.categories"), " ").alias("categories"),
        "broken",
        "raw",
    )


def _literal_rows(lines: DataFrame) -> DataFrame:
    """Metadata of 2014 -> the same columns."""
    columns = "block long, item_id string, title string, brand string, categories string, broken string, raw string"
    return lines.select("block", F.make_valid_utf8("raw").alias("raw")).mapInArrow(_literal_items, columns)


def _literal_items(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """block, raw -> block, item_id, title, brand, categories, broken, raw; as many rows, in the same order."""
    names = ("item_id", "title", "brand", "categories", "broken")
    for batch in batches:
        found = [_literal_item(line) for line in batch["raw"].to_pylist()]
        columns = [pa.array([row[i] for row in found], pa.string()) for i in range(len(names))]
        yield pa.RecordBatch.from_arrays([batch["block"], *columns, batch["raw"]], names=["block", *names, "raw"])


def _literal_item(line: str) -> tuple[str | None, ...]:
    """(asin, title, brand, categories, why the line is broken) of a line that is a Python literal."""
    try:
        item = ast.literal_eval(line.strip())
        paths = item.get("categories") or []
        # An item is in several categories, whose paths begin alike: each name once.
        categories = dict.fromkeys(str(name) for path in paths for name in path)
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        return None, None, None, None, "not one Python literal of an item"
    values = [None if item.get(key) is None else str(item[key]) for key in ("asin", "title", "brand")]
    # An escape of half a character (\ud83d) is no text that Arrow takes.
    texts = [value and value.encode(errors="replace").decode() for value in (*values, " ".join(categories))]
    return *texts, None


# --- Food.com ---


def foodcom_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """RAW_interactions.csv: user_id, recipe_id, date (a day), rating, review. Ratings are not used.

    Reviews have line breaks, so that the file is read by one task. Checked against published examples.
    """
    columns, encoding = ["user_id", "recipe_id", "date"], config.data.encoding
    rows = csv_rows(spark, files, columns, "data.format = 'foodcom'", multiline=True, encoding=encoding)
    return to_events(rows, F.col("row.user_id"), F.col("row.recipe_id"), F.col("row.date"), "iso")


def foodcom_items(spark: SparkSession, data: Data, files: list[Path]) -> DataFrame:
    """RAW_recipes.csv: name, id, .., tags, .., description, ..; the text is name, description and tags.

    Tags are words as a Python list, ['15-minutes-or-less', 'easy']. Checked against published examples.
    """
    columns = ["id", "name", "description", "tags"]
    rows = csv_rows(spark, files, columns, "data.format = 'foodcom'", multiline=True, encoding=data.encoding)
    tags = F.translate("row.tags", "[]'\",", "")
    return to_items(rows, F.col("row.id"), [F.col("row.name"), F.col("row.description"), tags])


# --- TencentGR ---


def tencentgr_events(spark: SparkSession, config: Config, files: list[Path]) -> DataFrame:
    """seq/*.parquet of TencentGR-1M and -10M: user_id, seq list<struct<item_id, action_type, timestamp>>.

    action_type 0 is the event type exposure, 1 click, 2 (10M) conversion; exposures without a click are events like
    the others, choose with etl.events. The table layout and the meaning of 0 and 1 were checked against independent
    code that reads the release; that 2 is a conversion and that timestamp is in seconds were not, beyond an excerpt of
    a table made of it. Actions of another number are bad rows. The release's pickles (indexer.pkl) are never opened.
    """
    users = parquet_rows(spark, files, ["user_id", "seq"], "data.format = 'tencentgr'")
    columns = users.select("block", F.col("row.user_id"), F.col("row.seq"), "broken")
    rows = columns.select("block", "user_id", F.explode_outer("seq").alias("event"), "broken")
    action = F.get(F.lit(list(TENCENT_ACTIONS)), F.col("event.action_type").try_cast("int"))
    lacking = F.when(F.col("event").isNull(), F.lit("no readable event")).when(
        action.isNull(), F.lit("no known action_type")
    )
    rows = rows.withColumns({"broken": lacking, "raw": F.to_json(F.struct("user_id", "event"))})
    return to_events(rows, F.col("user_id"), F.col("event.item_id"), F.col("event.timestamp"), "s", action)


def tencentgr_items(spark: SparkSession, data: Data, files: list[Path]) -> DataFrame:
    """item_feat/*.parquet of TencentGR: item_id and columns with numbers for names, features of anonymous values.

    The text is a word field=value for each feature that an item has: "100=6 101=31". A feature is a number, a list
    of them or struct<feature_value, ..>; both spellings are met in code that reads the release.
    """
    names = sorted(set().union(*(parquet.read_schema(file).names for file in files)))
    fields = sorted((name for name in names if name.isdigit()), key=int)
    require(["item_id", *(fields or ["100"])], names, files[0], "data.format = 'tencentgr'")
    rows = parquet_rows(spark, files, ["item_id", *fields], "data.format = 'tencentgr'")
    types = rows.schema["row"].dataType
    return to_items(rows, F.col("row.item_id"), [_feature(name, types[name].dataType) for name in fields])


def _feature(name: str, type_: T.DataType) -> Column:
    """'name=value', a word for each of a list's values; null where there is none."""
    value = _field(name)
    if isinstance(type_, T.StructType):
        value, type_ = value["feature_value"], type_["feature_value"].dataType
    values = value.cast("array<string>") if isinstance(type_, T.ArrayType) else F.array(value.cast("string"))
    words = F.transform(values, lambda word: F.concat(F.lit(f"{name}="), word))
    return F.array_join(words, " ")


READ_EVENTS = {
    "csv": mapped_events,
    "jsonl": mapped_events,
    "parquet": mapped_events,
    "colarec": colarec_events,
    "otto": otto_events,
    "amazon": amazon_events,
    "foodcom": foodcom_events,
    "tencentgr": tencentgr_events,
}
READ_ITEMS = {
    "csv": mapped_items,
    "jsonl": mapped_items,
    "parquet": mapped_items,
    "colarec": colarec_items,
    "amazon": amazon_items,
    "foodcom": foodcom_items,
    "tencentgr": tencentgr_items,
}
