"""The users of a corpus: who is asked for, and everything that is known of them. Nothing grows with the log but the
reading."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from contract import disk, texts
from contract.schema import Ragged
from eval.parts import OTHER_OUT
from trainer.samples import Block

IDS_AT_ONCE = 1 << 22  # looked up in one pass over users.parquet
ID_CHARS = 80  # of an id that is told
_COLUMNS = ["user_idx", "item_idx", "ts", "event"]


@dataclass(frozen=True)
class Asked:
    """The users of a file."""

    user_idx: np.ndarray  # int64, ascending, each once
    num_ids: int  # of the file, repeated ones and unknown ones included
    num_unknown: int
    first_unknown: tuple[str, ...]  # their first ID_CHARS characters


def find_users(corpus: Path, num_users: int, file: Path, unknown_file: Path) -> Asked:
    """Looks the ids of a file up; those that corpus/ does not have are written to `unknown_file`, one a line.

    Args:
        file: a user_id per line, or .csv or .parquet with a column user_id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds no ids, or none that corpus/ has; there is no room for the unknown ones.
    """
    users = pads.dataset(corpus / "users.parquet", format="parquet")
    asked, num_ids, num_unknown, first = np.zeros(num_users + 1, bool), 0, 0, []
    unknown_file.unlink(missing_ok=True)
    for ids in _read_ids(file):
        found = users.to_table(["user_idx", "user_id"], filter=pads.field("user_id").isin(ids))
        asked[found["user_idx"].to_numpy()] = True
        unknown = ids.filter(pc.invert(pc.is_in(ids, value_set=found["user_id"]))).to_pylist()
        if unknown:
            _append(unknown_file, unknown)
        num_ids, num_unknown, first = num_ids + len(ids), num_unknown + len(unknown), (first + unknown)[:3]
        first = [user_id[:ID_CHARS] for user_id in first]
    if num_ids == 0:
        raise ValueError(f"{file} holds no user ids; to recommend for all users leave --users out")
    if not asked.any():
        raise ValueError(
            f"none of the {num_ids:,} user ids of {file} are in {corpus / 'users.parquet'}, {first[0]!r} for one; give "
            "them as they are there, which are pseudonyms where etl.pseudonym_key is set"
        )
    return Asked(np.flatnonzero(asked), num_ids, num_unknown, tuple(first))


def _append(file: Path, ids: list[str]) -> None:
    with disk.writing(file, OTHER_OUT, sum(len(user_id) + 1 for user_id in ids)):
        try:
            with file.open("a") as lines:
                lines.writelines(f"{user_id}\n" for user_id in ids)
        except OSError:
            disk.remove(file)
            raise


def _read_ids(file: Path) -> Iterator[pa.Array]:
    """The ids of a file, some millions at a time. Raises as `find_users` does."""
    if not file.exists():  # a pipe is a file, too
        raise FileNotFoundError(f"--users={file}: there is no such file")
    try:
        for ids in {".parquet": _parquet_ids, ".csv": _csv_ids}.get(file.suffix, _text_ids)(file):
            if ids.null_count:
                raise ValueError(f"{ids.null_count:,} ids are missing")
            yield ids
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"--users={file} cannot be read: {str(error)[:300]}; it must hold a user_id per line, or be "
            ".csv or .parquet with a column user_id of texts or integers"
        ) from None


def _parquet_ids(file: Path) -> Iterator[pa.Array]:
    with pq.ParquetFile(file) as table:
        if "user_id" not in table.schema_arrow.names:
            raise ValueError(f"its columns are {', '.join(table.schema_arrow.names)}")
        kind = table.schema_arrow.field("user_id").type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"its column user_id is of type {kind}")
        for batch in table.iter_batches(IDS_AT_ONCE, columns=["user_id"]):
            yield batch["user_id"].cast(pa.string())


def _csv_ids(file: Path) -> Iterator[pa.Array]:
    convert = pyarrow.csv.ConvertOptions(column_types={"user_id": pa.string()}, include_columns=["user_id"])
    with file.open("rb") as raw:
        read = pyarrow.csv.ReadOptions(block_size=64 << 20, encoding=texts.encoding(raw))
        with pyarrow.csv.open_csv(raw, read, convert_options=convert) as batches:
            for batch in batches:
                yield batch["user_id"]


def _text_ids(file: Path) -> Iterator[pa.Array]:
    ids = filter(None, (line.strip() for line in texts.lines(file)))
    while some := list(itertools.islice(ids, IDS_AT_ONCE)):
        yield pa.array(some, pa.string())


class Histories:
    """interactions/ and users.parquet, read user by user in ascending order of user_idx."""

    def __init__(self, corpus: Path):
        self._path = corpus
        # Kept open: what the footers of their files tell, which user_idx lie in which rows, is read once.
        self._events = pads.dataset(corpus / "interactions", format="parquet")
        self._users = pads.dataset(corpus / "users.parquet", format="parquet")

    def read(self, user_idx: np.ndarray) -> tuple[pa.Array, Block]:
        """Raw ids (N,), and all events of these users, of every split, in time order; none is a target.

        Args:
            user_idx: int64 (N,), ascending.

        Raises:
            ValueError: one of them has no events.
        """
        ids = self._select(self._users, ["user_idx", "user_id"], user_idx)
        table = self._select(self._events, _COLUMNS, user_idx)
        user, item, ts, event = (table[name].to_numpy() for name in _COLUMNS)
        num_events = np.bincount(np.searchsorted(user_idx, user), minlength=len(user_idx))
        if len(ids) != len(user_idx) or not num_events.all():
            raise ValueError(f"{self._path}: users.parquet and interactions/ hold different users; run the ETL again")
        # The events of a user lie together and in time order, and keep it.
        order = np.argsort(user, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(num_events)])
        no_targets = np.zeros(len(user), bool)
        block = Block(user_idx, Ragged(item[order], offsets), ts[order], event[order], no_targets, "interactions/")
        return ids.sort_by("user_idx")["user_id"].combine_chunks(), block

    @staticmethod
    def _select(dataset: pads.Dataset, columns: list[str], user_idx: np.ndarray) -> pa.Table:
        """The rows of these users. Row groups without any of them are not read; others are sifted as they come."""
        key = pads.field("user_idx")
        scanner = dataset.scanner(columns, filter=(key >= int(user_idx[0])) & (key <= int(user_idx[-1])))
        sifted = (batch.filter(pa.array(np.isin(batch["user_idx"], user_idx))) for batch in scanner.to_batches())
        return pa.Table.from_batches(sifted, scanner.projected_schema)
