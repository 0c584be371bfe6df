"""A disk that is full, or that must not be written, as one message."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# What the system says of a disk, and not of our code.
_TROUBLE = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE")}


@contextlib.contextmanager
def on_disk(folder: Path, remedy: str) -> Iterator[None]:
    """Makes one message of what the system says of a disk that is full, or must not be written.

    Args:
        folder: what is written into, named where the system names no file.
        remedy: what to do about it.

    Raises:
        ValueError: with the path, the reason, the bytes left and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _TROUBLE:
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise ValueError(
            f"{error.filename or folder} cannot be written: {os.strerror(error.errno)} "
            f"({shutil.disk_usage(there).free:,} bytes free in {there}); {remedy}"
        ) from error
