"""The FLOP formula against what torch counts of a forward and backward pass without padding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.flops import step_flops
from trainer.model import ColaRec, ColaRecConfig

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
