"""Texts that a person wrote, with whatever program."""

import io
from collections.abc import Iterator
from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"


def encoding(raw: io.BufferedReader) -> str:
    """Of a text that a person wrote; takes nothing from the stream.

    UTF-8, with the byte order mark that Windows' editors write or without; UTF-16 where its mark is there, as in what
    PowerShell's `>` writes.
    """
    # 0xfe and 0xff begin no UTF-8 character. The codec goes by the mark, and refuses what has none.
    return "utf-16" if raw.peek(1)[:1] in (b"\xff", b"\xfe") else "utf-8"


def lines(file: Path) -> Iterator[str]:
    """The lines of a text that a person wrote, with their ends as "\\n", one by one: it may be large, or a pipe.

    Raises:
        ValueError: it is not a text in an `encoding` that is known. The message does not name the file.
    """
    number = 0
    with file.open("rb") as raw, io.TextIOWrapper(raw, encoding(raw)) as text:
        try:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise ValueError(f"line {number} holds a NUL character, which no text does; save it as UTF-8")
                # Not only at the beginning: files with marks are put together as they are.
                yield line.lstrip(BYTE_ORDER_MARK)
        except UnicodeError as error:
            # The block that cannot be decoded begins in the line after the last one.
            before = error.object[: error.start].count(b"\n") if isinstance(error, UnicodeDecodeError) else 0
            raise ValueError(f"line {number + before + 1} is not {text.encoding.upper()}; save it as UTF-8") from None


def read_text(file: Path) -> str:
    """The whole of a text that a person wrote. Raises as `lines` does."""
    return "".join(lines(file))
