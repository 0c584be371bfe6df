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

E_t is the codebook of level t in the paper, and so with `codebooks` = "level". With "prefix" the decoder is a search
by s_ui down the tree, and learns what that misses:

    d_t = Decoder(Encoder(X), z_<t) + h(X)
    p(z_t | X, z_<t)  ~  sum over m of exp(d_t . e_m + b_m)     e_m, b_m of the prefix (z_<t, z_t), m = 1 .. M
    p(z_l | X, z_<l)  ~  exp(d_l . v_i)                         of the item i that the GID leads to

each normalised over what is below z_<t. The softmax over items gives a node the mass of the items below it, the sum of
exp(s_ui), which M vectors e_m, each at the mean of a part of these items, with b_m the log of their number, come near
to; one vector is .43 off in its log, four .31, eight .23 (docs/experiments.md). The decoder's last norm starts at 0.

L_rec then asks for two things at once (`loss.distil`): the code of the target, and the distribution that the score
s_ui itself has over the codes after a prefix, from the items that L_softmax draws. Its gradient stays in the decoder,
the e_m and b_m: encoder and v_i are L_softmax's, and do not overfit to codes.

A causal encoder reads X_u from left to right: the state at its t-th item is h of a user with t items, so that one pass
has a target after every item. L_rec and L_softmax take all of them, the losses of items one, drawn at random.

h(X) is the encoder's state at eos. h . h, which the paper leaves unscaled, is scaled by d_model^-0.5: with
RMS-normalised states it would start saturated.

Axes in names: B rows, L encoder positions, N targets of a row, S targets of all rows, T levels of a GID (T = l),
K codes, M vectors of a code, P prefixes, Q items drawn at random, C items below a prefix, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from contract import config as config_module
from contract.settings import Config
from trainer import tables
from trainer.inputs import NUM_GAP_BUCKETS, Catalog
from trainer.ranking import Teacher, leaf_logits, of_all_ranks, sampled_scores

# Of all tables. What the stacks read is d_model^0.5 times as large, so that what an item is reaches the end of the
# residual stream beside what the layers add; dot products take the tables as they are, and AdamW at 1e-3 can turn them
# within some hundred steps.
EMBEDDING_STD = 0.03
LOSSES = ("rec", "index", "bpr", "softmax", "contrastive")
ITEMS_PER_VECTOR = 3  # below a code, on average, at least


class ColaRecConfig(PreTrainedConfig):
    """What a model is: its sizes, which follow from the artifacts, its layers, and how its inputs were made.

    Args:
        num_tokens: content vocabulary and task tokens.
        code_vectors: M of each level of codes, see `vectors_per_code`; one number for all of them.
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
        code_vectors: int | list[int] = 1,
        item_table: str = "exact",
        user_table: str = "exact",
        hash_functions: int = 2,
        hash_rows: int = 1,
        loss_weights: dict[str, float] | None = None,
        distil: float = 0.0,
        experiment: dict | None = None,
        **kwargs,
    ):
        self.num_tokens, self.num_items, self.num_users, self.num_events = num_tokens, num_items, num_users, num_events
        self.causal = causal
        self.gid_length, self.branching, self.max_recency = gid_length, branching, max_recency
        self.d_model, self.d_ff, self.d_kv, self.num_heads = d_model, d_ff, d_kv, num_heads
        self.num_encoder_layers, self.num_decoder_layers = num_encoder_layers, num_decoder_layers
        self.dropout, self.codebooks = dropout, codebooks
        self.code_vectors = [code_vectors] * self.code_levels if isinstance(code_vectors, int) else list(code_vectors)
        self.item_table, self.user_table = item_table, user_table
        self.hash_functions, self.hash_rows = hash_functions, hash_rows
        self.loss_weights = dict.fromkeys(LOSSES, 0.0) | (loss_weights or {})
        self.distil = distil
        self.experiment = experiment or {}
        super().__init__(**kwargs)

    @property
    def leaves_are_items(self) -> bool:
        """Whether the last code of a GID is, to the decoder, the item that it leads to."""
        return self.codebooks == "prefix"

    @property
    def distils(self) -> bool:
        """Whether L_rec learns from the ranking score, and trains the decoder alone."""
        return bool(self.leaves_are_items and self.distil and self.loss_weights["softmax"])

    @property
    def code_levels(self) -> int:
        """Levels whose codes have embeddings."""
        return self.gid_length - self.leaves_are_items


def vectors_per_code(config: Config, num_items: int, length: int) -> list[int]:
    """M of each level of codes with codebooks of prefixes: model.code_vectors, or fewer where so few items are below a
    code that the vectors would be hardly fewer than the items.

    Args:
        length: l.
    """
    below = (num_items / config.gid.branching ** (level + 1) for level in range(length - 1))
    return [max(1, min(config.model.code_vectors, round(items / ITEMS_PER_VECTOR))) for items in below]


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
        code_vectors=vectors_per_code(config, catalog.num_items, catalog.gids.shape[1]),
        item_table=model.item_table,
        user_table=model.user_table,
        hash_functions=model.hash_functions,
        hash_rows=model.hash_rows,
        loss_weights=config.loss.weights,
        distil=config.loss.distil,
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
        levels, branching, width = config.code_levels, config.branching, config.d_model
        # Content token 0 pads, so the rows of this table are the token ids themselves.
        self.token = _table(config, config.num_tokens - 1)
        self.item = None
        if config.item_table != "none":
            self.item = tables.build(config, config.item_table, config.num_items, EMBEDDING_STD, shard, 2 * seed)
        self.user = tables.build(config, config.user_table, config.num_users, EMBEDDING_STD, shard, 2 * seed + 1)
        self.event = _table(config, config.num_events)
        self.recency = _table(config, config.max_recency)
        self.gap = _table(config, NUM_GAP_BUCKETS - 1)
        self.start_D = nn.Parameter(torch.empty(width))
        if config.leaves_are_items:
            sizes = [(branching**level, branching, num) for level, num in enumerate(config.code_vectors)]
            self.code_vectors = nn.ParameterList(nn.Parameter(torch.empty(*size, width)) for size in sizes)
            self.code_biases = nn.ParameterList(nn.Parameter(torch.empty(size)) for size in sizes)
        else:  # what the decoder reads and what it is compared with are apart, as in the paper's code
            self.codebook_TKD = nn.Parameter(torch.empty(levels, branching, width))
            self.head_TKD = nn.Parameter(torch.empty(levels, branching, width))
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
            nn.init.normal_(self.start_D, std=EMBEDDING_STD)
            for codes in self.parameters_of_codes():
                nn.init.normal_(codes, std=EMBEDDING_STD)
            if self.config.leaves_are_items:
                for bias_PKM in self.code_biases:
                    nn.init.zeros_(bias_PKM)
                nn.init.zeros_(self.decoder.final_layer_norm.weight)

    def parameters_of_codes(self) -> list[nn.Parameter]:
        """The tables of code embeddings."""
        return list(self.code_vectors) if self.config.leaves_are_items else [self.codebook_TKD, self.head_TKD]

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
        if not self.config.leaves_are_items:
            return self.codebook_TKD[level, code]
        table_PKMD = self.code_vectors[level]
        rows = F.embedding(prefix * self.config.branching + code, table_PKMD.flatten(0, 1).flatten(1))
        return rows.unflatten(-1, table_PKMD.shape[2:]).mean(-2)

    def code_logits(self, level: int, prefix: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """float32 (..., K): what softmax makes p(z_t) of, at a level that has codes, after prefixes (...) as in
        `code_embedding`; d: d_t, (..., D)."""
        if not self.config.leaves_are_items:
            return (d @ self.head_TKD[level].T).float()
        table_PKMD, bias_PKM = self.code_vectors[level], self.code_biases[level]
        if level == 0:  # one prefix for all
            parts = d @ table_PKMD.flatten(0, 2).T
        else:
            codes = F.embedding(prefix.flatten(), table_PKMD.flatten(1)).unflatten(-1, (-1, table_PKMD.shape[-1]))
            parts = (codes @ d.flatten(0, -2)[..., None])[..., 0]
        parts = parts.view(*prefix.shape, *bias_PKM.shape[1:]).float()
        parts = parts + F.embedding(prefix, bias_PKM.flatten(1)).view_as(parts).float()
        return parts.logsumexp(-1)

    def path_loss(
        self, d_STD: torch.Tensor, gid_ST: torch.Tensor, leaves: dict | None, teacher: Teacher | None = None
    ) -> torch.Tensor:
        """-log p(z_t | X, z_<t), float32 (S, T), where the decoder says d_STD before the codes of gid_ST; with a
        teacher the cross-entropy of what it asks for in their place.

        Args:
            leaves: where leaves are items; see `_leaves`.
        """
        losses, prefix_S = [], torch.zeros_like(gid_ST[:, 0])
        for level in range(self.config.code_levels):
            wanted = teacher.codes(level, prefix_S, gid_ST[:, level]) if teacher else gid_ST[:, level]
            logits_SK = self.code_logits(level, prefix_S, d_STD[:, level])
            losses.append(F.cross_entropy(logits_SK, wanted, reduction="none"))
            prefix_S = prefix_S * self.config.branching + gid_ST[:, level]
        if self.config.leaves_are_items:
            v_SCD = F.embedding(leaves["row"], leaves["v"])
            logits_SC = leaf_logits(d_STD[:, -1], v_SCD, leaves["row"])
            wanted = teacher.leaves(v_SCD, leaves) if teacher else leaves["choice"]
            if teacher:  # the cross-entropy of probabilities would be inf times 0 where there is no item
                logits_SC = logits_SC.masked_fill(leaves["row"] == 0, torch.finfo(logits_SC.dtype).min)
            losses.append(F.cross_entropy(logits_SC, wanted, reduction="none"))
        return torch.stack(losses, 1)

    def decode(self, states_BLD: torch.Tensor, mask_BNL: torch.Tensor, gid_BNT: torch.Tensor) -> torch.Tensor:
        """d_t, (B, N, T, D), of N targets of each row, which read the same states, each what its mask shows: the first
        states of the row, so many as it has True.

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
        d_BNTD = d_BSD.view(size, num_targets, levels, -1)
        return d_BNTD + last_read(states_BLD, mask_BNL)[:, :, None] if self.config.leaves_are_items else d_BNTD

    def _target_loss(
        self, states_BLD: torch.Tensor, batch: dict, v_ND: torch.Tensor | None, teacher: Teacher | None
    ) -> torch.Tensor:
        """L_rec of each target, float32 (S,), decoded in the runs of rows that were encoded together."""
        if teacher:
            states_BLD, v_ND = states_BLD.detach(), v_ND.detach()
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
        d_STD = torch.cat(parts)[row, column]
        return self.path_loss(d_STD, gid_ST, _leaves(batch, "next", v_ND), teacher).mean(1)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Losses as float32 scalars: those in use by name, and 'loss', their weighted sum.

        Each loss is a sum over the targets under the weights of the batch (cross-entropies are means over the levels),
        so that the micro-batches of a step add up to its loss, however it was cut.
        """
        weights, losses = self.config.loss_weights, {}
        user_states = self.encode(batch["user"])
        v_candidate = self.item_vectors(batch["candidate"]) if "candidate" in batch else None
        teacher = None
        if weights["softmax"]:
            h_next = user_states[batch["next_row"], batch["next_at"]].float()
            candidate, random = batch["candidate"], batch["random"]
            targets = v_candidate[batch["next"]], candidate["item"][batch["next"]]
            of_items = (values[random] for values in (v_candidate, candidate["item"], candidate["prefix"]))
            *drawn, prefix_Q = of_all_ranks(batch["log_q"], *of_items)
            score_S, score_SQ = sampled_scores(h_next, *targets, *drawn)
            loss = torch.logaddexp(score_S, score_SQ.logsumexp(-1)) - score_S
            losses["softmax"] = (loss * batch["next_weight"]).sum()
            if weights["rec"] and self.config.distils:
                teacher = Teacher(self.config, h_next.detach(), score_S.detach(), score_SQ.detach(), prefix_Q)
        if weights["rec"]:
            loss = self._target_loss(user_states, batch, v_candidate, teacher)
            losses["rec"] = (loss * batch["next_weight"]).sum()
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


def last_read(states_BLD: torch.Tensor, mask_BNL: torch.Tensor) -> torch.Tensor:
    """h(X), (B, N, D), of those who read as many of the first states of a row as their mask has True: the last one."""
    at_BN = (mask_BNL.sum(-1) - 1).clamp_min(0)
    return states_BLD.gather(1, at_BN[..., None].expand(-1, -1, states_BLD.shape[-1]))


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
