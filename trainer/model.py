"""ColaRec: a T5 encoder-decoder whose encoder reads items and users and whose decoder writes GIDs.

    d_t = Decoder(Encoder(X), z_<t)                      p(z_t | X, z_<t) = softmax(d_t . E_t^T)
    L_rec         -log p(GID of the target | X_u)
    L_index       -log p(GID of an item | X_i), for the positive and the negative item
    L_bpr         -log sigma(h(X_u) . (h(X_i) - h(X_i-)))
    L_softmax     -log exp(s_ui) / (exp(s_ui) + sum over random items j of exp(s_uj - log q_j))
    L_contrastive -log sigma(h(X_i) . (h(X_i+) - h(X_i-)))

L_softmax is not in the paper: sampled softmax over s_ui = h(X_u) . v_i with v_i the input of item i, its slot and the
mean of its content tokens. A step draws its random items on all ranks together, by the square root of popularity, and
takes out how often j is drawn, q_j (Yi et al., RecSys 2019), so that in expectation it is the softmax over all items.

E_t is the codebook of level t in the paper, and so with `codebooks` = "level". With "prefix" a code of the levels
1 < t < l is E_t,z plus an embedding of the prefix (z_<t, z), and the last code stands for an item i, which is v_i:
p(z_l | X, z_<l) = softmax over the items below z_<l of d_l . v_i. So what a code means need not be the same below all
prefixes, and no probability goes to leaves that are no items.

A causal encoder reads X_u from left to right: the state at its t-th item is h of a user with t items, so that one pass
has a target after every item. L_rec and L_softmax take all of them, the losses of items one, drawn at random.

h(X) is the encoder's state at eos. h . h, which the paper leaves unscaled, is scaled by d_model^-0.5: with
RMS-normalised states it would start saturated.

Axes in names: B rows, L encoder positions, N targets of a row, T levels of a GID (T = l), K codes, D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from contract import config as config_module
from contract.settings import Config
from trainer import tables
from trainer.inputs import NUM_GAP_BUCKETS, Catalog

# Of all tables. What the stacks read is d_model^0.5 times as large, so that what an item is reaches the end of the
# residual stream beside what the layers add; dot products take the tables as they are, and AdamW at 1e-3 can turn them
# within some hundred steps.
EMBEDDING_STD = 0.03
LOSSES = ("rec", "index", "bpr", "softmax", "contrastive")


class ColaRecConfig(PreTrainedConfig):
    """What a model is: its sizes, which follow from the artifacts, its layers, and how its inputs were made.

    Args:
        num_tokens: content vocabulary and task tokens.
        num_users: 0 where items have no user slots.
        experiment: the settings of [history], [model] and [loss] that it was trained with, {dotted key: value}.
    """

    model_type = "colarec"

    def __init__(
        self,
        num_tokens: int = 1,
        num_items: int = 1,
        num_users: int = 0,
        num_events: int = 0,
        causal: bool = False,
        gid_length: int = 1,
        branching: int = 2,
        max_recency: int = 1,
        d_model: int = 64,
        d_ff: int = 256,
        d_kv: int = 16,
        num_heads: int = 4,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        dropout: float = 0.1,
        codebooks: str = "level",
        tie_codebooks: bool = True,
        item_table: str = "exact",
        user_table: str = "exact",
        hash_functions: int = 2,
        hash_rows: int = 1,
        loss_weights: dict[str, float] | None = None,
        experiment: dict | None = None,
        **kwargs,
    ):
        self.num_tokens, self.num_items, self.num_users, self.num_events = num_tokens, num_items, num_users, num_events
        self.causal = causal
        self.gid_length, self.branching, self.max_recency = gid_length, branching, max_recency
        self.d_model, self.d_ff, self.d_kv, self.num_heads = d_model, d_ff, d_kv, num_heads
        self.num_encoder_layers, self.num_decoder_layers = num_encoder_layers, num_decoder_layers
        self.dropout, self.codebooks, self.tie_codebooks = dropout, codebooks, tie_codebooks
        self.item_table, self.user_table = item_table, user_table
        self.hash_functions, self.hash_rows = hash_functions, hash_rows
        self.loss_weights = dict.fromkeys(LOSSES, 0.0) | (loss_weights or {})
        self.experiment = experiment or {}
        super().__init__(**kwargs)

    @property
    def leaves_are_items(self) -> bool:
        """Whether the last code of a GID is, to the decoder, the item that it leads to."""
        return self.codebooks == "prefix"

    @property
    def code_levels(self) -> int:
        """Levels whose codes have embeddings."""
        return self.gid_length - self.leaves_are_items


def model_config(config: Config, catalog: Catalog) -> ColaRecConfig:
    """The model of an experiment on its artifacts."""
    model = config.model
    return ColaRecConfig(
        num_tokens=catalog.vocab_size + 2,
        num_items=catalog.num_items,
        num_users=catalog.num_users if config.history.user_slots else 0,
        num_events=catalog.num_events,
        causal=config.history.attention == "causal",
        gid_length=catalog.gids.shape[1],
        branching=config.gid.branching,
        max_recency=max(config.history.train_items, config.history.eval_items),
        d_model=model.d_model,
        d_ff=model.d_ff,
        d_kv=model.d_kv,
        num_heads=model.num_heads,
        num_encoder_layers=model.num_encoder_layers,
        num_decoder_layers=model.num_decoder_layers,
        dropout=model.dropout,
        codebooks=model.codebooks,
        tie_codebooks=model.tie_codebooks,
        item_table=model.item_table,
        user_table=model.user_table,
        hash_functions=model.hash_functions,
        hash_rows=model.hash_rows,
        loss_weights=vars(config.loss),
        experiment=config_module.section(config, "history", "model", "loss"),
    )


class ColaRec(PreTrainedModel):
    """The model. `forward` takes a batch of `loader.TrainBatches` and returns the losses."""

    config_class = ColaRecConfig
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: ColaRecConfig, shard: tables.Shard | None = None, seed: int = 0):
        """With a `shard` the item and user tables are row-wise ones, for training, which start from `seed`."""
        super().__init__(config)
        self.scale = config.d_model**-0.5
        codes = (max(1, config.code_levels), config.branching, config.d_model)
        # Content token 0 pads, so the rows of this table are the token ids themselves.
        self.token = _table(config, config.num_tokens - 1)
        self.item = None
        if config.item_table != "none":
            self.item = tables.build(config, config.item_table, config.num_items, EMBEDDING_STD, shard, 2 * seed)
        self.user = tables.build(config, config.user_table, config.num_users, EMBEDDING_STD, shard, 2 * seed + 1)
        self.event = _table(config, config.num_events)
        self.recency = _table(config, config.max_recency)
        self.gap = _table(config, NUM_GAP_BUCKETS - 1)
        self.codebook_TKD = nn.Parameter(torch.empty(codes))
        # Of level t = 1 .. : (K^t prefixes, K, D), beside the level's codebook. Level 0 has one prefix alone.
        self.prefix_codebooks = nn.ParameterList(
            nn.Parameter(torch.empty(config.branching**t, *codes[1:]))
            for t in range(1, config.code_levels if config.leaves_are_items else 0)
        )
        self.start_D = nn.Parameter(torch.empty(config.d_model))
        self.head_TKD = None if config.tie_codebooks else nn.Parameter(torch.empty(codes))
        self.encoder = t5_stack(config, is_decoder=False)
        self.decoder = t5_stack(config, is_decoder=True)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """T5's layers have their own initialisation, which transformers calls."""
        if isinstance(module, nn.Embedding):
            rows = module.addresses.num_functions if isinstance(module, tables.HashEmbedding) else 1
            nn.init.normal_(module.weight, std=EMBEDDING_STD / rows**0.5)
            module.weight[0] = 0
        elif module is self:
            nn.init.normal_(self.codebook_TKD, std=EMBEDDING_STD)
            nn.init.normal_(self.start_D, std=EMBEDDING_STD)
            for codebook_PKD in self.prefix_codebooks:
                nn.init.normal_(codebook_PKD, std=EMBEDDING_STD)
            if self.head_TKD is not None:
                nn.init.normal_(self.head_TKD, std=EMBEDDING_STD)

    def compile_layers(self) -> None:
        """Compiles encoder and decoder in place, for any length; state dict and names stay."""
        for stack in (self.encoder, self.decoder):
            stack.compile(dynamic=True)

    def embed(self, inputs: dict) -> torch.Tensor:
        """(B, L, D) from the id arrays of `inputs.user_inputs` or `inputs.item_inputs`."""
        x_BLD = self.token(inputs["token"])
        if self.item is not None:
            x_BLD = x_BLD + self.item(inputs["item"])
        x_BLD = x_BLD + self.user(inputs["user"])
        x_BLD = x_BLD + self.event(inputs["event"]) + self.recency(inputs["recency"]) + self.gap(inputs["gap"])
        if "content_row" in inputs:
            bags = F.embedding_bag(inputs["content_tokens"], self.token.weight, inputs["content_offsets"], mode="mean")
            bags = F.pad(bags, (0, 0, 1, 0))  # row 0 is no bag; there are none when all histories are empty
            x_BLD = x_BLD + bags[inputs["content_row"]]
        return x_BLD / self.scale

    def encode(self, inputs: dict) -> torch.Tensor:
        """Encoder states (B, L, D); positions outside inputs["mask"] are meaningless.

        Rows in `groups` of like length are encoded group by group, each no wider than it must be.
        """
        x_BLD, mask_BL = self.embed(inputs), inputs["mask"]
        size, longest, _ = x_BLD.shape
        parts = []
        for begin, end, width in inputs.get("groups", [(0, size, longest)]):
            mask = mask_BL[begin:end, :width]
            if self.config.causal:  # (B, 1, queries, keys), which T5 takes as it is
                mask = mask[:, None, None, :] & torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
            states = self.encoder(inputs_embeds=x_BLD[begin:end, :width], attention_mask=mask).last_hidden_state
            parts.append(F.pad(states, (0, 0, 0, longest - width)))
        return torch.cat(parts)

    def item_vectors(self, items: dict) -> torch.Tensor:
        """v_i, float32 (N, D): what L_softmax has learned to find by h(X_u), and the decoder where leaves are items.

        Args:
            items: item (N,) and their content bags, see `inputs.content_bags`.
        """
        parts = [] if self.item is None else [self.item(items["item"])]
        if "content_tokens" in items:
            tokens, offsets = items["content_tokens"], items["content_offsets"]
            parts.append(F.embedding_bag(tokens, self.token.weight, offsets, mode="mean"))
        return sum(parts).float()

    def summary(self, states_BLD: torch.Tensor, inputs: dict) -> torch.Tensor:
        """h(X), (B, D): the states at eos, or the last ones."""
        return states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), inputs["eos"]]

    def decoder_inputs(self, gid_BT: torch.Tensor) -> torch.Tensor:
        """(B, T' + 1, D): the start vector and the embeddings of the T' < T codes given."""
        prefix_B, parts = torch.zeros_like(gid_BT[:, 0]) if gid_BT.shape[1] else None, []
        for level in range(gid_BT.shape[1]):
            parts.append(self.code_embedding(level, prefix_B, gid_BT[:, level]))
            prefix_B = prefix_B * self.config.branching + gid_BT[:, level]
        return torch.stack([self.start_D.expand(len(gid_BT), -1), *parts], 1) / self.scale

    def code_embedding(self, level: int, prefix: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """(..., D): what the decoder reads of codes (...) after prefixes (...) of `level` codes.

        Args:
            prefix: int64, the number that its codes are the digits of, to the base K.
        """
        x = self.codebook_TKD[level, code]
        if self.prefix_codebooks and level:
            rows_MD = self.prefix_codebooks[level - 1].flatten(0, 1)
            x = x + F.embedding(prefix * self.config.branching + code, rows_MD)
        return x

    def code_logits(self, level: int, prefix: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """(..., K): d_t . E_t^T, of a level that has codes, after prefixes (...) as in `code_embedding`."""
        logits = d @ (self.codebook_TKD if self.head_TKD is None else self.head_TKD)[level].T
        if self.prefix_codebooks and level:
            codes_MKD = F.embedding(prefix.flatten(), self.prefix_codebooks[level - 1].flatten(1))
            codes_MKD = codes_MKD.view(-1, *self.prefix_codebooks[level - 1].shape[1:])
            logits = logits + (codes_MKD @ d.flatten(0, -2)[..., None])[..., 0].view_as(logits)
        return logits

    def path_loss(self, d_STD: torch.Tensor, gid_ST: torch.Tensor, leaves: dict | None) -> torch.Tensor:
        """-log p(z_t | X, z_<t), float32 (S, T), where the decoder says d_STD before the codes of gid_ST.

        Args:
            leaves: where leaves are items; see `loader.TrainBatches` and `leaf_vectors`.
        """
        losses, prefix_S = [], torch.zeros_like(gid_ST[:, 0])
        for level in range(self.config.code_levels):
            logits_SK = self.code_logits(level, prefix_S, d_STD[:, level]).float()
            losses.append(F.cross_entropy(logits_SK, gid_ST[:, level], reduction="none"))
            prefix_S = prefix_S * self.config.branching + gid_ST[:, level]
        if self.config.leaves_are_items:
            row_SC = leaves["row"]
            v_SCD = F.embedding(row_SC, leaves["v"])
            logits_SC = leaf_logits(d_STD[:, -1], v_SCD, row_SC)
            losses.append(F.cross_entropy(logits_SC, leaves["choice"], reduction="none"))
        return torch.stack(losses, 1)

    def decode(self, states_BLD: torch.Tensor, mask_BNL: torch.Tensor, gid_BNT: torch.Tensor) -> torch.Tensor:
        """d_t, (B, N, T, D), of N targets of each row, which read the same states, each what its mask shows.

        They are one sequence for the decoder, so that keys and values of the states are computed once; masks keep them
        apart, and T5's position bias knows distances alone.
        """
        size, num_targets, levels = gid_BNT.shape
        x_BSD = self.decoder_inputs(gid_BNT[..., :-1].flatten(0, 1)).view(size, num_targets * levels, -1)
        place = torch.arange(num_targets * levels, device=x_BSD.device)
        own_SS = (place // levels == place[:, None] // levels) & (place <= place[:, None])
        d_BSD = self.decoder(
            inputs_embeds=x_BSD,
            attention_mask=own_SS.expand(size, 1, -1, -1),
            encoder_hidden_states=states_BLD,
            encoder_attention_mask=mask_BNL.repeat_interleave(levels, 1)[:, None],
        ).last_hidden_state
        return d_BSD.view(size, num_targets, levels, -1)

    def _target_loss(self, states_BLD: torch.Tensor, batch: dict, v_ND: torch.Tensor | None) -> torch.Tensor:
        """L_rec of each target, float32 (S,), decoded in the runs of rows that were encoded together."""
        size, longest, _ = states_BLD.shape
        row, at, gid_ST = batch["next_row"], batch["next_at"], batch["next_gid"]
        num_targets, column = (longest - 1, at - 1) if self.config.causal else (1, torch.zeros_like(at))
        gid_BNT = gid_ST.new_zeros(size, num_targets, gid_ST.shape[1]).index_put((row, column), gid_ST)
        at_BN = at.new_zeros(size, num_targets).index_put((row, column), at)
        read_BNL = torch.arange(longest, device=at.device) <= at_BN[..., None]
        parts = []
        for begin, end, width in batch["user"].get("groups", [(0, size, longest)]):
            rows, num = slice(begin, end), min(num_targets, width - 1)
            d_BNTD = self.decode(states_BLD[rows, :width], read_BNL[rows, :num, :width], gid_BNT[rows, :num])
            parts.append(F.pad(d_BNTD, (0, 0, 0, 0, 0, num_targets - num)))
        return self.path_loss(torch.cat(parts)[row, column], gid_ST, _leaves(batch, "next", v_ND)).mean(1)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Losses as float32 scalars: those in use by name, and 'loss', their weighted sum.

        Each loss is a sum over the targets under the weights of the batch (cross-entropies are means over the levels),
        so that the micro-batches of a step add up to its loss, however it was cut.
        """
        weights, losses = self.config.loss_weights, {}
        user_states = self.encode(batch["user"])
        v_candidate = self.item_vectors(batch["candidate"]) if "candidate" in batch else None
        if weights["rec"]:
            losses["rec"] = (self._target_loss(user_states, batch, v_candidate) * batch["next_weight"]).sum()
        if weights["softmax"]:
            h_next = user_states[batch["next_row"], batch["next_at"]].float()
            item, random = batch["candidate"]["item"], batch["random"]
            targets = v_candidate[batch["next"]], item[batch["next"]]
            loss = sampled_softmax(h_next, *targets, v_candidate[random], item[random], batch["log_q"])
            losses["softmax"] = (loss * batch["next_weight"]).sum()
        if "item" in batch:
            item_states = self.encode(batch["item"])
            if weights["index"]:
                rows = batch["index_rows"]
                mask, gid = batch["item"]["mask"][rows], batch["item"]["gid"][rows]
                d = self.decode(item_states[rows], mask[:, None], gid[:, None])[:, 0]
                loss = self.path_loss(d, gid, _leaves(batch, "index", v_candidate))
                losses["index"] = (loss.mean(1) * batch["index_weight"]).sum()
            h_item = self.summary(item_states, batch["item"]).float() * self.scale
            negative = h_item[batch["negative"]]
            if weights["bpr"]:
                h_user = user_states[torch.arange(len(user_states)), batch["at"]].float()
                margin = (h_user * (h_item[batch["positive"]] - negative)).sum(-1)
                losses["bpr"] = -(F.logsigmoid(margin) * batch["weight"]).sum()
            if weights["contrastive"]:
                h_positive = h_item[batch["positive"]] / self.scale
                margin = (h_positive * (h_item[batch["sibling"]] - negative)).sum(-1)
                losses["contrastive"] = -(F.logsigmoid(margin) * batch["sibling_weight"]).sum()
        losses["loss"] = sum(weights[name] * loss for name, loss in losses.items())
        return losses


def _leaves(batch: dict, name: str, v_ND: torch.Tensor | None) -> dict | None:
    """What `ColaRec.path_loss` takes of a batch, None where leaves are no items."""
    if f"{name}_leaf" not in batch:
        return None
    return {"row": batch[f"{name}_leaf"], "choice": batch[f"{name}_choice"], "v": F.pad(v_ND, (0, 0, 1, 0))}


def leaf_logits(d_MD: torch.Tensor, v_MCD: torch.Tensor, exists_MC: torch.Tensor) -> torch.Tensor:
    """d . v_i of the items below a prefix, float32 (M, C); -inf where exists_MC is 0."""
    logits_MC = (v_MCD @ d_MD.float()[..., None])[..., 0]
    return logits_MC.masked_fill(exists_MC == 0, -torch.inf)


def sampled_softmax(
    h_SD: torch.Tensor,
    v_target_SD: torch.Tensor,
    target_S: torch.Tensor,
    v_random_RD: torch.Tensor,
    random_R: torch.Tensor,
    log_q_R: torch.Tensor,
) -> torch.Tensor:
    """L_softmax of each target, float32 (S,), among the random items of all ranks; collective.

    Args:
        target_S, random_R: item_idx; a target that is among the random items counts once.
        log_q_R: log of how often a random item is drawn.
    """
    v_QD, random_Q, log_q_Q = _of_all_ranks(v_random_RD, random_R, log_q_R)
    score_SQ = h_SD @ v_QD.T - log_q_Q
    # Item 0 only fills up.
    score_SQ = score_SQ.masked_fill((random_Q == 0) | (random_Q == target_S[:, None]), -torch.inf)
    score_S = (h_SD * v_target_SD).sum(-1)
    return torch.logaddexp(score_S, score_SQ.logsumexp(-1)) - score_S


def _of_all_ranks(h_ND: torch.Tensor, *values_N: torch.Tensor) -> list[torch.Tensor]:
    """Rows and their values of all ranks, which may have different numbers of them; zeros fill up."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [h_ND, *values_N]
    most = torch.tensor(len(h_ND), device=h_ND.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    missing = int(most) - len(h_ND)
    padded = [F.pad(h_ND, (0, 0, 0, missing)), *(F.pad(values, (0, missing)) for values in values_N)]
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


@torch.no_grad()
def init_items(model: ColaRec, item_embeddings: torch.Tensor, gids: torch.Tensor, seed: int) -> None:
    """Starts the atomic item embeddings at the CF embeddings (I + 1, dim) under a random orthonormal map, and those of
    prefixes, where there are any, at the mean of the items below.

    Inner products are kept up to a factor, so that what LightGCN knows of neighbourhoods is there at step 0. The item
    table must be exact: a row of a hashed one belongs to many items.

    Args:
        gids: int64 (I + 1, l).
    """
    generator = torch.Generator().manual_seed(seed)
    width, dim = model.item.weight.shape[1], item_embeddings.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(max(width, dim), max(width, dim), generator=generator))
    mapped = item_embeddings[1:].float() @ rotation[:dim, :width]
    mapped *= EMBEDDING_STD / mapped.std().clamp_min(1e-12)
    if model.config.leaves_are_items:
        prefix = torch.zeros_like(gids[1:, 0])
        for level in range(model.config.code_levels):
            prefix = prefix * model.config.branching + gids[1:, level]
            codes = model.prefix_codebooks[level - 1].flatten(0, 1) if level else model.codebook_TKD[0]
            there, place, count = prefix.unique(return_inverse=True, return_counts=True)
            sums = mapped.new_zeros(len(there), width).index_add_(0, place, mapped)
            codes[there] = sums / count[:, None]
    if isinstance(model.item, tables.RowwiseEmbedding):
        return model.item.set_rows(F.pad(mapped, (0, 0, 1, 0)))
    model.item.weight[1:] = mapped


def _table(config: ColaRecConfig, rows: int) -> nn.Embedding:
    return nn.Embedding(rows + 1, config.d_model, padding_idx=0)


def t5_stack(config: ColaRecConfig, is_decoder: bool) -> T5Stack:
    """T5's encoder or decoder, which takes embeddings and uses PyTorch's fused attention."""
    stack = T5Stack(
        T5Config(
            vocab_size=8,  # unused, but checked against the special tokens
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_decoder_layers if is_decoder else config.num_encoder_layers,
            num_heads=config.num_heads,
            dropout_rate=config.dropout,
            is_decoder=is_decoder,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    del stack.embed_tokens  # inputs come as embeddings
    return stack


AutoConfig.register(ColaRecConfig.model_type, ColaRecConfig)
AutoModel.register(ColaRecConfig, ColaRec)
