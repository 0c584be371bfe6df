"""SASRec with a softmax: what a user takes next, from the items before it, by a causal transformer.

Kang and McAuley, 2018, arXiv 1808.09781. Trained with a loss over the catalog in place of its one negative per target
it is far stronger (arXiv 2309.07602), and the bar that generative recommenders are to clear.

Axes in names: B sequences, L places, T targets, N negatives, I items, D width.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import nn

from contract.disk import follow_umask
from contract.metrics import ranking_metrics
from contract.schema import Ragged
from eval.baselines.ranking import Fit, LeftOut, Ranking, rank_by_product
from eval.users import EvalUsers

MODEL = {"dim": 64, "num_layers": 2, "num_heads": 2, "max_items": 50, "dropout": 0.4}
TRAINING = {
    "lr": 2e-3,
    "warmup_steps": 100,
    "steps_per_epoch": 400,  # decides how many sequences a step takes, within these bounds
    "min_batch": 16,
    "max_batch": 1024,
    "batches_sorted": 20,  # so many are cut from their sequences by length, which saves most padding
    "patience": 5,  # epochs without a better valid NDCG@10
    "full_softmax": 2_000,  # items at most; above, the loss is estimated from so many negatives
    "num_negatives": 4096,
    "alpha": 0.5,  # negatives are drawn by the number of train events to this power
}


class SASRec(nn.Module):
    """Item ids are 1..I; 0 is padding and stands behind a sequence, where no earlier place sees it."""

    def __init__(self, num_items: int, dim: int, num_layers: int, num_heads: int, max_items: int, dropout: float):
        super().__init__()
        self.max_items = max_items
        self.items = nn.Embedding(num_items + 1, dim)
        self.places = nn.Embedding(max_items, dim)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, item_BL: torch.Tensor) -> torch.Tensor:
        """The state after each item, (B, L, D); its product with an item's embedding is the score of that item next."""
        length = item_BL.shape[1]
        x_BLD = self.items(item_BL) * math.sqrt(self.items.embedding_dim) + self.places.weight[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length, x_BLD.device, x_BLD.dtype)
        return self.layers(self.dropout(x_BLD), mask=causal, is_causal=True)


def sasrec(fit: Fit, users: EvalUsers, k: int, mask_seen: bool) -> Ranking:
    """score(u, i) = h_u . e_i, h_u the state after the last of u's history; the epoch of the best valid NDCG@10.

    A trained model is kept in fit.cache, so that it is trained once for a corpus.

    Raises:
        LeftOut: there is nothing to learn from.
    """
    device = torch.device(get_accelerator().current_device_name())
    settings = {**MODEL, **TRAINING, "epochs": fit.config.eval.sasrec_epochs, "seed": fit.config.seed}
    settings["mask_seen"] = mask_seen  # the epoch is chosen by it
    key = hashlib.sha256(json.dumps([fit.digest, settings], sort_keys=True).encode()).hexdigest()
    file = fit.cache and fit.cache / f"sasrec-{key[:16]}.safetensors"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(fit.config.seed)
        model = SASRec(fit.train.shape[1] - 1, **MODEL).to(device)
        epoch = load(model, file) if file else None
        if epoch:
            fit.progress(f"sasrec: {file} holds the model as trained before")
        else:
            epoch = train(model, fit, mask_seen)
            if file:
                try:
                    save(model, epoch, file)
                except (OSError, safetensors.SafetensorError) as error:
                    fit.progress(f"sasrec: {file} cannot be written ({error}): the next evaluation trains it anew")
    # In float64 a user's vector does not depend, once rounded, on the users of the same batch.
    model = model.double().eval()
    vectors = user_vectors(model, users.history)
    return Ranking(rank_by_product(vectors, _item_vectors(model), users, k, mask_seen), {"epoch": epoch})


def train(model: SASRec, fit: Fit, mask_seen: bool) -> int:
    """Trains in place, to the weights after the best epoch, which it returns."""
    device = model.items.weight.device
    rng = np.random.default_rng(fit.config.seed)
    windows = cut_windows(fit.sequences.offsets, model.max_items)
    if not len(windows):
        raise LeftOut("no user has two train events, one to be predicted from the other")
    log_q = log_proposal(np.bincount(fit.sequences.values, minlength=fit.train.shape[1])).to(device)
    valid, num_epochs = fit.valid, fit.config.eval.sasrec_epochs
    batch_size = int(np.clip(len(windows) // TRAINING["steps_per_epoch"], TRAINING["min_batch"], TRAINING["max_batch"]))
    num_steps = num_epochs * math.ceil(len(windows) / batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=TRAINING["lr"], betas=(0.9, 0.98))
    rise = max(1, min(TRAINING["warmup_steps"], num_steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / rise) * (1 - t / num_steps))
    best = (-1.0, 0, {})  # NDCG, epoch, weights
    for epoch in range(1, num_epochs + 1):
        model.train()
        for batch in batches(fit.sequences.values, windows, batch_size, rng):
            loss = next_item_loss(model, torch.from_numpy(batch).to(device), log_q)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        ranked = rank_by_product(user_vectors(model, valid.history), _item_vectors(model), valid, 10, mask_seen)
        ndcg = ranking_metrics(ranked, valid.targets, [10])["ndcg@10"].mean()
        fit.progress(f"sasrec: epoch {epoch} of at most {num_epochs}, valid ndcg@10 {ndcg:.4f}")
        if ndcg > best[0]:
            best = (ndcg, epoch, {name: value.clone() for name, value in model.state_dict().items()})
        if epoch - best[1] >= TRAINING["patience"]:
            break
    model.load_state_dict(best[2])
    return best[1]


def next_item_loss(model: SASRec, item_BL: torch.Tensor, log_q_I: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each item after the first given those before it; int64 (B, L), 0 behind the end.

    Over all items of a catalog of at most TRAINING["full_softmax"]. Above, the sum over the catalog is estimated,
    without bias, from N items drawn with the probabilities q, the same for the whole batch:

        exp(s_t) + sum over the drawn i other than the target t of exp(s_i) / (N q_i)
    """
    is_target = item_BL[:, 1:] > 0
    state_TD, target_T = model(item_BL[:, :-1])[is_target], item_BL[:, 1:][is_target]
    if len(log_q_I) - 1 <= TRAINING["full_softmax"]:
        return F.cross_entropy(state_TD @ model.items.weight[1:].T, target_T - 1)
    random_N = torch.rand(TRAINING["num_negatives"], dtype=log_q_I.dtype, device=log_q_I.device)
    drawn_N = torch.searchsorted(log_q_I.exp().cumsum(0), random_N, right=True).clamp(max=len(log_q_I) - 1)
    target_score_T1 = (state_TD * model.items(target_T)).sum(1, keepdim=True)
    score_TN = state_TD @ model.items(drawn_N).T - (log_q_I[drawn_N] + math.log(len(drawn_N))).to(state_TD)
    score_TN = score_TN.masked_fill(drawn_N == target_T[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([target_score_T1, score_TN], 1), torch.zeros_like(target_T))


def log_proposal(num_train_I: np.ndarray) -> torch.Tensor:
    """float64 (I + 1,): log of the probability to draw each item; -inf for padding."""
    q_I = np.maximum(num_train_I, 1.0) ** TRAINING["alpha"]
    q_I[0] = 0
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(q_I / q_I.sum()))


def cut_windows(offsets: np.ndarray, max_items: int) -> np.ndarray:
    """int64 (W, 2): begin and end of windows of at most max_items + 1 events, of sequences in offsets (N + 1,).

    Every event but a sequence's first is behind the first place of exactly one window: a target, once. Cut from the
    end, so that the latest targets see most.
    """
    num_targets = np.maximum(np.diff(offsets) - 1, 0)
    num_windows = -(-num_targets // max_items)
    row = np.repeat(np.arange(len(num_targets)), num_windows)
    number = np.arange(len(row)) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    end = offsets[1:][row] - number * max_items
    return np.stack([np.maximum(end - max_items - 1, offsets[:-1][row]), end], 1)


def batches(values: np.ndarray, windows: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """int64 (B, L): the windows in a random order, near lengths together, 0 behind the end of each."""
    order = rng.permutation(len(windows))
    together = TRAINING["batches_sorted"] * size
    for start in range(0, len(order), together):
        near = windows[order[start : start + together]]
        near = near[np.argsort(near[:, 1] - near[:, 0], kind="stable")]
        cuts = [near[i : i + size] for i in range(0, len(near), size)]
        for cut in rng.permutation(len(cuts)):
            yield _padded(values, cuts[cut])


def _padded(values: np.ndarray, windows: np.ndarray) -> np.ndarray:
    begin, end = windows.T
    place = begin[:, None] + np.arange(max(1, (end - begin).max()))
    inside = place < end[:, None]
    return np.where(inside, values[np.where(inside, place, 0)], 0).astype(np.int64)


@torch.no_grad()
def user_vectors(model: SASRec, history: Ragged) -> np.ndarray:
    """(N, D): the state after the last item of each history; zeros for an empty one, so that all items tie."""
    vectors = np.zeros((len(history), model.items.embedding_dim), model.items.weight.numpy(force=True).dtype)
    rows = np.nonzero(history.lengths)[0]
    rows = rows[np.argsort(history.lengths[rows], kind="stable")]
    for start in range(0, len(rows), 512):
        some = rows[start : start + 512]
        end = history.offsets[some + 1]
        begin = np.maximum(history.offsets[some], end - model.max_items)
        items = torch.from_numpy(_padded(history.values, np.stack([begin, end], 1)))
        states = model(items.to(model.items.weight.device))
        vectors[some] = states[torch.arange(len(some)), torch.from_numpy(end - begin - 1)].numpy(force=True)
    return vectors


def _item_vectors(model: SASRec) -> np.ndarray:
    return model.items.weight.numpy(force=True)


def save(model: SASRec, epoch: int, file: Path) -> None:
    """Writes the weights in one piece: a reader sees all of the file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary, weights = file.with_name(f".{file.name}.{os.getpid()}"), model.state_dict()
    metadata = {"epoch": str(epoch), "checksum": _checksum(weights, epoch)}
    try:
        safetensors.torch.save_file(weights, temporary, metadata=metadata)
        follow_umask(temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(weights: dict[str, torch.Tensor], epoch: int) -> str:
    seen = hashlib.sha256(str(epoch).encode())
    for name, weight in sorted(weights.items()):
        seen.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        seen.update(weight.numpy(force=True).tobytes())
    return seen.hexdigest()


def load(model: SASRec, file: Path) -> int | None:
    """Reads what `save` wrote into the model and returns the epoch; None if there is no such file or it is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as stored:
            epoch, weights = int(stored.metadata()["epoch"]), {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
            if stored.metadata()["checksum"] != _checksum(weights, epoch):
                return None
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None
    model.load_state_dict(weights)
    return epoch
