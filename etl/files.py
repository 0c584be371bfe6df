"""The files of the input: which there are, what they are by their content, and what their folders say of them."""

import codecs
import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa

Result = TypeVar("Result")

# What a file is, by its first bytes.
_MAGIC = {
    b"PAR1": "parquet",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"ORC": "orc",
    b"Obj\x01": "avro",
    b"ARROW1\x00\x00": "arrow",
    b"SQLite format 3\x00": "sqlite",
    b"\xd0\xcf\x11\xe0": "excel",
}
# The packed text that is read, with the ending by which Spark knows it.
PACKED = {"gzip": ".gz", "zstd": ".zst", "bzip2": ".bz2"}
# Bytes of plain text in a byte of a file. An estimate: JSON logs pack to a fifth or a tenth.
_TEXT_BYTES = {"gzip": 6, "zstd": 6, "bzip2": 8, "parquet": 8}
NULL_KEY = "__HIVE_DEFAULT_PARTITION__"


# --- which files ---


def absolute(base: str, name: str) -> str:
    """A path or pattern of the settings as an absolute one: relative to `base`; `~` is the home folder."""
    base = os.path.abspath(os.path.expanduser(base))
    path = os.path.join(base, name)
    return path if os.path.lexists(path) else os.path.join(base, os.path.expanduser(name))


def matches(pattern: str) -> list[str]:
    """What a path stands for: itself where it is there as it is written, else what it matches as a pattern.

    Of a pattern the first folders are taken literally as far as they are there.
    """
    if os.path.lexists(pattern):
        return [pattern]
    literal = os.path.dirname(pattern)
    while not os.path.lexists(literal):
        literal = os.path.dirname(literal)
    found = glob.glob(glob.escape(literal) + pattern[len(literal) :], recursive=True)
    return found or glob.glob(pattern, recursive=True)


def expand(pattern: str) -> list[Path]:
    """The files that a path or pattern stands for, of a folder all in it; links are followed, wherever they lead.

    Raises:
        FileNotFoundError: there are none, or a link leads to nothing.
        ValueError: a folder cannot be read, or something is neither file nor folder.
    """
    found: list[Path] = []
    hidden: list[Path] = []
    for path in map(Path, matches(pattern)):
        if path.is_dir():
            found += _files_in(path)
        elif _is_hidden(path.name):
            hidden.append(path)
        else:
            _check_there(path)
            found.append(path)
    if hidden and not found:
        raise FileNotFoundError(f"{hidden[0]} is hidden from Spark by its name, as _SUCCESS is; rename it")
    return found


def once(files: Iterable[Path]) -> list[Path]:
    """Each file once, sorted by path; one that several paths lead to by that with the fewest links."""
    paths: dict[str, list[Path]] = {}
    for file in sorted(set(files)):
        paths.setdefault(os.path.realpath(file), []).append(file)
    return sorted(same[0] if len(same) == 1 else min(same, key=_num_links) for same in paths.values())


def _num_links(path: Path) -> int:
    return sum(part.is_symlink() for part in (path, *path.parents))


def _files_in(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """`above`: the real paths of the folders around this one; a link to one of them is a ring."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be read: {error.strerror}; make it readable") from None
    for path in (folder / name for name in names if not _is_hidden(name)):
        if path.is_dir():
            yield from _files_in(path, (*above, real))
        else:
            _check_there(path)
            yield path


def _check_there(path: Path) -> None:
    if path.is_file():
        return
    if path.is_symlink():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it")
    raise ValueError(f"{path} is neither a file nor a folder; leave it out of the input")


def _is_hidden(name: str) -> bool:
    """Spark's own rule: _SUCCESS, _delta_log, .part-0.crc are no data, a partition _key=value is."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


# --- what they are ---


def kind_of(file: Path) -> str:
    """A value of _MAGIC, 'empty', or 'text' for all else."""
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; make it readable, or leave it out") from None
    if not head:
        return "empty"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "text")


def check_format(file: Path, format_: str) -> None:
    """Raises ValueError when the content is none of the format, or the name says another one to Spark."""
    kind, ending = kind_of(file), file.suffix
    if format_ in ("parquet", "tencentgr"):
        if kind == "empty":
            raise ValueError(f"{file} has no bytes, which no Parquet file is: cut off? mend it, or leave it out")
        if kind != "parquet":
            raise ValueError(f"{file} is no Parquet file (data.format = {format_!r}), but {_spoken(kind)}")
    elif kind in PACKED:
        if ending != PACKED[kind]:
            raise ValueError(f"{file} is packed with {kind}, which its name has to say: rename it to ...{PACKED[kind]}")
    elif kind not in ("text", "empty"):
        raise ValueError(f"{file} is no text (data.format = {format_!r}), but {_spoken(kind)}")
    elif kind == "text" and ending in PACKED.values():
        packer = next(packer for packer, of_it in PACKED.items() if of_it == ending)
        raise ValueError(f"{file} is named {ending}, but not packed with {packer}: rename it to {file.stem}")


def _spoken(kind: str) -> str:
    remedy = {
        "text": "another file, such as text: set data.format, or data.items_format, to what it is",
        "parquet": "Parquet: set data.format, or data.items_format, to 'parquet'",
        "zip": "a ZIP archive or an Excel workbook: unpack it, or save it as CSV",
        "excel": "an Excel workbook: save it as CSV",
    }
    packed = f"packed with {kind}: unpack it, or pack text with gzip or zstd"
    return remedy.get(kind) or (packed if kind in (*PACKED, "xz", "lz4", "7z") else f"{kind}: convert it")


def is_empty(file: Path) -> bool:
    """Whether there is nothing in the file, or nothing packed in it."""
    kind = kind_of(file)
    return kind == "empty" or (kind in PACKED and not _unpacked(file, lambda stream: stream.read(1)))


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def first_line(file: Path, encoding: str = "utf-8") -> str:
    """The first line of a text file that is not blank, without its end and a byte order mark; "" if there is none.

    Raises:
        ValueError: the file is packed and damaged.
    """

    codec = "utf-8-sig" if is_utf8(encoding) else encoding

    def read(stream: pa.NativeFile) -> str:
        with io.TextIOWrapper(stream, codec, errors="replace") as text:
            return next((line.rstrip("\r\n") for line in text if line.strip()), "")

    return _unpacked(file, read)


def _unpacked(file: Path, read: Callable[[pa.NativeFile], Result]) -> Result:
    # pyarrow's names of the packers are ours but for one.
    packer = {"gzip": "gzip", "zstd": "zstd", "bzip2": "bz2"}.get(kind_of(file))
    try:
        with pa.input_stream(str(file), compression=packer) as stream:
            return read(stream)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged or cut off ({error}); mend it, or leave it out"
        ) from None


def text_bytes(file: Path) -> int:
    """About how many bytes the file would have as plain text."""
    return file.stat().st_size * _TEXT_BYTES.get(kind_of(file), 1)


# --- what their folders say ---


def folder_keys(file: Path) -> dict[str, str | None]:
    """{key: value} of the folders named key=value around a file, as Hive and Spark write partitions."""
    pairs = (part.partition("=") for part in file.parts[:-1] if "=" in part)
    return {unquote(key): None if value == NULL_KEY else unquote(value) for key, _, value in pairs if key}
