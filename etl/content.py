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

MAX_TEXTS = 1_000_000  # a vocabulary does not improve beyond, and they are read into one machine
# Only the first tokens of a text are kept, so only about as much of it is read. A token has 4 to 5 characters.
CHARS_PER_TOKEN = 20
# The partial sums of the training are added per thread: a fixed number of threads gives the same vocabulary anywhere.
NUM_THREADS = 8

# Control characters, zero-width spaces and byte order marks are blanks.
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200b\ufeff]+")


def normalise(text: str) -> str:
    """HTML entities unescaped, twice where the first pass leaves some; runs of blanks become one space."""
    for _ in range(2):
        if "&" not in text:
            break
        text = html.unescape(text)
    return _BLANKS.sub(" ", text).strip()


def with_normal_text(items: DataFrame) -> DataFrame:
    """Normalises the column text; null becomes empty."""

    @F.arrow_udf(T.StringType())
    def normalised(texts: pa.Array) -> pa.Array:
        return pa.array([normalise(text or "") for text in texts.to_pylist()], pa.string())

    return items.withColumn("text", normalised("text"))


def train_tokenizer(items: DataFrame, vocab_size: int, max_item_tokens: int, folder: Path) -> bytes:
    """Trains SentencePiece (unigram) on the texts of `items` (item_idx, text) and writes `folder` for transformers.

    Of more than a million items a uniform sample is read: item_idx is a random permutation, so the first million is
    one. Returns the model file's content.

    Raises:
        ValueError: there is no text, or vocab_size does not even cover its characters.
    """
    texts = (
        items.where((F.col("item_idx") <= MAX_TEXTS) & (F.col("text") != ""))
        .select("item_idx", _head(max_item_tokens).alias("text"))
        .toArrow()
        .sort_by("item_idx")["text"]
    )
    if not len(texts):
        raise ValueError("no item has text; check data.items, data.item_column and data.text_columns")
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
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return model.getvalue()


def with_token_ids(items: DataFrame, model: bytes, max_item_tokens: int) -> DataFrame:
    """Adds token_ids array<int>: at most max_item_tokens pieces of the text, without eos."""

    def tokenise(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        for batch in batches:
            pieces = processor.encode(batch.column("head").to_pylist(), out_type=int)
            ids = pa.array([ids[:max_item_tokens] for ids in pieces], pa.list_(pa.int32()))
            yield batch.drop_columns("head").append_column("token_ids", ids)

    columns = T.StructType([*items.schema.fields, T.StructField("token_ids", T.ArrayType(T.IntegerType()))])
    return items.withColumn("head", _head(max_item_tokens)).mapInArrow(tokenise, columns)


def vocab_size(model: bytes) -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def _head(max_item_tokens: int) -> Column:
    return F.substring("text", 1, CHARS_PER_TOKEN * max_item_tokens)
