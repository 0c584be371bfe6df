"""Beam search by transformers' `generate` with a Python prefix tree, as the peer of `trainer.beam.beam_search`.

The weights are those of a ColaRec model. `generate` knows one vocabulary, so its tokens are the codes 0..K-1 whatever
their level, and K, with which every sequence starts; embeddings and head are those of the position and, of a model with
a codebook of each prefix, of the tokens before.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel, T5Config
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from trainer.model import ColaRec, last_read
from trainer.ranking import leaf_logits


class GeneratePeer(PreTrainedModel, GenerationMixin):
    """The decoder of a model, as `generate` calls it."""

    config_class = T5Config
    _supports_sdpa = True

    def __init__(self, model: ColaRec, gids: np.ndarray, v_ID: torch.Tensor | None = None):
        """Args: as `PrefixTree` and `beam_search` take them."""
        sizes = model.config
        start = sizes.branching
        super().__init__(
            T5Config(
                vocab_size=start + 1,
                d_model=sizes.d_model,
                d_kv=sizes.d_kv,
                d_ff=sizes.d_ff,
                num_layers=sizes.num_decoder_layers,  # by which the cache is sized
                num_heads=sizes.num_heads,
                decoder_start_token_id=start,
                pad_token_id=start,
                eos_token_id=None,
                is_encoder_decoder=True,
            )
        )
        self.model, self.v_ID = model, v_ID
        if v_ID is not None:
            table = np.zeros((start ** (sizes.gid_length - 1), start), np.int64)
            prefix = gids[1:, :-1] @ start ** np.arange(sizes.gid_length - 1)[::-1]
            table[prefix, gids[1:, -1]] = np.arange(1, len(gids))
            self.item_PK = torch.from_numpy(table).to(v_ID.device)  # 0 where there is none

    def get_encoder(self, modality: str | None = None) -> torch.nn.Module:
        return self.model.encoder

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        encoder_outputs: BaseModelOutput,
        attention_mask: torch.Tensor,
        sequence: torch.Tensor,
        past_key_values=None,
        use_cache: bool = True,
        **_,
    ) -> Seq2SeqLMOutput:
        """Logits of the code after the last token; the tokens before it are in the cache."""
        level, start = past_key_values.get_seq_length(), self.config.decoder_start_token_id
        digits = start ** torch.arange(level, device=sequence.device).flip(0)
        prefix = (sequence[:, 1:] * digits).sum(1)
        x = self.model.start_D.expand(len(prefix), -1)
        if level:
            x = self.model.code_embedding(level - 1, prefix // start, sequence[:, -1])
        embeds = x / self.model.scale
        out = self.model.decoder(
            inputs_embeds=embeds[:, None],
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        d = out.last_hidden_state[:, 0]
        if self.v_ID is not None:
            d = d + last_read(encoder_outputs.last_hidden_state, attention_mask[:, None])[:, 0]
        if level == self.model.config.gid_length - 1 and self.v_ID is not None:
            logits = leaf_logits(d, F.embedding(self.item_PK[prefix], self.v_ID), self.item_PK[prefix])
        else:
            logits = self.model.code_logits(level, prefix, d)
        logits = F.pad(logits, (0, 1), value=-torch.inf)[:, None]
        return Seq2SeqLMOutput(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args, **kwargs) -> dict:
        """With the whole sequence beside its last token."""
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs) | {"sequence": input_ids}


class PrefixTree:
    """The codes that may follow each prefix of a GID, as `prefix_allowed_tokens_fn` is asked for them."""

    def __init__(self, gids: np.ndarray):
        """Args: gids: int (I + 1, l), row item_idx; row 0 is padding."""
        self.item = {tuple(gid): item for item, gid in enumerate(gids.tolist()) if item}
        self._codes: dict[tuple[int, ...], set[int]] = {}
        for gid in self.item:
            for level, code in enumerate(gid):
                self._codes.setdefault(gid[:level], set()).add(code)
        self._codes = {prefix: sorted(codes) for prefix, codes in self._codes.items()}

    def __call__(self, _: int, tokens: torch.Tensor) -> list[int]:
        return self._codes[tuple(tokens[1:].tolist())]


@torch.no_grad()
def generate(
    peer: GeneratePeer, tree: PrefixTree, states_BLD: torch.Tensor, mask_BL: torch.Tensor, num_beams: int
) -> torch.Tensor:
    """item_idx int64 (B, num_beams), best first; the tree must hold so many items."""
    sequences = peer.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states_BLD),
        attention_mask=mask_BL,
        prefix_allowed_tokens_fn=tree,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=peer.model.config.gid_length,
        length_penalty=0.0,
        do_sample=False,
    )
    return torch.tensor([tree.item[tuple(gid)] for gid in sequences[:, 1:].tolist()]).view(-1, num_beams)
