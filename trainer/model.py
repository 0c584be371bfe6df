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
ITEMS_PER_VECTOR = 3  # below a code, on average, at least
NOTHING_BELOW = -10.0  # b_m where no item is below: next to no probability
CLUSTER_ROUNDS = 5  # of k-means among the items below a prefix, for the start of the e_m
CLUSTER_ROWS = 1 << 18  # items compared with their centres at once


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
        self, d_STD: torch.Tensor, gid_ST: torch.Tensor, leaves: dict | None, teacher: "Teacher | None" = None
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
        self, states_BLD: torch.Tensor, batch: dict, v_ND: torch.Tensor | None, teacher: "Teacher | None"
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
            *drawn, prefix_Q = _of_all_ranks(batch["log_q"], *of_items)
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


def last_read(states_BLD: torch.Tensor, mask_BNL: torch.Tensor) -> torch.Tensor:
    """h(X), (B, N, D), of those who read as many of the first states of a row as their mask has True: the last one."""
    at_BN = (mask_BNL.sum(-1) - 1).clamp_min(0)
    return states_BLD.gather(1, at_BN[..., None].expand(-1, -1, states_BLD.shape[-1]))


def _of_all_ranks(*parts: torch.Tensor) -> list[torch.Tensor]:
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
