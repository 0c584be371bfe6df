"""What a model is worth on the valid users: the loss of their targets, and recall@10 and ndcg@10 of beam search."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from contract.artifacts import Artifact
from contract.config import Config
from contract.metrics import ranking_metrics
from contract.schema import Ragged
from gid.tree import GidTree
from trainer import loader
from trainer.beam import beam_search
from trainer.inputs import Catalog
from trainer.model import ColaRec

CUTOFF = 10


@torch.no_grad()
def validate(
    config: Config,
    corpus: Artifact,
    catalog: Catalog,
    tree: GidTree,
    model: ColaRec,
    device: torch.device,
    between: Callable[[], None],
) -> dict[str, float]:
    """Means over the sample of `train.eval_users`, which is the same at any number of ranks (all ranks).

    Args:
        model: in eval mode, with whole weights on every rank.
        tree: on `device`.
        between: called after each batch, as often on all ranks; an exception of its own ends the validation.

    Returns:
        rec, the mean over the levels of rec_level_1 .. rec_level_l: -log p of the codes of a target, per target;
        recall@10 and ndcg@10 of the lists of `train.eval_beams` beams, per user; num_users.

    Raises:
        ValueError: the corpus has no valid users.
    """
    levels = tree.length
    total = torch.zeros(levels + 4, dtype=torch.float64)
    sample = loader.eval_sample(config, corpus, "valid")
    batches = loader.eval_batches(
        config, catalog, corpus, "valid", config.eval.batch, dist.get_rank(), dist.get_world_size(), sample
    )
    for batch in batches:
        on_device = loader.to_device(batch, device)
        states = model.encode(on_device["user"])
        log_p = model.gid_log_likelihood(states, on_device)
        total[:levels] -= log_p.double().sum(0).cpu()
        total[levels] += len(log_p)
        seen = (on_device["seen_row"], on_device["seen_item"]) if config.eval.mask_seen else (None, None)
        items, _ = beam_search(model, tree, on_device["user"], config.train.eval_beams, CUTOFF, *seen, states)
        if batch["user_idx"].any():  # the others only fill up
            total[levels + 1 :] += _ranking_sums(items.cpu().numpy(), batch)
        between()
    total = total.to(device)
    dist.all_reduce(total)
    *losses, num_targets, num_users, recall, ndcg = total.tolist()
    if not num_users:
        raise ValueError(f"{corpus.path} has no valid users, by whom the weights to keep are chosen; see etl.split")
    losses = {f"rec_level_{t + 1}": loss / num_targets for t, loss in enumerate(losses)}
    metrics = {f"recall@{CUTOFF}": recall / num_users, f"ndcg@{CUTOFF}": ndcg / num_users, "num_users": num_users}
    return {"rec": sum(losses.values()) / levels} | losses | metrics


def _ranking_sums(items: np.ndarray, batch: dict) -> torch.Tensor:
    """float64 (3,): users, and the sums over them of recall and ndcg. A user's targets are neighbours in the batch."""
    lengths = torch.bincount(batch["pair_row"], minlength=len(items)).numpy()
    targets = Ragged(batch["pair_item"].numpy(), np.concatenate([[0], np.cumsum(lengths)]))
    metrics = ranking_metrics(items, targets, [CUTOFF])
    sums = [metrics[f"{name}@{CUTOFF}"].sum() for name in ("recall", "ndcg")]
    return torch.tensor([len(items), *sums], dtype=torch.float64)
