"""Ids, event types and texts of all types and formats, as literal rows."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import functions as F

from etl import values


def found(events, name="item_id"):
    return [row.reason or row[name] for row in events]


# Columns of three rows -> their ids, or why they are none
COLUMNS = [
    (pa.array([31000001.0, float("nan"), None]), ["31000001", None, None]),
    (pa.array([7.5, -3.0, -0.0]), ["is a fraction", "-3", "0"]),
    (pa.array([2.0**53, float("-inf"), 2.0**53 - 1]), ["is a rounded number"] * 2 + ["9007199254740991"]),
    (pa.array([16777215, 16777216, 0.5], pa.float32()), ["16777215", "is a rounded number", "is a fraction"]),
    (pa.array(map(decimal.Decimal, ("7.00", "-7.50", "0")), pa.decimal128(38, 2)), ["7", "is a fraction", "0"]),
    (pa.array([decimal.Decimal("9" * 38), None, decimal.Decimal(7)], pa.decimal128(38, 0)), ["9" * 38, None, "7"]),
    (pa.array([2**64 - 1, 0, None], pa.uint64()), [str(2**64 - 1), "0", None]),
    (pa.array([2**32 - 1, 0, None], pa.uint32()), [str(2**32 - 1), "0", None]),
    (pa.array([-128, 7, None], pa.int8()), ["-128", "7", None]),
    (pa.array([True, False, None]), ["is true or false", "is true or false", None]),
    (pa.array([b"B00", b"\xc3\xa9", None]), ["B00", "\u00e9", None]),
    (pa.array([datetime.date(2024, 1, 31), None, None]), ["2024-01-31", None, None]),
    (pa.array([0, None, 1], pa.timestamp("us", "UTC")), ["is a time", None, "is a time"]),
    (pa.array([0, None, 1], pa.timestamp("us")), ["is a time", None, "is a time"]),
    (pa.array([["i3", "i5"], [], None]), ["is a list", "is a list", None]),
    (pa.array([{"id": 1}, {"id": None}, None]), ["is an object", "is an object", None]),
    (pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int8())), ["is an object", "is an object", None]),
    (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
    (pa.array(["7.0", "2.1", "nan"]), ["7", "2.1", None]),
    (pa.nulls(3), [None] * 3),
]


def test_ids_of_columns_of_all_types(spark, tmp_path):
    columns = {f"c{n}": column for n, (column, _) in enumerate(COLUMNS)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = spark.read.parquet(str(tmp_path / "t.parquet"))
    ids = [
        F.coalesce(
            values.bad_id(F.col(field.name), field.dataType, "id"), values.id_text(F.col(field.name), field.dataType)
        )
        for field in table.schema
    ]
    found = zip(*table.select(*(id_.alias(str(n)) for n, id_ in enumerate(ids))).collect(), strict=True)
    assert [list(of) for of in found] == [[f"id {i}" if i and " " in i else i for i in of] for _, of in COLUMNS]


def test_ids_of_parquet_floats_are_those_of_csv(read):
    log = pa.table({"user_id": [501.0, 502.0, 7.5], "item_id": [31000001.0, float("nan"), 1.0], "timestamp": [1] * 3})
    events, items = read(
        {"log.parquet": log, "items.csv": "item_id,title\n31000001,T\n"},
        "parquet", interactions="log.parquet", items="items.csv", items_format="csv",
    )  # fmt: skip
    assert [(e.user_id, e.item_id) for e in events if not e.reason] == [("501", "31000001")]
    assert [e.reason for e in events] == [None, "no item id", "user id is a fraction"]
    assert items[0].item_id == "31000001"


# As they stand in a field of CSV; the id, or the reason without its "item id".
TEXTS = {
    "7": "7", "7.0": "7", "31000001.000": "31000001", "3.1000001E7": "31000001", "3.1000001e+07": "31000001",
    "2e+3": "2000", "-1.0": "-1", "-0.0": "0", "12345678901234567890.0": "12345678901234567890",
    "1e+16": "is a rounded number", "1.2345678901234568e+19": "is a rounded number",
    # What tools write for a missing value, and what only looks like it.
    "nan": "no", "NaN": "no", "None": "no", "null": "no", "NULL": "no", "<NA>": "no", "#N/A": "no", "\\N": "no",
    "NA": "NA", "none": "none", "none-slip-mat": "none-slip-mat", "nano": "nano", "Null": "Null", "-": "-", "0": "0",
    # Numbers to nobody but a lenient parser
    "007": "007", "007.0": "007.0", "1e5": "1e5", "7e0": "7e0", "12E45": "12E45", "1.2.3": "1.2.3", "7d": "7d",
    "true": "true", "0x1F": "0x1F", "+7": "+7", "10.1000/182": "10.1000/182", "1.": "1.",
    "[new] mat": "[new] mat", "[a": "[a", "{x}": "{x}", "[]]": "[]]",
    "[i3]": "[i3]", "[3]": "is a list", "[]": "is a list", "{}": "is an object",
}  # fmt: skip
FRACTIONS = {"7.5": "is a fraction", "1.10": "is a fraction", "2.5e-01": "is a fraction"}


def spelt(texts):
    return [{"no": "no item id"}.get(id_, f"item id {id_}" if id_.startswith("is ") else id_) for id_ in texts]


def test_ids_of_csv(read):
    texts = TEXTS | FRACTIONS
    events, items = read(
        {"log.csv": "user_id,item_id,timestamp\n" + "".join(f"u,{text},1\n" for text in texts),
         "items.csv": "item_id,title\n" + "".join(f"{text},T\n" for text in texts)},
        "csv", interactions="log.csv", items="items.csv",
    )  # fmt: skip
    assert found(events) == found(items) == spelt(texts.values())


def test_ids_of_json_texts_are_those_of_csv_but_for_fractions(read):
    lines = [json.dumps({"user_id": "u", "item_id": text, "timestamp": 1, "title": "T"}) for text in [*TEXTS, "7.5"]]
    files = {"log.jsonl": "\n".join(lines)}
    events, items = read(files, "jsonl", interactions="log.jsonl", items="log.jsonl")
    assert found(events) == found(items) == spelt([*TEXTS.values(), "7.5"])


# As they stand in a line of JSON
JSON = {
    "7": "7", "7.0": "7", "7e0": "7", "70E-1": "7", "3.1000001E7": "31000001", "12345678901234567890": "1234567890" * 2,
    "1e400": "is a rounded number", "9007199254740993.0": "is a rounded number", "7.5": "is a fraction",
    "NaN": "no", "null": "no", '"None"': "no", "true": "is true or false", "false": "is true or false",
    '"true"': "true", '["i3", "i5"]': "is a list", "[]": "is a list", '{"id": "i3"}': "is an object",
    '"[\\"i3\\"]"': "is a list", '"7.0"': "7", '"\\u00e9?"': "é?", '"\\ud83d\\ude00?"': "😀?",
}  # fmt: skip


def test_ids_of_json_values(read):
    halves = {'"\\ud83d"': "item id not in UTF-8", '"x\\ude00y"': "item id not in UTF-8"}
    lines = [f'{{"user_id": {text}, "item_id": {text}, "timestamp": 1}}' for text in [*JSON, *halves]]
    items = [f'{{"item_id": {text}, "title": "T"}}' for text in [*JSON, *halves]]
    events, catalog = read(
        {"log.jsonl": "\n".join(lines), "items.jsonl": "\n".join(items)},
        "jsonl", interactions="log.jsonl", items="items.jsonl",
    )  # fmt: skip
    expected = [*spelt(JSON.values()), *halves.values()]
    assert found(catalog) == expected
    assert found(events) == [text.replace("item id", "user id") for text in expected]


def test_lists_are_no_ids_in_public_releases_either(read):
    lines = [
        '{"session": [1], "events": [{"aid": 1, "ts": 1, "type": "clicks"}]}',
        '{"session": 1, "events": [{"aid": [1, 2], "ts": 1, "type": "clicks"}, {"aid": 2.0, "ts": 1, "type": ["x"]}]}',
    ]
    events, _ = read({"log.jsonl": "\n".join(lines)}, "otto", interactions="log.jsonl")
    assert found(events) == ["user id is a list", "item id is a list", "event type is a list"]


def test_event_types(read):
    texts = ['"view"', "1", "1.0", "4.5", "NaN", "null", '"nan"', "true", '["view"]', '{"a": 1}', '"[new] view"']
    expected = ["view", "1", "1", "4.5", None, None, None, "true", "event type is a list", "event type is an object"]
    lines = [f'{{"user_id": "u", "item_id": "i", "timestamp": 1, "type": {text}}}' for text in texts]
    damaged = b'\n{"user_id": "u", "item_id": "i", "timestamp": 1, "type": "vi\xebw"}'
    files = {"log.jsonl": "\n".join(lines).encode() + damaged}
    events, _ = read(files, "jsonl", interactions="log.jsonl", event_column="type")
    assert found(events, "event") == [*expected, "[new] view", "event type not in UTF-8"]
    types = {
        "1.parquet": pa.array([1.0, 4.5, float("nan"), None]),
        "2.parquet": pa.array([True, False, None]),
        "3.parquet": pa.array([["view"], None]),
    }
    expected = {"1.parquet": ["1", "4.5", None, None], "2.parquet": ["true", "false", None]}
    for name, column in types.items():
        num = len(column)
        log = pa.table({"user_id": ["u"] * num, "item_id": ["i"] * num, "timestamp": [1] * num, "type": column})
        events, _ = read({name: log}, "parquet", interactions=name, event_column="type")
        assert found(events, "event") == expected.get(name, ["event type is a list", None])


# A title as it stands in the catalog -> its text
TITLES = {
    "[2024] wall calendar with cats": "[2024] wall calendar with cats",
    '["weird al"] greatest hits': '["weird al"] greatest hits',
    "[true] wireless earbuds": "[true] wireless earbuds",
    "['a'], ['b']": "['a'], ['b']",
    '["a"]]': '["a"]]',
    '["a"], "b": ["c"]': '["a"], "b": ["c"]',
    "[1] [2]": "[1] [2]",
    "[sale": "[sale",
    '["red", "green sock"]': "red green sock",
    "['red', 'green'] ": "red green",
    "[3]": "3",
    '{"a": 1} x': '{"a": 1} x',
    "2.0": "2.0",
    "None": "None",
    "nan": "",
}


def test_only_a_text_that_is_a_list_as_a_whole_is_joined(read):
    lines = [json.dumps({"item_id": f"i{n}", "title": title}) for n, title in enumerate(TITLES)]
    lines += ['{"item_id": "x", "title": NaN}', '{"item_id": "x", "title": ["[2024] wall", "b", null]}']
    table = pa.table({"item_id": [f"i{n}" for n in range(len(TITLES))], "title": list(TITLES)})
    log = {"log.csv": "user_id,item_id,timestamp\nu,a,1\n"}
    for name, content in {"items.jsonl": "\n".join(lines), "items.parquet": table}.items():
        _, items = read(
            log | {name: content}, "csv", interactions="log.csv", items=name, items_format=name.rsplit(".")[1]
        )
        assert [row.text for row in items[: len(TITLES)]] == list(TITLES.values())
    numbers = pa.table({"item_id": ["a", "b"], "title": [2024.0, float("nan")], "sizes": [[1.0, 2.5], None]})
    _, texts = read(
        log | {"n.parquet": numbers}, "csv",
        interactions="log.csv", items="n.parquet", items_format="parquet", text_columns="title,sizes",
    )  # fmt: skip
    assert [row.text for row in texts] == ["2024\n1 2.5", ""]
