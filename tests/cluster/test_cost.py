"""The calculator beside what was measured: points that nothing was fitted to, each within a stated factor."""

import re

import pytest

from bench.train import SHAPES
from cluster import cost
from cluster.stages import ON_DEVICE, train_bytes
from contract import config as config_module
from contract.settings import Cf, Config
from trainer.model import ColaRecConfig

# How all was trained that was measured before there were causal attention and codebooks of prefixes.
FULL = {"history.attention": "full", "history.user_slots": 2, "loss.contrastive": 0.1, "model.codebooks": "level"}


def within(factor: float, predicted: float, measured: float) -> bool:
    return measured / factor <= predicted <= measured * factor


def row(name: str, rows: list[dict] | None = None, **values) -> dict:
    """The only row of bench/results/<name>.json with these values."""
    found = [r for r in rows or cost.measured(name) if all(r.get(k) == v for k, v in values.items())]
    assert len(found) == 1, found
    return found[0]


def on_device(config: Config, scale: cost.Scale, bf16: bool) -> float:
    """Bytes of a rank that trains alone and does not validate."""
    held = train_bytes(config, scale, 1, bf16)
    return sum(held[name] for name in ON_DEVICE if name not in ("tree", "vectors"))


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
    measured = row("gid", cost.measured("gid")["trees"], items=items, device="CPU")
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


@pytest.mark.parametrize(
    ("data", "variant"),
    [("phone", "full"), *((data, v) for data in ("demo", "beauty") for v in ("as it is", "large batch", "full"))],
)
def test_steps_of_other_data_batches_and_attention(data, variant):
    config, scale, row = cost.measured_steps(data, variant)
    assert within(1.3, cost.positions(config, scale, config.train.global_batch)[0], row["positions"])
    assert within(1.3, config.train.global_batch * cost.flops_per_row(config, scale), row["flops"])
    assert within(1.5, cost.train_cpu_seconds(config, scale, 1, 1), row["cpu_seconds"])
    assert within(1.5, on_device(config, scale, bf16=False) + cost.INTERPRETER, row["peak_gb"] * 1e9)


def published(name: str) -> tuple[Config, cost.Scale, dict]:
    """The run in bench/results/<name>.json, whenever it was: its config, its data, and what it says of its training."""
    results = cost.measured(name)
    manifests, facts = results["manifests"], results["protocol"]
    settings = {"history.attention": "full"}  # from before there was another
    for stage in manifests.values():
        settings |= stage["config"]
    epochs, batch = re.match(r"at most (\d+) epochs, global batch (\d+)", facts["training"]).groups()
    ranks, device = re.match(r"\d+ min on (\d+) x (\w+)", facts["trained"]).groups()
    settings |= {"train.epochs": int(epochs), "train.global_batch": int(batch)}
    counts = manifests["corpus"]["counts"]
    scale = cost.corpus_scale(counts["num_users"], counts["num_items"], counts["num_train"])
    return cost.as_run(name, settings), scale, manifests["model"]["counts"] | {"ranks": int(ranks), "device": device}


@pytest.mark.parametrize("name", ["demo", "beauty", "phone"])
def test_published_trainings(name):
    """Steps, and wall time on a machine that others used as well: at least what cores of one's own would take."""
    config, scale, run = published(name)
    epochs = run["step"] / (cost.rows_of_an_epoch(config, scale) // config.train.global_batch)
    assert run["best_epoch"] / 1.1 <= epochs <= config.train.epochs * 1.1
    if run["device"] == "cpu":
        cpu = cost.train_cpu_seconds(config, scale, run["step"], run["ranks"])
        alone = (cpu + cost.validation_cpu_seconds(config, scale, run["step"])) / run["ranks"]
        assert run["seconds"] / 10 <= alone <= 1.5 * run["seconds"]


@pytest.mark.parametrize(("data", "batch"), [("phone", 128), ("phone", 1024), ("beauty", 128), ("beauty", 1024)])
def test_positions_of_a_target(data, batch):
    """What the loader counted on the real corpora, with full attention, against the means of users and events."""
    rows = cost.measured("loader")["rows"]
    measured = row("loader", rows, config=data, encoding="pooled", batch=batch, workers=0)
    order = {"phone": "set", "beauty": "time"}[data]
    config = cost.as_run(data, FULL | {"history.order": order})
    _, scale, _ = cost.measured_steps(data, "full")
    predicted = cost.positions(config, scale, batch)[0] / batch
    assert within(1.2, predicted, measured["tokens/CPU-s"] / measured["samples/CPU-s"])


@pytest.mark.parametrize(("shape", "precision"), [(s, p) for s in ("small", "official") for p in ("fp32", "bf16")])
def test_wider_shapes(shape, precision):
    """FLOPs, which are computed from lengths alone; memory of the small shape, which nothing was fitted to. Not a test
    of the formulas: the speed of both and the memory of the official shape, which are fit points."""
    measured = row("train", **{"who": "ours", "shape": shape, "train.precision": precision})
    given = {key: value for key, value in SHAPES[shape].items() if key.startswith("model.") and value.isdigit()}
    settings = FULL | {key: int(value) for key, value in given.items()} | {"history.encoding": "tokens"}
    settings |= {"history.order": "set", "history.train_items": 10, "train.global_batch": measured["batch"]}
    config = cost.as_run("phone", settings | {"train.precision": precision})
    _, scale, _ = cost.measured_steps("phone", "full")
    per_target = measured["tflops"] * 1e12 / measured["samples_per_s"]
    assert within(1.2, cost.flops_per_row(config, scale), per_target)
    steps = measured["samples_per_cpu_s"] / measured["batch"]
    assert within(1.3, cost.train_cpu_seconds(config, scale, steps, 1), 1)
    assert within(1.5, on_device(config, scale, precision == "bf16") + cost.INTERPRETER, measured["peak_gb"] * 1e9)


def test_decoding_of_other_data_and_beams():
    held_out = [
        r for r in cost.measured("scale") if r["what"] == "decode" and (r["data"], r["beams"]) != ("phone", 100)
    ]
    assert {r["beams"] for r in held_out} == {20, 100}
    for measured in held_out:
        flops = cost.decode_flops(ColaRecConfig(**measured["model"]), measured["positions_per_user"], measured["beams"])
        assert within(1.5, flops / cost.decode_rate(measured["model"]["d_model"]), measured["cpu_seconds_per_user"])


@pytest.mark.parametrize("data", ["demo", "phone"])
def test_ranking_by_the_hybrid(data):
    """Beams, near items and search together; the near items' share of it is less than the beams' rate says."""
    measured = row("scale", what="hybrid", data=data)
    config = cost.as_run(data, {"eval.hybrid": 1.0, "eval.neighbours": float(measured.get("neighbours", 0))})
    scale = cost.corpus_scale(measured["users"], measured["items"], measured["events"])
    assert within(2, cost.rank_cpu_seconds(config, scale, 1, measured["beams"]), measured["cpu_seconds_per_user"])


@pytest.mark.parametrize(("optimizer", "factor"), [("dense", 1.7), ("rowwise", 1.5)])
def test_tables(optimizer, factor):
    """The whole process beside the formula: AdamW's step needs copies that the formula leaves out."""
    for measured in cost.measured("tables")["cases"]:
        if measured["optimizer"] == optimizer and "rss_bytes" in measured:
            model = {"model.d_model": str(measured["width"]), "model.item_table": measured["table"]}
            settings = model | {"train.table_optimizer": optimizer, "train.ema": "0"}
            config = config_module.load("configs/phone.toml", settings)
            scale = cost.Scale(1e9, 1e6, measured["ids"], 1.0, 30)
            assert within(factor, cost.table_bytes(config, scale, 1, bf16=False), measured["rss_bytes"])


def test_weights_of_codes_and_their_teacher():
    """K^t K M (D + 1) of each level t but the last; 2 Q K of each target and such level beside L_softmax's 6 Q D."""
    settings = {"gid.branching": "8", "gid.length": "3", "model.d_model": "64", "history.attention": "full"}
    scale = cost.Scale(1e6, 1e5, 5e4, 1.0, 30)
    weights, work = {}, {}
    for vectors, distil in (("1", "0"), ("4", "0"), ("4", "0.8")):
        settings |= {"model.code_vectors": vectors, "loss.distil": distil, "train.negatives": "1000"}
        config = config_module.load("configs/phone.toml", settings)
        weights[vectors], work[distil] = (
            cost.num_layer_weights(config, scale),
            cost.softmax_flops_per_row(config, scale),
        )
    assert weights["4"] - weights["1"] == 3 * (8 + 8 * 8) * (64 + 1)
    few = cost.Scale(1e6, 1e5, 300, 1.0, 30)  # items: 4.7 below each of the second level's codes
    assert cost.num_layer_weights(config, few) - weights["1"] == 3 * 8 * (64 + 1) + (64 * 65) * 1
    assert work["0"] == 6 * 1000 * 64
    assert work["0.8"] == 6 * 1000 * 64 + 2 * 2 * 1000 * 8
