"""The trained model behind `mlflow models serve`. MLflow runs this file to load it; nothing is unpickled.

It holds what eval/serving.py logged: of corpus/ the items, their sampled users and the tokenizer; the GIDs; the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from contract import config as config_module
from contract import schema
from contract.artifacts import STAGES, open_finished
from eval import people
from eval.items import indices, read_names
from trainer.beam import best_items
from trainer.packing import to_tensors
from trainer.recommender import load

WORK = "work"  # the artifact: a work folder with what is needed of it
DEFAULT_K = 10
MAX_ONLY = 10_000  # they are scored one by one for their person


@dataclass(frozen=True)
class Request:
    """What is asked for one person."""

    acts: list[people.Act]  # oldest first, one at least
    k: int
    exclude: np.ndarray  # int64 item_idx
    only: np.ndarray | None  # int64 item_idx, each once; None: all items


class Served(mlflow.pyfunc.PythonModel):
    """A person per row in, a list per row out."""

    def load_context(self, context) -> None:
        work = Path(context.artifacts[WORK])
        self._config = config_module.load(str(work / "config.toml"), {"work": str(work)})
        inputs = {
            need: open_finished(work / need, "python eval/serving.py --config <your config>")
            for need in STAGES["eval"].needs
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._recommender = load(self._config, inputs, device)
        self._names = read_names(inputs["corpus"].path)
        self._reader = people.Reader(self._config, inputs["corpus"], self._recommender.catalog, self._names)

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        """The lists of the persons of a data frame; its columns, and those returned, are in eval/serving.py.

        Raises:
            MlflowException: a row asks for what cannot be; its message says which and why, and its HTTP status is 400.
        """
        requests = []
        for number, row in enumerate(model_input.to_dict("records"), 1):
            try:
                requests.append(self._request({name: value for name, value in row.items() if _is_given(value)}))
            except ValueError as error:
                raise MlflowException(f"row {number}: {error}", INVALID_PARAMETER_VALUE) from None
        of_all, size = [request for request in requests if request.only is None], self._config.eval.batch
        answers = (row for begin in range(0, len(of_all), size) for row in self._best(of_all[begin : begin + size]))
        return pd.DataFrame([next(answers) if r.only is None else self._best_of_only(r) for r in requests])

    def _request(self, row: dict) -> Request:
        """Raises ValueError when a value cannot be used."""
        words = _list(row, "history", str)
        if not words:
            raise ValueError("history is empty: give at least one item id or text")
        times = _list(row, "timestamps", int, [schema.NO_TIME] * len(words))
        events = _list(row, "events", str, [""] * len(words))
        for name, values in (("timestamps", times), ("events", events)):
            if len(values) != len(words):
                raise ValueError(f"{name} has {len(values)} entries, history {len(words)}")
        if (np.diff(times) < 0).any():
            raise ValueError("timestamps go back in time; give the history oldest first")
        k, most = row.get("k", DEFAULT_K), self._config.eval.beams
        if not (isinstance(k, int | float) and 1 <= k <= most and k == int(k)):
            raise ValueError(f"k = {k!r} is not a whole number within 1..{most}")
        only = None
        if "only" in row:
            only = np.unique(indices(self._names, _list(row, "only", str), "only"))
            if not 1 <= len(only) <= MAX_ONLY:
                raise ValueError(f"only has {len(only):,} items; give 1 to {MAX_ONLY:,}, or leave it out")
        acts = [self._reader.act(*said) for said in zip(words, times, events, strict=True)]
        return Request(acts, int(k), indices(self._names, _list(row, "exclude", str, []), "exclude"), only)

    def _batch(self, requests: list[Request]) -> dict:
        """As `Recommender.recommend` takes it."""
        batch = people.batch_of(self._config, self._recommender.catalog, [request.acts for request in requests])
        rows = np.repeat(np.arange(len(requests)), [len(request.exclude) for request in requests])
        never = {"seen_row": rows, "seen_item": np.concatenate([request.exclude for request in requests])}
        if self._config.eval.mask_seen:
            never = {name: np.concatenate([batch[name].numpy(), values]) for name, values in never.items()}
        return batch | to_tensors(never)

    def _best(self, requests: list[Request]) -> list[dict]:
        """The best of all items. A list is the same whatever k is asked for beside it."""
        found = self._recommender.recommend(self._batch(requests), max(request.k for request in requests))
        ranked = zip(requests, found["item_idx"].cpu(), found["score"].cpu(), strict=True)
        return [self._answer(item_K[: request.k], score_K[: request.k]) for request, item_K, score_K in ranked]

    def _best_of_only(self, request: Request) -> dict:
        batch, item_1N = self._batch([request]), torch.from_numpy(request.only)[None]
        score_1N = self._recommender.score(batch, item_1N).cpu()
        never = (batch["seen_row"], batch["seen_item"])
        found = best_items(item_1N, score_1N, request.k, self._recommender.catalog.num_items, *never)
        return self._answer(*(values_1K[0] for values_1K in found))

    def _answer(self, item_K: torch.Tensor, score_K: torch.Tensor) -> dict:
        items = pa.array(item_K[item_K > 0].numpy())
        return {
            "item_id": self._names.item_id.take(items).to_pylist(),
            "score": score_K[item_K > 0].tolist(),
            "title": self._names.title.take(items).to_pylist(),
        }


def _list(row: dict, name: str, kind: type, default: Sequence = ()) -> list:
    """A list of texts or of whole numbers. Raises ValueError when the row has something else there."""
    value = row.get(name, default)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple) or not all(type(entry) is kind for entry in value):
        raise ValueError(f"{name} = {value!r} is not a list of {'texts' if kind is str else 'whole numbers'}")
    return list(value)


def _is_given(value) -> bool:
    """False for what pandas puts where a row lacks a column that another has."""
    return not (value is None or (isinstance(value, float) and np.isnan(value)))


mlflow.models.set_model(Served())
