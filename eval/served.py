"""The trained model behind `mlflow models serve`. MLflow runs this file to load it; nothing is unpickled.

It holds what eval/serving.py logged: of corpus/ the items, their sampled users and the tokenizer; the GIDs; the model.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from contract import config as config_module
from contract import schema
from contract.artifacts import STAGES, open_finished
from eval import people
from eval.items import indices, read_names, shown
from trainer.beam import best_items
from trainer.packing import to_tensors
from trainer.recommender import load

WORK = "work"  # the artifact: a work folder with what is needed of it
DEFAULT_K = 10
MAX_ROWS = 256
MAX_HISTORY = 1000  # entries
MAX_TEXT = 10_000  # characters of an entry
MAX_IDS = 10_000  # of exclude, and of only, which are scored one by one for their person
MAX_SECONDS = 45  # of a request; looked at between rows, as what runs cannot be stopped


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
            MlflowException: a row asks for what cannot be, or all of them for too much; its message says which and
                why, and its HTTP status is 400. Or 500, and what happened is in the log alone.
        """
        try:
            return self._predict(model_input, time.monotonic() + MAX_SECONDS)
        except ValueError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        except Exception:
            # MLflow would tell the client where the code lies, and how it got there.
            logging.getLogger(__name__).exception("a request could not be answered")
            message = "the request could not be answered: an error of the server, which its log tells"
            raise MlflowException(message, INTERNAL_ERROR) from None

    def _predict(self, rows: pd.DataFrame, deadline: float) -> pd.DataFrame:
        """Raises ValueError: see `predict`. deadline: on the monotonic clock, seconds."""
        if len(rows) > MAX_ROWS:
            raise ValueError(f"the request has {len(rows):,} rows; give at most {MAX_ROWS} at once")
        requests, answers = [], []
        for number, row in enumerate(rows.to_dict("records"), 1):
            _check_time(deadline)
            try:
                requests.append(self._request({name: value for name, value in row.items() if _is_given(value)}))
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
        of_all, size = [request for request in requests if request.only is None], self._config.eval.batch
        for begin in range(0, len(of_all), size):
            _check_time(deadline)
            answers += self._best(of_all[begin : begin + size])
        answer, lists = iter(answers), []
        for request in requests:
            _check_time(deadline)
            lists.append(next(answer) if request.only is None else self._best_of_only(request))
        return pd.DataFrame(lists)

    def _request(self, row: dict) -> Request:
        """Raises ValueError when a value cannot be used. Nothing is coerced: MLflow's schema takes any type."""
        if "history" not in row:
            raise ValueError("history is missing: give at least one item id or text")
        words = _list(row, "history", str, MAX_HISTORY)
        if not words:
            raise ValueError("history is empty: give at least one item id or text")
        for place, entry in enumerate(words):
            if len(entry) > MAX_TEXT:
                raise ValueError(f"history[{place}] has {len(entry):,} characters; give at most {MAX_TEXT:,}")
        times = _list(row, "timestamps", int, MAX_HISTORY, [schema.NO_TIME] * len(words))
        events = _list(row, "events", str, MAX_HISTORY, [""] * len(words))
        for name, values in (("timestamps", times), ("events", events)):
            if len(values) != len(words):
                raise ValueError(f"{name} has {len(values)} entries, history {len(words)}")
        if "timestamps" in row:
            self._check_times(times)
        k, most = row.get("k", DEFAULT_K), self._config.eval.beams
        # A column of pandas that lacks an integer somewhere holds 5.0 for 5.
        if type(k) not in (int, float) or not 1 <= k <= most or k != int(k):
            k = int(k) if type(k) is float and k.is_integer() else k
            raise ValueError(f"k = {shown(k)} is not a whole number within 1..{most}")
        only = None
        if "only" in row:
            only = np.unique(indices(self._names, _list(row, "only", str, MAX_IDS), "only"))
            if not len(only):
                raise ValueError(f"only has no items; give 1 to {MAX_IDS:,}, or leave it out")
        exclude = indices(self._names, _list(row, "exclude", str, MAX_IDS), "exclude")
        acts = [self._reader.act(*said) for said in zip(words, times, events, strict=True)]
        return Request(acts, int(k), exclude, only)

    def _check_times(self, times: list[int]) -> None:
        """Raises ValueError for those that the ETL would put into quarantine, and for a wrong order."""
        least, most = 0, np.iinfo(np.int64).max
        if self._recommender.catalog.has_time:  # else they are positions
            least, most = schema.FIRST_MS, time.time_ns() // 10**6 + schema.MS_PER_DAY
        for place, ts in enumerate(times):
            if not least <= ts <= most:
                wrong = "negative" if ts < 0 else "before 1995" if ts < least else "in the future"
                raise ValueError(f"timestamps[{place}] = {shown(ts)} is {wrong}; give milliseconds since 1970")
            if place and ts < times[place - 1]:
                raise ValueError("timestamps go back in time; give the history oldest first")

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


def _list(row: dict, name: str, kind: type, most: int, default: Sequence = ()) -> list:
    """A list of at most `most` texts or whole numbers. Raises ValueError when the row has something else there."""
    value = row.get(name, default)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    one = "text" if kind is str else "whole number"
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} = {shown(value)} is not a list of {one}s")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value):,} entries; give at most {most:,}")
    for place, entry in enumerate(value):
        if type(entry) is not kind:
            raise ValueError(f"{name}[{place}] = {shown(entry)} is not a {one}")
    return list(value)


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ValueError(f"the request took more than {MAX_SECONDS} seconds; give fewer rows at once")


def _is_given(value) -> bool:
    """False for what pandas puts where a row lacks a column that another has."""
    return not (value is None or (isinstance(value, float) and np.isnan(value)))


mlflow.models.set_model(Served())
