"""Tables and metrics.json of literal results."""

import json

import pytest

from contract import config as config_module
from eval import table
from eval.table import Results


@pytest.fixture
def results():
    def estimate(mean, half):
        return {"mean": mean, "low": mean - half, "high": mean + half}

    return Results(
        "small",
        {"data": "10 users", "date": "2024-05-06"},
        {
            "ColaRec": {
                "recall@5": estimate(0.25, 0.02),
                "ndcg@5": estimate(0.125, 0.01),
                "mrr@1": estimate(0.01, 0.01),
                "mrr@5": estimate(0.3, 0.01),
                "arp@5": estimate(12.34, 1),
                "coverage@5": {"mean": 0.5},
            },
            "popularity": {
                "recall@5": estimate(0.1, 0.03),
                "ndcg@5": estimate(0.12501, 0.01),
                "mrr@1": estimate(0, 0),
                "mrr@5": estimate(0.2, 0.01),
                "arp@5": estimate(1234.56, 1),
                "coverage@5": {"mean": 0},
            },
        },
        {
            "recall@5": {**estimate(0.15, 0.04), "over": "popularity"},
            "ndcg@5": {**estimate(-0.00001, 0.02), "over": "popularity"},
            "mrr@1": {**estimate(0.01, 0.02), "over": "popularity"},
            "mrr@5": {**estimate(0.1, 0.02), "over": "popularity"},
        },
        10,
        [
            {
                "kind": "popularity",
                "name": "tail",
                "what": "rare items",
                "num_users": 4,
                "num_targets": 5,
                "models": {"ColaRec": {"recall@5": estimate(0.2, 0.1)}, "popularity": {"recall@5": estimate(0, 0)}},
                "lead": {"recall@5": {**estimate(0.2, 0.1), "over": "popularity"}},
            }
        ],
        {"ColaRec": [0.1, 0.2], "popularity": [0, 0.1]},
    )


def test_terminal(results):
    assert table.terminal(results).splitlines() == [
        "            recall@5    ndcg@5     mrr@5",
        "-----------------------------------------",
        "ColaRec       0.2500*   0.1250*   0.3000*",
        "popularity    0.1000    0.1250*   0.2000",
        "lead         +0.1500   -0.0000   +0.1000",
        "",
        "* best",
        "Intervals (95%, bootstrap over users) are ±0.0300 or less.",
        "lead: ColaRec minus the best other model, paired by user.",
        "coverage@5, the share of the catalog that is recommended: ColaRec 50%, popularity 0%.",
        "arp@5, how many train events an item that is recommended has, on average: ColaRec 12.3, popularity 1,234.6.",
        "",
        "data:        10 users",
        "date:        2024-05-06",
    ]


def test_markdown(results):
    assert table.markdown(results).splitlines() == [
        "|  | recall@5 | ndcg@5 | mrr@5 |",
        "| --- | ---: | ---: | ---: |",
        "| ColaRec | **0.2500** ±0.0200 | **0.1250** ±0.0100 | **0.3000** ±0.0100 |",
        "| popularity | 0.1000 ±0.0300 | **0.1250** ±0.0100 | 0.2000 ±0.0100 |",
        "| lead | +0.1500 ±0.0400 | -0.0000 ±0.0200 | +0.1000 ±0.0200 |",
        "",
        "Bold: best. Intervals (95%, bootstrap over users) are ±0.0300 or less. "
        "lead: ColaRec minus the best other model, paired by user. "
        "coverage@5, the share of the catalog that is recommended: ColaRec 50%, popularity 0%. "
        "arp@5, how many train events an item that is recommended has, on average: ColaRec 12.3, popularity 1,234.6.",
        "",
        "- data: 10 users",
        "- date: 2024-05-06",
    ]


def test_numbers_for_mlflow(results):
    found = table.numbers(results)
    assert found["num_users"] == 10
    assert found["recall@5"] == 0.25
    assert found["popularity/arp@5"] == 1234.56
    assert found["lead/mrr@5"] == 0.1
    assert found["coverage@5"] == 0.5
    assert found["slice/popularity/tail/num_targets"] == 5
    assert found["slice/popularity/tail/recall@5"] == 0.2
    assert found["popularity/slice/popularity/tail/recall@5"] == 0
    assert found["lead/slice/popularity/tail/recall@5"] == 0.2
    assert len(found) == 22  # 1 + 6 + 6 + 4 of all, 2 + 1 + 1 + 1 of the slice


def test_results_of_before_there_were_slices_are_read(results, tmp_path):
    old = {name: value for name, value in vars(results).items() if name in ("name", "protocol", "models", "lead")}
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    assert table.read(tmp_path / "metrics.json").slices == []


def test_one_model_alone_has_no_lead(results):
    alone = Results("small", {}, {"ColaRec": results.models["ColaRec"]}, {}, 10)
    assert "lead" not in table.terminal(alone) + table.markdown(alone)


def test_what_is_written_is_read(results, tmp_path):
    table.write(results, tmp_path / "metrics.json")
    assert table.read(tmp_path / "metrics.json") == results


@pytest.mark.parametrize("text", ["{", '{"name": "small"}', "[]"])
def test_what_is_not_results_is_refused(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold results"):
        table.read(tmp_path / "metrics.json")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {"history": "train and valid items", "seen items": "masked", "split": "leave one out, in time order"}),
        ({"eval.split": "valid"}, {"history": "train items"}),
        ({"etl.valid_in_history": "false"}, {"history": "train items"}),
        ({"eval.mask_seen": "false", "etl.split": "given"}, {"seen items": "not masked", "split": "as given"}),
        (
            {"etl.split": "temporal", "etl.valid_days": "3.5"},
            {"split": "by time, the last 7 days test, the 3.5 before them valid"},
        ),
        ({"eval.hybrid": "0", "eval.neighbours": "0"}, {"decoding": "100 beams over the GIDs of all items"}),
        (
            {"eval.hybrid": "0", "eval.neighbours": "0.5"},
            {
                "decoding": "100 beams over the GIDs of all items; with as many by c, the neighbours, "
                "ranked by log p + 0.5 c"
            },
        ),
        ({"eval.mode": "dense"}, {"decoding": "all items by h(X_u) . v_i"}),
        ({"eval.mode": "dense", "loss.softmax": "0"}, {"decoding": "all items by h(X_u) . h(X_i)"}),
        (
            {"eval.beams": "567", "eval.hybrid": "4"},
            {"decoding": "the GIDs of all items, ranked by (log p + 4 h(X_u) . v_i) / 5"},
        ),
        (
            {"eval.beams": "567", "eval.hybrid": "4", "eval.neighbours": "0.5"},
            {"decoding": "the GIDs of all items, ranked by (log p + 4 h(X_u) . v_i) / 5 + 0.5 c"},
        ),
        ({"eval.exhaustive": "true", "eval.mode": "generative"}, {"decoding": "the GIDs of all items"}),
        ({"etl.split": "random"}, {"split": "at random, 0.8:0.1:0.1 of each user's items"}),
    ],
)
def test_the_protocol_says_what_was_compared(overrides, expected, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text("[loss]\nrec = 1\nindex = 1\ncontrastive = 0.1\n")
    facts = table.protocol(config_module.load(str(file), overrides), 1234, 567, "2 x CPU", trained="3 min")
    assert facts.items() >= expected.items()
    assert facts["data"].startswith("small: 1,234 ")
    assert "567 items" in facts["data"]
    assert facts["trained"] == "3 min"
    softmax = "" if "loss.softmax" in overrides else "1 softmax + "
    assert facts["training"].endswith(f"loss 1 rec + 1 index + {softmax}0.1 contrastive")
