"""Which files there are, what they are, and what their folders say."""

import gzip
import lzma

import pyarrow as pa
import pytest

from contract.settings import Data
from etl import readers
from etl.files import NULL_KEY


def test_each_file_is_found_once_and_files_of_spark_are_not(tmp_path):
    for name in ("b.csv", "a/1.csv", "a/_SUCCESS", "a/_delta_log/0.json", "a/.1.csv.crc", "c.gz", "d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        magic = {"c.gz": b"\x1f\x8b", "d.parquet": b"PAR1"}.get(name, b"")
        (tmp_path / name).write_bytes(magic + b"12345"[len(magic) :])
    data = Data(format="csv", path=str(tmp_path), interactions=("b.csv", "a", "*/1.csv", "c.gz"))
    found = readers.input_files(data)
    assert found == {"data.interactions": [tmp_path / name for name in ("a/1.csv", "b.csv", "c.gz")], "data.items": []}
    assert readers.input_bytes([*found["data.interactions"], tmp_path / "d.parquet"]) == 5 + 5 + 6 * 5 + 8 * 5


def test_missing_and_empty_files_are_named(read):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv .* data\.interactions"):
        read({}, "csv", interactions="nowhere.csv")
    with pytest.raises(ValueError, match=r"data\.interactions is empty"):
        read({}, "csv")
    with pytest.raises(ValueError, match=r"the log is empty: no bytes in .*log\.csv"):
        read({"log.csv": ""}, "csv", interactions="log.csv")
    with pytest.raises(ValueError, match="with ':' in their names"):
        read({"12:30.csv": "x"}, "csv", interactions="*.csv")


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    for name in ("log/1.csv", "elsewhere/2.csv", "elsewhere/deep/3.csv", "log/_later=1/4.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    links = {
        *(("log/old", "../elsewhere"), ("log/newest", "_later=1"), ("log/again.csv", "1.csv")),
        *(("elsewhere/deep/ring", "../../log"), ("log/here", ".")),
    }
    for link, target in links:
        (tmp_path / link).symlink_to(target)
    data = Data(format="csv", path=str(tmp_path), interactions=("log",))
    names = ["log/1.csv", "log/_later=1/4.csv", "log/old/2.csv", "log/old/deep/3.csv"]
    assert readers.input_files(data)["data.interactions"] == [tmp_path / name for name in names]
    (tmp_path / "log" / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"log/gone is a link to nowhere, which is not there"):
        readers.input_files(data)


@pytest.mark.parametrize("folder", ["data [spring]", "a*b?", "~", "plain"])
def test_a_path_that_is_there_is_no_pattern(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    log = tmp_path / ("home" if folder == "~" else folder) / "log [1]" / "x1.csv"
    log.parent.mkdir(parents=True)
    log.write_text("x")
    path = "~" if folder == "~" else str(tmp_path / folder)
    for name in ("log [1]", "log [1]/x1.csv", "log [1]/x[0-9].csv", "*/x?.csv", "~/log [1]"):
        if name.startswith("~") and folder != "~":
            continue
        data = Data(format="csv", path=path, interactions=(name,))
        assert readers.input_files(data)["data.interactions"] == [log]


@pytest.mark.parametrize(
    ("name", "content", "format_", "message"),
    [("log.csv.gz", b"user_id,item_id\n", "csv", r"named \.gz, but not packed with gzip: rename it to log\.csv"),
     ("log.csv.zst", b"user_id,item_id\n", "csv", "named .zst, but not packed with zstd"),
     ("log.csv", gzip.compress(b"user_id"), "csv", r"packed with gzip, which its name has to say: .* \.\.\.\.gz"),
     ("log.GZ", gzip.compress(b"{}"), "jsonl", "packed with gzip, which its name has to say"),
     ("log.csv.xz", lzma.compress(b"x"), "csv", "packed with xz: unpack it"),
     ("log.csv", b"PK\x03\x04\x14\x00", "csv", "a ZIP archive or an Excel workbook"),
     ("log.csv", b"PAR1\x15\x04PAR1", "csv", "but Parquet: set data.format"),
     ("log.parquet", b"user_id,item_id", "parquet", "no Parquet file .* another file, such as text: set data.format"),
     ("log.parquet", b"", "parquet", "has no bytes, which no Parquet file is"),
     ("log.parquet", b"PAR1 cut", "parquet", "damaged, cut off, or no Parquet file"),
     ("log.csv.gz", gzip.compress(b"user_id,item_id\n" * 9)[:12], "csv", "it is damaged or cut off"),
     ("log.csv.gz", gzip.compress(b""), "csv", "the log is empty"),
     ("_log.csv", b"user_id", "csv", "hidden from Spark by its name")],
)  # fmt: skip
def test_a_file_is_what_it_holds_and_not_its_name(read, tmp_path, name, content, format_, message):
    (tmp_path / name).write_bytes(content)  # as it is: `read` would pack it
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read({}, format_, interactions=name)


def test_packed_files_with_nothing_in_them_are_no_other_header(read, tmp_path):
    (tmp_path / "0.csv.gz").write_bytes(b"")
    content = {"1.csv.gz": "", "2.csv.gz": "\n\nuser_id,item_id,timestamp\nu,a,1\n", "3.csv": "\ufeff\n", "4.csv": "\n"}
    events, _ = read(content, "csv", interactions="*.csv*")
    assert [(e.user_id, e.ts, e.reason) for e in events] == [("u", 1000, None)]


@pytest.mark.parametrize("format_", ["csv", "csv of many lines", "jsonl", "parquet"])
def test_keys_of_folders_are_columns(read, format_):
    format_, _, multiline = format_.partition(" ")
    keys = ["dt=2026-11-01/event=view", "dt=2026-11-01/event=a%20%C3%BC%3Db", f"dt=2026-11-02/event={NULL_KEY}"]
    content = {
        "csv": "user_id,item_id\nu,a\n",
        "jsonl": '{"user_id": "u", "item_id": "a"}\n',
        "parquet": pa.table({"user_id": ["u"], "item_id": ["a"]}),
    }[format_]
    files = {f"{key}/part-0": content for key in keys}
    if format_ == "jsonl":
        files["dt=2026-11-02/event=view/part-1"] = '{"user_id": "u", "item_id": "a", "event": "own"}\n'
    events, _ = read(
        files, format_, split="given", interactions="dt=*", event_column="event", split_column="event",
        time_column="dt", time_unit="iso", multiline="true" if multiline else "false",
    )  # fmt: skip
    day = 1_793_491_200_000
    found = [(day, "a ü=b"), (day, "view"), (day + 86_400_000, None)]
    assert [(e.ts, e.event) for e in events] == found + [(day + 86_400_000, "own")] * (format_ == "jsonl")
    assert {e.reason for e in events} == {"no split, which is train, valid, test"}
