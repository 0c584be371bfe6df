"""Implicit ALS (Hu, Koren and Volinsky, ICDM 2008) on Spark: collaborative embeddings of graphs of any size.

It minimises sum over all (u, i) of c_ui (p_ui - x_u . y_i)^2 + reg * (n_u |x_u|^2 + n_i |y_i|^2), where p_ui is 1 for
an interaction and else 0, and c_ui = 1 + alpha p_ui. Spark spreads the interactions and the factors over its executors;
what returns to this process is (U + I) d float32.
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import torch
from pyspark.ml.recommendation import ALS
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from contract.schema import TRAIN, VALID, read_interactions
from contract.settings import Cf
from gid.lightgcn import Embeddings, ValidRecall

# Iterations between checkpoints. Every iteration hangs on the one before: a long chain overflows the JVM's stack.
CHECKPOINT_INTERVAL = 3
CHECKED_USERS = 100_000  # users, at most, that the valid Recall@20 is the mean of


def fit(
    spark: SparkSession, corpus: Path, num_users: int, num_items: int, cf: Cf, seed: int, scratch: Path
) -> Embeddings:
    """Factors of the train split of a corpus; their inner product is the score.

    Args:
        corpus: the folder; the executors read interactions/ themselves.
        scratch: a folder for checkpoints, which the executors share as well.

    Raises:
        ValueError: there are no train interactions.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        spark.sparkContext.setCheckpointDir(scratch.absolute().as_uri())
        pairs = spark.read.parquet((corpus / "interactions").absolute().as_uri()).where(F.col("split") == TRAIN)
        pairs = pairs.select(F.col("user_idx").cast("int"), "item_idx", F.lit(1.0).alias("seen")).distinct()
        if pairs.isEmpty():
            raise ValueError("the corpus has no train interactions; check [data] and [etl], and run etl/build.py again")
        als = ALS(
            rank=cf.dim,
            maxIter=cf.als_iterations,
            regParam=cf.als_reg,
            alpha=cf.als_alpha,
            implicitPrefs=True,
            userCol="user_idx",
            itemCol="item_idx",
            ratingCol="seen",
            seed=seed,
            checkpointInterval=CHECKPOINT_INTERVAL,
        )
        model = als.fit(pairs.sort("user_idx", "item_idx"))  # in a fixed order, for the same sums in every run
        users, items = _table(model.userFactors, num_users, cf.dim), _table(model.itemFactors, num_items, cf.dim)
    return Embeddings(users, items, cf.als_iterations, _valid_recall(corpus, users, items, seed))


def _table(factors, num_ids: int, dim: int) -> np.ndarray:
    """float32 (num_ids + 1, dim), zeros for ids without factors. Partition by partition, to hold them once."""
    table = np.zeros((num_ids + 1, dim), np.float32)
    for batch in factors.toArrow().to_batches():
        table[batch["id"].to_numpy()] = batch["features"].flatten().to_numpy().reshape(-1, dim)
    return table


def _valid_recall(corpus: Path, users: np.ndarray, items: np.ndarray, seed: int) -> float:
    """Mean Recall@20 of valid users, of a sample when there are many; 0 when there are none."""
    valid = read_interactions(corpus, VALID)
    known = np.unique(valid[0])
    if not len(known):
        return 0.0
    if len(known) > CHECKED_USERS:
        known = np.sort(np.random.default_rng(seed).choice(known, CHECKED_USERS, replace=False))
    user, item = read_interactions(corpus, TRAIN, known)
    of_known = np.isin(valid[0], known)
    valid = np.searchsorted(known, valid[0][of_known]), valid[1][of_known].astype(np.int64) - 1
    train = np.searchsorted(known, user), item.astype(np.int64) - 1
    recall = ValidRecall(train, valid, len(items) - 1, torch.device("cpu"))
    return recall(torch.from_numpy(users[known]), torch.from_numpy(items[1:]))
