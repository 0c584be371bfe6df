"""What a value of the input is as an id, an event type or a text, whatever the format and the type that it came in.

An id is a text, and the log and the catalog, which may differ in format and types, must spell it alike:

- A whole number is its digits: 7 (any type), 7.0 (of floats and decimals, or as text, which is what pandas makes of
  integers with a gap), 7e0 in JSON, 3.1000001E7 and 3.1000001e+07 as text (as Java and Python print floats).
- A number with a fraction is no id, nor is a float so large that ids next to each other are one float. A text that
  reads as a fraction is a number in CSV, which knows no types; in JSON and Parquet it is a text ("2.1", a version).
- `MISSING` are the texts that tools write where there is no value. Nothing else is: "NA", "none", "-" and "0" are ids.
- Lists, objects, truth values and points in time are no ids.
- Anything else is an id as it is written: "007", "1e5", "none-slip-mat".
"""

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql import types as T

# What pandas, NumPy, Python, Spark, JavaScript, SQL dumps and spreadsheets write for a missing value, in their
# spelling. The last is how Spark's JSON reader gives a NaN.
MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>", "#N/A", "\\N", '"NaN"')
NO_TEXT = ("nan", "NaN", "<NA>", '"NaN"')  # a title may well be "None"

# Floats have no id beyond: 2^53 and 2^53 + 1 are one double, 2^24 and 2^24 + 1 one float.
MAX_DOUBLE, MAX_FLOAT = 1 << 53, 1 << 24

# No leading zeros, which numbers do not have; an exponent only after a point or before a sign: hex ids have neither.
_DECIMAL = r"^-?(?:(?:0|[1-9][0-9]*)\.[0-9]+(?:[eE][+-]?[0-9]+)?|[1-9][eE]\+[0-9]+)$"
_POINT_ZERO = r"\.0+$"
_FLOATS = (T.FloatType, T.DoubleType)
_INFINITE = ('"Infinity"', '"-Infinity"')  # as Spark's JSON reader gives them

REPLACEMENT = "\ufffd"  # what decoders put in the place of bytes that they cannot decode
_END = "_end_of_text"


def id_text(value: Column, type_: T.DataType) -> Column:
    """The id as a text, null where it is missing; what is no id (`bad_id`) has some text."""
    if isinstance(type_, _FLOATS):
        return _whole_float(value)
    if isinstance(type_, T.DecimalType):
        return value.try_cast(T.DecimalType(38, 0)).cast("string")
    if isinstance(type_, T.StringType):
        text = F.trim(value)
        return F.when(~text.isin(*MISSING), _whole_text(text))
    return F.trim(value.cast("string"))


def bad_id(value: Column, type_: T.DataType, what: str) -> Column:
    """Why the value is no id of a `what` ("item id"), null where it is one or is missing."""
    if isinstance(type_, _FLOATS):
        limit = MAX_FLOAT if isinstance(type_, T.FloatType) else MAX_DOUBLE
        is_number = value.isNotNull() & ~F.isnan(value)
        rounded = F.when(is_number & (F.abs(value) >= limit), F.lit(f"{what} is a rounded number"))
        return rounded.when(is_number & ~_is_whole(value), F.lit(f"{what} is a fraction"))
    if isinstance(type_, T.DecimalType):
        return F.when(~_is_whole(value), F.lit(f"{what} is a fraction"))
    if isinstance(type_, T.StringType):
        text = F.trim(value)
        too_large = text.rlike("[eE]") & text.rlike(_DECIMAL) & (F.abs(text.try_cast("double")) >= MAX_DOUBLE)
        rounded = F.when(too_large | text.isin(*_INFINITE), F.lit(f"{what} is a rounded number"))
        return F.coalesce(rounded, bad_text(text, what))
    kinds = {
        T.ArrayType: "a list", T.StructType: "an object", T.MapType: "an object", T.VariantType: "an object",
        T.BooleanType: "true or false", T.TimestampType: "a time", T.TimestampNTZType: "a time",
    }  # fmt: skip
    kind = next((kind for class_, kind in kinds.items() if isinstance(type_, class_)), None)
    return F.when(value.isNotNull(), F.lit(f"{what} is {kind}")) if kind else F.lit(None).cast("string")


def bad_text(text: Column, what: str) -> Column:
    """A reason where the text is as a whole a list or an object in JSON."""
    is_list = text.startswith("[") & _whole(text, "array<string>").isNotNull()
    is_object = text.startswith("{") & _whole(text, "map<string,string>").isNotNull()
    return F.when(is_list, F.lit(f"{what} is a list")).when(is_object, F.lit(f"{what} is an object"))


def bad_csv_id(text: Column, what: str) -> Column:
    """A reason where a field of CSV, which knows no types, is a number with a fraction."""
    text = F.trim(text)
    number = text.try_cast("double")
    is_fraction = text.rlike(_DECIMAL) & ~text.rlike(_POINT_ZERO) & ~_is_whole(number)
    return F.when(is_fraction, F.lit(f"{what} is a fraction"))


def bad_json_id(text: Column, line: Column, name: str, what: str) -> Column:
    """A reason where the field `name` of a JSON line, whose text is `text`, is no string and no whole number.

    The text does not tell 1.5 from "1.5"; the line is read for it again, where the text leaves a doubt.
    """
    # Half of a surrogate pair, an escape such as \\ud83d, is a question mark in Spark's strings, and no variant.
    halved = text.contains("?") & line.rlike(r"\\u[dD][89a-fA-F]")
    schema = T.StructType([T.StructField(name, T.VariantType())])
    doubtful = text.rlike(_DECIMAL) | text.isin("true", "false") | halved
    kind = F.when(doubtful, F.schema_of_variant(F.from_json(line, schema)[name]))
    reason = F.when(kind == "BOOLEAN", F.lit(f"{what} is true or false"))
    reason = reason.when(kind.rlike("^(?:DECIMAL|DOUBLE|FLOAT)"), bad_csv_id(text, what))
    return reason.when(halved & kind.isNull(), F.lit(f"{what} not in UTF-8"))


def event_text(value: Column, type_: T.DataType) -> Column:
    """The event type: whole numbers as an id's, fractions (of a rating) as they are; null where it is missing."""
    if isinstance(type_, (*_FLOATS, T.DecimalType)):
        text = value.cast("string")
        return F.when(~text.isin(*MISSING), F.when(_is_whole(value), id_text(value, type_)).otherwise(text))
    if isinstance(type_, T.StringType):
        return F.when(~value.isin(*MISSING), _whole_text(value))
    return value.cast("string")


def plain_text(value: Column, type_: T.DataType) -> Column:
    """A text of any value; the elements of a list are joined with spaces, also of a list that a text is in JSON.

    Whole numbers of floats are their digits; a NaN is no text.
    """
    if isinstance(type_, T.ArrayType) and isinstance(type_.elementType, _FLOATS):
        return F.array_join(F.transform(value, lambda element: plain_text(element, type_.elementType)), " ")
    if isinstance(type_, T.ArrayType):
        return F.array_join(value.cast("array<string>"), " ")
    if isinstance(type_, _FLOATS):
        whole = F.when(_is_whole(value) & (F.abs(value) < MAX_DOUBLE), _whole_float(value))
        return F.when(~F.isnan(value), F.coalesce(whole, value.cast("string")))
    text = value.cast("string")
    listed = F.coalesce(F.array_join(_whole(text, "array<string>"), " "), text)
    return F.when(text.startswith("["), listed).when(~text.isin(*NO_TEXT), text)


def _whole(text: Column, type_: str) -> Column:
    """The list (array<string>) or object (map<string,string>) that the text is as a whole in JSON, else null.

    from_json reads the first value of a text and does not look at what follows, so that "[2024] calendar" would be a
    list. As an element of an enclosing list, before another, the value is read to its end.
    """
    is_list = type_.startswith("array")
    end = f'["{_END}"]' if is_list else f'{{"{_END}":""}}'
    values = F.from_json(F.concat(F.lit("["), text, F.lit(f",{end}]")), f"array<{type_}>")
    value, last = F.get(values, F.lit(0)), F.get(values, F.lit(1))
    return F.when((F.size(values) == 2) & (F.array_contains if is_list else F.map_contains_key)(last, _END), value)


def _is_whole(number: Column) -> Column:
    """Not by floor, which overflows beyond 64 bits."""
    return number % 1 == 0


def _whole_float(value: Column) -> Column:
    return F.when(~F.isnan(value), value.try_cast("long").cast("string"))


def _whole_text(text: Column) -> Column:
    number = text.try_cast("double")
    # The digits themselves where they are there: a decimal may have more than a double holds.
    digits = F.when(text.rlike(_POINT_ZERO), F.substring_index(text, ".", 1))
    exact = _is_whole(number) & (F.abs(number) < MAX_DOUBLE)
    digits = digits.when(exact, number.try_cast("long").cast("string"))
    whole = F.when(digits == "-0", F.lit("0")).otherwise(digits)
    return F.when(text.rlike(_DECIMAL), F.coalesce(whole, text)).otherwise(text)
