"""The FLOP formula against what torch counts of a forward and backward pass without padding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.flops import decoder_flops, step_flops, teacher_flops
from trainer.model import ColaRec, ColaRecConfig
from trainer.ranking import Teacher

B, L, N, M, T = 4, 9, 6, 5, 3


def inputs(rows, length):
    zeros = torch.zeros(rows, length, dtype=torch.long)
    names = ("token", "item", "user", "event", "recency", "gap")
    return dict.fromkeys(names, zeros) | {"mask": zeros == 0, "eos": torch.full((rows,), length - 1)}


@pytest.mark.parametrize("weights", [{"rec": 1.0, "index": 1.0}, {"rec": 1.0, "index": 0.0}])
def test_a_step_is_what_torch_counts(weights):
    config = ColaRecConfig(
        d_model=32, d_ff=96, d_kv=8, num_heads=2, gid_length=T, branching=16, dropout=0.0, num_decoder_layers=3,
        loss_weights=weights,
    )  # fmt: skip
    model = ColaRec(config)
    batch = {"user": inputs(B, L), "weight": torch.ones(B), "next_row": torch.arange(B)}
    batch |= {"next_gid": torch.zeros(B, T, dtype=torch.long), "next_weight": torch.ones(B)}
    batch["at"] = batch["next_at"] = batch["user"]["eos"]
    item = inputs(N, M) | {"gid": torch.zeros(N, T, dtype=torch.long)}
    batch |= {"item": item, "negative": torch.zeros(B, dtype=torch.long)}
    batch |= {"index_rows": torch.arange(N), "index_weight": torch.ones(N) / N}
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(batch)["loss"].backward()
    counted = counter.get_total_flops()
    if not weights["index"]:  # encoded, but nothing of it is learned from
        with FlopCounterMode(display=False) as forward_only:
            model.encode(batch["item"])
        counted += 2 * forward_only.get_total_flops()
    # torch also counts the gradient of the inputs of the first layers and of what no weight needs.
    user, item = (B, B * L, B * L**2), (N, N * M, N * M**2)
    lengths = {"user": user, "decoded user": user, "item": item, "decoded item": item}
    assert step_flops(config, lengths) == pytest.approx(counted, rel=0.03)


def test_codes_and_what_teaches_them_are_what_torch_counts():
    config = ColaRecConfig(
        d_model=32, gid_length=T, branching=4, codebooks="prefix", code_vectors=3, num_decoder_layers=0,
        loss_weights={"rec": 1.0, "softmax": 1.0}, distil=0.5,
    )  # fmt: skip
    model, targets, drawn = ColaRec(config), 7, 90
    gids, leaves = torch.zeros(targets, T, dtype=torch.long), torch.ones(targets, 4, dtype=torch.long)
    below = {"row": leaves, "choice": gids[:, 0], "v": torch.randn(2, 32)}
    with FlopCounterMode(display=False) as counter:
        model.path_loss(torch.randn(targets, T, 32), gids, below)
    assert decoder_flops(config, targets, 0, 0) == counter.get_total_flops() == 2 * targets * 32 * 4 * (3 + 3 + 1)
    scores = torch.randn(targets), torch.randn(targets, drawn)
    teacher = Teacher(config, torch.randn(targets, 32), *scores, torch.zeros(drawn, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        for level in range(T - 1):
            teacher.codes(level, gids[:, 0], gids[:, 0])
    assert teacher_flops(config, targets, drawn) == counter.get_total_flops() == 2 * 2 * targets * drawn * 4
