"""What a model is worth on the valid users: the loss of their targets, and recall@10 and ndcg@10 of its lists."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from contract import config as config_module
from contract.artifacts import Artifact
from contract.metrics import ranking_metrics
from contract.schema import Ragged
from contract.settings import Config
from trainer import loader, packing
from trainer.inputs import Catalog
from trainer.model import ColaRec
from trainer.recommender import Recommender

CUTOFF = 10
# Of the ranking score in the hybrid, to choose from, the simplest first: 0 leaves the generated list.
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)
# Of the neighbours.
OF_NEIGHBOURS = (0.0, 0.5, 1.0, 2.0, 4.0)


@torch.no_grad()
def validate(
    config: Config,
    corpus: Artifact,
    catalog: Catalog,
    model: ColaRec,
    device: torch.device,
    between: Callable[[], None],
) -> dict[str, float]:
    """Means over the sample of `train.eval_users`, which is the same at any number of ranks (all ranks).

    Args:
        model: in eval mode, with whole weights on every rank.
        between: called after each batch, as often on all ranks; an exception of its own ends the validation.

    Returns:
        rec, the mean over the levels of rec_level_1 .. rec_level_l: -log p of the codes of a target, per target;
        recall@10 and ndcg@10, per user, of the lists that an evaluation would report, with `train.eval_beams` beams;
        num_users. Of a hybrid also hybrid and neighbours, its weights, or those of the highest ndcg@10 where none are
        set, and generative_ndcg@10 and dense_ndcg@10, of its halves.

    Raises:
        ValueError: the corpus has no valid users.
    """
    if config.eval.hybrid < 0 and not (config.loss.softmax or config.loss.bpr):
        config = config_module.replace(config, {"eval.hybrid": 0.0})  # nothing trains the ranking score
    recommender = Recommender(
        config_module.replace(config, {"eval.beams": max(config.train.eval_beams, *config.eval.cutoffs)}),
        catalog, model, device,
    )  # fmt: skip
    of_neighbours = OF_NEIGHBOURS if catalog.neighbours else (0.0,)
    weights = tuple(
        itertools.product(
            (config.eval.hybrid,) if config.eval.hybrid >= 0 else WEIGHTS,
            (config.eval.neighbours,) if config.eval.neighbours >= 0 else of_neighbours,
        )
    )
    names = ("generative", "dense", *weights) if config.eval.ranks_by == "hybrid" else (config.eval.ranks_by,)
    levels = model.config.gid_length
    total = torch.zeros(levels + 2 + 2 * len(names), dtype=torch.float64)
    sample = loader.eval_sample(config, corpus, "valid")
    batches = loader.eval_batches(
        config, catalog, corpus, "valid", config.eval.batch, dist.get_rank(), dist.get_world_size(), sample
    )
    for batch in batches:
        if batch["user_idx"].any():  # the others only fill up, for `between`
            on_device = packing.to_device(batch, device)
            states = model.encode(on_device["user"])
            row = on_device["pair_row"]
            log_p = recommender.log_p(states[row], on_device["user"]["mask"][row], on_device["pair_item"][:, None])
            total[:levels] -= log_p.double().sum((0, 1)).cpu()
            total[levels] += len(log_p)
            lists = _lists(config, recommender, on_device, states, weights)
            total[levels + 1] += len(states)
            total[levels + 2 :] += torch.cat([_ranking_sums(items.cpu().numpy(), batch) for items in lists])
        between()
    total = total.to(device)
    dist.all_reduce(total)
    *losses, num_targets, num_users = total[: levels + 2].tolist()
    if not num_users:
        raise ValueError(f"{corpus.path} has no valid users, by whom the weights to keep are chosen; see etl.split")
    losses = {f"rec_level_{t + 1}": loss / num_targets for t, loss in enumerate(losses)}
    found = dict(zip(names, (total[levels + 2 :] / num_users).view(-1, 2).tolist(), strict=True))
    halves = {f"{name}_ndcg@{CUTOFF}": found[name][1] for name in names[:2] if len(names) > 1}
    best = max(names[-len(weights) :], key=lambda name: found[name][1])
    chosen = dict(zip(("hybrid", "neighbours"), best, strict=True)) if len(names) > 1 else {}
    metrics = {f"recall@{CUTOFF}": found[best][0], f"ndcg@{CUTOFF}": found[best][1], "num_users": num_users}
    return {"rec": sum(losses.values()) / levels} | losses | metrics | chosen | halves


def _lists(
    config: Config,
    recommender: Recommender,
    batch: dict,
    states: torch.Tensor,
    weights: Sequence[tuple[float, float]],
) -> list[torch.Tensor]:
    """The first items, (B, 10), by each of what `validate` compares."""
    keys = ("user", "seen_row", "seen_item") if config.eval.mask_seen else ("user",)
    shown = {key: batch[key] for key in keys}
    if config.eval.ranks_by != "hybrid":
        return [recommender.recommend(shown, CUTOFF, states)["item_idx"]]
    found = recommender.candidates(shown, CUTOFF, states)
    halves = [found.generated[0][:, :CUTOFF], found.near[0][:, :CUTOFF]]
    return halves + [found.best(*pair, CUTOFF)[0] for pair in weights]


def _ranking_sums(items: np.ndarray, batch: dict) -> torch.Tensor:
    """float64 (2,): the sums over the users of recall and ndcg. A user's targets are neighbours in the batch."""
    lengths = torch.bincount(batch["pair_row"], minlength=len(items)).numpy()
    targets = Ragged(batch["pair_item"].numpy(), np.concatenate([[0], np.cumsum(lengths)]))
    metrics = ranking_metrics(items, targets, [CUTOFF])
    return torch.tensor([metrics[f"{name}@{CUTOFF}"].sum() for name in ("recall", "ndcg")], dtype=torch.float64)
