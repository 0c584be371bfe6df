"""From what a person did, told in item ids and words, to what the encoder reads. No training history is needed.

A text is read as an item that the catalog does not hold: it has content tokens, by the tokenizer of corpus/, and no
atomic embedding. All else is as for the users of corpus/: order, recency, time gaps, event types.

What is no item_id of the catalog is a text, but for a single word with a digit or an underscore (ASCII) that no item's
text holds: that is an item_id with a mistake in it, or of another catalog, and refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import sentencepiece

from contract import schema
from contract.artifacts import Artifact
from contract.schema import Ragged
from contract.settings import Config
from eval.items import ItemNames, nearest, shown
from trainer import inputs, samples
from trainer.inputs import Catalog
from trainer.packing import to_tensors
from trainer.recommender import Recommender

_ID = re.compile(r"(?=.*[0-9_])[!-~]+")
_MAX_EVENTS_TOLD = 20


@dataclass(frozen=True)
class Act:
    """One thing that a person did: with an item of the catalog, or with what a text tells of."""

    item_idx: int  # 0: what a text tells of
    token_ids: np.ndarray  # int32 content tokens
    ts: int = schema.NO_TIME  # ms
    event: int = 0  # as in interactions/; 0: unknown


class Reader:
    """Reads words as the ETL read the catalog."""

    def __init__(self, config: Config, corpus: Artifact, catalog: Catalog, names: ItemNames):
        """Raises ValueError when the tokenizer cannot be read."""
        self._max_tokens, self._max_text = config.etl.max_item_tokens, config.etl.max_text
        self._events = corpus.manifest["events"]
        self._catalog, self.names, self._processor = catalog, names, None
        file = corpus.path / "tokenizer" / "spiece.model"
        if file.is_file():  # a catalog without texts has none
            try:
                self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{file} cannot be read: {error}; run again: spark-submit etl/build.py") from None

    def act(self, words: str, ts: int = schema.NO_TIME, event: str = "") -> Act:
        """An item where the words are an item_id of the catalog, else a text.

        Raises:
            ValueError: the words say nothing to the model, or are an unknown item_id; or there is no such event.
        """
        if event and event not in self._events:
            known = ", ".join(self._events[:_MAX_EVENTS_TOLD]) or "none: the log had no types"
            raise ValueError(f"event {shown(event)} is unknown; there are: {known}")
        code = 1 + self._events.index(event) if event else 0
        item_idx = self.names.item_idx.get(words.strip(), 0)
        return Act(item_idx, self._catalog.tokens.row(item_idx) if item_idx else self.token_ids(words), ts, code)

    def token_ids(self, text: str) -> np.ndarray:
        """int32: the content tokens of a text, at most etl.max_item_tokens.

        Raises:
            ValueError: it has none, or is an item_id that the catalog does not hold.
        """
        text = text.strip()
        if not text:
            raise ValueError("an entry of the history is empty: give an item id or a text")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{shown(text)} is no text: it holds half a surrogate pair, or bytes that are not UTF-8")
        if self._processor is None:
            raise ValueError(
                f"{shown(text)} is no item id (the nearest is {shown(nearest(self.names, text))}), and as the items of "
                "this corpus have no texts, no other words can be read"
            )
        token_ids = np.array(self._processor.encode(text[: self._max_text])[: self._max_tokens], np.int32)
        known = set(token_ids.tolist()) - {schema.UNK, self._processor.piece_to_id("\u2581")}
        if _ID.fullmatch(text) and not self._is_in_texts(text):
            raise ValueError(
                f"item {shown(text)} is unknown; did you mean {shown(nearest(self.names, text))}? Nor is it a word of "
                "the items' texts; to be read as a text it needs others beside it"
            )
        if not known:
            raise ValueError(f"{shown(text)} is no item id, and none of its words occur in the texts of the catalog")
        return token_ids

    def _is_in_texts(self, word: str) -> bool:
        """Whether the content tokens of an item hold those of the word in a row, in capitals or not."""
        values, offsets = self._catalog.tokens.values, self._catalog.tokens.offsets
        for form in {word, word.lower(), word.upper(), word.capitalize()}:
            token_ids = self._processor.encode(form)
            place = np.flatnonzero(values[: max(0, len(values) - len(token_ids) + 1)] == token_ids[0])
            for i, token_id in enumerate(token_ids):
                place = place[values[place + i] == token_id]
            item, end = (np.searchsorted(offsets, place + i, "right") for i in (0, len(token_ids) - 1))
            if (item == end).any():
                return True
        return False


def batch_of(config: Config, catalog: Catalog, people: Sequence[Sequence[Act]]) -> dict:
    """The batch that `Recommender.recommend` takes, a row per person.

    Args:
        people: what each of them did, oldest first; at least one act each.

    Returns:
        user: X_u; seen_row (S,), seen_item (S,): the items in the histories.
    """
    acts = [act for person in people for act in person]
    # The acts are numbered here as if they were a catalog, so that texts have a place in it and its size is theirs.
    tokens = Ragged(np.concatenate([act.token_ids for act in acts]), _offsets([len(act.token_ids) for act in acts]))
    told = replace(catalog, tokens=schema.with_padding_row(tokens))
    block = samples.Block(
        user_idx=np.arange(1, len(people) + 1),
        item_idx=Ragged(np.arange(1, len(acts) + 1), _offsets([len(person) for person in people])),
        ts=np.array([act.ts for act in acts], np.int64),
        event=np.array([act.event for act in acts], np.int8),
        is_target=np.zeros(len(acts), bool),
        shard="",
    )
    history = samples.eval_histories(config, told, block, np.random.default_rng(config.seed))
    user = inputs.user_inputs(config, told, history)
    item_idx = np.array([0, *(act.item_idx for act in acts)], np.int64)
    user["item"] = item_idx[user["item"]]
    seen = item_idx[1:] > 0
    return to_tensors({"user": user, "seen_row": block.row[seen], "seen_item": item_idx[1:][seen]})


def show(recommender: Recommender, reader: Reader, history: Sequence[str], k: int) -> None:
    """Prints how a history was read, and the k items that are recommended to who has it.

    Args:
        history: item ids and texts, oldest first, each one or several separated by commas.

    Raises:
        ValueError: one of them says nothing to the model.
    """
    names = reader.names
    # An id may hold commas.
    words = [part.strip() for entry in history for part in ([entry] if entry in names.item_idx else entry.split(","))]
    acts = [reader.act(part) for part in words]
    batch = batch_of(recommender.config, recommender.catalog, [acts])
    found = recommender.recommend(batch if recommender.config.eval.mask_seen else {"user": batch["user"]}, k)
    print("\nhistory, oldest first")
    for part, act in zip(words, acts, strict=True):
        as_text = f"text of {len(act.token_ids)} tokens  {part}"
        print(f"  item {part}  {names.title[act.item_idx]}" if act.item_idx else f"  {as_text}")
    rows = [
        (names.item_id[item].as_py(), names.title[item].as_py(), score)
        for item, score in zip(found["item_idx"][0].tolist(), found["score"][0].tolist(), strict=True)
        if item
    ]
    width = max([len("item"), *(len(item_id) for item_id, _, _ in rows)])
    print(f"\nrank    score  {'item':<{width}}  title")
    for rank, (item_id, title, score) in enumerate(rows, 1):
        print(f"{rank:>4} {score:>8.3f}  {item_id:<{width}}  {title}")


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
