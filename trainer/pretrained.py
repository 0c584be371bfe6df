"""Starting from T5's weights, and training small adapters instead of them (LoRA)."""

from pathlib import Path

import torch
from transformers import AutoConfig, T5ForConditionalGeneration

from contract.settings import Config
from trainer.model import ColaRec, ColaRecConfig

LORA_TARGETS = ["q", "k", "v", "o", "wi", "wo"]
LORA_SCALE = 2  # alpha / rank


@torch.no_grad()
def init_from_t5(model: ColaRec, config: Config) -> str:
    """Copies encoder and decoder from model.init, a T5 checkpoint: a folder or a name on the hub, in safetensors.

    T5's word embeddings become those of the content tokens where the corpus was built with T5's SentencePiece model
    (etl.tokenizer); they are brought to the size that ours start with.

    Returns:
        What was taken, for the log.

    Raises:
        ValueError: no such checkpoint, or one of another shape; names the settings to change.
    """
    source = config.model.init
    if source.startswith((".", "/")) and not Path(source).is_dir():
        raise ValueError(f"model.init = {source!r}: there is no such folder")
    try:
        shape = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.init = {source!r} cannot be read: {str(error).splitlines()[0]}") from None
    _check_shape(model.config, shape, source)
    try:
        t5 = T5ForConditionalGeneration.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"model.init = {source!r} has no weights: {str(error).splitlines()[0]}") from None
    weights = t5.state_dict()
    for ours in ("encoder", "decoder"):
        stack = {
            name.removeprefix(f"{ours}."): value
            for name, value in weights.items()
            if name.startswith(f"{ours}.") and "embed_tokens" not in name
        }
        getattr(model, ours).load_state_dict(stack)
    if model.config.leaves_are_items:
        model.decoder.final_layer_norm.weight.zero_()  # the decoder adds to the ranking score, see trainer/model.py
    taken = f"encoder and decoder of {source}"
    words, pieces = weights["shared.weight"], model.config.num_tokens - 2  # without the task tokens
    if config.etl.tokenizer:
        if pieces > len(words):
            raise ValueError(
                f"the corpus has {pieces} pieces, {source} {len(words)}: etl.tokenizer is not of that model"
            )
        rows = words[1:pieces]
        model.token.weight[1:pieces] = rows * (model.token.weight[1:pieces].std() / rows.std())
        taken += " with its word embeddings"
    return taken


def _check_shape(ours: ColaRecConfig, t5, source: str) -> None:
    if t5.model_type != "t5" or t5.is_gated_act:
        raise ValueError(f"model.init = {source!r} is a {t5.model_type} with {t5.dense_act_fn}; a T5 (v1.0) is needed")
    names = ("d_model", "d_ff", "d_kv", "num_heads", ("num_encoder_layers", "num_layers"), "num_decoder_layers")
    pairs = [(name, name) if isinstance(name, str) else name for name in names]
    wrong = [f"--model.{a}={getattr(t5, b)}" for a, b in pairs if getattr(ours, a) != getattr(t5, b)]
    if wrong:
        raise ValueError(f"model.init = {source!r} has another shape than [model]; use {' '.join(wrong)}")


def add_lora(model: ColaRec, config: Config) -> None:
    """Freezes the T5 layers and adds low-rank adapters to their matrices; embeddings and codebooks train as before."""
    import peft  # here, because it is not needed without LoRA

    rank = config.model.lora_rank
    settings = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    for stack in (model.encoder, model.decoder):
        stack.requires_grad_(False)
        peft.inject_adapter_in_model(settings, stack)


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in the names of a model without adapters, these multiplied out: W + (alpha / r) B A."""
    result = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            adapter = name.replace(".base_layer.weight", ".lora_{}.default.weight")
            value = value + LORA_SCALE * weights[adapter.format("B")] @ weights[adapter.format("A")]
        result[name.replace(".base_layer.", ".")] = value
    return result
