"""Builds gid/: collaborative embeddings of the train split, and the tree whose paths name the items.

    python gid/build.py --config configs/demo.toml
    python gid/build.py --config configs/phone.toml --gid.branching=64 --dry-run
    spark-submit gid/build.py --config configs/shop.toml --cf.method=als
    python gid/build.py --config configs/shop.toml --extend

Reads <work>/corpus. Writes <work>/gid:
    gids.parquet           the GID of every item
    item_embeddings.npy    float32 (I + 1, d), row item_idx; row 0 is zeros
    user_embeddings.npy    float32 (U + 1, d), row user_idx; row 0 is zeros
    tree_embeddings.npy    float32 (I + 1, d'), what the tree clusters; absent when it is the item embeddings
    neighbours.npy, neighbour_weights.npy
                           the items that the same people take, see gid/neighbours.py; absent without gid.neighbours
    report.html            the tree, what its clusters hold, and a map of the items
The inner product of a user's and an item's row is the score of LightGCN, or of ALS. Uses a GPU when there is one.

--extend reads the <work>/gid of an older corpus as well: items that it knows, by item_id, keep GID and embedding, the
others are placed in the same tree by their content.
"""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from contract.artifacts import Artifact, Output, open_artifact, stage_output
from contract.cli import Progress, parse, run, show_plan
from contract.disk import save_array
from contract.schema import GIDS_OF_ITEMS, TRAIN, VALID, Items, read_interactions, read_items
from contract.settings import Config
from contract.tracking import Run, track
from gid import cold, content, lightgcn, neighbours
from gid.extend import Grown, grow
from gid.hierarchy import build_tree, check_room, gid_length, random_tree
from gid.report import describe, write_report

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class Made:
    """What a build makes. Row 0 of every table but the GIDs is padding."""

    gids: np.ndarray  # int16 (I, l)
    items: np.ndarray  # float32 (I + 1, d)
    users: np.ndarray  # float32 (U + 1, d)
    tree: np.ndarray  # float32 (I + 1, d'), what was clustered
    counts: dict  # of this way of making it


def main(argv: list[str]) -> None:
    extends = "--extend" in argv
    config, dry_run = parse([word for word in argv if word != "--extend"], __doc__)
    if dry_run:
        reads = {"corpus": config.work_dir / "corpus"} | ({"older gid": config.work_dir / "gid"} if extends else {})
        show_plan(config, reads, config.work_dir / "gid")
        return
    corpus = open_artifact(config, "corpus")
    items, progress = read_items(corpus.path), Progress("gid")
    older = open_artifact(config, "gid", any_input=True) if extends else None
    length = config.gid.length or gid_length(items.num_items, config.gid.branching, config.gid.slack)
    if not older:
        check_room(items.num_items, config.gid.branching, length)
    with stage_output(config, "gid") as output, track(config, "gid") as tracker:
        if older:
            made = extended(config, corpus, items, older, output, progress)
        else:
            made = built(config, corpus, items, length, output, progress, tracker)
        counts = {
            "num_users": corpus.counts["num_users"],
            "num_items": items.num_items,
            **made.counts,
            **describe(config, made.tree[1:], made.gids),
        }
        progress(
            f"GIDs of length {counts['length']}; {counts['num_leaves']} leaves; leaf SSE "
            f"{counts['leaf_sse']:.4g}, of random leaves as large {counts['leaf_sse_random']:.4g}"
        )
        tracker.metrics({name: value for name, value in counts.items() if isinstance(value, (int, float))})
        write(output, made, items)
        write_report(output.path / "report.html", config, corpus.path, made.gids, made.tree[1:], counts)
        tracker.artifact(output.path / "report.html")
        output.commit(counts, {"corpus": corpus.digest})
        progress(f"wrote {config.work_dir / 'gid'}; its report.html shows the tree")


def built(
    config: Config, corpus: Artifact, items: Items, length: int, output: Output, progress: Progress, tracker: Run
) -> Made:
    """A tree of this corpus alone."""
    embeddings = from_train(config, corpus, items.num_items, output, progress, tracker)
    is_cold = ~embeddings.items[1:].any(axis=1)
    if is_cold.all():
        raise ValueError("no item has an embedding: the corpus has no train interactions")
    embeddings.items[1:] = cold.fill(embeddings.items[1:], items.tokens, is_cold, config.seed)
    progress(f"{is_cold.sum()} cold items embedded from their content")
    tree = tree_embeddings(config, embeddings.items, items)
    if config.gid.method == "random":
        gids = random_tree(items.num_items, config.gid.branching, length, config.seed)
    else:
        gids = build_tree(tree[1:], config.gid.branching, length, config.gid.headroom, config.seed)
    method = config.cf.method
    counts = {
        "num_cold": int(is_cold.sum()),
        f"{method}_best_epoch": embeddings.best_epoch,
        f"{method}_valid_recall@20": embeddings.valid_recall,
    }
    return Made(gids, embeddings.items, embeddings.users, tree, counts)


def from_train(
    config: Config, corpus: Artifact, num_items: int, output: Output, progress: Progress, tracker: Run
) -> lightgcn.Embeddings:
    """Embeddings by cf.method, zeros for what train does not know. Writes the neighbours."""
    num_users = corpus.counts["num_users"]
    progress(f"{num_users} users, {num_items} items, {corpus.counts.get('num_train', 'some')} train interactions")

    def report(epoch: int, loss: float, recall: float) -> None:
        progress(f"lightgcn epoch {epoch}: loss {loss:.4f}, valid recall@20 {recall:.4f}")
        tracker.metrics({"lightgcn/loss": loss, "lightgcn/valid_recall@20": recall}, step=epoch)

    with spark_if_needed(config) as spark:
        write_neighbours(config, corpus, num_items, output, progress, spark)
        if spark:
            from gid import als

            found = als.fit(spark, corpus.path, num_users, num_items, config.cf, config.seed, output.path / "als")
            progress(f"als: valid recall@20 {found.valid_recall:.4f}")
            return found
    train, valid = read_interactions(corpus.path, TRAIN), read_interactions(corpus.path, VALID)
    return lightgcn.fit(train, valid, num_users, num_items, config.cf, config.seed, report)


def spark_if_needed(config: Config) -> contextlib.AbstractContextManager:
    """A Spark session for cf.method = "als", for logs that no memory holds; else None."""
    if config.cf.method != "als":
        return contextlib.nullcontext()
    from contract.spark import spark_session  # here: LightGCN needs no Spark

    return spark_session("colarec gid", "contract", "gid")


def write_neighbours(
    config: Config, corpus: Artifact, num_items: int, output: Output, progress: Progress, spark: "SparkSession | None"
) -> None:
    """The gid.neighbours items that the same people take as each, by Spark or, without a session, in memory."""
    count = config.gid.neighbours
    if not count:
        return
    if spark:
        from gid import cooccurrence

        cooccurrence.write(spark, corpus.path, num_items, count, output.path)
    else:
        pairs = read_interactions(corpus.path, TRAIN)
        neighbours.write(output.path, neighbours.find(*pairs, corpus.counts["num_users"], num_items, count))
    progress(f"up to {count} neighbours of each item")


def tree_embeddings(config: Config, cf: np.ndarray, items: Items) -> np.ndarray:
    """float32 (I + 1, d'): what gid.method clusters."""
    if config.gid.method not in ("content", "fused"):
        return cf
    rows = content.features(items.tokens, config.cf.dim, config.seed)
    if config.gid.method == "fused":
        rows = np.concatenate([content.whitened(cf[1:]), content.whitened(rows)], axis=1)
    return np.concatenate([np.zeros((1, rows.shape[1]), np.float32), rows])


def extended(
    config: Config, corpus: Artifact, items: Items, older: Artifact, output: Output, progress: Progress
) -> Made:
    """The tree of an older corpus with the items of this one. Writes the neighbours."""
    grown: Grown = grow(config, older.path, items)
    with spark_if_needed(config) as spark:
        write_neighbours(config, corpus, items.num_items, output, progress, spark)
    users = mean_of_items(read_interactions(corpus.path, TRAIN), grown.items, corpus.counts["num_users"])
    share = grown.num_displaced / max(grown.num_added, 1)
    progress(
        f"{grown.num_kept} items kept their GID, {grown.num_added} were added, {grown.num_removed} are gone; "
        f"{share:.1%} of the added ones were displaced by full clusters"
    )
    if share > config.gid.rebuild_share:
        progress(
            f"a rebuild is due: more than gid.rebuild_share = {config.gid.rebuild_share:.0%}; run without --extend"
        )
    counts = {
        "num_kept": grown.num_kept,
        "num_added": grown.num_added,
        "num_removed": grown.num_removed,
        "displaced_share": share,
        "rebuild_due": share > config.gid.rebuild_share,
    }
    return Made(grown.gids, grown.items, users, grown.tree, counts)


def mean_of_items(pairs: tuple[np.ndarray, np.ndarray], items: np.ndarray, num_users: int) -> np.ndarray:
    """float32 (U + 1, d): the mean of a user's train items, zeros without any."""
    user, item = pairs
    members = sp.csr_matrix((np.ones(len(user), np.float32), (user, item)), (num_users + 1, len(items)))
    degree = np.maximum(np.bincount(user, minlength=num_users + 1), 1)[:, None]
    return (members @ items / degree).astype(np.float32)


def write(output: Output, made: Made, items: Items) -> None:
    offsets = np.arange(0, made.gids.size + 1, made.gids.shape[1], dtype=np.int32)
    rows = pa.ListArray.from_arrays(offsets, made.gids.ravel())
    numbers = pa.array(np.arange(1, items.num_items + 1, dtype=np.int32))
    table = pa.Table.from_arrays([numbers, rows, pa.array(items.item_ids[1:], pa.string())], schema=GIDS_OF_ITEMS)
    pq.write_table(table, output.path / "gids.parquet")
    save_array(output.path / "item_embeddings.npy", made.items)
    save_array(output.path / "user_embeddings.npy", made.users)
    if made.tree is not made.items:
        save_array(output.path / "tree_embeddings.npy", made.tree)


if __name__ == "__main__":
    run(main)
