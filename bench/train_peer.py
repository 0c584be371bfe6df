"""The training loop of the official ColaRec code, written from its description, as the peer of bench/train.py.

It tokenises texts in the collate function, pads every batch to its longest text, and makes one encoder pass each for
the user, the positive, the negative and the contrastive item, and a decoder pass for the first three, through
transformers' T5 under torch AdamW in float32.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from contract import schema
from contract.artifacts import Artifact
from contract.settings import Config
from trainer import loader, samples
from trainer.inputs import Catalog
from trainer.model import ColaRecConfig, t5_stack

PAD = 0


class Peer(nn.Module):
    """T5 with atomic item and user embeddings and one head per level."""

    def __init__(self, config: ColaRecConfig):
        super().__init__()
        width = config.d_model
        self.token = nn.Embedding(config.num_tokens, width, padding_idx=PAD)
        self.item = nn.Embedding(config.num_items + 1, width, padding_idx=PAD)
        self.user = nn.Embedding(config.num_users + 1, width, padding_idx=PAD)
        self.codes = nn.ModuleList(nn.Embedding(config.branching, width) for _ in range(config.gid_length))
        self.heads = nn.ModuleList(nn.Linear(width, config.branching, bias=False) for _ in range(config.gid_length))
        self.start = nn.Parameter(torch.zeros(width))
        self.encoder, self.decoder = t5_stack(config, is_decoder=False), t5_stack(config, is_decoder=True)

    def encode(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        embeds = self.token(inputs["token"]) + self.item(inputs["item"]) + self.user(inputs["user"])
        return self.encoder(inputs_embeds=embeds, attention_mask=inputs["mask"]).last_hidden_state

    def gid_loss(self, states: torch.Tensor, mask: torch.Tensor, gid: torch.Tensor) -> torch.Tensor:
        codes = [code(gid[:, t]) for t, code in enumerate(self.codes)]
        embeds = torch.stack([self.start.expand_as(codes[0]), *codes[:-1]], 1)
        out = self.decoder(inputs_embeds=embeds, encoder_hidden_states=states, encoder_attention_mask=mask)
        logits = [head(out.last_hidden_state[:, t]) for t, head in enumerate(self.heads)]
        return sum(F.cross_entropy(logits[t], gid[:, t]) for t in range(gid.shape[1]))

    def forward(self, batch: dict, weights: dict[str, float]) -> torch.Tensor:
        states = {who: self.encode(batch[who]) for who in ("user", "positive", "negative", "contrastive")}
        h = {who: state[torch.arange(len(state)), batch[who]["mask"].sum(1) - 1] for who, state in states.items()}
        loss = weights["rec"] * self.gid_loss(states["user"], batch["user"]["mask"], batch["gid"]["positive"])
        for who in ("positive", "negative"):
            loss += weights["index"] * self.gid_loss(states[who], batch[who]["mask"], batch["gid"][who])
        margin = (h["user"] * (h["positive"] - h["negative"])).sum(-1)
        loss -= weights["bpr"] * F.logsigmoid(margin).mean()
        margin = (h["positive"] * (h["contrastive"] - h["negative"])).sum(-1)
        return loss - weights["contrastive"] * F.logsigmoid(margin).mean()


class PeerBatches:
    """Batches of the same targets as the trainer's, with the texts tokenised anew for each."""

    def __init__(self, config: Config, corpus: Artifact, catalog: Catalog):
        self.config, self.catalog = config, catalog
        table = pq.read_table(corpus.path / "items.parquet", columns=["item_idx", "text"])
        self.texts = [""] * (catalog.num_items + 1)
        for item, text in zip(table["item_idx"].to_pylist(), table["text"].to_pylist(), strict=True):
            self.texts[item] = text
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus.path / "tokenizer" / "spiece.model"))
        self.blocks = [samples.read_shard(path) for path in loader.shard_paths(corpus, "train")]

    def __iter__(self) -> Iterator[dict]:
        rng = np.random.default_rng(self.config.seed)
        while True:
            block = self.blocks[rng.integers(len(self.blocks))]
            targets = rng.choice(samples.train_targets(self.config, block, rng), self.config.train.global_batch)
            history = samples.train_histories(self.config, self.catalog, block, targets, rng).item_idx
            positive = block.item_idx.values[targets].astype(np.int64)
            negative = samples.draw_negatives(self.catalog, block, targets, rng)
            sibling = np.maximum(samples.draw_siblings(self.catalog, positive, rng), 1)
            batch = {"user": self.collate([row[row > 0] for row in history], users=False)}
            for who, items in {"positive": positive, "negative": negative, "contrastive": sibling}.items():
                batch[who] = self.collate(items[:, None], users=True)
            gids = {"positive": positive, "negative": negative}
            batch["gid"] = {who: torch.from_numpy(self.catalog.gids[items]) for who, items in gids.items()}
            yield batch

    def collate(self, rows: list[np.ndarray], users: bool) -> dict[str, torch.Tensor]:
        """Texts of the items of each row to padded ids: [task, (item slot, tokens) .., user slots, eos]."""
        limit, most = self.config.history.max_tokens, self.config.etl.max_item_tokens
        sequences = []
        for items in rows:
            sequence = [(self.catalog.task_item if users else self.catalog.task_user, 0, 0)]
            for item in items.tolist():
                sequence.append((0, item, 0))
                sequence += [(piece, 0, 0) for piece in self.pieces.encode(self.texts[item])[:most]]
            sequence = sequence[: limit - 1]
            if users:
                owners = self.catalog.users.take(items).values[: self.config.history.user_slots]
                sequence += [(0, 0, int(owner)) for owner in owners]
            sequences.append([*sequence, (schema.EOS, 0, 0)])
        longest = max(map(len, sequences))
        padded = torch.tensor([s + [(PAD, 0, 0)] * (longest - len(s)) for s in sequences])
        lengths = torch.tensor([len(s) for s in sequences])
        names = zip(("token", "item", "user"), padded.unbind(-1), strict=True)
        return dict(names) | {"mask": torch.arange(longest) < lengths[:, None]}
