"""Floating-point operations of a training step, and the share of the device's peak that they come to (MFU).

Only what the model needs counts: positions without padding, matrix products alone (a multiply and an add are two), and
a backward pass that costs twice the forward one. Work done again (train.recompute) or on padding lowers the MFU.

For a stack of N layers with a = heads x d_kv, over a sequence of length L:

    self-attention     N (8 L D a + 4 L^2 a)          projections q, k, v, o; scores and values
    cross-attention    N (4 T D a + 4 L D a + 4 T L a)   T decoder positions reading L encoder states; targets that
                                                         read the same states share their keys and values, 4 L D a
    feed-forward       N 4 L D F
    code logits        2 D K M per level of codes with M vectors each (1 with a codebook of a level), 2 D K of the items

L_softmax and what the teacher of L_rec adds up (`teacher_flops`), products with the items drawn at random, are left out
of a step's.
"""

import torch

from trainer.model import ColaRecConfig

# Dense bf16 tensor-core FLOP/s of a device, by a part of its name, as the vendor states them.
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}
PEAK_BF16 |= {"L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12}


def encoder_flops(config: ColaRecConfig, length: float, square: float) -> float:
    """Forward FLOPs of sequences whose lengths add up to `length` and their squares to `square`."""
    width, attention = config.d_model, config.num_heads * config.d_kv
    return config.num_encoder_layers * (
        8 * length * width * attention + 4 * square * attention + 4 * length * width * config.d_ff
    )


def decoder_flops(config: ColaRecConfig, num_sequences: float, read: float, length: float) -> float:
    """Forward FLOPs of decoding so many whole GIDs, which read `read` encoder states in sum, out of `length`."""
    width, attention, levels = config.d_model, config.num_heads * config.d_kv, config.gid_length
    positions = num_sequences * levels
    layer = 8 * positions * width * attention + 4 * positions * levels * attention  # self
    layer += 4 * positions * width * attention + 4 * length * width * attention + 4 * levels * read * attention
    layer += 4 * positions * width * config.d_ff
    vectors = sum(config.code_vectors) + 1 if config.leaves_are_items else levels
    return config.num_decoder_layers * layer + 2 * num_sequences * width * config.branching * vectors


def teacher_flops(config: ColaRecConfig, num_targets: float, num_random: float) -> float:
    """FLOPs by which `ranking.Teacher` adds up the mass below each code: S Q K a level of codes, and no backward pass.

    Args:
        num_random: Q, items that L_softmax ranks each target among.
    """
    return 2 * num_targets * num_random * config.branching * config.code_levels if config.distils else 0.0


def step_flops(config: ColaRecConfig, lengths: dict[str, tuple[int, int, int]]) -> float:
    """FLOPs of the forward and backward pass over a micro-batch, whose "lengths" `loader.TrainBatches` gives."""
    forward = sum(encoder_flops(config, *lengths[name][1:]) for name in ("user", "item") if name in lengths)
    for name, encoded, loss in (("decoded user", "user", "rec"), ("decoded item", "decoded item", "index")):
        if name in lengths and config.loss_weights[loss]:
            forward += decoder_flops(config, *lengths[name][:2], lengths[encoded][1])
    return 3 * forward


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU that is listed above; None of others and of CPUs, whose peak nobody states."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
