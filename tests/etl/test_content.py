import pyarrow as pa
import pytest
import sentencepiece
from transformers import AutoTokenizer, T5Tokenizer

from etl import content

WORDS = ["steel", "bike", "light", "helmet", "travel", "leather", "case", "camera", "lens", "wooden", "brass", "lamp"]
TEXTS = [f"{a} {b} for {c}, fits {b} {n}" for n, a in enumerate(WORDS) for b in WORDS for c in WORDS[:3]]


def test_normalise():
    assert content.normalise("AT&amp;T &reg; 5&quot;") == 'AT&T ® 5"'
    assert content.normalise("Fast &amp;amp; light") == "Fast & light"
    assert content.normalise("&amp;amp;amp;") == "&amp;"  # two passes, no more
    assert content.normalise(" a\t\n\x00b\u200b \ufeffc\xa0") == "a b c"


@pytest.fixture(scope="module")
def items(spark):
    rows = [(n, f"i{n}", text) for n, text in enumerate([*TEXTS, None, "R&amp;D \u00a0case"], start=1)]
    return content.with_normal_text(spark.createDataFrame(rows, "item_idx int, item_id string, text string")).persist()


@pytest.fixture(scope="module")
def model(items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("content") / "tokenizer"
    return content.train_tokenizer(items, 200, 30, folder), folder


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
    table = content.with_token_ids(items, proto, 4).toArrow()
    assert table["token_ids"].type == pa.list_(pa.int32())
    for text, ids in zip(table["text"].to_pylist(), table["token_ids"].to_pylist(), strict=True):
        assert len(ids) <= 4
        assert processor.unk_id() in ids or text.startswith(processor.decode(ids))


def test_training_is_deterministic(items, model, tmp_path):
    assert content.train_tokenizer(items.repartition(3), 200, 30, tmp_path / "again") == model[0]


def test_texts_that_give_no_vocabulary(spark, items, tmp_path):
    with pytest.raises(ValueError, match=r"no item has text; check data\.items"):
        content.train_tokenizer(items.where("text = ''"), 200, 30, tmp_path / "t")
    with pytest.raises(ValueError, match=r"etl\.vocab_size = 5"):
        content.train_tokenizer(items, 5, 30, tmp_path / "t")
    one = spark.createDataFrame([(1, "a")], "item_idx int, text string")
    assert content.train_tokenizer(one, 8000, 30, tmp_path / "small")  # a tiny text is enough
