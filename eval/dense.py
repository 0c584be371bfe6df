"""The other half of what training learned: h(X_u) . h(X_i), the score that the ranking losses train.

Alone it is dense retrieval over all items. The hybrid takes the best candidates of the beam and as many of dense
retrieval, and ranks them by the sum of the log-probability and this score.

Axes in names: B users, N candidates, I items, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F

from contract.config import Config
from trainer.beam import best_items
from trainer.inputs import Catalog, item_inputs
from trainer.loader import to_device, to_tensors
from trainer.model import ColaRec

ITEMS_AT_ONCE = 1024


@torch.no_grad()
def item_vectors(config: Config, model: ColaRec, catalog: Catalog, device: torch.device) -> torch.Tensor:
    """h(X_i) of every item, float32 (I + 1, D), times d_model^-0.5 as in training; row 0 is zeros."""
    vectors = torch.zeros(catalog.num_items + 1, config.model.d_model, device=device)
    for begin in range(1, catalog.num_items + 1, ITEMS_AT_ONCE):
        items = np.arange(begin, min(begin + ITEMS_AT_ONCE, catalog.num_items + 1))
        inputs = to_device(to_tensors(item_inputs(config, catalog, items, key=config.seed)), device)
        vectors[begin : begin + len(items)] = model.summary(model.encode(inputs), inputs).float() * model.scale
    return vectors


@torch.no_grad()
def user_vectors(model: ColaRec, states_BLD: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """h(X_u), float32 (B, D)."""
    return model.summary(states_BLD, inputs).float()


def hybrid(
    item_BN: torch.Tensor, log_p_BN: torch.Tensor, user_BD: torch.Tensor, item_ID: torch.Tensor, weight: float, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the candidates by log p(GID | X_u) + weight * h(X_u) . h(X_i).

    Args:
        item_BN, log_p_BN: as `beam_search` returns them; an item counts once.

    Returns:
        item_idx int64 (B, k) and the sum, as `beam_search` does.
    """
    ordered_BN, order_BN = item_BN.sort(dim=1, stable=True)
    again_BN = F.pad(ordered_BN[:, 1:] == ordered_BN[:, :-1], (1, 0)).gather(1, order_BN.argsort(1))
    score_BN = log_p_BN + weight * torch.einsum("bd,bnd->bn", user_BD, item_ID[item_BN])
    return best_items(item_BN, score_BN.masked_fill(again_BN | (item_BN == 0), -torch.inf), k)


def build_index(item_ID: torch.Tensor):
    """A FAISS index of exact inner products; result n is the item n + 1."""
    import faiss  # here, because decoding alone does not need it

    index = faiss.IndexFlatIP(item_ID.shape[1])
    index.add(item_ID[1:].cpu().numpy())
    return index


def search(
    index, user_BD: torch.Tensor, k: int, seen_row: torch.Tensor | None = None, seen_item: torch.Tensor | None = None
) -> torch.Tensor:
    """item_idx int64 (B, k) on the CPU, best first, 0 where there are no more; of all items but the pairs seen."""
    most_seen = 0 if seen_row is None or not len(seen_row) else int(torch.bincount(seen_row).max())
    score, found = map(torch.from_numpy, index.search(user_BD.cpu().numpy(), min(k + most_seen, index.ntotal)))
    seen = (None, None) if seen_row is None else (seen_row.cpu(), seen_item.cpu())
    return best_items(found + 1, score, k, index.ntotal, *seen)[0]
