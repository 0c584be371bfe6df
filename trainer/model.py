"""ColaRec: a T5 encoder-decoder whose encoder reads items and users and whose decoder writes GIDs.

    d_t = Decoder(Encoder(X), z_<t)                      p(z_t | X, z_<t) = softmax(d_t . E_t^T)
    L_rec         -log p(GID of the target | X_u)
    L_index       -log p(GID of an item | X_i), for the positive and the negative item
    L_bpr         -log sigma(h(X_u) . (h(X_i) - h(X_i-)))
    L_contrastive -log sigma(h(X_i) . (h(X_i+) - h(X_i-)))

h(X) is the encoder's state at eos. As in T5, dot products with tied embeddings are scaled by d_model^-0.5; the same
scale is given to h . h, which the paper leaves unscaled: with RMS-normalised states it would start saturated.

Axes in names: B rows, L encoder positions, T levels of a GID (T = l), K codes, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from contract.config import Config
from trainer.inputs import NUM_GAP_BUCKETS, Catalog


@dataclass(frozen=True)
class Sizes:
    """What the model derives from the artifacts and cannot be built without."""

    num_tokens: int  # content vocabulary and task tokens
    num_items: int
    num_users: int
    num_events: int
    gid_length: int
    branching: int
    max_recency: int


def sizes(config: Config, catalog: Catalog) -> Sizes:
    return Sizes(
        num_tokens=catalog.vocab_size + 2,
        num_items=catalog.num_items,
        num_users=catalog.num_users if config.history.user_slots else 0,
        num_events=catalog.num_events,
        gid_length=catalog.gids.shape[1],
        branching=config.gid.branching,
        max_recency=max(config.history.train_items, config.history.eval_items),
    )


# Embeddings are added up and read through RMS norms, so only their ratio to what the layers add matters. This one
# lets AdamW at 1e-3 turn them within some hundred steps.
EMBEDDING_STD = 0.1


class ColaRec(nn.Module):
    """The model. `forward` takes a batch of `loader.TrainBatches` and returns the losses."""

    def __init__(self, config: Config, sizes: Sizes):
        super().__init__()
        self.sizes, self.loss_weights = sizes, config.loss
        width = config.model.d_model
        self.scale = width**-0.5

        def table(rows: int) -> nn.Embedding:
            embedding = nn.Embedding(rows + 1, width, padding_idx=0)
            nn.init.normal_(embedding.weight[1:], std=EMBEDDING_STD)
            return embedding

        # Content token 0 pads, so the rows of this table are the token ids themselves.
        self.token = table(sizes.num_tokens - 1)
        self.item = table(sizes.num_items)
        self.user = table(sizes.num_users)
        self.event = table(sizes.num_events)
        self.recency = table(sizes.max_recency)
        self.gap = table(NUM_GAP_BUCKETS - 1)
        self.codebook_TKD = nn.Parameter(torch.randn(sizes.gid_length, sizes.branching, width) * EMBEDDING_STD)
        self.start_D = nn.Parameter(torch.randn(width) * EMBEDDING_STD)
        self.encoder = _stack(config, is_decoder=False)
        self.decoder = _stack(config, is_decoder=True)
        self.head_TKD = None
        if not config.model.tie_codebooks:
            self.head_TKD = nn.Parameter(torch.randn(sizes.gid_length, sizes.branching, width) * self.scale)

    def embed(self, inputs: dict) -> torch.Tensor:
        """(B, L, D) from the id arrays of `inputs.user_inputs` or `inputs.item_inputs`."""
        x_BLD = self.token(inputs["token"]) + self.item(inputs["item"]) + self.user(inputs["user"])
        x_BLD = x_BLD + self.event(inputs["event"]) + self.recency(inputs["recency"]) + self.gap(inputs["gap"])
        if "content_row" in inputs:
            bags = F.embedding_bag(inputs["content_tokens"], self.token.weight, inputs["content_offsets"], mode="mean")
            bags = torch.cat([torch.zeros_like(bags[:1]), bags])
            x_BLD = x_BLD + bags[inputs["content_row"]]
        return x_BLD

    def encode(self, inputs: dict) -> torch.Tensor:
        """Encoder states (B, L, D); positions outside inputs["mask"] are meaningless.

        Rows in `groups` of like length are encoded group by group, each no wider than it must be.
        """
        x_BLD, mask_BL = self.embed(inputs), inputs["mask"]
        size, longest, _ = x_BLD.shape
        parts = []
        for begin, end, width in inputs.get("groups", [(0, size, longest)]):
            part = {"inputs_embeds": x_BLD[begin:end, :width], "attention_mask": mask_BL[begin:end, :width]}
            parts.append(F.pad(self.encoder(**part).last_hidden_state, (0, 0, 0, longest - width)))
        return torch.cat(parts)

    def summary(self, states_BLD: torch.Tensor, inputs: dict) -> torch.Tensor:
        """h(X), (B, D): the states at eos."""
        return states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), inputs["eos"]]

    def decoder_inputs(self, gid_BT: torch.Tensor) -> torch.Tensor:
        """(B, T' + 1, D): the start vector and the embeddings of the T' < T codes given."""
        level = torch.arange(gid_BT.shape[1], device=gid_BT.device)
        return torch.cat([self.start_D.expand(len(gid_BT), 1, -1), self.codebook_TKD[level, gid_BT]], 1)

    def code_logits(self, d_BTD: torch.Tensor, first_level: int = 0) -> torch.Tensor:
        """(B, T', K): d_t . E_t^T for the levels from `first_level` on."""
        levels = slice(first_level, first_level + d_BTD.shape[1])
        if self.head_TKD is not None:
            return torch.einsum("btd,tkd->btk", d_BTD, self.head_TKD[levels])
        return torch.einsum("btd,tkd->btk", d_BTD * self.scale, self.codebook_TKD[levels])

    def gid_loss(self, states_BLD: torch.Tensor, mask_BL: torch.Tensor, gid_BT: torch.Tensor) -> torch.Tensor:
        """(B, T): -log p(z_t | X, z_<t)."""
        d_BTD = self.decoder(
            inputs_embeds=self.decoder_inputs(gid_BT[:, :-1]),
            encoder_hidden_states=states_BLD,
            encoder_attention_mask=mask_BL,
        ).last_hidden_state
        logits = self.code_logits(d_BTD).float()
        return F.cross_entropy(logits.flatten(0, 1), gid_BT.flatten(), reduction="none").view_as(gid_BT)

    def forward(self, batch: dict) -> dict[str, torch.Tensor] | torch.Tensor:
        """Losses as float32 scalars: those in use by name, and 'loss', their weighted sum.

        A batch of `loader.eval_batches` gives `gid_log_likelihood` instead: ZeRO 3 gathers weights in forward only.

        Each loss is a sum over the targets under the weights of the batch (cross-entropies are means over the levels),
        so that the micro-batches of a step add up to its loss, however it was cut.
        """
        if "pair_gid" in batch:
            return self.gid_log_likelihood(batch)
        weights, losses = self.loss_weights, {}
        user_states = self.encode(batch["user"])
        if weights.rec:
            loss = self.gid_loss(user_states, batch["user"]["mask"], batch["gid"])
            losses["rec"] = (loss.mean(1) * batch["weight"]).sum()
        if "item" in batch:
            item_states = self.encode(batch["item"])
            if weights.index:
                rows = batch["index_rows"]
                loss = self.gid_loss(item_states[rows], batch["item"]["mask"][rows], batch["item"]["gid"][rows])
                losses["index"] = (loss.mean(1) * batch["index_weight"]).sum()
            h_item = self.summary(item_states, batch["item"]).float() * self.scale
            negative = h_item[batch["negative"]]
            if weights.bpr:
                h_user = self.summary(user_states, batch["user"]).float()
                margin = (h_user * (h_item[batch["positive"]] - negative)).sum(-1)
                losses["bpr"] = -(F.logsigmoid(margin) * batch["weight"]).sum()
            if weights.contrastive:
                h_positive = h_item[batch["positive"]] / self.scale
                margin = (h_positive * (h_item[batch["sibling"]] - negative)).sum(-1)
                losses["contrastive"] = -(F.logsigmoid(margin) * batch["sibling_weight"]).sum()
        losses["loss"] = sum(getattr(weights, name) * loss for name, loss in losses.items())
        return losses

    def gid_log_likelihood(self, batch: dict) -> torch.Tensor:
        """(P, T): log p of the codes of each (user, target) pair of a batch of `loader.eval_batches`."""
        states, rows = self.encode(batch["user"]), batch["pair_row"]
        return -self.gid_loss(states[rows], batch["user"]["mask"][rows], batch["pair_gid"])


def init_items(model: ColaRec, item_embeddings: torch.Tensor, seed: int) -> None:
    """Starts the atomic item embeddings at the CF embeddings (I + 1, dim) under a random orthonormal map.

    Inner products are kept up to a factor, so that what LightGCN knows of neighbourhoods is there at step 0.
    """
    generator = torch.Generator().manual_seed(seed)
    width, dim = model.item.weight.shape[1], item_embeddings.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(max(width, dim), max(width, dim), generator=generator))
    mapped = item_embeddings[1:].float() @ rotation[:dim, :width]
    with torch.no_grad():
        model.item.weight[1:] = mapped * (EMBEDDING_STD / mapped.std().clamp_min(1e-12))


def _stack(config: Config, is_decoder: bool) -> T5Stack:
    model = config.model
    stack = T5Stack(
        T5Config(
            vocab_size=8,  # unused, but checked against the special tokens
            d_model=model.d_model,
            d_kv=model.d_kv,
            d_ff=model.d_ff,
            num_layers=model.num_decoder_layers if is_decoder else model.num_encoder_layers,
            num_heads=model.num_heads,
            dropout_rate=model.dropout,
            is_decoder=is_decoder,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    del stack.embed_tokens  # inputs come as embeddings
    return stack
