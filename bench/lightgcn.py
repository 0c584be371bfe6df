"""LightGCN of gid/lightgcn.py against RecBole's, on the same split, of the same size, scored by the same code.

    pip install recbole        (or, beside newer packages: pip install --no-deps --target DIR recbole, PYTHONPATH=DIR)
    OMP_NUM_THREADS=1 python -m bench.lightgcn --config configs/phone.toml

Reads <work>/corpus and <work>/gid, whose embeddings are ours. Trains RecBole's model on the train split, stopped
by its own valid Recall@20, with each learning rate of --lr, and takes the best by valid. Ranks all items for
every user of the test split, train items masked, with eval/. Writes bench/results/lightgcn.{json,md}.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from contract import config as config_module
from contract import schema
from contract.artifacts import Artifact, git_revision, open_artifact
from contract.metrics import ranking_metrics
from contract.settings import Config
from eval import baselines
from eval.users import read_eval_users

RESULTS = Path(__file__).parent / "results"
CUTOFFS = [10, 20]


def train_recbole(config: Config, corpus: Artifact, folder: Path, lr: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(user embeddings (U + 1, d), item embeddings (I + 1, d), its valid Recall@20) of the best epoch."""
    restore_old_names()
    from recbole.config import Config as RecboleConfig
    from recbole.data import create_dataset, data_preparation
    from recbole.model.general_recommender import LightGCN
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    settings = RecboleConfig(
        model="LightGCN",
        dataset="corpus",
        config_dict={
            "data_path": str(folder),
            "benchmark_filename": ["train", "valid", "test"],
            "load_col": {"inter": ["user_id", "item_id"]},
            "checkpoint_dir": str(folder),
            "embedding_size": config.cf.dim,
            "n_layers": config.cf.num_layers,
            "reg_weight": 1e-4,
            "learning_rate": lr,
            "train_batch_size": config.cf.batch,
            "eval_batch_size": 1 << 22,
            "epochs": 300,
            "eval_step": 5,
            "stopping_step": 4,
            "metrics": ["Recall"],
            "topk": [20],
            "valid_metric": "Recall@20",
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "RO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
            "seed": config.seed,
            "use_gpu": False,
            "show_progress": False,
            "state": "WARNING",
            "log_wandb": False,
        },
    )
    init_seed(config.seed, True)
    dataset = create_dataset(settings)
    train, valid, _ = data_preparation(settings, dataset)
    model = LightGCN(settings, train.dataset)
    trainer = Trainer(settings, model)
    best, _ = trainer.fit(train, valid, saved=True, show_progress=False)
    model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
    with torch.no_grad():
        users, items = (part.numpy() for part in model.forward())
    return (
        _by_our_ids(users, dataset.field2id_token["user_id"], corpus.counts["num_users"]),
        _by_our_ids(items, dataset.field2id_token["item_id"], corpus.counts["num_items"]),
        float(best),
    )


def restore_old_names() -> None:
    """What RecBole 1.2.1 uses and numpy 2 and scipy 1.15 have dropped."""
    for old, new in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        setattr(np, old, new)
    sp.dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)


def write_atomic_files(corpus: Artifact, folder: Path) -> None:
    """RecBole's input: corpus.{train,valid,test}.inter."""
    (folder / "corpus").mkdir()
    for split, name in enumerate(schema.SPLITS):
        pairs = np.stack(schema.read_interactions(corpus.path, split), axis=1)
        with (folder / "corpus" / f"corpus.{name}.inter").open("w") as stream:
            stream.write("user_id:token\titem_id:token\n")
            np.savetxt(stream, pairs, fmt="%d", delimiter="\t")


def _by_our_ids(rows: np.ndarray, tokens: np.ndarray, num_ids: int) -> np.ndarray:
    result = np.zeros((num_ids + 1, rows.shape[1]), np.float32)
    result[[int(token) for token in tokens[1:]]] = rows[1:]  # row 0 is its padding
    return result


def score(corpus: Artifact, gid: Artifact, users: np.ndarray, items: np.ndarray, split: str) -> dict[str, float]:
    """Recall and NDCG over all users of the split; items without train interactions have no embedding in either."""
    fit = baselines.read_fit(corpus, gid)
    fit = dataclasses.replace(fit, user_embeddings=users, item_embeddings=items)
    asked = read_eval_users(corpus, split)
    ranked = baselines.BASELINES["lightgcn"](fit, asked, max(CUTOFFS), mask_seen=True).item_idx
    return {name: float(values.mean()) for name, values in ranking_metrics(ranked, asked.targets, CUTOFFS).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--work", default="", help="as in the stages")
    parser.add_argument("--lr", default="2e-3,5e-3", help="learning rates of RecBole, separated by commas")
    args = parser.parse_args()
    config = config_module.load(args.config, {"work": args.work} if args.work else {})
    corpus, gid = open_artifact(config, "corpus"), open_artifact(config, "gid")
    ours = [np.load(gid.path / f"{who}_embeddings.npy") for who in ("user", "item")]
    ours[1][np.bincount(schema.read_interactions(corpus.path, schema.TRAIN)[1], minlength=len(ours[1])) == 0] = 0
    rows = {"gid/lightgcn.py": score(corpus, gid, *ours, "test")}
    with tempfile.TemporaryDirectory() as folder:
        write_atomic_files(corpus, Path(folder))
        trained = []
        for lr in map(float, args.lr.split(",")):
            start = time.monotonic()
            users, items, valid = train_recbole(config, corpus, Path(folder), lr)
            print(f"RecBole, lr {lr:g}: valid recall@20 {valid:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            trained.append((valid, lr, users, items))
    _, lr, users, items = max(trained, key=lambda entry: entry[0])
    rows[f"RecBole, lr {lr:g}"] = score(corpus, gid, users, items, "test")
    report(config, rows)


def report(config: Config, rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    lines = [
        f"LightGCN on {config.name}, test users, all items ranked, train items masked; revision {git_revision()}",
        "",
    ]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {who} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for who, row in rows.items()]
    ours, peer = rows.values()
    lines += ["| ratio | " + " | ".join(f"{ours[name] / peer[name]:.3f}" for name in names) + " |"]
    text = "\n".join(lines) + "\n"
    (RESULTS / "lightgcn.md").write_text(text)
    (RESULTS / "lightgcn.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
