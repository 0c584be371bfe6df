"""How the embeddings of a model start: items at their CF embeddings, codes amid the items below them.

Axes in names: I items, P prefixes, M vectors of a code, D width.
"""

import torch

from trainer import tables
from trainer.model import EMBEDDING_STD, ColaRec

NOTHING_BELOW = -10.0  # b_m where no item is below: next to no probability
CLUSTER_ROUNDS = 5  # of k-means among the items below a prefix, for the start of the e_m
CLUSTER_ROWS = 1 << 18  # items compared with their centres at once


@torch.no_grad()
def init_items(model: ColaRec, item_embeddings: torch.Tensor, seed: int) -> torch.Tensor:
    """Starts the atomic item embeddings at the CF embeddings (I + 1, dim) under a random orthonormal map, and returns
    them, float32 (I + 1, D).

    Inner products are kept up to a factor, so that what LightGCN knows of neighbourhoods is there at step 0. The item
    table must be exact: a row of a hashed one belongs to many items.
    """
    generator = torch.Generator().manual_seed(seed)
    width, dim = model.item.weight.shape[1], item_embeddings.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(max(width, dim), max(width, dim), generator=generator))
    mapped = item_embeddings.float() @ rotation[:dim, :width]
    mapped *= EMBEDDING_STD / mapped[1:].std().clamp_min(1e-12)
    mapped[0] = 0
    if isinstance(model.item, tables.RowwiseEmbedding):
        model.item.set_rows(mapped)
    else:
        model.item.weight.copy_(mapped)
    return mapped


@torch.no_grad()
def init_codes(model: ColaRec, gids: torch.Tensor, vectors: torch.Tensor | None, seed: int) -> None:
    """Starts e_m at the means of M parts of the items below each prefix, by some rounds of k-means, and b_m at the log
    of how many these are.

    Args:
        gids: int64 (I + 1, l).
        vectors: float32 (I + 1, D), what the items start at; None: the e_m stay as they are, at random.
    """
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.zeros_like(gids[1:, 0])
    for level in range(model.config.code_levels):
        prefix = prefix * model.config.branching + gids[1:, level]
        there, node = prefix.unique(return_inverse=True)
        vectors_PMD, bias_PM = (table[level].flatten(0, 1) for table in (model.code_vectors, model.code_biases))
        num_parts = bias_PM.shape[1]
        if vectors is None:
            part = torch.randint(num_parts, node.shape, generator=generator)
        else:
            vectors_PMD[there], part = _parts(vectors[1:], node, len(there), num_parts, generator)
        counts = torch.bincount(node * num_parts + part, minlength=len(there) * num_parts).view(-1, num_parts)
        bias_PM.fill_(NOTHING_BELOW)
        bias_PM[there] = counts.float().log().clamp_min(NOTHING_BELOW)


def _parts(
    x_ID: torch.Tensor, node_I: torch.Tensor, num_nodes: int, num_parts: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means among the rows of each node, all nodes at once: the centres, float32 (nodes, M, D), and the number of its
    centre for each row, int64 (I,). A node with fewer rows than M has each of them for a centre, and its mean."""
    order = torch.randperm(len(x_ID), generator=generator)
    order = order[node_I[order].argsort(stable=True)]
    sizes = torch.bincount(node_I, minlength=num_nodes)
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    mean = x_ID.new_zeros(num_nodes, x_ID.shape[1]).index_add_(0, node_I, x_ID) / sizes[:, None]
    centre = mean[:, None].repeat(1, num_parts, 1)
    seeds = order[place < num_parts]
    centre[node_I[seeds], place[place < num_parts]] = x_ID[seeds]
    exists = torch.arange(num_parts) < sizes[:, None]
    part = torch.zeros_like(node_I)
    for _ in range(CLUSTER_ROUNDS):
        for rows in torch.arange(len(x_ID)).split(CLUSTER_ROWS):
            distance = (x_ID[rows, None] - centre[node_I[rows]]).square().sum(-1)
            part[rows] = distance.masked_fill(~exists[node_I[rows]], torch.inf).argmin(1)
        cell = node_I * num_parts + part
        sums = torch.zeros_like(centre).flatten(0, 1).index_add_(0, cell, x_ID)
        counts = torch.bincount(cell, minlength=len(sums))[:, None]
        centre = torch.where(counts > 0, sums / counts.clamp_min(1), centre.flatten(0, 1)).view_as(centre)
    return centre, part
