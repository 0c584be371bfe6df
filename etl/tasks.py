"""Work that Spark spreads but does not look into: a task is a plain function on files of the shared file system.

A task writes under a name that no other attempt of it can have and returns that name; the driver goes on with the
names that the job returned. So a lost executor, a retry or a speculative copy leaves files behind that nobody reads,
never two of one, never half of one.
"""

import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

Task, Result = TypeVar("Task"), TypeVar("Result")


def run_tasks(spark: SparkSession, function: Callable[[Task], Result], tasks: list[Task]) -> list[Result]:
    """`function` of every task, on the executors; the results in the order of the tasks."""
    if not tasks:
        return []
    return spark.sparkContext.parallelize(tasks, len(tasks)).map(function).collect()


def check_shared(spark: SparkSession, folder: Path) -> None:
    """Lets a task for every core write a file into the folder, and looks whether it is there.

    Raises:
        ValueError: an executor cannot write there, or has another folder of this name.
    """
    probe = functools.partial(_probe, folder=folder)
    for host, name, error in run_tasks(spark, probe, list(range(spark.sparkContext.defaultParallelism))):
        if error or not (folder / name).is_file():
            what = error or f"a file that it wrote into {folder} is not there for the driver"
            raise ValueError(
                f"the executor on {host} does not share the work folder: {what}; "
                "choose one (--work=...) on a file system that all machines mount under the same path"
            )
        (folder / name).unlink()


def _probe(_: int, folder: Path) -> tuple[str, str, str]:
    """(host, name of the file written, the error if it was not)."""
    name = unique_name()
    try:
        (folder / name).touch()
    except OSError as error:
        return os.uname().nodename, name, str(error)
    return os.uname().nodename, name, ""


def unique_name() -> str:
    return uuid.uuid4().hex


def remove_folder(folder: Path) -> None:
    """Removes a folder that a task which nobody waits for, a late speculative copy, may still write into."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(1)
    shutil.rmtree(folder)


def write_arrow(file: Path, **columns) -> None:
    """Writes arrays of one length as an uncompressed Arrow file, which `read_arrow` maps into memory."""
    table = pa.table(columns)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))


def read_arrow(file: Path) -> dict[str, pa.Array]:
    """{column: array}, without a copy."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    empty = {name: pa.array([], table.schema.field(name).type) for name in table.column_names}
    return empty | {name: table[name].chunk(0) for name in table.column_names if table.num_rows}


def read_items(stage: Path, folders: list[str]) -> np.ndarray:
    """int32: the column `item`, catalog numbers, of the Parquet folders of these names."""
    return np.concatenate([np.zeros(0, np.int32), *(pq.read_table(stage / f)["item"].to_numpy() for f in folders)])
