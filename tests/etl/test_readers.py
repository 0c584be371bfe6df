import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import config as config_module
from etl import readers


@pytest.fixture
def read(tmp_path, spark):
    """Writes files, reads them with these [data] settings; returns (events, items) as rows in input order."""

    def run(files: dict, format_: str, split: str = "leave_one_out", **data):
        for name, content in files.items():
            path = tmp_path / name
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
            elif name.endswith(".gz"):
                path.write_bytes(gzip.compress(content.encode()))
            else:
                path.write_bytes(content.encode())
        (tmp_path / "c.toml").write_text("")
        settings = {"data.path": str(tmp_path), "data.format": format_, "etl.split": split}
        settings |= {f"data.{key}": value for key, value in data.items()}
        config = config_module.load(str(tmp_path / "c.toml"), settings)
        found = readers.input_files(config.data)
        events = readers.read_events(spark, config, found)
        items = readers.read_items(spark, config.data, found)
        return events.orderBy("order").collect(), items.orderBy("order").collect()

    return run


ITEMS = '{"item_id": "a", "title": "A"}\n'


def test_jsonl_rows_in_input_order_with_reasons(read):
    lines = [
        '{"user_id": 7, "item_id": "a", "timestamp": 1700000000, "type": "view"}',
        '{"user_id": "u", "item_id": " b ", "timestamp": "1700000000.25"}',
        "",
        '{"user_id": "u", "item_id": "a", "timest',
        '[{"user_id": "u", "item_id": "a", "timestamp": 1700000000}]',
        '{"user_id": "u", "item_id": "a", "timestamp": 1700000000} trailing',
        '{"user_id": "", "item_id": "a", "timestamp": 1700000000}',
        '{"user_id": "u", "timestamp": 1700000000}',
        '{"user_id": "u", "item_id": "a"}',
        '{"user_id": "u", "item_id": "a", "timestamp": "yesterday"}',
    ]
    events, _ = read(
        {"2.jsonl": "\n".join(lines), "1.jsonl.gz": lines[0] + "\n", "items.jsonl": ITEMS},
        "jsonl", interactions="*.jsonl.gz,2.jsonl", items="items.jsonl", event_column="type",
    )  # fmt: skip
    good = [(e.user_id, e.item_id, e.ts, e.event) for e in events if e.reason is None]
    assert good == [
        ("7", "a", 1_700_000_000_000, "view"),
        ("7", "a", 1_700_000_000_000, "view"),
        ("u", "b", 1_700_000_000_250, None),
    ]
    assert [(e.reason, e.raw) for e in events if e.reason] == [
        ("not one JSON object", lines[3]),
        ("not one JSON object", lines[4]),
        ("not one JSON object", lines[5]),
        ("no user id", lines[6]),
        ("no item id", lines[7]),
        ("no timestamp", lines[8]),
        ("timestamp not in unit 's'", lines[9]),
    ]


def test_csv_follows_the_header_and_refuses_rows_of_another_width(read):
    content = 'ts,item,user,note\r\n5,"a,1",u,x\r\n6,b,v,y\r\n7,c\r\n8,d,w,x,y\r\n'
    events, items = read(
        {"log.csv": content, "items.csv": "item,title\na,\"say \"\"hi\"\"\"\n"},
        "csv", interactions="log.csv", items="items.csv", time_unit="order",
        user_column="user", item_column="item", time_column="ts",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts, e.reason) for e in events[:2]] == [("u", "a,1", 5, None), ("v", "b", 6, None)]
    assert [(e.reason, e.raw) for e in events[2:]] == [("not 4 CSV fields", "7,c"), ("not 4 CSV fields", "8,d,w,x,y")]
    assert [(i.item_id, i.text) for i in items] == [("a", 'say "hi"')]


def test_csv_files_must_share_the_header_and_hold_the_columns(read):
    items = {"items.csv": "item_id,title\na,A\n"}
    with pytest.raises(ValueError, match=r"header of .*2\.csv is not that of .*1\.csv"):
        read(
            {"1.csv": "user_id,item_id,timestamp\n", "2.csv": "item_id,user_id,timestamp\n", **items},
            "csv", interactions="1.csv,2.csv", items="items.csv",
        )  # fmt: skip
    with pytest.raises(ValueError, match='no column "timestamp"'):
        read({"1.csv": "user_id,item_id\nu,a\n", **items}, "csv", interactions="1.csv", items="items.csv")


def test_parquet_keeps_typed_times(read, tmp_path):
    table = pa.table(
        {
            "user_id": pa.array([1, None], pa.int64()),
            "item_id": ["a", "b"],
            "timestamp": pa.array([1_700_000_000_123, 0], pa.timestamp("ms", tz="UTC")),
        }
    )
    items = pa.table({"item_id": ["a"], "title": ["T"], "tags": [["x", "y"]]})
    events, texts = read(
        {"log.parquet": table, "items.parquet": items},
        "parquet", interactions="log.parquet", items="items.parquet", text_columns="title,tags",
    )  # fmt: skip
    assert (events[0].user_id, events[0].ts, events[0].reason) == ("1", 1_700_000_000_123, None)
    assert (events[1].reason, json.loads(events[1].raw)["item_id"]) == ("no user id", "b")
    assert texts[0].text == "T x y"


@pytest.mark.parametrize(
    ("unit", "text", "ms"),
    [("ms", "1700000000123", 1_700_000_000_123), ("us", "1700000000123456", 1_700_000_000_123),
     ("iso", "2023-11-14T22:13:20Z", 1_700_000_000_000), ("iso", "2023-11-15 00:13:20+02:00", 1_700_000_000_000),
     ("s", "1.7e9", 1_700_000_000_000), ("s", "NaN", None), ("s", "99999999999999999999", None)],
)  # fmt: skip
def test_time_units(spark, unit, text, ms):
    row = spark.createDataFrame([(text,)], "time string")
    time = readers._milliseconds(row["time"], row.schema["time"].dataType, unit)
    assert row.select(time).first()[0] == ms


def test_lists_in_item_texts_are_joined(read):
    lines = '{"item_id": "a", "title": "T", "tags": ["x", "y z"]}\n{"item_id": "b", "title": "[not a list"}\n'
    _, items = read(
        {"log.csv": "user_id,item_id,timestamp\nu,a,1\n", "items.jsonl": lines},
        "csv", interactions="log.csv", items="items.jsonl", items_format="jsonl", text_columns="title,tags",
    )  # fmt: skip
    assert [i.text for i in items] == ["T x y z", "[not a list"]


def test_colarec_release(read):
    files = {
        "train_time_inter.csv": "user_id,item_id,time\n1,10,1396396800\n1,11,\n",
        "valid_inter.csv": "user_id,item_id\n1,12\n",
        "test_inter.csv": "user_id,item_id\n1,13\n",
        "corpus_512.json": json.dumps({"10": {"cid": [1], "content": "title A"}, "99": {"content": "cold"}}, indent=1),
    }
    events, items = read(files, "colarec", split="given")
    by_item = {e.item_id: (e.split, e.ts, e.reason) for e in events}
    assert by_item == {
        "10": (0, 1_396_396_800_000, None),
        "11": (0, None, "no timestamp"),
        "12": (1, None, None),
        "13": (2, None, None),
    }
    assert [(i.item_id, i.text) for i in items] == [("10", "title A"), ("99", "cold")]
    with pytest.raises(ValueError, match=r"etl\.split = 'leave_one_out' with data\.format = 'colarec'"):
        read(files, "colarec", split="leave_one_out")


def test_missing_and_empty_files_are_named(read):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv .* data\.interactions"):
        read({}, "csv", interactions="nowhere.csv", items="items.csv")
    with pytest.raises(ValueError, match=r"data\.items is empty"):
        read({"log.csv": "x"}, "csv", interactions="log.csv")
    with pytest.raises(ValueError, match=r"the log is empty: no bytes in .*log\.csv"):
        read({"log.csv": "", "items.csv": "x"}, "csv", interactions="log.csv", items="items.csv")
