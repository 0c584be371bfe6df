import json

import pyarrow as pa
import pytest
import sentencepiece
from transformers import AutoTokenizer, T5Tokenizer

from contract.settings import Etl
from etl import content

WORDS = ["steel", "bike", "light", "helmet", "travel", "leather", "case", "camera", "lens", "wooden", "brass", "lamp"]
TEXTS = [f"{a} {b} for {c}, fits {b} {n}" for n, a in enumerate(WORDS) for b in WORDS for c in WORDS[:3]]
ETL = Etl(vocab_size=200, max_item_tokens=30)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("AT&amp;T &reg; 5&quot;", 'AT&T ® 5"'),
        ("Fast &amp;amp; light", "Fast & light"),
        ("&amp;amp;amp;", "&amp;"),  # two passes, no more
        (" a\t\x00b\u200b \ufeffc\xa0", "a b c"),
        ("", ""),
        (" \n\t ", ""),
        ("one\ntwo\r\nthree", "one two three"),
        ("Steel  Lamp\nbright\nsteel lamp", "Steel Lamp bright"),  # the first stays, where it was
        ("a\nb\nA\nc\nB", "a b c"),
        ("lamp\nlamp for a desk", "lamp lamp for a desk"),  # only whole lines
        ("a &lt;br&gt; b", "a <br> b"),
        ("x&#10;y&#10;X", "x y"),  # an entity may be a line break
    ],
)
def test_normalise(text, normal):
    assert content.normalise(text, 2000) == normal
    assert content.normalise(normal, 2000) == normal or "&" in normal


def test_a_text_is_cut_to_characters():
    assert content.normalise("abc def", 5) == "abc d"
    assert content.normalise("abc def", 4) == "abc"  # no blank at the end
    assert content.normalise("&eacute;&eacute;&eacute;", 2) == "éé"


@pytest.fixture(scope="module")
def items(spark):
    rows = [(n, f"i{n}", text) for n, text in enumerate([*TEXTS, None, "R&amp;D \u00a0case"], start=1)]
    table = spark.createDataFrame(rows, "item_idx int, item_id string, text string")
    return content.with_normal_text(table, 2000).persist()


@pytest.fixture(scope="module")
def model(items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("content") / "tokenizer"
    return content.tokenizer(items, ETL, folder), folder


def test_normal_text_in_the_table(items):
    last = {row.item_idx: row.text for row in items.where(f"item_idx > {len(TEXTS)}").collect()}
    assert last == {len(TEXTS) + 1: "", len(TEXTS) + 2: "R&D case"}


def test_transformers_loads_the_tokenizer_and_agrees(items, model):
    proto, folder = model
    ids = {row.text: row.token_ids for row in content.with_token_ids(items, proto, 30).collect()}
    for tokenizer in (T5Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        assert len(tokenizer) == content.vocab_size(proto) <= 200
        assert {text: tokenizer.encode(text, add_special_tokens=False) for text in ids} == ids
    assert ids[""] == []


def test_tokens_are_truncated_and_say_the_text(items, model):
    proto, _ = model
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    result = content.with_token_ids(items, proto, 4)
    assert result.columns == [*items.columns, "token_ids"]
    table = result.toArrow()
    assert table["token_ids"].type == pa.list_(pa.int32())
    for text, ids in zip(table["text"].to_pylist(), table["token_ids"].to_pylist(), strict=True):
        assert len(ids) == min(4, len(processor.encode(text)))
        assert processor.unk_id() in ids or text.startswith(processor.decode(ids))


def test_training_is_deterministic(items, model, tmp_path):
    assert content.tokenizer(items.repartition(3), ETL, tmp_path / "again") == model[0]
    for file in model[1].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_that_is_given_is_taken_as_it_is(items, model, tmp_path):
    proto, folder = model
    etl = Etl(tokenizer=str(folder), vocab_size=5)  # the size is the model's
    assert content.tokenizer(items.where("false"), etl, tmp_path / "copy") == proto
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["spiece.model", "tokenizer_config.json"]
    assert (tmp_path / "copy" / "spiece.model").read_bytes() == proto
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["tokenizer_class"] == "T5Tokenizer"


@pytest.mark.parametrize("model_bytes", [None, b"no model"])
def test_a_folder_without_a_model(items, tmp_path, model_bytes):
    if model_bytes is not None:
        (tmp_path / "spiece.model").write_bytes(model_bytes)
    with pytest.raises(ValueError, match=r"etl\.tokenizer = .*: spiece\.model cannot be read"):
        content.tokenizer(items, Etl(tokenizer=str(tmp_path)), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_model_whose_special_pieces_are_not_t5s(items, tmp_path):
    """sentencepiece's own: unk, bos and eos are 0, 1 and 2, and there is no pad."""
    with (tmp_path / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            vocab_size=200,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    message = r"spiece\.model: pad, eos and unk are pieces \(-1, 2, 0\), must be \(0, 1, 2\) as in T5's"
    with pytest.raises(ValueError, match=message):
        content.tokenizer(items, Etl(tokenizer=str(tmp_path)), tmp_path / "t")


def test_a_vocabulary_that_is_too_small(spark, items, tmp_path):
    with pytest.raises(ValueError, match=r"etl\.vocab_size = 5 pieces of 433 texts"):
        content.tokenizer(items, Etl(vocab_size=5), tmp_path / "t")
    one = spark.createDataFrame([(1, "a")], "item_idx int, text string")
    assert content.tokenizer(one, Etl(), tmp_path / "small")  # a tiny text is enough


def test_no_text_at_all(items, tmp_path):
    textless = items.where("text = ''")
    assert content.tokenizer(textless, ETL, tmp_path / "t") is None
    assert not (tmp_path / "t").exists()
    assert content.vocab_size(None) == 3
    table = content.with_token_ids(textless, None, 30).toArrow()
    assert table["token_ids"].type == pa.list_(pa.int32())
    assert table["token_ids"].to_pylist() == [[]]
