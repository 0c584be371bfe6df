"""What is read back is what was written, or it is refused by name; a disk without room is one message."""

import errno
import json
import os

import numpy as np
import pytest

from contract import disk

RECORD = {"hybrid": 32.0, "shares": (1, 2), "by_day": {10: "a", 9: None}, "name": "K\u00f6ln", "nan": float("inf")}
READ = {"hybrid": 32.0, "shares": [1, 2], "by_day": {"10": "a", "9": None}, "name": "K\u00f6ln", "nan": float("inf")}


def test_no_flipped_bit_of_a_record_passes(tmp_path):
    file = tmp_path / "record.json"
    disk.write_record(file, RECORD)
    assert disk.read_record(file, "") == READ
    content, refused = file.read_bytes(), 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            read = disk.read_record(file, "run it again")
        except ValueError as error:
            read, told = READ, str(error)
            refused += told.startswith(f"{file} is damaged (") and told.endswith("); run it again")
        assert read == READ  # where it is read, a white space is another one
    assert refused > 0.8 * 8 * len(content)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '"checksum"', "{}", '{"checksum": null}', '{"checksum": 1, "a": 2}']
)
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=r"record.json is damaged \(.*\); run it again"):
        disk.read_record(tmp_path / "record.json", "run it again")


def test_a_record_that_is_not_there_or_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record.json is missing; run it again"):
        disk.read_record(tmp_path / "record.json", "run it again")
    (tmp_path / "record.json").mkdir()
    with pytest.raises(ValueError, match=r"record.json cannot be read: Is a directory; run it again"):
        disk.read_record(tmp_path / "record.json", "run it again")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(7, dtype=np.int64),
        np.zeros(0, np.int32),
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0).reshape(3, 4)[::2, 1:],
        np.array(3.0),
    ],
    ids=["flat", "empty", "rows", "columns", "a view", "a number"],
)
def test_a_saved_array_has_the_bytes_of_numpy(tmp_path, array):
    disk.save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "numpys.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()
    created = disk.create_array(tmp_path / "created.npy", array.dtype, array.shape)
    assert not np.any(created)
    created[...] = array
    created.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "created.npy"), array)


WRITERS = {
    "save_array": lambda file: disk.save_array(file, np.zeros(1000)),
    "create_array": lambda file: disk.create_array(file, np.int64, (1000,)),
    "write_record": lambda file: disk.write_record(file, {"a": "b" * 8000}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_without_room_nothing_is_left_and_the_message_says_all(tmp_path, largest_file, name):
    largest_file(4000)
    file = tmp_path / "some.file"
    message = rf"{file} cannot be written \(8,000 bytes\): File too large; make room, or ask"
    with pytest.raises(ValueError, match=message), disk.writing(file, "ask", 8000):
        WRITERS[name](file)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_from_one_that_may_not_be_written(tmp_path, small_disk):
    with (
        pytest.raises(
            ValueError, match=rf"a.npy cannot be written: No space .*; [\d,]+ bytes are free in {small_disk}; "
        ),
        disk.writing(small_disk, "ask"),
    ):
        disk.save_array(small_disk / "a.npy", np.zeros(1 << 20))
    folder = tmp_path / "folder"
    for error in (errno.EROFS, errno.EACCES, errno.EPERM):
        refused = OSError(error, os.strerror(error), str(folder / "a.npy"))
        assert disk.refusal(refused, folder, "ask") == f"{folder / 'a.npy'} cannot be written: {refused.strerror}; ask"
        assert disk.refuses_writing(refused, folder)
        assert not disk.refuses_writing(OSError(error, "no", str(tmp_path / "log.csv")), folder)  # read, elsewhere
    with pytest.raises(ConnectionResetError), disk.writing(folder, "ask"):
        raise ConnectionResetError(errno.ECONNRESET, "the server is gone")


def test_a_seal_is_of_the_content_whatever_its_order():
    sealed = disk.sealed({"a": 1, "b": [2.5]})
    assert disk.opened(json.loads(json.dumps(dict(reversed(sealed.items()))))) == {"a": 1, "b": [2.5]}
