"""Embedding tables of items and users: exact or hashed, and row-wise training for those too large for AdamW.

An exact table has a row per id. A hashed one (Weinberger et al. 2009; several functions: Svenstrup et al. 2017) has
as many rows as it is given: an id is the sum of the rows that F fixed hash functions name. Two ids have the same vector
with probability F! / num_rows^F. New ids need no new rows. Row 0 is for padding and stays zero.

Bytes of a table of R rows of D float32, over all ranks (ZeRO 0 holds the dense ones once per rank):

    dense     16 R D        weights, gradients and AdamW's two moments; a step reads and writes all of them
    row-wise   4 R (D + 2)  weights and two numbers of state per row; a step touches the rows of its batch alone

Row-wise tables are no parameters of the module: DeepSpeed knows nothing of them, so they go with every ZeRO stage. Rank
q holds the rows r with r % world_size = q. Their optimizer is row-wise Adam, FBGEMM's PARTIAL_ROWWISE_ADAM, without its
first moment (beta_1 = 0), which would be as large as the table. With the gradient g of a row in a step:

    k <- k + 1      v <- 0.999 v + 0.001 mean over D of g^2      w <- w - lr g / (sqrt(v / (1 - 0.999^k)) + 1e-8)

k counts the row's own updates, not the steps of the run: else the first update of a row that is met late would be 30
times too large. Steps are of the size of AdamW's, so that one learning rate serves both (row-wise Adagrad, with one
number less, needs ten times that rate on the corpus of the tests). There is no weight decay, as for no embedding.
Gradients are clipped apart from the other parameters': `train.clip` holds for the norm over the rows of all row-wise
tables of all ranks, and in DeepSpeed for the norm over its own.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

BETA, EPSILON = 0.999, 1e-8
_DRAWN, _SENT = 1 << 16, 1 << 22  # values at a time: what a cache holds, what a rank can spare
# splitmix64 (Steele et al. 2014) as int64, which wraps around as uint64 does.
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(number: torch.Tensor, seed: torch.Tensor | int) -> torch.Tensor:
    """int64, the bits of the outputs of splitmix64 from `seed`, of which the first has number 1."""
    z = number * _GOLDEN + seed
    for bits, multiplier in ((30, _MULTIPLY_1), (27, _MULTIPLY_2)):
        z.bitwise_xor_(_shift(z, bits)).mul_(multiplier)
    return z.bitwise_xor_(_shift(z, 31))


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts right as if unsigned."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Addresses:
    """Which rows of a table an id is made of."""

    num_rows: int  # beside row 0, which pads
    num_functions: int = 0  # hash functions; 0: exact, the row of an id is the id

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (..., F), or (..., 1) when exact, of the ids (...); id 0 has rows 0. The same on every device."""
        if not self.num_functions:
            return ids[..., None]
        keys = splitmix64(torch.arange(1, self.num_functions + 1, device=ids.device), 0)
        rows = 1 + (splitmix64(ids[..., None], keys) & (2**63 - 1)) % self.num_rows
        return rows.masked_fill(ids[..., None] == 0, 0)


@dataclass(frozen=True)
class Shard:
    """Which rows of the row-wise tables this process holds: those with row % world_size == rank."""

    rank: int
    world_size: int


def build(config, kind: str, num_ids: int, std: float, shard: Shard | None, seed: int) -> nn.Module:
    """The table of the ids 0..num_ids, a module from int64 (...) to (..., D).

    Args:
        config: the `ColaRecConfig` of the model.
        kind: "exact" or "hash", see `model.item_table`.
        std: of the vectors at the start of a row-wise table; the model itself fills dense ones.
        shard: what to hold of a row-wise table; None: a dense one, for AdamW or for evaluation, which holds the same
            values under the same name.
        seed: of the values at the start of a row-wise table, which are the same over any number of ranks.
    """
    addresses = Addresses(config.hash_rows, config.hash_functions) if kind == "hash" else Addresses(num_ids)
    if shard and num_ids:
        std /= math.sqrt(max(1, addresses.num_functions))
        return RowwiseEmbedding(addresses, config.d_model, std, shard, seed)
    if kind == "hash" and num_ids:
        return HashEmbedding(addresses, config.d_model)
    return nn.Embedding(num_ids + 1, config.d_model, padding_idx=0)


class HashEmbedding(nn.Embedding):
    """A dense hashed table: the vector of an id is the sum of its rows."""

    def __init__(self, addresses: Addresses, width: int):
        super().__init__(addresses.num_rows + 1, width, padding_idx=0)
        self.addresses = addresses

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _sum_rows(self.addresses.rows(ids), self.weight, padding_row=0)


class RowwiseEmbedding(nn.Module):
    """A table, exact or hashed, of which each rank holds a part, and whose rows are updated by `step` alone.

    `forward` and what it is called by (`embed`, `encode`) are collective when there are several ranks: all of them call
    it equally often. In training each call hands out its rows as a leaf of the autograd graph, which `step` asks for
    its gradient. A forward pass that activation checkpointing repeats does no harm: one of the two leaves gets none.
    """

    STATE = ("weight", "second_moment", "num_updates")

    def __init__(self, addresses: Addresses, width: int, std: float, shard: Shard, seed: int):
        """Draws uniform values of standard deviation `std` from (seed, row, column); zeros when it is 0."""
        super().__init__()
        self.addresses, self.shard = addresses, shard
        num_own = len(range(shard.rank, addresses.num_rows + 1, shard.world_size))
        self.weight = torch.zeros(num_own, width)
        self.second_moment = torch.zeros(num_own)  # v of the module's docstring
        self.num_updates = torch.zeros(num_own, dtype=torch.int32)  # k
        self._handed_out: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows and their leaves
        # Follows the module to its device and dtype; weights and state stay float32, whatever the others are cast to.
        self.register_buffer("like", torch.empty(0), persistent=False)
        for own in torch.arange(num_own if std else 0).split(max(1, _DRAWN // width)):
            self.weight[own] = initial_rows(own * shard.world_size + shard.rank, width, std, seed)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name in self.STATE:
            setattr(self, name, getattr(self, name).to(self.like.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.addresses}, {self.weight.shape[1]}, {self.shard}"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        distinct, place = torch.unique(self.addresses.rows(ids), return_inverse=True)
        values = self.look_up(distinct)
        if self.training and torch.is_grad_enabled():
            values.requires_grad_()
            self._handed_out.append((distinct, values))
        return _sum_rows(place, values).to(self.like.dtype)

    @torch.no_grad()
    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, D) of int64 rows (n,), from the ranks that hold them; collective."""
        if self.shard.world_size == 1:
            return self.weight[rows]
        order, asked, asking = self._route(rows)
        own = _exchange(rows[order], asked, asking) // self.shard.world_size
        values = torch.empty(len(rows), self.weight.shape[1], device=rows.device)
        values[order] = _exchange(self.weight[own], asking, asked)
        return values

    @torch.no_grad()
    def take_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the rows that this rank holds, summed over the lookups since the last call and averaged
        over the ranks, as DeepSpeed does it; collective.

        Returns:
            int64 (n,), distinct places in `weight`; float32 (n, D).
        """
        given = [(rows, leaf.grad) for rows, leaf in self._handed_out if leaf.grad is not None]
        self.forget()
        rows = torch.cat([self.weight.new_empty(0, dtype=torch.long), *(rows for rows, _ in given)])
        gradient = torch.cat([self.weight[:0], *(gradient for _, gradient in given)])
        rows, gradient = self._add_equal(rows, gradient)
        world_size = self.shard.world_size
        if world_size > 1:
            order, send, receive = self._route(rows)
            rows, gradient = (_exchange(x[order], send, receive) for x in (rows, gradient))
            rows, gradient = self._add_equal(rows, gradient)
            gradient /= world_size
        return rows // world_size, gradient

    def forget(self) -> None:
        """Drops the gradient of the lookups since the last step."""
        self._handed_out.clear()

    def _add_equal(self, rows: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows, ascending and without the padding, and the sums of their gradients.

        By the sums of a sparse tensor, as they are the same in each run on a GPU as well.
        """
        size = (self.addresses.num_rows + 1, gradient.shape[1])
        sums = torch.sparse_coo_tensor(rows[None], gradient, size, check_invariants=False).coalesce()
        rows, num_padding = sums.indices()[0], int((sums.indices() == 0).sum())
        return rows[num_padding:], sums.values()[num_padding:]

    @torch.no_grad()
    def update(self, own: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """Row-wise Adam on the distinct rows at the places `own` of `weight`, int64 (n,), with (n, D)."""
        num_updates = self.num_updates[own] + 1
        second_moment = self.second_moment[own].lerp(gradient.square().mean(1), 1 - BETA)
        self.num_updates[own], self.second_moment[own] = num_updates, second_moment
        unbiased = second_moment / (1 - BETA ** num_updates.double()).float()
        self.weight[own] -= gradient * (lr / (unbiased.sqrt() + EPSILON))[:, None]

    @torch.no_grad()
    def set_rows(self, values: torch.Tensor) -> None:
        """Starts the table at (num_rows + 1, D), given on every rank; row 0 must be zeros."""
        self.weight.copy_(values[self.shard.rank :: self.shard.world_size])

    def whole(self) -> torch.Tensor | None:
        """On rank 0 the table, float32 (num_rows + 1, D) on the CPU; None elsewhere. Collective, in pieces.

        It is what a dense table of the same settings holds as its weight.
        """
        rank, world_size = self.shard.rank, self.shard.world_size
        if world_size == 1:
            return self.weight.cpu().clone()
        num_rows, width = self.addresses.num_rows + 1, self.weight.shape[1]
        table = torch.empty(num_rows, width) if rank == 0 else None
        most = -(-num_rows // world_size)  # rows of a rank
        step = min(most, max(1, _SENT // width))
        for begin in range(0, most, step):
            piece = F.pad(self.weight[begin : begin + step], (0, 0, 0, max(0, begin + step - len(self.weight))))
            pieces = [torch.empty_like(piece) for _ in range(world_size)] if rank == 0 else None
            dist.gather(piece, pieces)
            for q in range(world_size if rank == 0 else 0):
                target = table[begin * world_size + q : (begin + step) * world_size : world_size]
                target.copy_(pieces[q][: len(target)])
        return table

    def _route(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """The order of `rows` by the rank that holds them, how many go to each rank, how many come from each."""
        owner = rows % self.shard.world_size
        send = torch.bincount(owner, minlength=self.shard.world_size)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        return owner.argsort(stable=True), send.tolist(), receive.tolist()


def initial_rows(rows: torch.Tensor, width: int, std: float, seed: int) -> torch.Tensor:
    """float32 (n, width) of int64 rows (n,): uniform, of standard deviation `std`; zeros for row 0."""
    number = rows[:, None] * width + torch.arange(width, device=rows.device)
    unit = (splitmix64(number, seed) >> 40).float().add_(0.5).mul_(2**-23)  # 24 signed bits: in (-1, 1), and exact
    return unit.mul_(std * math.sqrt(3)).masked_fill_(rows[:, None] == 0, 0)


def _sum_rows(rows: torch.Tensor, weight: torch.Tensor, padding_row: int | None = None) -> torch.Tensor:
    """(..., D): the sums of the rows (..., F) of `weight`."""
    sums = F.embedding_bag(rows.flatten(0, -2), weight, mode="sum", padding_idx=padding_row)
    return sums.view(*rows.shape[:-1], -1)


def _exchange(values: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
    """Sends the first send[0] values to rank 0 and so on; returns what came, by rank."""
    result = values.new_empty(sum(receive), *values.shape[1:])
    dist.all_to_all_single(result, values.contiguous(), receive, send)
    return result


def rowwise(model: nn.Module) -> dict[str, RowwiseEmbedding]:
    """The row-wise tables of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RowwiseEmbedding)}


def step(model: nn.Module, lr: float, clip: float, apply: bool = True) -> torch.Tensor | None:
    """Updates the rows that were looked up since the last step, after the backward passes of all micro-batches of
    the step; collective.

    Args:
        apply: False, on all ranks: leave the rows alone and forget their gradient, as the engine skipped the step.

    Returns:
        The norm of their gradient before it was clipped, over all tables and ranks; where it is not finite the rows
        are as before. None without row-wise tables or when nothing was to be applied.
    """
    tables = list(rowwise(model).values())
    if not apply:
        for table in tables:
            table.forget()
    if not apply or not tables:
        return None
    gradients = [table.take_gradient() for table in tables]
    norm = torch.stack([gradient.square().sum() for _, gradient in gradients]).sum()
    if tables[0].shard.world_size > 1:
        dist.all_reduce(norm)
    norm = norm.sqrt()
    if norm.isfinite():
        scale = (clip / (norm + 1e-6)).clamp_max(1)
        for table, (own, gradient) in zip(tables, gradients, strict=True):
            table.update(own, gradient * scale, lr)
    return norm


def num_weights(model: nn.Module) -> int:
    """Values in the row-wise tables, over all ranks."""
    return sum((table.addresses.num_rows + 1) * table.weight.shape[1] for table in rowwise(model).values())


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """On rank 0 what the row-wise tables add to the state dict of the model to evaluate; {} elsewhere. Collective."""
    tables = {f"{name}.weight": table.whole() for name, table in rowwise(model).items()}
    return {name: table for name, table in tables.items() if table is not None}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of the row-wise tables, for a checkpoint; no copies, so that filling them restores it.

    Of each table NAME: NAME.weight float32 (n, D), NAME.second_moment float32 (n,) and NAME.num_updates int32 (n,);
    place j is row rank + j * world_size.
    """
    return {f"{name}.{key}": getattr(table, key) for name, table in rowwise(model).items() for key in table.STATE}
