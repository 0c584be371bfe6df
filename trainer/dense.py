"""The other half of what training learned: h(X_u) . v_i, the score that L_softmax trains.

Of a model without L_softmax it is h(X_u) . h(X_i) d_model^-0.5, which BPR trains; it is written v_i all the same.

Alone it is dense retrieval; the hybrid adds it to the log-probability, see trainer/recommender.py.

Axes in names: B users, N candidates, C items that are searched, I items, D width.
"""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from contract.settings import Config
from trainer.beam import best_items
from trainer.inputs import Catalog, content_bags, item_inputs
from trainer.model import ColaRec
from trainer.packing import to_device, to_tensors

ITEMS_AT_ONCE = 1024
# Scores of a search on a GPU that are in memory at a time, 4 bytes each.
MAX_SCORES = 1 << 28


@torch.no_grad()
def item_vectors(
    config: Config, model: ColaRec, catalog: Catalog, device: torch.device, items: np.ndarray, which: str
) -> torch.Tensor:
    """Of the items int64 (C,) 'v', v_i, or 'h', h(X_i) times d_model^-0.5; float32 (C, D) (all ranks).

    The items are cut into the same blocks at any number of ranks, and so the vectors are the same to the last bit. Each
    rank computes an equal run of blocks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    per_rank = ITEMS_AT_ONCE * -(-len(items) // (ITEMS_AT_ONCE * world_size))
    own = torch.zeros(per_rank, config.model.d_model, device=device)
    for begin in range(0, per_rank, ITEMS_AT_ONCE):
        block = items[rank * per_rank + begin :][:ITEMS_AT_ONCE]
        size, block = len(block), block if len(block) else items[:1]  # look-ups in row-wise tables take all ranks
        if which == "v":
            arrays = {"item": block} | content_bags(config, catalog, block)
            vectors = model.item_vectors(to_device(to_tensors(arrays), device))
        else:
            inputs = to_device(to_tensors(item_inputs(config, catalog, block, key=config.seed)), device)
            vectors = model.summary(model.encode(inputs), inputs).float() * model.scale
        own[begin : begin + size] = vectors[:size]
    if world_size == 1:
        return own[: len(items)]
    vectors = own.new_empty(world_size * per_rank, own.shape[1])
    dist.all_gather_into_tensor(vectors, own)
    return vectors[: len(items)]


def found_by(model: ColaRec) -> str:
    """Which of `item_vectors` h(X_u) has learned to find: v_i with L_softmax, else h(X_i)."""
    return "v" if model.config.loss_weights["softmax"] else "h"


@torch.no_grad()
def user_vectors(model: ColaRec, states_BLD: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """h(X_u), float32 (B, D)."""
    return model.summary(states_BLD, inputs).float()


def repeated(item_BN: torch.Tensor) -> torch.Tensor:
    """bool (B, N): whether an item stands further left in its row as well."""
    ordered_BN, order_BN = item_BN.sort(dim=1, stable=True)
    again_BN = F.pad(ordered_BN[:, 1:] == ordered_BN[:, :-1], (1, 0))
    return torch.empty_like(again_BN).scatter_(1, order_BN, again_BN)


class Index:
    """Items by h(X_u) . v_i: all inner products are computed, nothing is approximated.

    On a CPU by FAISS, on a GPU by matrix products there. Both read the vectors where they are and keep no copy.

    Args:
        vectors_CD: float32, of the items items_C, as `item_vectors` makes them.
        items_C: item_idx, ascending, in 1..num_items.
    """

    def __init__(self, vectors_CD: torch.Tensor, items_C: np.ndarray, num_items: int):
        device = vectors_CD.device
        self.vectors_CD, self.items_C = vectors_CD, torch.from_numpy(items_C).to(device)
        self._row_I = torch.zeros(num_items + 1, dtype=torch.long, device=device)
        self._row_I[self.items_C] = torch.arange(len(items_C), device=device)

    def vectors(self, item: torch.Tensor) -> torch.Tensor:
        """float32 (..., D) of items int64 (...) of the index; that of 0 is meaningless."""
        return self.vectors_CD[self._row_I[item]]

    def scores(self, user_BD: torch.Tensor, item_BN: torch.Tensor) -> torch.Tensor:
        """float32 (B, N) of N items of the index for each user; those of 0 are meaningless."""
        return torch.einsum("bd,bnd->bn", user_BD, self.vectors(item_BN))

    def search(
        self,
        user_BD: torch.Tensor,
        k: int,
        seen_row: torch.Tensor | None = None,
        seen_item: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """item_idx int64 (B, k), the nearest first, 0 where there are no more, and their scores, -inf there; of all
        items of the index but the pairs seen."""
        most_seen = 0 if seen_row is None or not len(seen_row) else int(torch.bincount(seen_row).max())
        search = _by_matmul if user_BD.is_cuda else _by_faiss
        row_BN, score_BN = search(self.vectors_CD, user_BD, min(k + most_seen, len(self.items_C)))
        item_BN, score_BN = best_items(self.items_C[row_BN], score_BN, k, len(self._row_I) - 1, seen_row, seen_item)
        # How a search adds up depends on the number of users; the scores by which items are ranked do not.
        return best_items(item_BN, self.scores(user_BD, item_BN).masked_fill(item_BN == 0, -torch.inf), k)


def _by_faiss(vectors_CD: torch.Tensor, user_BD: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the `count` highest inner products, int64 (B, count), and these, float32."""
    import faiss  # here, because decoding alone does not need it

    score, row = faiss.knn(user_BD.numpy(), vectors_CD.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(row), torch.from_numpy(score)


def _by_matmul(vectors_CD: torch.Tensor, user_BD: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device."""
    row_BN = torch.zeros(len(user_BD), 0, dtype=torch.long, device=user_BD.device)
    score_BN = user_BD[:, :0]
    for begin in range(0, len(vectors_CD), rows := max(1, MAX_SCORES // len(user_BD))):
        score_BM = user_BD @ vectors_CD[begin : begin + rows].T
        score_BM, row_BM = score_BM.topk(min(count, score_BM.shape[1]))
        score_BN, row_BN = torch.cat([score_BN, score_BM], 1), torch.cat([row_BN, begin + row_BM], 1)
        score_BN, choice_BN = score_BN.topk(min(count, score_BN.shape[1]))
        row_BN = row_BN.gather(1, choice_BN)
    return row_BN, score_BN
