"""What the columns of many Parquet files have in common, by their footers.

Spark takes the schema of one file for all, and refuses a file for types of columns that nobody asks for. So each file
is read with a schema of its own, of the columns that are named alone; files of the same one together.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql import types as T

NUM_THREADS = 16  # footers are read at once
MAX_DIGITS = 38  # of Spark's decimals
# Digits that integers of so many bytes have at most.
_DIGITS = {T.ByteType: 3, T.ShortType: 5, T.IntegerType: 10, T.LongType: 19}


@dataclass(frozen=True)
class Stored:
    """How a column of a file is read: its name there, the type that Spark reads, what that has to be made into."""

    name: str
    type: T.DataType
    to: str = ""  # 'ns', 'time s', .. 'time ns': a number of such units; 'uuid': 16 bytes

    @property
    def value_type(self) -> T.DataType:
        return {"": self.type, "ns": T.TimestampType()}.get(self.to, T.StringType())

    def value(self) -> Column:
        """The column, of `value_type`."""
        column = F.col("`" + self.name.replace("`", "``") + "`")
        if self.to == "ns":
            return F.timestamp_micros(_div(column, 1000))
        if self.to.startswith("time "):
            micros = {"ms": column.cast("long") * 1000, "us": column, "ns": _div(column, 1000)}[self.to.split()[1]]
            return F.substring(
                F.timestamp_micros(micros).cast("string"), len("1970-01-01 ") + 1, len("00:00:00.000000")
            )
        if self.to == "uuid":
            digits, ends = F.lower(F.hex(column)), (0, 8, 12, 16, 20, 32)
            parts = [F.substring(digits, a + 1, b - a) for a, b in itertools.pairwise(ends)]
            return F.when(column.isNotNull(), F.concat_ws("-", *parts))
        return column


@dataclass(frozen=True)
class Group:
    """Files that hold the wanted columns under the same names and types."""

    files: list[Path]
    columns: dict[str, Stored]  # of the wanted names those that are there

    @property
    def schema(self) -> T.StructType:
        """What Spark is to read of these files."""
        return T.StructType([T.StructField(column.name, column.type) for column in self.columns.values()])

    def values(self) -> list[Column]:
        return [column.value().alias(name) for name, column in self.columns.items()]


def plan(files: list[Path], names: list[str], keys: list[str]) -> tuple[list[Group], dict[str, T.DataType], list[str]]:
    """How the columns of these names are read from the files.

    Args:
        keys: those that a folder names, as text, for files without the column.

    Returns:
        the groups of the files; {name: the type that all its columns fit into}; the columns that files have.

    Raises:
        ValueError: a file is no Parquet file, has a column of a type that is not read, or one that does not go with
            those of other files; the message names them.
    """
    schemas = read_all(files)
    there = {name: None for schema in schemas for name in schema.names}
    found = [
        _columns(file, schema, [n for n in names if n in there]) for file, schema in zip(files, schemas, strict=True)
    ]
    types: dict[str, T.DataType] = {}
    first: dict[str, tuple[Path, str]] = {}
    for file, schema, columns in zip(files, schemas, found, strict=True):
        for name in names:
            if name in columns:
                stored, spoken = columns[name].value_type, str(schema.field(columns[name].name).type)
            elif name in keys:
                stored, spoken = T.StringType(), "text: the name of its folder"
            else:
                continue
            if name not in types:
                types[name], first[name] = stored, (file, spoken)
            elif (wider := wider_type(types[name], stored)) is not None:
                types[name] = wider
            else:
                other, of_other = first[name]
                # What pandas makes of integers with gaps, unless they are of its type Int64.
                hint = " (in pandas: dtype Int64)" if "double" in (spoken, of_other) else ""
                raise ValueError(
                    f"the column {json.dumps(name)} is {spoken} in {file} and {of_other} in {other}; "
                    f"write it with one type in all files{hint}"
                )
    groups: dict[str, Group] = {}
    for file, columns in zip(files, found, strict=True):
        # What is within lists and structs is not cast: Spark reads it as the type that fits all.
        columns = {
            name: Stored(column.name, types[name] if _is_nested(column.type) else column.type, column.to)
            for name, column in columns.items()
        }
        groups.setdefault(repr(columns), Group([], columns)).files.append(file)
    return list(groups.values()), {name: types.get(name, T.StringType()) for name in names}, list(there)


def read_all(files: list[Path]) -> list[pa.Schema]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(read_schema, files))


def read_schema(file: Path) -> pa.Schema:
    """The file's columns. Of times of the old type INT96 the field has the metadata {"int96": ""}, as Spark reads them
    otherwise than other nanoseconds; of UUIDs {"uuid": ""}.

    Raises:
        ValueError: it is no Parquet file, or cut off.
    """
    try:
        footer = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged, cut off, or no Parquet file ({error}); mend it, or leave it out"
        ) from None
    marks: dict[str, dict[str, str]] = {}
    with footer:
        for index in range(len(footer.schema)):
            leaf = footer.schema.column(index)
            mark = "int96" if leaf.physical_type == "INT96" else "uuid" if leaf.logical_type.type == "UUID" else None
            if mark:
                marks |= {name: {mark: ""} for name in (leaf.path, leaf.path.split(".")[0])}
        return pa.schema([field.with_metadata(marks.get(field.name)) for field in footer.schema_arrow])


def _columns(file: Path, schema: pa.Schema, names: list[str]) -> dict[str, Stored]:
    """Of the names the columns that the file has: of this name, or of one that differs in case alone."""
    columns = {}
    for name in names:
        same = [other for other in schema.names if other == name]
        same = same or [other for other in schema.names if other.casefold() == name.casefold() and other not in names]
        if len(same) > 1:
            raise ValueError(f"{file} has {len(same)} columns {json.dumps(name)} ({', '.join(same)}); rename one")
        if not same:
            continue
        field = schema.field(same[0])
        try:
            stored = _stored(field)
        except TypeError as error:
            raise ValueError(
                f"the column {json.dumps(field.name)} of {file} is of type {error}, which is not read; write it as "
                "text or numbers"
            ) from None
        if stored:
            columns[name] = stored
    return columns


def _stored(field: pa.Field) -> Stored | None:
    """None where there is nothing in the column: of type null, as pandas writes what is None throughout.

    Raises:
        TypeError: Spark has no such type; the message is the type.
    """
    type_, marks = _plain(field.type), field.metadata or {}
    if b"uuid" in marks and pa.types.is_fixed_size_binary(type_):
        return Stored(field.name, T.BinaryType(), "uuid")
    if pa.types.is_time(type_):
        return Stored(field.name, T.IntegerType() if type_.bit_width == 32 else T.LongType(), f"time {type_.unit}")
    if pa.types.is_timestamp(type_) and type_.unit == "ns" and b"int96" not in marks:
        return Stored(field.name, T.LongType(), "ns")
    spark_type = _spark_type(type_, b"int96" in marks)
    return spark_type and Stored(field.name, spark_type)


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type that is stored, without what Arrow makes of it: dictionaries and extensions."""
    while isinstance(type_, (pa.BaseExtensionType, pa.DictionaryType)):
        type_ = type_.value_type if isinstance(type_, pa.DictionaryType) else type_.storage_type
    return type_


def _spark_type(type_: pa.DataType, int96: bool) -> T.DataType | None:
    """What Spark reads of a stored type; None of null and of lists of it."""
    type_, is_ = _plain(type_), pa.types
    if is_.is_null(type_):
        return None
    if is_.is_map(type_):
        key, value = (_spark_type(part, int96) for part in (type_.key_type, type_.item_type))
        return key and value and T.MapType(key, value)
    if is_.is_list(type_) or is_.is_large_list(type_) or is_.is_fixed_size_list(type_):
        element = _spark_type(type_.value_type, int96)
        return element and T.ArrayType(element)
    if is_.is_struct(type_):
        fields = [(field.name, _spark_type(field.type, int96)) for field in type_]
        return T.StructType([T.StructField(name, part) for name, part in fields if part]) if any(fields) else None
    if is_.is_timestamp(type_):
        if type_.unit == "ns" and not int96:
            return T.LongType()
        return T.TimestampType() if type_.tz or int96 else T.TimestampNTZType()
    if is_.is_decimal(type_):
        if type_.precision > MAX_DIGITS:
            raise TypeError(type_)
        return T.DecimalType(type_.precision, type_.scale)
    simple = {
        pa.bool_(): T.BooleanType(),
        pa.int8(): T.ByteType(),
        pa.int16(): T.ShortType(),
        pa.int32(): T.IntegerType(),
        pa.int64(): T.LongType(),
        pa.uint8(): T.IntegerType(),
        pa.uint16(): T.IntegerType(),
        pa.uint32(): T.LongType(),
        pa.uint64(): T.DecimalType(20, 0),
        pa.float32(): T.FloatType(),
        pa.float64(): T.DoubleType(),
        pa.date32(): T.DateType(),
        pa.date64(): T.DateType(),
        pa.time32("ms"): T.IntegerType(),
        pa.time64("us"): T.LongType(),
        pa.time64("ns"): T.LongType(),
    }
    if type_ in simple:
        return simple[type_]
    if is_.is_duration(type_):
        return T.LongType()
    if is_.is_string(type_) or is_.is_large_string(type_) or is_.is_string_view(type_):
        return T.StringType()
    if (
        is_.is_binary(type_)
        or is_.is_large_binary(type_)
        or is_.is_binary_view(type_)
        or is_.is_fixed_size_binary(type_)
    ):
        return T.BinaryType()
    raise TypeError(type_)


def wider_type(one: T.DataType, other: T.DataType) -> T.DataType | None:
    """The type that holds what both hold, and says it the same; None if there is none."""
    if one == other:
        return one
    kinds = {type(one), type(other)}
    if kinds <= {T.StringType, T.BinaryType}:
        return T.StringType()
    if kinds == {T.TimestampType, T.TimestampNTZType}:
        return T.TimestampType()
    if kinds == {T.FloatType, T.DoubleType}:
        return T.DoubleType()
    if kinds <= set(_DIGITS):
        return max(one, other, key=lambda type_: _DIGITS[type(type_)])
    if kinds <= {*_DIGITS, T.DecimalType}:
        digits, scales = zip(
            *((_DIGITS.get(type(t)) or t.precision, getattr(t, "scale", 0)) for t in (one, other)), strict=True
        )
        return T.DecimalType(max(digits), scales[0]) if scales[0] == scales[1] else None
    if kinds == {T.ArrayType}:
        element = wider_type(one.elementType, other.elementType)
        return element and T.ArrayType(element)
    if kinds == {T.StructType}:
        return _wider_struct(one, other)
    return None


def _wider_struct(one: T.StructType, other: T.StructType) -> T.StructType | None:
    """With the fields of both."""
    fields = {name: struct[name].dataType for struct in (one, other) for name in struct.names}
    for name in set(one.names) & set(other.names):
        fields[name] = wider_type(one[name].dataType, other[name].dataType)
    return T.StructType([T.StructField(*field) for field in fields.items()]) if all(fields.values()) else None


def _is_nested(type_: T.DataType) -> bool:
    return isinstance(type_, (T.ArrayType, T.MapType, T.StructType))


def _div(column: Column, divisor: int) -> Column:
    """Floored, in integers."""
    return F.call_function("div", column - F.pmod(column, F.lit(divisor)), F.lit(divisor))
