import numpy as np
import pytest

from contract import config as config_module
from contract.schema import Ragged
from trainer import inputs
from trainer.inputs import Catalog, History

TASK_USER, TASK_ITEM, EOS = 20, 21, 1


@pytest.fixture
def catalog() -> Catalog:
    """Items 1, 2, 3 with contents (5, 6), (7), (); item 1 has users 11, 12, 13, item 2 has user 14."""
    return Catalog(
        tokens=Ragged(np.array([5, 6, 7]), np.array([0, 0, 2, 3, 3])),
        users=Ragged(np.array([11, 12, 13, 14]), np.array([0, 0, 3, 4, 4])),
        gids=np.array([[0, 0], [0, 0], [0, 1], [1, 0]]),
        group=np.array([0, 1, 1, 2]),
        siblings=Ragged(np.array([1, 2, 3]), np.array([0, 0, 2, 3])),
        popularity=np.array([0, 0.5, 0.25, 0.25], np.float32),
        vocab_size=20,
        num_users=20,
        event_weights=np.array([1, 0.5, 2], np.float32),
        events_per_user=4.0,
        has_time=True,
    )


def settings(tmp_path, **changes):
    (tmp_path / "c.toml").write_text("")
    changes = {"history__attention": "full"} | changes
    return config_module.load(str(tmp_path / "c.toml"), {k.replace("__", "."): v for k, v in changes.items()})


def history(*rows) -> History:
    item_idx = np.array(rows)
    present = item_idx > 0
    recency = np.where(present, present.sum(1)[:, None] - np.arange(item_idx.shape[1]), 0)
    return History(item_idx, present * 2, recency, present * 3)


def test_user_tokens_layout(tmp_path, catalog):
    config = settings(tmp_path, history__encoding="tokens")
    x = inputs.user_inputs(config, catalog, history([1, 3, 2], [2, 0, 0]))
    assert x["token"].tolist() == [[TASK_USER, 0, 5, 6, 0, 0, 7, EOS], [TASK_USER, 0, 7, EOS, 0, 0, 0, 0]]
    assert x["item"].tolist() == [[0, 1, 0, 0, 3, 2, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0]]
    assert x["recency"].tolist() == [[0, 3, 0, 0, 2, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert x["event"][0].tolist() == [0, 2, 0, 0, 2, 2, 0, 0]
    assert x["gap"][0].tolist() == [0, 3, 0, 0, 3, 3, 0, 0]
    assert x["eos"].tolist() == [7, 3]
    assert x["mask"].sum(1).tolist() == [8, 4]
    assert "content_row" not in x


def test_too_much_content_leaves_the_oldest_items_out(tmp_path, catalog):
    config = settings(tmp_path, history__encoding="tokens", history__max_tokens="6")
    x = inputs.user_inputs(config, catalog, history([1, 3, 2]))
    assert x["token"].tolist() == [[TASK_USER, 0, 0, 7, EOS]]
    assert x["item"].tolist() == [[0, 3, 2, 0, 0]]


def test_user_pooled_layout(tmp_path, catalog):
    x = inputs.user_inputs(settings(tmp_path), catalog, history([1, 3, 1], [2, 0, 0]))
    assert x["token"].tolist() == [[TASK_USER, 0, 0, 0, EOS], [TASK_USER, 0, EOS, 0, 0]]
    assert x["item"].tolist() == [[0, 1, 3, 1, 0], [0, 2, 0, 0, 0]]
    # bags of the distinct items 1, 2, 3
    assert x["content_tokens"].tolist() == [5, 6, 7]
    assert x["content_offsets"].tolist() == [0, 2, 3]
    assert x["content_row"].tolist() == [[0, 1, 3, 1, 0], [0, 2, 0, 0, 0]]


@pytest.mark.parametrize("encoding", ["tokens", "pooled"])
def test_without_content_no_text_is_in_the_input(tmp_path, catalog, encoding):
    config = settings(tmp_path, history__encoding=encoding, history__content="false", history__user_slots="1")
    x = inputs.user_inputs(config, catalog, history([1, 3, 2], [2, 0, 0]))
    assert x["token"].tolist() == [[TASK_USER, 0, 0, 0, EOS], [TASK_USER, 0, EOS, 0, 0]]
    assert x["item"].tolist() == [[0, 1, 3, 2, 0], [0, 2, 0, 0, 0]]
    assert x["recency"].tolist() == [[0, 3, 2, 1, 0], [0, 1, 0, 0, 0]]
    assert inputs.user_lengths(config, catalog, np.array([[1, 3, 2], [2, 0, 0]])).tolist() == [5, 3]
    of_items = inputs.item_inputs(config, catalog, np.array([1, 3]), key=0)
    assert of_items["token"].tolist() == [[TASK_ITEM, 0, 0, EOS], [TASK_ITEM, 0, EOS, 0]]
    assert of_items["item"].tolist() == [[0, 1, 0, 0], [0, 3, 0, 0]]
    assert not {"content_row", "content_tokens"} & (set(x) | set(of_items))


def test_item_slots_are_distinct_users_of_the_item(tmp_path, catalog):
    config = settings(tmp_path, history__user_slots="2")
    seen = set()
    for key in range(30):
        x = inputs.item_inputs(config, catalog, np.array([1, 2, 3]), key)
        first = [u for u in x["user"][0] if u]
        assert len(set(first)) == 2
        assert set(first) <= {11, 12, 13}
        seen |= set(first)
        assert [u for u in x["user"][1] if u] == [14]
        assert x["user"][2].sum() == 0
        assert x["token"][:, 0].tolist() == [TASK_ITEM] * 3
        assert x["eos"].tolist() == [4, 3, 2]
    assert seen == {11, 12, 13}


def test_item_slots_do_not_depend_on_the_batch(tmp_path, catalog):
    config = settings(tmp_path, history__user_slots="1")
    for key in range(10):
        alone = inputs.item_inputs(config, catalog, np.array([1]), key)["user"][0]
        among = inputs.item_inputs(config, catalog, np.array([2, 3, 1]), key)["user"][2]
        assert alone.max() == among.max()


def test_gap_bucket():
    seconds = np.array([0, 1, 3, 7, 2**40])
    assert inputs.gap_bucket(seconds * 1000).tolist() == [1, 2, 3, 4, inputs.NUM_GAP_BUCKETS - 1]
