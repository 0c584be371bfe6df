"""Texts in the encodings that people's programs write, and the modes of files."""

import os
import stat

import pytest

from cluster import sites
from contract import config, disk, texts
from eval import items, known

TEXT = "a\nbé\n"
BYTES = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark, Notepad": TEXT.encode("utf-8-sig"),
    "utf-8 with two": b"\xef\xbb\xbf" + TEXT.encode("utf-8-sig"),
    "files with marks put together": b"\xef\xbb\xbfa\n\xef\xbb\xbfb\xc3\xa9\n",
    "utf-16, PowerShell": b"\xff\xfe" + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
    "utf-16, the other order": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "line ends of Windows": TEXT.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("content", BYTES.values(), ids=list(BYTES))
def test_a_text_is_what_its_author_saw(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    assert texts.read_text(tmp_path / "text") == TEXT
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    assert texts.read_text(type(tmp_path)(f"/dev/fd/{reader}")) == TEXT
    os.close(reader)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\xe9\n", "line 2 is not UTF-8; save it as UTF-8"),
        (b"a\n" * 100_000 + b"\xff\n", "line 100001 is not UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        ("a\nb\n".encode("utf-32"), "line 1 holds a NUL character"),
        (b"\xffabc", "line 1 is not UTF-16"),
        (b"\xff\xfea", "line 1 is not UTF-16"),
        (b"PK\x03\x04\x00\x00\n", "line 1 holds a NUL character"),
    ],
)
def test_what_is_no_text_is_said_with_its_line(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts.read_text(tmp_path / "text")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_whatever_a_person_writes_may_begin_with_a_mark(tmp_path, encoding):
    """Configs, profiles, and lists of ids, of items and of users."""
    file = tmp_path / "text.toml"
    file.write_text("seed = 5\nname = 'café'\n", encoding)
    assert (config.load(str(file)).seed, config.load(str(file)).name) == (5, "café")
    file.write_text("account = 'é'\n", encoding)
    assert sites.load(str(file)).account == "é"
    ids = tmp_path / "ids.txt"
    ids.write_text("ä1\n\nb2\u2028c\n", encoding)  # only line feeds end a line
    assert items._read_ids("--only", str(ids)) == ["ä1", "b2\u2028c"]
    assert [found.to_pylist() for found in known._read_ids(ids)] == [["ä1", "b2\u2028c"]]
    table = tmp_path / "ids.csv"
    table.write_text("user_id,age\nä1,7\nb2,8\n", encoding)
    assert [found.to_pylist() for found in known._read_ids(table)] == [["ä1", "b2"]]


def test_what_no_person_can_have_meant_names_the_file(tmp_path):
    for suffix in ("toml", "txt", "csv"):
        (tmp_path / f"x.{suffix}").write_bytes(b"user_id\n\xe9\n")
    with pytest.raises(ValueError, match=r"config .*x\.toml is not valid TOML: line 2 is not UTF-8"):
        config.load(str(tmp_path / "x.toml"))
    with pytest.raises(ValueError, match=r"profile .*x\.toml is not valid TOML: line 2 is not UTF-8"):
        sites.load(str(tmp_path / "x.toml"))
    with pytest.raises(ValueError, match=r"--only .*x\.txt cannot be read: line 2 is not UTF-8"):
        items._read_ids("--only", str(tmp_path / "x.txt"))
    for suffix in ("txt", "csv"):
        with pytest.raises(ValueError, match=rf"--users=.*x\.{suffix} cannot be read: .*UTF-?8"):
            list(known._read_ids(tmp_path / f"x.{suffix}"))


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_a_private_file_or_folder_gets_the_mode_of_others(tmp_path, umask):
    before = os.umask(umask)
    try:
        os.close(os.open(tmp_path / "file", os.O_CREAT, 0o600))
        (tmp_path / "folder").mkdir(0o700)
        (tmp_path / "other file").touch()
        (tmp_path / "other folder").mkdir()
        for kind in ("file", "folder"):
            disk.follow_umask(tmp_path / kind)
            assert stat.S_IMODE((tmp_path / kind).stat().st_mode) == stat.S_IMODE(
                (tmp_path / f"other {kind}").stat().st_mode
            )
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
