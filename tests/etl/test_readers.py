import dataclasses
import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JJavaError

from contract.settings import Config, Data, Etl
from etl import readers, rows

ITEMS = '{"item_id": "a", "title": "A"}\n'


def test_jsonl_rows_in_input_order_with_reasons(read):
    lines = [
        '{"user_id": 7, "item_id": "a", "timestamp": 1700000000, "type": "view"}',
        '{"user_id": "u", "item_id": " b ", "timestamp": "1700000000.25"}',
        "",
        '{"user_id": "u", "item_id": "a", "timest',
        '[{"user_id": "u", "item_id": "a", "timestamp": 1700000000}]',
        '{"user_id": "u", "item_id": "a", "timestamp": 1700000000} trailing',
        '{"user_id": "u", "item_id": "a", "timestamp": 1}{"user_id": "v", "item_id": "a", "timestamp": 2}',
        '{"user_id": "u", "item_id": "a", "timestamp": 1}, {"user_id": "v", "item_id": "a", "timestamp": 2}',
        '{"user_id": "u", "item_id": "a", "timestamp": 1}] [{"user_id": "v", "item_id": "a", "timestamp": 2}',
        '{"user_id": "u", "item_id": "a", "timestamp": 1}}',
        "null",
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
        *(("not one JSON object", lines[number]) for number in range(3, 11)),
        ("no user id", lines[11]),
        ("no item id", lines[12]),
        ("no timestamp", lines[13]),
        ("timestamp not in unit 's'", lines[14]),
    ]


def test_ids_that_are_not_utf8_are_bad_rows_in_every_format(read):
    line = b'{"user_id": "\xff", "item_id": "a", "timestamp": 1, "note": "x"}\n'
    note = b'{"user_id": "u", "item_id": "\xc3\xa9", "timestamp": 1, "note": "\xff"}\n'
    events, _ = read({"1.jsonl": line + note}, "jsonl", interactions="1.jsonl")
    assert [(e.item_id, e.reason) for e in events] == [("a", "user id not in UTF-8"), ("é", None)]
    assert events[0].raw == line.decode(errors="replace").strip()
    events, _ = read({"1.csv": b"user_id,item_id,timestamp\nu,\xff,1\n"}, "csv", interactions="1.csv")
    assert [e.reason for e in events] == ["item id not in UTF-8"]
    users = pa.array([b"\xff", b"u"]).view(pa.string())
    table = pa.table({"user_id": users, "item_id": ["a", "b"], "timestamp": [1, 1]})
    events, _ = read({"1.parquet": table}, "parquet", interactions="1.parquet")
    assert [e.reason for e in events] == ["user id not in UTF-8", None]


# A name that sorts first for the largest file, so that Spark, which takes large files first, has another order.
@pytest.mark.parametrize(("suffix", "split_files"), [("", True), (".gz", False), (".zst", False)])
def test_order_is_that_of_the_sorted_paths_and_their_lines(spark, tmp_path, suffix, split_files):
    sizes = {"b small [x]{y}": 3, "a ü, %20?": 2000, "c": 900, "d": 1, "e*": 0}
    expected = []
    for name in sorted(sizes):
        lines = [f'{{"user_id": "{name}", "item_id": "{n}", "timestamp": {n}}}\n' for n in range(sizes[name])]
        pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda text: pa.compress(text, "zstd", asbytes=True)}[suffix]
        # In two pieces: compressed files may be put together from several, as Hadoop and pigz do.
        text, half = "".join(lines).encode(), sizes[name] * 20
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(pack(text[:half]) + pack(text[half:]))
        expected += [(name, str(n)) for n in range(sizes[name])]
    data = Data(format="jsonl", path=str(tmp_path), interactions=(f"*.jsonl{suffix}",))
    files = readers.input_files(data)
    _with_small_splits(spark)
    try:
        table = readers.read_events(spark, Config(data=data), files)
        size = readers.granule_bytes(spark)
        assert size == 1000
        assert (table.rdd.getNumPartitions() > 20) == split_files
        events = table.orderBy("order").collect()
    finally:
        _with_default_splits(spark)
    assert [(e.user_id, e.item_id) for e in events] == expected
    assert len({e.order for e in events}) == len(events)
    name_of = pickle.loads(pickle.dumps(readers.file_names(files["data.interactions"], size)))
    assert all(name_of(e.order) == f"{e.user_id}.jsonl{suffix}" for e in events)


def test_order_of_parquet_with_several_row_groups(spark, tmp_path):
    for name, start in (("b", 3000), ("a", 0)):
        ids = list(map(str, range(start, start + 3000)))
        table = pa.table({"user_id": ids, "item_id": ids, "timestamp": range(start, start + 3000)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=100)
    data = Data(format="parquet", path=str(tmp_path), interactions=("*.parquet",))
    _with_small_splits(spark)
    try:
        table = readers.read_events(spark, Config(data=data), readers.input_files(data))
        assert table.rdd.getNumPartitions() > 20
        events = table.orderBy("order").collect()
    finally:
        _with_default_splits(spark)
    assert [int(e.user_id) for e in events] == list(range(6000))


def _with_small_splits(spark):
    spark.conf.set("spark.sql.files.maxPartitionBytes", "3000b")
    spark.conf.set("spark.sql.files.openCostInBytes", "1000b")


def _with_default_splits(spark):
    spark.conf.unset("spark.sql.files.maxPartitionBytes")
    spark.conf.unset("spark.sql.files.openCostInBytes")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_file_is_an_error_that_names_it(read, tmp_path, suffix):
    lines = "".join(f'{{"user_id": "u{n}", "item_id": "a", "timestamp": {n * n}}}\n' for n in range(5000))
    name = f"log.jsonl.{suffix}"
    events, _ = read({name: lines}, "jsonl", interactions=name)
    assert len(events) == 5000
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(Py4JJavaError, match=rf"while reading file .*{name}"):
        read({}, "jsonl", interactions=name)


def test_csv_follows_the_header_and_refuses_rows_of_another_width(read):
    content = '\ufeffts,item,user,\r\n5,"a,1",u,x\r\n6,b,v,y\r\n7,c\r\n8,d,w,x,y\r\n'
    events, items = read(
        {"1.csv": content, "2.csv": "", "items.csv": "item,title\na,\"say \"\"hi\"\"\"\n"},
        "csv", interactions="1.csv,2.csv", items="items.csv", time_unit="order",
        user_column="user", item_column="item", time_column="ts",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts, e.reason) for e in events[:2]] == [("u", "a,1", 5, None), ("v", "b", 6, None)]
    assert [(e.reason, e.raw) for e in events[2:]] == [("not 4 CSV fields", "7,c"), ("not 4 CSV fields", "8,d,w,x,y")]
    assert [(i.item_id, i.text) for i in items] == [("a", 'say "hi"')]


def test_csv_with_tabs_and_with_line_breaks_in_quotes(read):
    log = "user_id\titem_id\ttimestamp\nu\ta,1\t5\n"
    catalog = 'item_id,title\na,"two\nlines"\nb,x,y\n,"no\nid"\nc,\n'
    events, items = read(
        {"log.tsv": log, "items.tsv": catalog.replace(",", "\t")}, "csv",
        interactions="log.tsv", items="items.tsv", delimiter="\t", multiline="true",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts, e.reason) for e in events] == [("u", "a,1", 5000, None)]
    assert [(i.item_id, i.text) for i in items if i.reason is None] == [("a", "two\nlines"), ("c", "")]
    assert [(i.reason, i.raw) for i in items if i.reason] == [
        ("not 2 CSV fields", "b\tx\ty"),
        ("no item id", '{"title":"no\\nid"}'),
    ]


def test_csv_files_must_share_the_header_and_hold_the_columns(read):
    with pytest.raises(ValueError, match=r"header of .*2\.csv\.gz \(item_id,.*\) is not that of .*1\.csv"):
        read(
            {"1.csv": "user_id,item_id,timestamp\n", "2.csv.gz": "item_id,user_id,timestamp\n"},
            "csv", interactions="1.csv,2.csv.gz",
        )  # fmt: skip
    with pytest.raises(ValueError, match='no column "timestamp"'):
        read({"1.csv": "user_id,item_id\nu,a\n"}, "csv", interactions="1.csv")


def test_parquet_keeps_typed_times(read):
    table = pa.table(
        {
            "user_id": pa.array([1, None], pa.int64()),
            "item_id": ["a", "b"],
            "timestamp": pa.array([1_700_000_000_123, 0], pa.timestamp("ms", tz="UTC")),
        }
    )
    items = pa.table({"item_id": ["a"], "title": ["T"], "tags": [["x", "y"]], "sizes": [[1, 2]]})
    events, texts = read(
        {"log.parquet": table, "items.parquet": items},
        "parquet", interactions="log.parquet", items="items.parquet", text_columns="title,tags,sizes",
    )  # fmt: skip
    assert (events[0].user_id, events[0].ts, events[0].reason) == ("1", 1_700_000_000_123, None)
    assert (events[1].reason, json.loads(events[1].raw)["item_id"]) == ("no user id", "b")
    assert texts[0].text == "T\nx y\n1 2"


@pytest.mark.parametrize(
    ("unit", "text", "ms"),
    [("ms", "1700000000123", 1_700_000_000_123), ("us", "1700000000123456", 1_700_000_000_123),
     ("iso", "2023-11-14T22:13:20Z", 1_700_000_000_000), ("iso", "2023-11-15 00:13:20+02:00", 1_700_000_000_000),
     ("iso", "12:30:00", None), ("iso", "T10:00", None),
     ("s", "1.7e9", 1_700_000_000_000), ("s", "NaN", None), ("s", "99999999999999999999", None)],
)  # fmt: skip
def test_time_units(spark, unit, text, ms):
    row = spark.createDataFrame([(text,)], "time string")
    time = rows.milliseconds(row["time"], row.schema["time"].dataType, unit)
    assert row.select(time).first()[0] == ms


def test_item_texts_join_lists_and_leave_out_what_is_empty(read):
    lines = [
        '{"item_id": "a", "title": "T", "tags": ["x", "y z"]}',
        '{"item_id": "b", "title": "[not a list"}',
        '{"item_id": "c", "title": "", "tags": "z"}',
    ]
    _, items = read(
        {"log.csv": "user_id,item_id,timestamp\nu,a,1\n", "items.jsonl.zst": "\n".join(lines)},
        "csv", interactions="log.csv", items="items.jsonl.zst", items_format="jsonl", text_columns="title,tags",
    )  # fmt: skip
    assert [i.text for i in items] == ["T\nx y z", "[not a list", "z"]


# The last character of the Shift JIS ends with the byte of "|".
ENCODED = {
    "latin-1": "Caf\u00e9 \u00fc",
    "cp1252": "\u20ac5 \u201cMat\u201d",
    "shift_jis": "\u732b \u30dd",
    "UTF8": "\u732b \u00e9",
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("multiline", ["false", "true"])
def test_texts_in_other_encodings(read, encoding, multiline):
    text = ENCODED[encoding]
    title = f'{text}\n"{text}"' if multiline == "true" else text
    between = "," if multiline == "true" else "|"
    catalog = f'item_id{between}{text}\n{text}{between}"{title.replace(chr(34), chr(34) * 2)}"\n'
    line = json.dumps({"user_id": text, "item_id": text, "timestamp": 1}, ensure_ascii=False)
    events, items = read(
        {"log.jsonl": line.encode(encoding), "items.csv": catalog.encode(encoding)}, "jsonl",
        interactions="log.jsonl", items="items.csv", items_format="csv", text_columns=text, delimiter=between,
        multiline=multiline, encoding=encoding,
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.reason) for e in events] == [(text, text, None)]
    assert [(i.item_id, i.text, i.reason) for i in items] == [(text, title, None)]


def test_what_cannot_be_decoded_is_a_replacement_character_in_every_format(read):
    damaged = b"item_id,title\na,caf\xe9\nb,x\n"
    log = {"log.csv": "user_id,item_id,timestamp\nu,a,1\n"}
    table = pa.table({"item_id": ["a"], "title": pa.array([b"caf\xe9"]).view(pa.string())})
    contents = {
        "1.csv": damaged, "2.csv": damaged, "3.csv": damaged.replace(b"\xe9", b"\x81"),
        "4.jsonl": b'{"item_id": "a", "title": "caf\xe9"}', "5.parquet": table,
    }  # fmt: skip
    settings = {"2.csv": {"multiline": "true"}, "3.csv": {"encoding": "cp1252"}}
    for name, content in contents.items():
        _, items = read(
            log | {name: content}, "csv",
            interactions="log.csv", items=name, items_format=name.split(".")[1], **settings.get(name, {}),
        )  # fmt: skip
        assert (items[0].text, items[0].reason) == ("caf\ufffd", None)


def test_utf_16_is_refused_with_the_remedy(read):
    message = r"log is not text, or in UTF-16; convert it first: iconv -f UTF-16"
    for format_, text in {"csv": "user_id,item_id,timestamp\nu,a,1\n", "jsonl": '{"user_id": "u"}\n'}.items():
        with pytest.raises(ValueError, match=message):
            read({"log": text.encode("utf-16")}, format_, interactions="log")


def test_a_csv_text_that_goes_on_in_the_next_line_is_not_cut(read):
    log = "user_id,item_id,timestamp\nu,a,1\n"
    catalog = 'item_id,title\na,"two\nlines"\nb,5" nails\nc,"Weird" Al\nd,"a ""b"", c"\n'
    _, items = read({"log.csv": log, "items.csv": catalog}, "csv", interactions="log.csv", items="items.csv")
    assert [(i.text, i.reason) for i in items] == [
        ("two", "a quote that is not closed (data.multiline)"), ("", "not 2 CSV fields"),
        ('5" nails', None), ('"Weird" Al', None), ('a "b", c', None),
    ]  # fmt: skip


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_a_given_split_is_read_from_its_column(read, format_):
    columns = {"user_id": list("uuuu"), "item_id": list("abcd"), "timestamp": [1, 2, 3, 4]}
    columns["part"] = ["train", "valid", " test ", "dev"]
    lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    content = {
        "csv": "\n".join([",".join(columns), *(",".join(map(str, line.values())) for line in lines)]),
        "jsonl": "\n".join(map(json.dumps, lines)),
        "parquet": pa.table(columns),
    }
    log = {"log": content[format_]}
    events, _ = read(log, format_, split="given", interactions="log", split_column="part")
    assert [e.split for e in events] == [0, 1, 2, None]
    assert [e.reason for e in events] == [None, None, None, "no split, which is train, valid, test"]
    events, _ = read(log, format_, interactions="log", split_column="part")
    assert [(e.split, e.reason) for e in events] == [(None, None)] * 4


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [({"format": "csv"}, "given", "set data.split_column"),
     ({"format": "otto", "split_column": "part"}, "given", "set data.split_column"),
     ({"format": "colarec"}, "leave_one_out", "'leave_one_out' with data.format = 'colarec'"),
     ({"format": "colarec"}, "temporal", "'temporal' with data.format = 'colarec'")],
)  # fmt: skip
def test_splits_that_the_input_cannot_give_are_refused(spark, settings, split, message):
    config = Config(data=Data(**settings), etl=dataclasses.replace(Etl(), split=split))
    with pytest.raises(ValueError, match=message):
        readers.read_events(spark, config, {"data.interactions": []})


def test_a_log_needs_no_catalog(read):
    _, items = read({"log.csv": "user_id,item_id,timestamp\nu,a,1\n"}, "csv", interactions="log.csv")
    assert items == []
    with pytest.raises(ValueError, match="'otto' has no item texts"):
        read({"log": "x", "items": "y"}, "otto", interactions="log", items="items")


def test_more_granules_than_an_order_can_number_are_refused(tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(b"x" * 9)
    monkeypatch.setattr(rows, "MAX_GRANULES", 8)
    assert rows.first_granules([tmp_path / "log"], 2) == [0]
    with pytest.raises(ValueError, match="9 granules of 1 bytes"):
        rows.first_granules([tmp_path / "log"], 1)


# --- Parquet of several writers ---


# --- which files there are, and what they are ---


def test_nanoseconds_are_divided_in_integers(spark):
    texts = ["1700000000123000000", "1700000000999999999", "1.7e18", None]
    table = spark.createDataFrame([(text,) for text in texts], "time string")
    column = rows.milliseconds(table["time"], table.schema["time"].dataType, "ns")
    found = [row[0] for row in table.select(column).collect()]
    assert found == [1_700_000_000_123, 1_700_000_000_999, 1_700_000_000_000, None]
