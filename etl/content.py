"""What an item says: its text normalised, a SentencePiece vocabulary of all texts, and the token ids."""

import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import sentencepiece
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from contract.schema import EOS, PAD, UNK
from contract.settings import Etl

MAX_TEXTS = 250_000  # a vocabulary does not improve beyond, and they are read into one machine
# Only the first tokens of a text are kept, so only about as much of it is read. A token has 4 to 5 characters.
CHARS_PER_TOKEN = 20
# The partial sums of the training are added per thread: a fixed number of threads gives the same vocabulary anywhere.
NUM_THREADS = 8

MODEL_FILE = "spiece.model"
TRANSFORMERS_SETTINGS = {
    "tokenizer_class": "T5Tokenizer",
    "extra_ids": 0,
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}

# Control characters, zero-width spaces and byte order marks are blanks.
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\ufeff]+")


def normalise(text: str, max_chars: int) -> str:
    """One line of at most max_chars characters.

    HTML entities are unescaped, twice where the first pass leaves some; runs of blanks become one space; of lines that
    are the same but for case and blanks (a title that the description repeats) the first stays.
    """
    for _ in range(2):
        if "&" not in text:
            break
        text = html.unescape(text)
    distinct: dict[str, str] = {}
    for line in text.splitlines():
        line = _BLANKS.sub(" ", line).strip()
        distinct.setdefault(line.casefold(), line)
    return " ".join(filter(None, distinct.values()))[:max_chars].rstrip()


def with_normal_text(items: DataFrame, max_chars: int) -> DataFrame:
    """Normalises the column text; null becomes empty."""

    @F.arrow_udf(T.StringType())
    def normalised(texts: pa.Array) -> pa.Array:
        return pa.array([normalise(text or "", max_chars) for text in texts.to_pylist()], pa.string())

    return items.withColumn("text", normalised("text"))


def tokenizer(items: DataFrame, etl: Etl, folder: Path) -> bytes | None:
    """The SentencePiece model of etl.tokenizer, or else one trained on the texts of `items` (item_idx, text).

    Writes `folder` for transformers and returns the model file's content; None, and no folder, if no item has text.

    Raises:
        ValueError: there is no model in etl.tokenizer, its special pieces are not T5's, or vocab_size is too small.
    """
    if etl.tokenizer:
        model = read_model(Path(etl.tokenizer))
    else:
        model = train_model(items, etl.vocab_size, etl.max_item_tokens)
    if model is not None:
        folder.mkdir()
        (folder / MODEL_FILE).write_bytes(model)
        (folder / "tokenizer_config.json").write_text(json.dumps(TRANSFORMERS_SETTINGS, indent=1))
    return model


def read_model(folder: Path) -> bytes:
    """The SentencePiece model in the folder. Raises ValueError when there is none whose special pieces are T5's."""
    file = folder / MODEL_FILE
    try:
        model = file.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"etl.tokenizer = {str(folder)!r}: {MODEL_FILE} cannot be read: {error}") from None
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if special != (PAD, EOS, UNK):
        raise ValueError(f"{file}: pad, eos and unk are pieces {special}, must be {(PAD, EOS, UNK)} as in T5's")
    return model


def train_model(items: DataFrame, vocab_size: int, max_item_tokens: int) -> bytes | None:
    """Trains SentencePiece (unigram) on the texts of `items` (item_idx, text); None if there is none.

    Of more than MAX_TEXTS items a uniform sample is read: item_idx is a random permutation, so the first ones are one.

    Raises:
        ValueError: vocab_size does not even cover the characters.
    """
    texts = (
        items.where((F.col("item_idx") <= MAX_TEXTS) & (F.col("text") != ""))
        .select("item_idx", _head(max_item_tokens).alias("text"))
        .toArrow()
        .sort_by("item_idx")["text"]
    )
    if not len(texts):
        return None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.as_py() for text in texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a small catalog does not hold so many pieces
            max_sentence_length=4 * CHARS_PER_TOKEN * max_item_tokens,  # bytes; longer ones would be left out
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot make etl.vocab_size = {vocab_size} pieces of {len(texts):,} texts: {error}"
        ) from None
    return model.getvalue()


def with_token_ids(items: DataFrame, model: bytes | None, max_item_tokens: int) -> DataFrame:
    """Adds token_ids array<int>: at most max_item_tokens pieces of the text, without eos; none without a model."""
    if model is None:
        return items.withColumn("token_ids", F.array().cast("array<int>"))

    def tokenise(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        for batch in batches:
            pieces = processor.encode(batch.column("head").to_pylist(), out_type=int)
            ids = pa.array([ids[:max_item_tokens] for ids in pieces], pa.list_(pa.int32()))
            yield batch.drop_columns("head").append_column("token_ids", ids)

    columns = T.StructType([*items.schema.fields, T.StructField("token_ids", T.ArrayType(T.IntegerType()))])
    return items.withColumn("head", _head(max_item_tokens)).mapInArrow(tokenise, columns)


def vocab_size(model: bytes | None) -> int:
    """Pieces, the three special ones included."""
    if model is None:
        return len((PAD, EOS, UNK))
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def _head(max_item_tokens: int) -> Column:
    return F.substring("text", 1, CHARS_PER_TOKEN * max_item_tokens)
