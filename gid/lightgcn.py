"""LightGCN (He et al., SIGIR 2020, arXiv 2002.02126): the collaborative embeddings that the tree is built from.

Symbols: U users and I items with train interactions, N = U + I nodes of the bipartite graph (users first),
A = D^-1/2 [[0, R], [R^T, 0]] D^-1/2 its normalised adjacency, E0 (N, d) the only parameters.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from contract.settings import Cf

RECALL_AT = 20
# Scores held at once when all users are ranked: 64 MB.
MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class Embeddings:
    """Propagated embeddings; their inner product is LightGCN's score. Rows without train interactions are zeros."""

    users: np.ndarray  # float32 (num_users + 1, d), row user_idx
    items: np.ndarray  # float32 (num_items + 1, d), row item_idx
    best_epoch: int
    valid_recall: float


def fit(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    num_users: int,
    num_items: int,
    cf: Cf,
    seed: int,
    report: Callable[[int, float, float], None] = lambda epoch, loss, recall: None,
) -> Embeddings:
    """Trains with BPR, stops by valid Recall@20 and returns the embeddings of the best measurement.

    Args:
        train, valid: (user_idx, item_idx) pairs, each pair once. Ids start at 1.
        report: called as (epoch, mean loss of its last step, valid Recall@20) after each measurement.

    Raises:
        ValueError: nothing to train on or to measure with, too little memory, or the loss is not finite.
    """
    # Dense over what occurs in train: nodes without edges would only receive noise, and as negatives give it.
    user_ids, user = np.unique(train[0], return_inverse=True)
    item_ids, item = np.unique(train[1], return_inverse=True)
    if not len(user):
        raise ValueError("the corpus has no train interactions; check [data] and [etl], and run etl/build.py again")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_memory(len(user_ids) + len(item_ids), len(user), cf, available_memory(device))
    generator = torch.Generator().manual_seed(seed)
    adjacency = Adjacency(user, item, len(user_ids), len(item_ids), device)
    negatives = NEGATIVES[cf.negatives](user, item, len(user_ids), len(item_ids))
    recall = ValidRecall((user, item), _relabelled(valid, user_ids, item_ids), len(item_ids), device)
    trainable = torch.from_numpy(negatives.has_negative[user].nonzero()[0])
    if not len(trainable):
        raise ValueError("every user has interacted with every item: there is nothing to tell apart")
    user, item = torch.from_numpy(user), torch.from_numpy(item)

    e0 = (torch.randn(len(user_ids) + len(item_ids), cf.dim, generator=generator) * 0.1).to(device).requires_grad_()
    optimizer = torch.optim.Adam([e0], lr=cf.lr, fused=True)
    best, best_epoch, best_e0 = -1.0, 0, e0.detach().clone()
    for epoch in range(1, cf.max_epochs + 1):
        for batch in trainable[torch.randperm(len(trainable), generator=generator)].split(cf.batch):
            users, positives = user[batch], item[batch]
            triples = torch.stack([users, positives, negatives.sample(users, generator)]).to(device)
            loss = bpr_loss(adjacency, e0, triples, len(user_ids), cf)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if epoch % cf.eval_every and epoch != cf.max_epochs:
            continue
        if not torch.isfinite(loss):
            raise ValueError(f"LightGCN's loss is {loss.item()} in epoch {epoch}; lower cf.lr = {cf.lr}")
        measured = recall(*propagate(adjacency, e0.detach(), cf.num_layers).split([len(user_ids), len(item_ids)]))
        report(epoch, loss.item(), measured)
        if measured > best:
            best, best_epoch, best_e0 = measured, epoch, e0.detach().clone()
        elif epoch - best_epoch >= cf.patience * cf.eval_every:
            break

    final = propagate(adjacency, best_e0, cf.num_layers).cpu().numpy()
    users, items = np.zeros((num_users + 1, cf.dim), np.float32), np.zeros((num_items + 1, cf.dim), np.float32)
    users[user_ids], items[item_ids] = final[: len(user_ids)], final[len(user_ids) :]
    return Embeddings(users, items, best_epoch, best)


def memory_need(num_nodes: int, num_interactions: int, cf: Cf) -> int:
    """Bytes that training takes at its peak, at most, beside the program itself: 4 (12 N d + 16 B d + 30 E).

    Twelve float32 (N, d): the parameters, their best, their gradient and Adam's two moments, the layers and sums of
    both propagations. Sixteen float32 (B, d): the rows of a batch and their gradients. An interaction is two entries
    of A, which is built from coordinates, and some int64 of the samplers. docs/gid.md compares it with measurements.
    """
    batch = min(cf.batch, num_interactions)
    return 4 * ((12 * num_nodes + 16 * batch) * cf.dim + 30 * num_interactions)


def check_memory(num_nodes: int, num_interactions: int, cf: Cf, available: int) -> None:
    """Raises ValueError when training would take more than the bytes `available`."""
    need = memory_need(num_nodes, num_interactions, cf)
    if need > available:
        raise ValueError(
            f"LightGCN would take 4 (12 N d + 16 B d + 30 E) = {need / 2**30:.1f} GiB for N = {num_nodes} users and "
            f"items, d = {cf.dim}, a batch of B = {min(cf.batch, num_interactions)} and E = {num_interactions} "
            f"interactions, and {available / 2**30:.1f} GiB are free; "
            'set cf.method = "als" (Spark), or a smaller cf.dim or cf.batch, or use a larger machine'
        )


def available_memory(device: torch.device) -> int:
    """Free bytes of the device, or of the machine: within the limit of its cgroup, where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):  # counts the page cache as free, which the line above does not
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def bpr_loss(adjacency: "Adjacency", e0: torch.Tensor, triples: torch.Tensor, num_users: int, cf: Cf) -> torch.Tensor:
    """Equation 15, as a mean over the batch: -ln sigma(y_ui - y_uj) + l2/2 (|e0_u|^2 + |e0_i|^2 + |e0_j|^2).

    Args:
        triples: int64 (3, B): user, positive item, negative item; dense.
    """
    nodes = triples + torch.tensor([[0], [num_users], [num_users]], device=triples.device)
    # The gradient of `embedding` adds up in a fixed order, that of indexing on several threads in any.
    u, i, j = F.embedding(nodes, propagate(adjacency, e0, cf.num_layers))
    ranking = F.softplus((u * (j - i)).sum(1)).mean()
    return ranking + cf.l2 / 2 * F.embedding(nodes, e0).square().sum() / triples.shape[1]


def propagate(adjacency: "Adjacency", e0: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Equations 7 and 8: mean over k = 0..L of A^k E0, (N, d)."""
    return _LayerMean.apply(e0, adjacency, num_layers)


class _LayerMean(torch.autograd.Function):
    """A is symmetric, so the gradient is the layer mean of the gradient: no transpose, and no activations to keep."""

    @staticmethod
    def forward(ctx, e0, adjacency, num_layers):
        ctx.adjacency, ctx.num_layers = adjacency, num_layers
        layer, total = e0, e0.clone()
        for _ in range(num_layers):
            layer = adjacency.multiply(layer)
            total += layer
        return total.div_(num_layers + 1)

    @staticmethod
    def backward(ctx, gradient):
        return _LayerMean.forward(ctx, gradient.contiguous(), ctx.adjacency, ctx.num_layers), None, None


class Adjacency:
    """The normalised adjacency A (N, N) as CSR.

    Args:
        user, item: int64 (E,) dense pairs, each once, from 0.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, num_users: int, num_items: int, device: torch.device):
        degree_u, degree_i = np.bincount(user, minlength=num_users), np.bincount(item, minlength=num_items)
        weight = (1 / np.sqrt(degree_u[user] * degree_i[item])).astype(np.float32)
        ratings = sp.csr_matrix((weight, (user, item)), shape=(num_users, num_items))
        self.matrix = sp.block_array([[None, ratings], [ratings.T, None]], format="csr")
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.matrix = torch.sparse_csr_tensor(
                torch.from_numpy(self.matrix.indptr),
                torch.from_numpy(self.matrix.indices),
                torch.from_numpy(self.matrix.data),
                self.matrix.shape,
                device=device,
            )

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """A x, for x float32 (N, d)."""
        if self.on_gpu:
            return self.matrix @ x
        # Measured on 2 cores, d = 64: scipy's one thread is level with torch's CSR on two, and sums in a fixed order.
        return torch.from_numpy(self.matrix @ x.numpy())


class Negatives:
    """Uniform over the items that a user has not interacted with, exactly and without rejection.

    With a user's items sorted, s_0 < s_1 < ..., the r-th item not among them is r + #{j: s_j - j <= r}.
    `keys` holds user * (I + 1) + s_j - j, which is sorted over all users, so one binary search counts.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, num_users: int, num_items: int):
        order = np.lexsort((item, user))
        degrees = np.bincount(user, minlength=num_users)
        self.starts = torch.from_numpy(np.cumsum(degrees) - degrees)
        self.num_unseen = torch.from_numpy(num_items - degrees)
        self.has_negative = self.num_unseen.numpy() > 0
        self.stride = num_items + 1
        position = np.arange(len(user)) - self.starts.numpy()[user[order]]
        self.keys = torch.from_numpy(user[order] * self.stride + item[order] - position)

    def sample(self, users: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One item (int64, dense) for each of `users` (int64 (B,)), who all must have one."""
        share = torch.rand(len(users), generator=generator, dtype=torch.float64)
        rank = (share * self.num_unseen[users]).long()
        return rank + torch.searchsorted(self.keys, users * self.stride + rank, right=True) - self.starts[users]


class PopularNegatives(Negatives):
    """By the number of train interactions to the power of 0.75, of the items that a user has not interacted with."""

    TRIES = 8  # draws that hit an item of the user; then uniform, so that a user of nearly everything ends as well

    def __init__(self, user: np.ndarray, item: np.ndarray, num_users: int, num_items: int):
        super().__init__(user, item, num_users, num_items)
        self.cumulative = torch.from_numpy(np.cumsum(np.bincount(item, minlength=num_items) ** 0.75))
        self.seen = torch.from_numpy(np.append(np.sort(user * self.stride + item), np.iinfo(np.int64).max))

    def sample(self, users: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        items = super().sample(users, generator)
        left = torch.arange(len(users))
        for _ in range(self.TRIES):
            share = torch.rand(len(left), generator=generator, dtype=torch.float64)
            drawn = torch.searchsorted(self.cumulative, share * self.cumulative[-1], right=True)
            keys = users[left] * self.stride + drawn
            is_unseen = self.seen[torch.searchsorted(self.seen, keys)] != keys
            items[left[is_unseen]] = drawn[is_unseen]
            left = left[~is_unseen]
        return items


NEGATIVES = {"uniform": Negatives, "popularity": PopularNegatives}


class ValidRecall:
    """Mean over users of |top 20 and targets| / |targets|: all items ranked, train items masked, no sampling."""

    def __init__(self, train, valid, num_items: int, device: torch.device):
        """Args: train, valid: dense (user, item) pairs; item -1 is one unknown to train, which cannot be found."""
        if not len(valid[0]):
            raise ValueError("no valid interaction is of a user with train interactions: early stopping needs some")
        self.users, row, self.num_targets = np.unique(valid[0], return_inverse=True, return_counts=True)
        self.device, self.num_items = device, num_items
        known = valid[1] >= 0
        keys = np.append(np.sort(row[known] * num_items + valid[1][known]), np.iinfo(np.int64).max)
        self.target_keys = torch.from_numpy(keys).to(device)
        masked = np.isin(train[0], self.users)
        mask_row, mask_item = np.searchsorted(self.users, train[0][masked]), train[1][masked]
        order = np.argsort(mask_row, kind="stable")
        self.mask_row, self.mask_item = mask_row[order], mask_item[order]

    def __call__(self, user_embeddings: torch.Tensor, item_embeddings: torch.Tensor) -> float:
        found = []
        block = max(1, MAX_SCORES // self.num_items)
        for start in range(0, len(self.users), block):
            rows = torch.from_numpy(self.users[start : start + block]).to(self.device)
            scores = user_embeddings[rows] @ item_embeddings.T
            low, high = np.searchsorted(self.mask_row, [start, start + block])
            scores[self.mask_row[low:high] - start, self.mask_item[low:high]] = -torch.inf
            top = scores.topk(min(RECALL_AT, self.num_items), dim=1).indices
            keys = top + torch.arange(start, start + len(rows), device=self.device)[:, None] * self.num_items
            found.append((self.target_keys[torch.searchsorted(self.target_keys, keys)] == keys).sum(1).cpu().numpy())
        return float(np.mean(np.concatenate(found) / self.num_targets))


def _relabelled(pairs, user_ids: np.ndarray, item_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of known users in dense labels; items that train does not know become -1."""
    users, items = pairs
    known = np.isin(users, user_ids)
    dense = np.where(np.isin(items, item_ids), np.searchsorted(item_ids, items), -1)
    return np.searchsorted(user_ids, users[known]), dense[known]
