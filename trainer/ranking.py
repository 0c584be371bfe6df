"""The ranking score s_ui among the items of a step, on all ranks, and what L_rec learns from it. See trainer/model.py.

Axes in names: S targets, K codes, Q items drawn at random, C items below a prefix, D width, M rows of any kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

if TYPE_CHECKING:
    from trainer.model import ColaRecConfig


def leaf_logits(d_MD: torch.Tensor, v_MCD: torch.Tensor, exists_MC: torch.Tensor) -> torch.Tensor:
    """d . v_i of the items below a prefix, float32 (M, C); -inf where exists_MC is 0."""
    logits_MC = (v_MCD @ d_MD.float()[..., None])[..., 0]
    return logits_MC.masked_fill(exists_MC == 0, -torch.inf)


def sampled_scores(
    h_SD: torch.Tensor,
    v_target_SD: torch.Tensor,
    target_S: torch.Tensor,
    log_q_Q: torch.Tensor,
    v_random_QD: torch.Tensor,
    random_Q: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s_ui of each target, float32 (S,), and of the random items of all ranks, float32 (S, Q), each less the log of how
    often it is drawn: exp of them all adds up, in expectation, to the sum over the catalog.

    Args:
        target_S, random_Q: item_idx; a target that is among the random items counts once. 0 only fills up.
    """
    score_SQ = h_SD @ v_random_QD.T - log_q_Q
    score_SQ = score_SQ.masked_fill((random_Q == 0) | (random_Q == target_S[:, None]), -torch.inf)
    return (h_SD * v_target_SD).sum(-1), score_SQ


class Teacher:
    """What L_rec asks for in the place of a target's code: `distil` parts of the distribution that the ranking score
    has over the codes after a prefix, 1 - `distil` of the code itself.

    Args:
        h_SD: h(X_u) of each target.
        score_S, score_SQ: as `sampled_scores` gives them, without gradient.
        prefix_Q: int64, the l-1 prefixes of the random items as numbers to the base K.
    """

    def __init__(
        self,
        config: ColaRecConfig,
        h_SD: torch.Tensor,
        score_S: torch.Tensor,
        score_SQ: torch.Tensor,
        prefix_Q: torch.Tensor,
    ):
        self._config, self._h_SD, self._prefix_Q = config, h_SD, prefix_Q
        highest_S = torch.maximum(score_S, score_SQ.max(-1).values)
        self._mass_SQ = (score_SQ - highest_S[:, None]).exp()
        # Never 0, as what is below the prefix of a target may have no more than that.
        self._mass_S = (score_S - highest_S).exp().clamp_min(torch.finfo(torch.float32).tiny)

    def codes(self, level: int, prefix_S: torch.Tensor, code_S: torch.Tensor) -> torch.Tensor:
        """float32 (S, K), rows that add up to 1: of the codes of a level after prefixes of the targets."""
        branching = self._config.branching
        child_Q = self._prefix_Q // branching ** (self._config.code_levels - 1 - level)
        mass_SQ = self._mass_SQ
        if level:
            mass_SQ = mass_SQ * (child_Q // branching == prefix_S[:, None])
        mass_SK = mass_SQ @ F.one_hot(child_Q % branching, branching).to(mass_SQ)
        mass_SK = mass_SK.scatter_add(1, code_S[:, None], self._mass_S[:, None])
        return self._mixed(mass_SK / mass_SK.sum(-1, keepdim=True), code_S)

    def leaves(self, v_SCD: torch.Tensor, leaves: dict) -> torch.Tensor:
        """float32 (S, C): of the items below the l-1 prefixes of the targets."""
        return self._mixed(leaf_logits(self._h_SD, v_SCD, leaves["row"]).softmax(-1), leaves["choice"])

    def _mixed(self, asked_SN: torch.Tensor, choice_S: torch.Tensor) -> torch.Tensor:
        distil = self._config.distil
        return (distil * asked_SN).scatter_add(1, choice_S[:, None], torch.full_like(asked_SN[:, :1], 1 - distil))


def of_all_ranks(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Rows of all ranks, which may have different numbers of them; zeros fill up. Each part, (N, ...), is gathered."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(parts)
    most = torch.tensor(len(parts[0]), device=parts[0].device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    missing = int(most) - len(parts[0])
    padded = [F.pad(part, (*[0, 0] * (part.ndim - 1), 0, missing)) for part in parts]
    return [_AllGather.apply(rows.contiguous()) for rows in padded]


class _AllGather(torch.autograd.Function):
    """The rows of all ranks, one after another; gradients return to the rank that a row came from."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
