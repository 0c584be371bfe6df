"""Beam search over the tree of GIDs: every beam is the prefix of a real item at every step, and ends in one.

No Python per user or beam. The keys and values of the cross-attention are computed once per user and shared by its
beams: as cross-attention in T5 has no position bias, the beams of a user are queries of one attention call.

Axes in names: B users, L encoder positions, N beams, K codes, H heads, S positions written so far, D width.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gid.tree import GidTree
from trainer.model import ColaRec, last_read
from trainer.ranking import leaf_logits

# Users whose leaves are scored at once: with 100 beams and 32 leaves of 64 wide vectors 13 MB.
_ROWS = 16
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
    v_ID: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable items of each user.

    Args:
        inputs: X_u of B users, see `trainer.inputs.user_inputs`.
        states_BLD: what the encoder makes of them, where that is known.
        v_ID: v_i of all items, row item_idx, of a model whose leaves are items.
        seen_row, seen_item: int64 (S,), (user row, item_idx) pairs that must not be returned.

    Returns:
        item_idx int64 (B, num_results), best first, equal scores by item_idx, 0 where there are no more items; and
        their log p(GID | X_u), float32, -inf where there are none.
    """
    decoder = Decoder(model, model.encode(inputs) if states_BLD is None else states_BLD, inputs["mask"])
    batch, device = len(inputs["mask"]), inputs["mask"].device
    node_BN = prefix_BN = torch.zeros(batch, 1, dtype=torch.long, device=device)
    score_BN = torch.zeros(batch, 1, device=device)
    x_BND = model.start_D.expand(batch, 1, -1)
    for level in range(tree.length):
        d_BND = decoder.step(x_BND, level)
        code_BNC = tree.codes(level, node_BN)
        log_p_BNC = _children_log_p(model, tree, v_ID, level, node_BN, prefix_BN, code_BNC, d_BND)
        score_BC = (score_BN[..., None] + log_p_BNC).masked_fill(code_BNC < 0, -torch.inf).flatten(1)
        if level == tree.length - 1:
            column_C = torch.arange(code_BNC.shape[-1], device=device)
            item_BC = tree.leaf_item[tree.child(level, node_BN[..., None], column_C)].flatten(1)
            return best_items(item_BC, score_BC, num_results, tree.num_items, seen_row, seen_item)
        score_BN, choice_BN = score_BC.topk(min(num_beams, score_BC.shape[1]))
        parent_BN, column_BN = choice_BN // code_BNC.shape[-1], choice_BN % code_BNC.shape[-1]
        node_BN = tree.child(level, node_BN.gather(1, parent_BN), column_BN)
        decoder = decoder.select(parent_BN)
        code_BN, parent_BN = code_BNC.flatten(1).gather(1, choice_BN).clamp_min(0), prefix_BN.gather(1, parent_BN)
        x_BND = model.code_embedding(level, parent_BN, code_BN)
        prefix_BN = parent_BN * tree.branching + code_BN
    raise AssertionError("a tree has at least one level")


@torch.no_grad()
def gid_log_p(
    model: ColaRec,
    tree: GidTree,
    states_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    item_BN: torch.Tensor,
    gid_BNT: torch.Tensor,
    v_ID: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p of each code of the GIDs of N items for each user, float32 (B, N, l): their sums are what `beam_search`
    would say of the items.

    Args:
        item_BN: int64, in 1..I; gid_BNT: int64, their GIDs.
        v_ID: as there.
    """
    decoder, (batch, _, length) = Decoder(model, states_BLD, mask_BL), gid_BNT.shape
    row_B1, levels = torch.arange(batch, device=item_BN.device)[:, None], []
    # A prefix that several items of a user share is decoded once. U: those of a level, of which item n has the u-th.
    x_BUD, prefix_BN, u_BN = model.start_D.expand(batch, 1, -1), torch.zeros_like(item_BN), torch.zeros_like(item_BN)
    first_BU = u_BN[:, :1]  # an item that has it
    for level in range(length):
        d_BUD, code_BN = decoder.step(x_BUD, level), gid_BNT[..., level]
        if level == length - 1 and v_ID is not None:
            below_BUC = tree.items(tree.parent(item_BN).gather(1, first_BU))
            choice_BN = (below_BUC[row_B1, u_BN] == item_BN[..., None]).int().argmax(-1)
            log_p_BUC = _leaf_log_p(d_BUD, below_BUC, v_ID)
        else:
            logits_BUK = model.code_logits(level, prefix_BN.gather(1, first_BU), d_BUD)
            log_p_BUC, choice_BN = logits_BUK.log_softmax(-1), code_BN
        levels.append(log_p_BUC[row_B1, u_BN, choice_BN])
        if level == length - 1:
            break
        prefix_BN, before_BN, parent_BN = prefix_BN * tree.branching + code_BN, prefix_BN, u_BN
        first_BU, u_BN = _distinct(prefix_BN)
        decoder = decoder.select(parent_BN.gather(1, first_BU))
        x_BUD = model.code_embedding(level, before_BN.gather(1, first_BU), code_BN.gather(1, first_BU))
    return torch.stack(levels, -1)


def _distinct(value_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct values of each row, at most U: a place of the u-th, int64 (B, U), that of the last one again where a
    row has fewer; and which of them each value is, int64 (B, N)."""
    sorted_BN, order_BN = value_BN.sort(dim=1, stable=True)
    number_BN = F.pad(sorted_BN[:, 1:] != sorted_BN[:, :-1], (1, 0)).cumsum(1)
    first_BN = order_BN[:, -1:].repeat(1, value_BN.shape[1])
    first_BN.scatter_(1, number_BN, order_BN)
    which_BN = torch.empty_like(number_BN).scatter_(1, order_BN, number_BN)
    return first_BN[:, : int(number_BN.max()) + 1], which_BN


def _children_log_p(
    model: ColaRec,
    tree: GidTree,
    v_ID: torch.Tensor | None,
    level: int,
    node_BN: torch.Tensor,
    prefix_BN: torch.Tensor,
    code_BNC: torch.Tensor,
    d_BND: torch.Tensor,
) -> torch.Tensor:
    """log p of the codes that lead on from nodes, float32 (B, N, C); where there is none, code -1, meaningless."""
    if level == tree.length - 1 and v_ID is not None:
        return _leaf_log_p(d_BND, tree.items(node_BN), v_ID)
    log_p_BNK = model.code_logits(level, prefix_BN, d_BND).log_softmax(-1)
    return log_p_BNK.gather(-1, code_BNC.clamp_min(0))


def _leaf_log_p(d_BND: torch.Tensor, item_BNC: torch.Tensor, v_ID: torch.Tensor) -> torch.Tensor:
    """float32 (B, N, C): log p of the items below a prefix, 0 being none; as many at once as memory is not a matter."""
    parts = []
    for d_ND, item_NC in zip(d_BND.split(_ROWS), item_BNC.split(_ROWS), strict=True):
        logits_MC = leaf_logits(d_ND.flatten(0, 1), F.embedding(item_NC.flatten(0, 1), v_ID), item_NC.flatten(0, 1))
        parts.append(logits_MC.log_softmax(-1).view_as(item_NC))
    return torch.cat(parts)


@torch.no_grad()
def all_items(
    model: ColaRec,
    tree: GidTree,
    states_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    rows_at_once: int = 1 << 14,
    v_ID: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """log p(GID | X_u) of every item of the tree: every node is expanded, none is left out.

    Depth first, so that memory is bounded however many items there are: at most `rows_at_once` pairs of a user and a
    node (or the users, if they are more) are decoded together.

    Yields:
        item_idx int64 (C,), each item once; log p, float32 (B, C).
    """
    nodes_at_once = max(1, rows_at_once // len(states_BLD))

    def expand(decoder: Decoder, level: int, node_N, prefix_N, score_BN: torch.Tensor, x_ND: torch.Tensor):
        users = len(states_BLD)
        d_BND = decoder.step(x_ND.expand(users, -1, -1), level)
        code_NC = tree.codes(level, node_N)
        parent_M, column_M = (code_NC >= 0).nonzero(as_tuple=True)
        code_M, child_M = code_NC[parent_M, column_M], tree.child(level, node_N[parent_M], column_M)
        shared = (of_nodes.expand(users, *of_nodes.shape) for of_nodes in (node_N, prefix_N, code_NC))
        log_p_BNC = _children_log_p(model, tree, v_ID, level, *shared, d_BND)
        score_BM = score_BN[:, parent_M] + log_p_BNC[:, parent_M, column_M]
        if level == tree.length - 1:
            yield tree.leaf_item[child_M], score_BM
            return
        x_MD = model.code_embedding(level, prefix_N[parent_M], code_M)
        prefix_M = prefix_N[parent_M] * tree.branching + code_M
        for begin in range(0, len(child_M), nodes_at_once):
            part = slice(begin, begin + nodes_at_once)
            chosen = decoder.select(parent_M[part].expand(users, -1))
            yield from expand(chosen, level + 1, child_M[part], prefix_M[part], score_BM[:, part], x_MD[part])

    root = torch.zeros(1, dtype=torch.long, device=mask_BL.device)
    start = torch.zeros(len(states_BLD), 1, device=mask_BL.device)
    yield from expand(Decoder(model, states_BLD, mask_BL), 0, root, root, start, model.start_D[None])


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
        self._h_B1D = last_read(states_BLD, mask_BL[:, None]) if model.config.leaves_are_items else 0
        self._cross, self._own = [], []
        for block in self._blocks:
            attention = block.layer[1].EncDecAttention
            key_BLHD, value_BLHD = (f(states_BLD).unflatten(-1, self._split) for f in (attention.k, attention.v))
            self._cross.append((key_BLHD.transpose(1, 2), value_BLHD.transpose(1, 2)))
            empty = states_BLD.new_zeros(len(states_BLD), 1, 0, *self._split)
            self._own.append((empty, empty))

    def step(self, x_BND: torch.Tensor, level: int) -> torch.Tensor:
        """d_t, (B, N, D), before the codes of `level`, after reading the embeddings of the last code of each beam."""
        x_BND = x_BND / self._model.scale  # as in training, see ColaRec.decoder_inputs
        bias_attention = self._blocks[0].layer[0].SelfAttention
        bias_SH = bias_attention.compute_bias(level + 1, level + 1, device=x_BND.device)[0, :, -1].T
        for i, block in enumerate(self._blocks):
            x_BND = x_BND + self._self_attention(i, block.layer[0], x_BND, bias_SH)
            x_BND = x_BND + self._cross_attention(i, block.layer[1], x_BND)
            x_BND = block.layer[2](x_BND)
        return self._model.decoder.final_layer_norm(x_BND) + self._h_B1D

    def select(self, parent_BN: torch.Tensor) -> "Decoder":
        """The decoder whose beam n of each user goes on from what is beam parent_BN[:, n] here."""
        batch, beams = self._own[0][0].shape[:2]
        row_M = (torch.arange(batch, device=parent_BN.device)[:, None] * beams + parent_BN).flatten()
        chosen = copy.copy(self)
        chosen._own = [
            tuple(cache.flatten(0, 1).index_select(0, row_M).unflatten(0, parent_BN.shape) for cache in caches)
            for caches in self._own
        ]
        return chosen

    def _self_attention(self, i: int, layer, x_BND: torch.Tensor, bias_SH: torch.Tensor) -> torch.Tensor:
        attention, normed = layer.SelfAttention, layer.layer_norm(x_BND)
        q, k, v = (f(normed).unflatten(-1, self._split) for f in (attention.q, attention.k, attention.v))
        key, value = self._own[i]
        key, value = torch.cat([key, k[:, :, None]], 2), torch.cat([value, v[:, :, None]], 2)
        self._own[i] = (key, value)
        # One query and a few keys for each beam: products and sums are four times faster than so many tiny matrices.
        weight_BNSH = ((q[:, :, None] * key).sum(-1) + bias_SH).float().softmax(2).to(value.dtype)
        return attention.o((weight_BNSH[..., None] * value).sum(2).flatten(-2))

    def _cross_attention(self, i: int, layer, x_BND: torch.Tensor) -> torch.Tensor:
        attention = layer.EncDecAttention
        q_BHND = attention.q(layer.layer_norm(x_BND)).unflatten(-1, self._split).transpose(1, 2)
        key, value = self._cross[i]
        out = F.scaled_dot_product_attention(q_BHND, key, value, attn_mask=self._cross_mask, scale=1.0)
        return attention.o(out.transpose(1, 2).flatten(-2))
