"""Logs a trained model to MLflow as one that answers HTTP requests, and says how to serve it, or serves it.

python eval/serving.py --config configs/demo.toml
python eval/serving.py --config configs/demo.toml --port 5001

It is registered under the name of the experiment. It holds copies of the model, the GIDs, and of corpus/ the items,
their sampled users and the tokenizer; interactions and shards stay where they are. eval/served.py is what it does,
eval/server.py the server.
"""

import argparse
import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array

from contract import cli
from contract import config as config_module
from contract.artifacts import MANIFEST, STAGES, Artifact, open_artifact
from contract.cli import Progress
from contract.settings import Config
from contract.tracking import absolute_uri, track
from eval.items import read_names
from eval.served import WORK
from gid import neighbours
from trainer.inputs import read_catalog

# What is needed of corpus/ and gid/ to serve. The last two of corpus/ are derived from the tables before them: see
# `schema.map_tokens`.
CORPUS_FILES = ("items.parquet", "item_users.parquet", "tokenizer", ".items.token_ids", ".item_users.user_idxs")
GID_FILES = ("gids.parquet", neighbours.ITEMS, neighbours.WEIGHTS)
CODE = ("contract", "gid", "trainer", "eval")
PACKAGES = ("mlflow", "torch", "transformers", "safetensors", "sentencepiece", "webdataset", "fsspec", "pyarrow")
PACKAGES += ("pandas", "numpy", "scipy")

SIGNATURE = ModelSignature(
    # eval/served.py checks them all: MLflow would make texts of numbers and of null, and of optional columns that have
    # types some rows alone could not do without.
    inputs=Schema(
        [
            ColSpec(AnyType(), "history"),  # item ids or texts, oldest first
            ColSpec(AnyType(), "timestamps", required=False),  # of the history, whole ms
            ColSpec(AnyType(), "events", required=False),  # of the history, such as "view"
            ColSpec(AnyType(), "k", required=False),  # a whole number
            ColSpec(AnyType(), "exclude", required=False),  # item ids that are not to be recommended
            ColSpec(AnyType(), "only", required=False),  # item ids: nothing else is to be
        ]
    ),
    outputs=Schema(  # best first
        [
            ColSpec(Array(DataType.string), "item_id"),
            ColSpec(Array(DataType.double), "score"),
            ColSpec(Array(DataType.string), "title"),
        ]
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="N", help="serve it right away, at http://127.0.0.1:N/invocations")


def main(argv: list[str]) -> None:
    config, given = cli.parse_more(argv, __doc__, "[--port N]", add_arguments)
    if given.dry_run:
        reads = {need: config.work_dir / need for need in STAGES["eval"].needs}
        return cli.show_plan(config, reads, f"{config.tracking.uri}, model {config.name}")
    inputs = {need: open_artifact(config, need) for need in STAGES["eval"].needs}
    read_catalog(inputs["corpus"], inputs["gid"])  # writes the tables derived from those of corpus/
    progress = Progress("serving")
    # Beside what is copied: a catalog may be larger than what /tmp holds.
    with (
        track(config, "serving") as run,
        tempfile.TemporaryDirectory(dir=config.work_dir, prefix=".serving.") as folder,
    ):
        gather(config, inputs, Path(folder) / WORK)
        progress("logs the model")
        uri = run.served_model(
            "recommender",
            registered=config.name,
            python_model=str(Path(__file__).with_name("served.py")),
            code_paths=[str(Path(__file__).parents[1] / room) for room in CODE],
            artifacts={WORK: str(Path(folder) / WORK)},
            signature=SIGNATURE,
            input_example=pd.DataFrame([{"history": [read_names(inputs["corpus"].path).item_id[1].as_py()], "k": 5}]),
            pip_requirements=requirements(),
        )
    store = {"MLFLOW_TRACKING_URI": absolute_uri(config.tracking.uri)}
    command = [
        sys.executable,
        str(Path(__file__).absolute().with_name("server.py")),
        uri,
        "--port",
        str(given.port or 5001),
    ]
    if given.port:
        progress(f"serves {uri} at http://127.0.0.1:{given.port}/invocations")
        os.execve(command[0], command, os.environ | store)
    told = " ".join(f"{name}={shlex.quote(value)}" for name, value in store.items())
    progress(f"logged {uri}; serve it with\n\n{told} {shlex.join(command)}\n")


def gather(config: Config, inputs: dict[str, Artifact], folder: Path) -> None:
    """Copies what serving reads of a work folder."""
    files = {"corpus": CORPUS_FILES, "gid": GID_FILES, "model": tuple(inputs["model"].manifest["files"])}
    for need, artifact in inputs.items():
        (folder / need).mkdir(parents=True)
        for name in (MANIFEST, *files[need]):
            source = artifact.path / name
            if source.is_dir():
                shutil.copytree(source, folder / need / name)
            elif source.is_file():  # a catalog without texts has no tokenizer, a gid/ may have no neighbours
                shutil.copy(source, folder / need / name)
    (folder / "config.toml").write_text(config_module.to_toml(config), encoding="utf-8")


def requirements() -> list[str]:
    """The packages that serving needs, in the versions that are here; FAISS under the name that it has here."""
    faiss = importlib.metadata.packages_distributions()["faiss"]
    return [f"{name}=={importlib.metadata.version(name)}" for name in (*PACKAGES, *faiss)]


if __name__ == "__main__":
    cli.run(main)
