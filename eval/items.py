"""The items of a corpus by the names that people and programs give them: raw ids and titles."""

import difflib
import functools
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from contract import texts

TITLE_CHARS = 80  # corpus/ keeps no titles apart: one is the beginning of an item's text
_ID_CHARS = 64  # of an unknown id, that are compared with those of the catalog

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 3, 3, 3


@dataclass(frozen=True)
class ItemNames:
    """Arrow arrays by item_idx; entry 0 is padding."""

    item_id: pa.Array  # string (I + 1,)
    title: pa.Array  # string (I + 1,), at most TITLE_CHARS characters

    @functools.cached_property
    def item_idx(self) -> dict[str, int]:
        """{item_id: item_idx}, made when it is first asked for."""
        return {item_id: i for i, item_id in enumerate(self.item_id.to_pylist()) if i}


def read_names(corpus: Path) -> ItemNames:
    """Reads items.parquet piece by piece, so that its texts are never held whole."""
    pieces = []
    for batch in pads.dataset(corpus / "items.parquet", format="parquet").to_batches(
        columns=["item_idx", "item_id", "text"]
    ):
        title = pc.utf8_slice_codeunits(pc.fill_null(batch["text"], ""), 0, TITLE_CHARS)
        pieces.append(pa.table({"item_idx": batch["item_idx"], "item_id": batch["item_id"], "title": title}))
    table = pa.concat_tables(pieces).sort_by("item_idx")
    padding = pa.array([""])
    return ItemNames(*(pa.concat_arrays([padding, *table[name].chunks]) for name in ("item_id", "title")))


def indices(names: ItemNames, item_ids: Sequence[str], what: str) -> np.ndarray:
    """int64: the item_idx of every id.

    Args:
        what: gave the ids, such as "--exclude"; for the message.

    Raises:
        ValueError: an id is not in the catalog; it names the nearest one.
    """
    unknown = [item_id for item_id in item_ids if item_id not in names.item_idx]
    if unknown:
        first, others = unknown[0], f", as are {len(unknown) - 1:,} others" if len(unknown) > 1 else ""
        known = shown(nearest(names, first))
        raise ValueError(f"{what}: item {shown(first)} is unknown{others}; did you mean {known}?")
    return np.array([names.item_idx[item_id] for item_id in item_ids], np.int64)


def nearest(names: ItemNames, word: str) -> str:
    """The item_id most like the word, of the hundred that share most of its pairs of neighbouring characters."""
    word = word[:_ID_CHARS].encode(errors="replace").decode()  # half a surrogate pair is no character to Arrow
    ids = names.item_id[1:]
    shared = np.zeros(len(ids), np.int64)
    for pair in {word[i : i + 2] for i in range(len(word) - 1)}:
        shared += pc.match_substring(ids, pair).to_numpy(zero_copy_only=False)
    best = np.argsort(-shared, kind="stable")[:100]
    return difflib.get_close_matches(word, ids.take(pa.array(best)).to_pylist(), n=1, cutoff=0)[0]


def shown(value: object) -> str:
    """A value that came from outside as a message repeats it: a short piece of it, in the words of JSON."""
    for word, same in (("null", None), ("true", True), ("false", False)):
        if value is same:
            return word
    return _SHORT.repr(value)


def choose(names: ItemNames, only: str | None, exclude: str | None) -> np.ndarray | None:
    """item_idx of the candidates that --only and --exclude leave, int64, ascending; None: all items.

    Args:
        only, exclude: ids separated by commas, or a file with one a line; None: not given.

    Raises:
        ValueError: an id is unknown, or no item is left.
    """
    if only is None and exclude is None:
        return None
    chosen = np.arange(1, len(names.item_id))
    if only is not None:
        chosen = np.unique(indices(names, _read_ids("--only", only), "--only"))
    if exclude is not None:
        chosen = np.setdiff1d(chosen, indices(names, _read_ids("--exclude", exclude), "--exclude"))
    if not len(chosen):
        raise ValueError("--only and --exclude leave no item to recommend")
    return chosen


def _read_ids(option: str, text: str) -> list[str]:
    try:
        lines = texts.lines(Path(text)) if os.path.isfile(text) else text.split(",")
        ids = [line.strip() for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{option} {text} cannot be read: {error}") from None
    if not ids:
        raise ValueError(f"{option} {shown(text)}: there are no item ids")
    return ids
