"""Differences of ablations to the full model, on lists written by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.artifacts import open_artifact
from eval import contrast, table
from eval.users import read_eval_users
from eval.variants import Variant
from tests import tiny

FULL, WORSE, EVEN = Variant("full", "all of it", {}), Variant("worse", "no luck", {}), Variant("even", "nothing", {})


@pytest.fixture
def room(tmp_path):
    """(config, corpus, {variant: folder of its lists}): the full model has every target of valid first, `worse` of
    every other user, `even` as the full model."""
    config = tiny.tiny_config(tmp_path / "work", eval__split="valid", eval__cutoffs="5,10")
    tiny.write_corpus(config)
    corpus = open_artifact(config, "corpus")
    users = read_eval_users(corpus, "valid")
    folders = {}
    for name, every in (("full", 1), ("worse", 2), ("even", 1)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        lists = [[int(users.targets.row(u)[0])] if u % every == 0 else [] for u in range(len(users))]
        columns = {"user_idx": users.user_idx, "item_idx": pa.array(lists, pa.list_(pa.int32()))}
        pq.write_table(pa.table(columns), folders[name] / "recommendations.parquet")
    return config, corpus, folders


def test_differences_are_paired_by_user(room):
    results = contrast.contrast(*room)
    assert results["full"]["recall@10"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    worse = results["worse"]["recall@10"]
    assert worse["mean"] == 0.5
    difference = worse["difference"]
    assert difference["mean"] == -0.5
    # The full model's hits are constant, so that the difference varies as the variant alone does.
    assert difference["low"] == pytest.approx(worse["low"] - 1)
    assert difference["high"] == pytest.approx(worse["high"] - 1)
    assert results["even"]["ndcg@5"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_lists_of_other_users_are_refused(room):
    config, corpus, folders = room
    file = folders["worse"] / "recommendations.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ValueError, match="worse does not hold the list of every valid user"):
        contrast.contrast(config, corpus, folders)


def test_the_table_says_what_was_removed_and_which_differences_count(room):
    results, metrics = contrast.contrast(*room), contrast.shown((5, 10))
    variants, training = [FULL, WORSE, EVEN], {"full": "1 min", "worse": "2.5 min", "even": "3 min"}
    text = contrast.markdown(variants, results, metrics, {"data": "tiny"}, training, {})
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["full"] == "| full | all of it | 1.0000 ±0.0000 |  | 1.0000 ±0.0000 |  | 1 min |"
    low, high = (results["worse"]["recall@10"]["difference"][end] for end in ("low", "high"))
    assert rows["worse"].startswith("| worse | no luck | 0.5000 ±")
    assert f"| **-0.5000** [{low:+.4f}, {high:+.4f}] |" in rows["worse"]
    assert rows["worse"].endswith("| 2.5 min |")
    assert "| +0.0000 [+0.0000, +0.0000] |" in rows["even"]
    assert "- data: tiny" in text
    lines = contrast.terminal(variants, results, metrics, {}).splitlines()
    assert lines[0].split() == ["recall@10", "difference", "ndcg@10", "difference"]
    assert lines[3].split() == ["worse", "0.5000", "-0.5000*", "0.5000", "-0.5000*"]
    assert lines[4].split() == ["even", "1.0000", "+0.0000", "1.0000", "+0.0000"]


def test_the_generated_lists_stand_beside_those_that_are_shown(room):
    _, _, folders = room
    means = {"full": 0.25, "worse": 0.125}
    for name, folder in folders.items():
        models = {"ColaRec": {"recall@10": {"mean": 0.5}, "ndcg@10": {"mean": 0.5}}}
        if name in means:
            models["ColaRec, generative"] = {"recall@10": {"mean": means[name]}, "ndcg@10": {"mean": means[name] / 2}}
        table.write(table.Results(name, {}, models, {}, 1), folder / "metrics.json")
    results, metrics = contrast.contrast(*room), contrast.shown((5, 10))
    variants, training = [FULL, WORSE, EVEN], {"full": "1 min", "worse": "2.5 min", "even": "3 min"}
    beside = contrast.generated(variants, folders, metrics)
    assert beside == {
        "generated recall@10": ["0.2500", "0.1250", ""],
        "generated ndcg@10": ["0.1250", "0.0625", ""],
    }
    text = contrast.markdown(variants, results, metrics, {}, training, beside)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["variant"].endswith("| generated recall@10 | generated ndcg@10 | training |")
    assert rows["worse"].endswith("| 0.1250 | 0.0625 | 2.5 min |")
    assert rows["even"].endswith("|  |  | 3 min |")
    lines = contrast.terminal(variants, results, metrics, beside).splitlines()
    assert lines[3].split()[-2:] == ["0.1250", "0.0625"]
    assert contrast.generated([EVEN], folders, metrics) == {}


def test_the_figure_has_a_row_per_ablation_and_a_panel_per_metric(room):
    results = contrast.contrast(*room)
    drawn = contrast.figure([FULL, WORSE, EVEN], results, ["recall@10", "ndcg@10"], "tiny")
    left, right = drawn.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["no luck  (worse)", "nothing  (even)"]
    assert "ndcg@10 minus the full model's 1.0000" in right.get_xlabel()
    difference = results["worse"]["recall@10"]["difference"]
    interval, point = left.lines[0], left.lines[1]
    assert np.allclose(interval.get_xdata(), [difference["low"], difference["high"]])
    assert np.allclose([*point.get_xdata(), *point.get_ydata()], [-0.5, 0])
    assert interval.get_color() == contrast.WORSE
    assert left.lines[2].get_color() == contrast.NEITHER
