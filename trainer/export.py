"""The model/ artifact: a transformers model folder, with a card for people."""

from pathlib import Path

import safetensors.torch
import torch
import transformers

from contract.artifacts import Artifact
from contract.disk import follow_umask
from contract.settings import Config
from trainer.model import ColaRec, ColaRecConfig

CARD = "README.md"
MODEL_FILES = (CARD, transformers.utils.CONFIG_NAME, transformers.utils.SAFE_WEIGHTS_NAME)
transformers.utils.logging.disable_progress_bar()


def write_model(path: Path, weights: dict[str, torch.Tensor], config: ColaRecConfig, card: str) -> None:
    """config.json, model.safetensors and README.md, as `save_pretrained` would write them."""
    config.architectures = [ColaRec.__name__]
    config.save_pretrained(path)
    file = path / transformers.utils.SAFE_WEIGHTS_NAME
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    follow_umask(file)
    (path / CARD).write_text(card)


def load_model(artifact: Artifact) -> ColaRec:
    """The trained model on the CPU in float32, ready for evaluation.

    Raises:
        ValueError: the folder does not hold all weights of such a model, and no others.
    """
    train_again = f"{artifact.path} does not hold a model of this version ({{}}); run again: deepspeed trainer/main.py"
    if not (artifact.path / transformers.utils.CONFIG_NAME).is_file():
        raise ValueError(train_again.format(f"no {transformers.utils.CONFIG_NAME}"))
    model, found = ColaRec.from_pretrained(artifact.path, dtype=torch.float32, output_loading_info=True)
    wrong = sorted(found["missing_keys"] | found["unexpected_keys"])
    if wrong:
        raise ValueError(train_again.format(f"weights that are missing or unknown: {', '.join(wrong[:5])}"))
    return model.eval()


def model_card(
    config: Config, corpus: Artifact, model: ColaRecConfig, facts: dict[str, str], num_parameters: int
) -> str:
    """README.md of the model, with the header that the Hugging Face hub reads.

    Args:
        facts: what training measured, {name: value}, in the order to be shown.
    """
    counts, history = corpus.counts, config.history
    rows = [
        ("data", f"{config.name}: {counts['num_users']:,} users, {counts['num_items']:,} items"),
        ("history", f"{history.order}, {history.encoding}, {history.train_items} items at training"),
        ("GIDs", f"{config.gid.method}, {model.gid_length} codes of {model.branching}"),
        (
            "layers",
            f"T5 {model.num_encoder_layers}+{model.num_decoder_layers}, d_model {model.d_model}; "
            f"{num_parameters / 1e6:.2f} M parameters",
        ),
        ("losses", " + ".join(f"{weight:g} {name}" for name, weight in model.loss_weights.items() if weight)),
        *facts.items(),
    ]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
    return f"""---
library_name: transformers
tags: [recommendation, generative-retrieval, colarec]
---
# {config.name}

A generative recommender (ColaRec, CIKM 2024): the encoder reads a user's history, the decoder writes the GID of the
next item. Its item, user and token ids are those of the corpus and the GIDs it was trained on, and mean nothing
without them.

{table}

Measured on the valid split while training; test results come from `deepspeed eval/main.py`.

```python
import trainer.model                       # registers the architecture
from transformers import AutoModel
model = AutoModel.from_pretrained("<this folder>")
```
"""
