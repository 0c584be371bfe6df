"""The calculator beside what was measured: points that nothing was fitted to, each within a stated factor."""

import pytest

from bench.train import SHAPES
from cluster import cost
from cluster.stages import train_bytes
from contract import config as config_module
from contract.config import Cf
from trainer.model import ColaRecConfig


def within(factor: float, predicted: float, measured: float) -> bool:
    return measured / factor <= predicted <= measured * factor


def row(name: str, rows: list[dict] | None = None, **values) -> dict:
    """The only row of bench/results/<name>.json with these values."""
    found = [r for r in rows or cost.measured(name) if all(r.get(k) == v for k, v in values.items())]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("rows", [5_000_000, 200_000_000])
def test_etl_cpu_seconds_between_and_ten_times_beyond_the_points_of_the_line(rows):
    measured = row("etl", engine="spark", num_rows=rows)
    assert within(1.2, cost.etl_cpu_seconds(rows), measured["cpu_seconds"])


def test_etl_wall_time_and_disk():
    few = row("etl", engine="spark", num_rows=5_000_000)
    assert within(1.2, cost.etl_seconds(5e6, few["cores"]), few["seconds"])
    # docs/etl.md, the run of 200M rows: local disk 7.7 GB, work folder 15 GB at its peak, corpus 8.0 GB.
    events = row("etl", engine="spark", num_rows=200_000_000)["num_events"]
    assert within(1.2, cost.SHUFFLE_PER_ROW * 200e6, 7.7e9)
    assert within(1.2, cost.WORK_PER_EVENT * events, 15e9)
    assert within(1.2, cost.CORPUS_PER_EVENT * events, 8.0e9)


def test_more_cores_shorten_all_but_the_start():
    alone, many = cost.etl_seconds(2e9, 1), cost.etl_seconds(2e9, 1000)
    assert alone / 1000 < many < alone / 100
    assert cost.etl_seconds(1e6, 10**6) > 20


@pytest.mark.parametrize(("items", "factor"), [(100_000, 1.5), (300_000, 1.5), (1_000_000, 2.2)])
def test_trees(items, factor):
    """The tree of 1M x 64 is 3% full: emptier than most, and cheaper."""
    measured = row("gid", cost.measured("gid")["trees"], items=items)
    assert within(factor, cost.tree_cpu_seconds(items, 64), measured["cpu_seconds"])
    assert within(1.2, cost.tree_bytes(items, 64), measured["peak_gb"] * 2**30)


@pytest.mark.parametrize(("users", "events", "low", "high"), [(300_000, 2e6, 1 / 1.5, 1.5), (20_000, 1e6, 1, 4)])
def test_lightgcn_steps(users, events, low, high):
    """A graph that a CPU's cache holds is faster than what is said of large ones."""
    rows = [r for r in cost.measured("scale") if r["what"] == "lightgcn step"]
    (measured,) = (r for r in rows if r["users"] == users and 0.9 < r["events"] / events < 1.1)
    predicted = cost.lightgcn_step_seconds(users + measured["items"], measured["events"], Cf())
    assert low <= predicted / measured["cpu_seconds"] <= high


def test_lightgcn_memory_is_at_most_what_the_formula_says():
    # docs/gid.md: N, E, d, B, measured GiB
    for nodes, events, dim, batch, measured in ((2e5, 2e6, 64, 10**6, 4.3), (1.5e5, 4e6, 16, 2 * 10**6, 2.4)):
        assert within(1.1, cost.lightgcn_bytes(nodes, events, Cf(dim=dim, batch=batch)), measured * 2**30)


@pytest.mark.parametrize("name", ["beauty", "demo"])
def test_published_trainings(name):
    config, scale = cost.published_case(name)
    seconds, ranks, steps = cost.published_run(name)
    cpu = cost.train_cpu_seconds(config, scale, steps * config.train.global_batch, ranks)
    assert within(1.5, (cpu + cost.validation_cpu_seconds(config, scale, steps)) / ranks, seconds)
    assert within(1.2, cost.train_events(config, scale) * config.train.epochs / config.train.global_batch, steps)


@pytest.mark.parametrize(("data", "batch"), [("phone", 128), ("phone", 1024), ("beauty", 128), ("beauty", 1024)])
def test_positions_of_a_target(data, batch):
    """What the loader counted on the real corpora, against the means of users and events alone."""
    rows = cost.measured("loader")["rows"]
    measured = row("loader", rows, config=data, encoding="pooled", batch=batch, workers=0)
    config, scale = cost.published_case(data)
    user, item = cost.lengths(config, scale)
    predicted = user + item * cost.items_of_a_batch(config, scale, batch) / batch
    assert within(1.2, predicted, measured["tokens/CPU-s"] / measured["samples/CPU-s"])


@pytest.mark.parametrize(("shape", "precision"), [(s, p) for s in ("small", "official") for p in ("fp32", "bf16")])
def test_flops_and_memory_of_a_step(shape, precision):
    """FLOPs of all shapes, which are computed from lengths alone; memory of the shape that it was not fitted to."""
    measured = row("train", **{"who": "ours", "shape": shape, "train.precision": precision})
    overrides = SHAPES[shape] | {"train.global_batch": str(measured["batch"]), "train.precision": precision}
    config = config_module.load("configs/phone.toml", overrides)
    _, scale = cost.published_case("phone")
    per_target = measured["tflops"] * 1e12 / measured["samples_per_s"]
    assert within(1.2, cost.flops_per_target(config, scale), per_target)
    assert within(1.3, cost.train_cpu_seconds(config, scale, 1, 1), 1 / measured["samples_per_cpu_s"])
    held = train_bytes(config, scale, 1, precision == "bf16")
    device = sum(held[name] for name in ("layers", "tables", "activations", "logits", "tree"))
    assert within(1.5, device + cost.INTERPRETER, measured["peak_gb"] * 1e9)


def test_decoding_of_other_data_and_beams():
    held_out = [
        r for r in cost.measured("scale") if r["what"] == "decode" and (r["data"], r["beams"]) != ("phone", 100)
    ]
    assert {r["beams"] for r in held_out} == {20, 100}
    for measured in held_out:
        flops = cost.decode_flops(ColaRecConfig(**measured["model"]), measured["positions_per_user"], measured["beams"])
        assert within(1.5, flops / cost.decode_rate(measured["model"]["d_model"]), measured["cpu_seconds_per_user"])


def test_validation_takes_what_docs_trainer_says():
    config, scale = cost.published_case("phone")  # 16 s for 10,000 users and 20 beams on one core
    assert within(3, cost.decode_cpu_seconds(config, scale, 10_000, 20), 16)


@pytest.mark.parametrize(("optimizer", "factor"), [("dense", 1.7), ("rowwise", 1.5)])
def test_tables(optimizer, factor):
    """The whole process beside the formula: AdamW's step needs copies that the formula leaves out."""
    for measured in cost.measured("tables")["cases"]:
        if measured["optimizer"] == optimizer and "rss_bytes" in measured:
            model = {"model.d_model": str(measured["width"]), "model.item_table": measured["table"]}
            settings = model | {"train.table_optimizer": optimizer, "history.user_slots": "0"}
            config = config_module.load("configs/phone.toml", settings)
            scale = cost.Scale(1e9, 1e6, measured["ids"], 1.0, 30)
            assert within(factor, cost.table_bytes(config, scale, 1, bf16=False), measured["rss_bytes"])
