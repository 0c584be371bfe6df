"""Builds gid/: collaborative embeddings of the train split, and the tree whose paths name the items.

    python gid/build.py --config configs/demo.toml
    python gid/build.py --config configs/phone.toml --gid.branching=64 --dry-run

Reads <work>/corpus. Writes <work>/gid:
    gids.parquet           the GID of every item
    item_embeddings.npy    float32 (I + 1, d), row item_idx; row 0 is zeros
    user_embeddings.npy    float32 (U + 1, d), row user_idx; row 0 is zeros
The inner product of a user's and an item's row is LightGCN's score. Uses a GPU when there is one.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contract.artifacts import Output, open_artifact, stage_output
from contract.cli import Progress, parse, run, show_plan
from contract.config import Config
from contract.schema import GIDS, TRAIN, VALID, read_interactions, read_items
from contract.tracking import Run, track
from gid import cold, lightgcn
from gid.hierarchy import build_tree, check_room, cluster_capacity, gid_length, leaf_sse, random_tree


def main(argv: list[str]) -> None:
    config, dry_run = parse(argv, __doc__)
    if dry_run:
        show_plan(config, {"corpus": config.work_dir / "corpus"}, config.work_dir / "gid")
        return
    corpus = open_artifact(config, "corpus")
    items, progress = read_items(corpus.path), Progress("gid")
    length = config.gid.length or gid_length(items.num_items, config.gid.branching, config.gid.slack)
    check_room(items.num_items, config.gid.branching, length)
    with stage_output(config, "gid") as output, track(config, "gid") as tracker:
        train, valid = read_interactions(corpus.path, TRAIN), read_interactions(corpus.path, VALID)
        num_users = corpus.counts["num_users"]
        progress(f"{num_users} users, {items.num_items} items, {len(train[0])} train interactions")

        embeddings = train_lightgcn(config, train, valid, num_users, items.num_items, progress, tracker)
        is_cold = items.num_train[1:] == 0
        item_embeddings = embeddings.items
        item_embeddings[1:] = cold.fill(item_embeddings[1:], items.tokens, is_cold, config.seed)
        progress(f"{is_cold.sum()} cold items embedded from their content")

        gids = make_gids(config, item_embeddings[1:], length)
        counts = {
            "num_users": num_users,
            "num_items": items.num_items,
            "num_cold": int(is_cold.sum()),
            "lightgcn_best_epoch": embeddings.best_epoch,
            "lightgcn_valid_recall@20": embeddings.valid_recall,
            **describe(config, item_embeddings[1:], gids),
        }
        progress(
            f"GIDs of length {counts['length']}; {counts['num_leaves']} leaves; leaf SSE "
            f"{counts['leaf_sse']:.4g}, of random leaves as large {counts['leaf_sse_random']:.4g}"
        )
        tracker.metrics({name: value for name, value in counts.items() if isinstance(value, (int, float))})
        write(output, gids, item_embeddings, embeddings.users)
        output.commit(counts, {"corpus": corpus.digest})
        progress(f"wrote {config.work_dir / 'gid'}")


def train_lightgcn(
    config: Config, train, valid, num_users: int, num_items: int, progress: Progress, tracker: Run
) -> lightgcn.Embeddings:
    def report(epoch: int, loss: float, recall: float) -> None:
        progress(f"lightgcn epoch {epoch}: loss {loss:.4f}, valid recall@20 {recall:.4f}")
        tracker.metrics({"lightgcn/loss": loss, "lightgcn/valid_recall@20": recall}, step=epoch)

    return lightgcn.fit(train, valid, num_users, num_items, config.cf, config.seed, report)


def make_gids(config: Config, embeddings: np.ndarray, length: int) -> np.ndarray:
    """int16 (I, l) by gid.method."""
    if config.gid.method == "random":
        return random_tree(len(embeddings), config.gid.branching, length, config.seed)
    return build_tree(embeddings, config.gid.branching, length, config.gid.headroom, config.seed)


def describe(config: Config, embeddings: np.ndarray, gids: np.ndarray) -> dict:
    """What a reader of the manifest wants to know of the tree; a leaf is a prefix of length l - 1."""
    num_items, length = gids.shape
    sizes = [np.unique(gids[:, :level], axis=0, return_counts=True)[1] for level in range(1, length)]
    capacities, node = [], num_items
    for level in range(1, length):
        node = cluster_capacity(node, config.gid.branching, length - level, config.gid.headroom)
        capacities.append(node)
    shuffled = np.random.default_rng(config.seed).permutation(num_items)
    return {
        "branching": config.gid.branching,
        "length": length,
        "num_leaves": len(sizes[-1]) if sizes else 1,
        "capacity_per_level": capacities,
        "largest_cluster_per_level": [int(s.max()) for s in sizes],
        "leaf_sse": leaf_sse(embeddings, gids),
        "leaf_sse_random": leaf_sse(embeddings, gids[shuffled]),
    }


def write(output: Output, gids: np.ndarray, item_embeddings: np.ndarray, user_embeddings: np.ndarray) -> None:
    offsets = np.arange(0, gids.size + 1, gids.shape[1], dtype=np.int32)
    rows = pa.ListArray.from_arrays(offsets, gids.ravel())
    table = pa.Table.from_arrays([pa.array(np.arange(1, len(gids) + 1, dtype=np.int32)), rows], schema=GIDS)
    pq.write_table(table, output.path / "gids.parquet")
    np.save(output.path / "item_embeddings.npy", item_embeddings)
    np.save(output.path / "user_embeddings.npy", user_embeddings)


if __name__ == "__main__":
    run(main)
