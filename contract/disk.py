"""What passes over a disk: it is there in one piece or not at all, is checked before it is believed, and a disk without
room is one message.

A record is a JSON object in a file that holds its own checksum: of the state of a run, the manifest of an artifact,
and whatever else is read back later. It says the bytes and the sha256 of the files that it speaks of, where there are
any (`fingerprint`), so that with it they are checked as well (`difference`).
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

CHECKSUM = "checksum"  # of a record, in it: sha256 of all the rest
# Of a disk that does not take what is written; the others are of a disk that may not be written to at all.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


def write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:  # as configs are read, whatever the locale
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)
    except OSError:
        remove(temporary)
        raise


def write_record(file: Path, record: dict) -> None:
    """Writes a JSON object with its checksum, in one piece."""
    write_atomically(file, json.dumps(sealed(record), indent=1) + "\n")


def read_record(file: Path, remedy: str) -> dict:
    """What `write_record` was given, with lists for tuples.

    Args:
        remedy: what to do when it is damaged, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not what was written.
    """
    try:
        return opened(json.loads(file.read_bytes().decode()))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{file} is missing; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from None


def sealed(record: dict) -> dict:
    """The record with its checksum."""
    return record | {CHECKSUM: _checksum(record)}


def opened(record: object) -> dict:
    """The record that was sealed, without its checksum. Raises ValueError when it differs, or has none."""
    if not isinstance(record, dict) or CHECKSUM not in record:
        raise ValueError("it has no checksum of itself")
    content = {name: value for name, value in record.items() if name != CHECKSUM}
    if record[CHECKSUM] != _checksum(content):
        raise ValueError("it differs from its checksum")
    return content


def _checksum(record: dict) -> str:
    # Keys that are numbers are texts once they were written, and are sorted as such.
    return hashlib.sha256(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(file: Path) -> dict:
    """{"bytes", "sha256"} of a file, for a record."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def difference(file: Path, expected: dict, max_hashed: int | None = None) -> str:
    """How a file differs from its `fingerprint`, in words after its name; '' when it does not.

    Args:
        max_hashed: bytes; of larger files the size alone is compared.
    """
    try:
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"has {file.stat().st_size} bytes, not {expected['bytes']}"
        if (max_hashed is None or expected["bytes"] <= max_hashed) and sha256(file) != expected["sha256"]:
            return "differs from its checksum"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def save_array(file: Path, array: np.ndarray) -> None:
    """`np.save`, with its place on the disk taken first: where there is no room, not a byte of the array is written.

    Raises:
        OSError: there is no room; no file is left.
    """
    header = _header(np.lib.format.header_data_from_array_1_0(array))
    with _new(file) as stream:
        os.posix_fallocate(stream.fileno(), 0, len(header) + array.nbytes)
        np.save(stream, array)


def create_array(file: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy of zeros, mapped to be written to.

    Its place on the disk is taken before it is mapped: what is written to a mapped hole of a full disk ends the process
    by SIGBUS, without a word.

    Raises:
        OSError: there is no room; no file is left.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = _header({"descr": descr, "fortran_order": False, "shape": shape})
    with _new(file) as stream:
        stream.write(header)
        stream.flush()
        os.posix_fallocate(stream.fileno(), 0, len(header) + np.dtype(dtype).itemsize * math.prod(shape))
    return np.lib.format.open_memmap(file, "r+")


def _header(of_array: dict) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, of_array)
    return stream.getvalue()


@contextlib.contextmanager
def _new(file: Path) -> Iterator[BinaryIO]:
    """A new file, which goes when it cannot be written, and is named by the error."""
    try:
        with file.open("wb") as stream:
            yield stream
    except OSError as error:
        remove(file)
        raise OSError(error.errno, error.strerror or str(error), str(file)) from None


def remove(path: Path) -> None:
    """Removes a file or a folder as far as it is there, whatever becomes of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, remedy: str, num_bytes: int | None = None) -> Iterator[None]:
    """Turns the error of a disk that does not take what is written into one message.

    Args:
        path: what is written: a file, or the folder of several.
        remedy: what to do beside making room, for the message.
        num_bytes: to be written, where that is known.

    Raises:
        ValueError: no room, a quota, or a folder that may not be written.
    """
    try:
        yield
    except OSError as error:
        if not refuses_writing(error, path):
            raise
        raise ValueError(refusal(error, path, remedy, num_bytes)) from None


def refuses_writing(error: OSError, path: Path) -> bool:
    """Whether this is an error of a disk that does not take what is written to `path`, a file or folder, and not one of
    reading something else."""
    return error.errno in _FULL or (error.errno in _REFUSED and str(path) in str(error))


def refusal(error: OSError, path: Path, remedy: str, num_bytes: int | None = None) -> str:
    """The message for such an error."""
    file = Path(os.fsdecode(error.filename)) if error.filename else path
    what = f"{file} cannot be written" + (f" ({num_bytes:,} bytes)" if num_bytes is not None else "")
    if error.errno not in _FULL:
        return f"{what}: {os.strerror(error.errno)}; {remedy}"
    folder = next(folder for folder in (file, *file.parents) if folder.is_dir())
    free = f"; {shutil.disk_usage(folder).free:,} bytes are free in {folder}" if error.errno == errno.ENOSPC else ""
    return f"{what}: {os.strerror(error.errno)}{free}; make room, or {remedy}"


def follow_umask(path: Path) -> None:
    """Gives what was made for its owner alone, as `tempfile` and safetensors do, the mode of any other file."""
    # Asking the system for the umask would change it, also for the files that other threads make meanwhile.
    umask = int(re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1], 8)
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
