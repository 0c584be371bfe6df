"""A person told in ids and words is read as a user of the corpus is."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from contract import schema
from eval import people
from eval.items import read_names
from tests import tiny
from tests.eval.rows import ragged
from trainer import inputs, samples
from trainer.packing import to_tensors

HISTORIES = [[3, 7, 7, 12, 40, 1], [9], [5, 6]]
HOUR = 3_600_000


@pytest.fixture(params=["pooled", "tokens"])
def room(request, tmp_path):
    return tiny.tiny_room(tmp_path / "work", history__encoding=request.param)


def write_tokenizer(corpus: Path) -> None:
    """One of 30 pieces, for texts such as "item 3 of some wool"."""
    model, texts = io.BytesIO(), [f"item {i} of some wool" for i in range(1, 41)]
    settings = {"vocab_size": 30, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **settings
    )
    (corpus / "tokenizer").mkdir()
    (corpus / "tokenizer" / "spiece.model").write_bytes(model.getvalue())


@pytest.fixture
def reader(room):
    config, corpus, catalog, _ = room
    write_tokenizer(corpus.path)
    return people.Reader(config, corpus, catalog, read_names(corpus.path))


def test_items_are_read_as_those_of_a_user(room, reader):
    config, _, catalog, model = room
    acts = [[reader.act(f"i{i}", HOUR * t, tiny.EVENTS[i % 2]) for t, i in enumerate(history)] for history in HISTORIES]
    batch = people.batch_of(config, catalog, acts)

    items = ragged(HISTORIES)
    ts = np.concatenate([HOUR * np.arange(len(history)) for history in HISTORIES])
    event = (1 + items.values % 2).astype(np.int8)
    block = samples.Block(np.arange(1, 4), items, ts, event, np.zeros(len(ts), bool), "")
    history = samples.eval_histories(config, catalog, block, np.random.default_rng(0))
    expected = to_tensors(inputs.user_inputs(config, catalog, history))
    for name in ("mask", "eos", "item", "token", "event", "recency", "gap"):
        assert torch.equal(batch["user"][name], expected[name]), name
    with torch.no_grad():
        torch.testing.assert_close(model.embed(batch["user"]), model.embed(expected))
    pairs = {(int(r), int(i)) for r, i in zip(batch["seen_row"], batch["seen_item"], strict=True)}
    assert pairs == {(row, item) for row, history in enumerate(HISTORIES) for item in history}


def test_a_text_is_an_item_without_an_atomic_embedding(room, reader):
    config, _, catalog, model = room
    as_text = people.Act(0, catalog.tokens.row(7))
    batch = people.batch_of(config, catalog, [[reader.act("i3"), as_text]])
    item = people.batch_of(config, catalog, [[reader.act("i3"), reader.act("i7")]])
    with torch.no_grad():
        assert not torch.allclose(model.embed(batch["user"]), model.embed(item["user"]))
        model.item.weight[7] = 0
        torch.testing.assert_close(model.embed(batch["user"]), model.embed(item["user"]))
    assert (item["user"]["item"] == 7).sum() == 1
    assert batch["seen_item"].tolist() == [3]


def test_words_are_tokens_of_the_corpus(room, reader):
    act = reader.act("item of some wool")
    assert act.item_idx == 0
    pieces = sentencepiece.SentencePieceProcessor(str(room[1].path / "tokenizer" / "spiece.model"))
    assert pieces.decode(act.token_ids.tolist()) == "item of some wool"
    assert len(reader.token_ids("item of some wool " * 20)) == room[0].etl.max_item_tokens
    assert act.ts == schema.NO_TIME
    batch = people.batch_of(room[0], room[2], [[act]])
    assert not batch["user"]["gap"].any()
    assert batch["user"]["recency"].max() == 1


def test_what_says_nothing_is_refused(room, reader):
    with pytest.raises(ValueError, match="entry of the history is empty"):
        reader.act("  ")
    with pytest.raises(ValueError, match="none of its words occur"):
        reader.act("字")
    with pytest.raises(ValueError, match="event 'buy' is unknown; there are: view, purchase"):
        reader.act("i3", event="buy")
    (room[1].path / "tokenizer" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be read"):
        people.Reader(room[0], room[1], room[2], read_names(room[1].path))
    (room[1].path / "tokenizer" / "spiece.model").unlink()
    reader = people.Reader(room[0], room[1], room[2], read_names(room[1].path))
    with pytest.raises(ValueError, match=r"'i41' is no item id \(the nearest is 'i4.?'\).* have no texts"):
        reader.act("i41")


def test_a_word_with_a_digit_is_an_item_id_unless_a_text_holds_it(room, reader):
    config, corpus, catalog, _ = room
    pieces = sentencepiece.SentencePieceProcessor(str(corpus.path / "tokenizer" / "spiece.model"))
    texts = [pieces.encode(text) for text in ("item 4", "wool2 of item 31", "some i")]
    torn = pieces.encode("wool40")
    texts += [torn[:-1], torn[-1:]]
    told = replace(catalog, tokens=schema.with_padding_row(ragged(texts)))
    reader = people.Reader(config, corpus, told, reader.names)
    for text in ("31", " wool2 ", "WOOL2", "wool", "item i77", "some-wool", "31 77"):
        assert reader.act(text).item_idx == 0
    # The tokens of the last are in a row, but of two items.
    for word in ("i77", "I3", "i3,i4", "wool31", "i_7", "i" * 50_000 + "3", "wool40"):
        with pytest.raises(ValueError, match=r"^item '.*' is unknown; did you mean 'i\d+'\? Nor is it a word") as error:
            reader.act(word)
        assert len(str(error.value)) < 300
    for text in ("some \ud83d", "\udcff"):
        with pytest.raises(ValueError, match="is no text: it holds half a surrogate pair, or bytes that are not UTF-8"):
            reader.act(text)
