"""The part of the ranking that is counted, not learned: the neighbours of a history's items.

    n(u, i) = sum over the items j of X_u of s(j, i)        s of gid/neighbours.py, 0 for what is no neighbour of j
    c(u, i) = log(1 + n(u, i) / (FLOOR max_i n(u, i)))      0 for what is nobody's neighbour

h(X_u) . v_i and log p(GID | X_u) are log-probabilities up to a constant of the user, and so is c, of a distribution by
n on a floor: their sum is a product of experts. What few people took together, no embedding of some dozen numbers can
remember, while the table can; what it has never seen it says nothing about.

Axes in names: B users, L encoder positions, K neighbours of an item, M = L K, N items of each user.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gid import neighbours
from trainer.beam import best_items

FLOOR = 0.3  # of the ranking of the valid users of Phone and Beauty, of .1, .3, 1 and 3 (docs/experiments.md)


class OfUsers(NamedTuple):
    """c of the neighbours of each user, every item once, in ascending order."""

    item_BM: torch.Tensor  # int64; more than every item_idx where there are no more
    score_BM: torch.Tensor  # float32; 0 there

    def scores(self, item_BN: torch.Tensor) -> torch.Tensor:
        """c, float32 (B, N), of any items."""
        place_BN = torch.searchsorted(self.item_BM, item_BN.contiguous()).clamp_max(self.item_BM.shape[1] - 1)
        return self.score_BM.gather(1, place_BN).masked_fill(self.item_BM.gather(1, place_BN) != item_BN, 0)


class Neighbours:
    """The tables on a device.

    Args:
        may_be_found_I: bool (I + 1,), the candidates.
    """

    def __init__(self, table: neighbours.Neighbours, may_be_found_I: torch.Tensor):
        device = may_be_found_I.device
        self._item_IK, self._weight_IK = (torch.from_numpy(np.asarray(part)).to(device) for part in table)
        self._may_be_found_I = may_be_found_I

    def of(self, history_BL: torch.Tensor) -> OfUsers:
        """Of users with these items, int64 (B, L); 0 is none."""
        num_items = len(self._item_IK) - 1
        most = int((history_BL > 0).sum(1).max())
        history_BL = history_BL.sort(dim=1, descending=True)[0][:, : max(1, most)]  # tokens have no items
        item_BM, weight_BM = (table[history_BL].flatten(1) for table in (self._item_IK, self._weight_IK))
        item_BM = torch.where(item_BM > 0, item_BM, num_items + 1).long()
        item_BM, order_BM = item_BM.sort(dim=1, stable=True)
        first_BM = F.pad(item_BM[:, 1:] != item_BM[:, :-1], (1, 0), value=True)
        group_BM = first_BM.cumsum(1) - 1
        n_BM = torch.zeros_like(weight_BM).scatter_add_(1, group_BM, weight_BM.gather(1, order_BM))
        n_BM = n_BM / n_BM.amax(1, keepdim=True).clamp_min(1e-30)
        once_BM = torch.full_like(item_BM, num_items + 1).scatter_(1, group_BM, item_BM)
        return OfUsers(once_BM, torch.log1p(n_BM / FLOOR))

    def best(
        self, found: OfUsers, k: int, seen_row: torch.Tensor | None = None, seen_item: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """item_idx int64 (B, k), of the highest c, 0 where there are no more, and c, -inf there; of the candidates but
        the pairs seen."""
        num_items = len(self._item_IK) - 1
        is_none_BM = ~F.pad(self._may_be_found_I, (0, 1))[found.item_BM]
        score_BM = found.score_BM.masked_fill(is_none_BM, -torch.inf)
        return best_items(found.item_BM.masked_fill(is_none_BM, 0), score_BM, k, num_items, seen_row, seen_item)
