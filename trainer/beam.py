"""Beam search over the tree of GIDs: every beam is the prefix of a real item at every step, and ends in one.

No Python per user or beam. The keys and values of the cross-attention are computed once per user and shared by its
beams: as cross-attention in T5 has no position bias, the beams of a user are queries of one attention call.

Axes in names: B users, L encoder positions, N beams, K codes, H heads, S positions written so far, D width.
"""

import torch
import torch.nn.functional as F

from gid.tree import GidTree
from trainer.model import ColaRec

# Scores are float32; in float64 there is room below their resolution to order equal ones by item_idx.
_TIE = 1e-14


@torch.no_grad()
def beam_search(
    model: ColaRec,
    tree: GidTree,
    inputs: dict[str, torch.Tensor],
    num_beams: int,
    num_results: int,
    seen_row: torch.Tensor | None = None,
    seen_item: torch.Tensor | None = None,
    states_BLD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable items of each user.

    Args:
        inputs: X_u of B users, see `trainer.inputs.user_inputs`.
        states_BLD: what the encoder makes of them, where that is known.
        seen_row, seen_item: int64 (S,), (user row, item_idx) pairs that must not be returned.

    Returns:
        item_idx int64 (B, num_results), best first, equal scores by item_idx, 0 where there are no more items; and
        their log p(GID | X_u), float32, -inf where there are none.
    """
    decoder = Decoder(model, model.encode(inputs) if states_BLD is None else states_BLD, inputs["mask"])
    batch, device = len(inputs["mask"]), inputs["mask"].device
    node_BN = torch.zeros(batch, 1, dtype=torch.long, device=device)
    score_BN = torch.zeros(batch, 1, device=device)
    x_BND = model.start_D.expand(batch, 1, -1)
    for level in range(tree.length):
        log_p_BNK = decoder.step(x_BND, level).float().log_softmax(-1)
        # Codes that no item has (K may exceed what the tree uses) are columns that the table does not hold.
        children_BNK = tree.child_table(level)[node_BN]
        score_BNK = score_BN[..., None] + log_p_BNK[..., : children_BNK.shape[-1]]
        score_BNK = score_BNK.masked_fill(children_BNK < 0, -torch.inf)
        if level == tree.length - 1:
            item_BC = tree.leaf_item[children_BNK.clamp_min(0)].flatten(1)
            return best_items(item_BC, score_BNK.flatten(1), num_results, tree.num_items, seen_row, seen_item)
        codes = score_BNK.shape[-1]
        score_BN, choice_BN = score_BNK.flatten(1).topk(min(num_beams, score_BNK[0].numel()))
        node_BN = children_BNK.flatten(1).gather(1, choice_BN).clamp_min(0)
        decoder.select(choice_BN // codes)
        x_BND = model.codebook_TKD[level, choice_BN % codes]
    raise AssertionError("a tree has at least one level")


@torch.no_grad()
def gid_log_p(model: ColaRec, states_BLD: torch.Tensor, mask_BL: torch.Tensor, gid_BNT: torch.Tensor) -> torch.Tensor:
    """log p(GID | X_u), float32 (B, N), of N GIDs for each user: what `beam_search` would say of their items."""
    decoder, (batch, count, length) = Decoder(model, states_BLD, mask_BL), gid_BNT.shape
    x_BND = model.start_D.expand(batch, 1, -1)
    log_p_BN = torch.zeros(batch, count, device=states_BLD.device)
    for level in range(length):
        code_BN = gid_BNT[..., level]
        log_p_BNK = decoder.step(x_BND, level).float().log_softmax(-1).expand(-1, count, -1)
        log_p_BN += log_p_BNK.gather(-1, code_BN[..., None])[..., 0]
        if level == 0:  # one start for all
            decoder.select(torch.zeros_like(code_BN))
        x_BND = model.codebook_TKD[level, code_BN]
    return log_p_BN


def best_items(
    item_BC: torch.Tensor,
    score_BC: torch.Tensor,
    num_results: int,
    num_items: int = 0,
    seen_row: torch.Tensor | None = None,
    seen_item: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best candidates but for the pairs seen, as `beam_search` returns them; item_idx is in 1..num_items."""
    if seen_row is not None and len(seen_row):
        seen, _ = torch.sort(seen_row * (num_items + 1) + seen_item)
        key_BC = torch.arange(len(item_BC), device=item_BC.device)[:, None] * (num_items + 1) + item_BC
        found_BC = seen[torch.searchsorted(seen, key_BC).clamp_max(len(seen) - 1)] == key_BC
        score_BC = score_BC.masked_fill(found_BC, -torch.inf)
    count = min(num_results, score_BC.shape[1])
    _, choice = (score_BC.double() - item_BC * _TIE).topk(count)
    score = F.pad(score_BC.gather(1, choice), (0, num_results - count), value=-torch.inf)
    item = F.pad(item_BC.gather(1, choice), (0, num_results - count))
    return item.masked_fill(score == -torch.inf, 0), score


class Decoder:
    """The T5 decoder of a batch of users, one code of all their beams at a time, with its caches."""

    def __init__(self, model: ColaRec, states_BLD: torch.Tensor, mask_BL: torch.Tensor):
        self._model = model
        self._blocks = model.decoder.block
        first = self._blocks[0].layer[0].SelfAttention
        self._split = (first.n_heads, first.key_value_proj_dim)
        self._cross_mask = mask_BL[:, None, None, :]
        self._cross, self._own = [], []
        for block in self._blocks:
            attention = block.layer[1].EncDecAttention
            key_BLHD, value_BLHD = (f(states_BLD).unflatten(-1, self._split) for f in (attention.k, attention.v))
            self._cross.append((key_BLHD.transpose(1, 2), value_BLHD.transpose(1, 2)))
            empty = states_BLD.new_zeros(len(states_BLD), 1, 0, *self._split)
            self._own.append((empty, empty))

    def step(self, x_BND: torch.Tensor, level: int) -> torch.Tensor:
        """Code logits (B, N, K) of `level`, after reading the embeddings of the last code of each beam."""
        bias_attention = self._blocks[0].layer[0].SelfAttention
        bias_HS = bias_attention.compute_bias(level + 1, level + 1, device=x_BND.device)[0, :, -1]
        for i, block in enumerate(self._blocks):
            x_BND = x_BND + self._self_attention(i, block.layer[0], x_BND, bias_HS)
            x_BND = x_BND + self._cross_attention(i, block.layer[1], x_BND)
            x_BND = block.layer[2](x_BND)
        d_BND = self._model.decoder.final_layer_norm(x_BND)
        return self._model.code_logits(d_BND.flatten(0, 1)[:, None], level).view(*d_BND.shape[:2], -1)

    def select(self, parent_BN: torch.Tensor) -> None:
        """Beam n of each user goes on from what was beam parent_BN[:, n]."""
        rows = torch.arange(len(parent_BN), device=parent_BN.device)[:, None]
        self._own = [(key[rows, parent_BN], value[rows, parent_BN]) for key, value in self._own]

    def _self_attention(self, i: int, layer, x_BND: torch.Tensor, bias_HS: torch.Tensor) -> torch.Tensor:
        attention, normed = layer.SelfAttention, layer.layer_norm(x_BND)
        q, k, v = (f(normed).unflatten(-1, self._split) for f in (attention.q, attention.k, attention.v))
        key, value = self._own[i]
        key, value = torch.cat([key, k[:, :, None]], 2), torch.cat([value, v[:, :, None]], 2)
        self._own[i] = (key, value)
        weight = (torch.einsum("bnhd,bnshd->bnhs", q, key) + bias_HS).float().softmax(-1).to(value.dtype)
        return attention.o(torch.einsum("bnhs,bnshd->bnhd", weight, value).flatten(-2))

    def _cross_attention(self, i: int, layer, x_BND: torch.Tensor) -> torch.Tensor:
        attention = layer.EncDecAttention
        q_BHND = attention.q(layer.layer_norm(x_BND)).unflatten(-1, self._split).transpose(1, 2)
        key, value = self._cross[i]
        out = F.scaled_dot_product_attention(q_BHND, key, value, attn_mask=self._cross_mask, scale=1.0)
        return attention.o(out.transpose(1, 2).flatten(-2))
