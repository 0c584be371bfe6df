"""The scoring half of an evaluation: ColaRec and the baselines on the same users, in numbers."""

import dataclasses

import numpy as np

from contract import schema
from contract.artifacts import Artifact
from contract.cli import Progress
from contract.metrics import rows_of
from contract.settings import Config, Train
from eval import baselines, metrics, otto, slices, table
from eval.metrics import Lists
from eval.users import EvalUsers


def score(
    config: Config, inputs: dict[str, Artifact], users: EvalUsers, recommended: dict, device: str, progress: Progress
) -> table.Results:
    """Metrics of ColaRec and of the baselines over the same users.

    Args:
        recommended: item_idx int32 (N, k), in the order of the users; and of its parts, where there are any.
        device: what decoded, in words.
    """
    corpus, cutoffs = inputs["corpus"], config.eval.cutoffs
    num_items, events = corpus.counts["num_items"], corpus.manifest["events"]
    num_train = schema.read_num_train(corpus.path, num_items)
    rankings = {"ColaRec": recommended["item_idx"]}
    for part in ("without_neighbours", "generative", "dense"):
        if part in recommended:
            rankings[f"ColaRec, {part.replace('_', ' ')}"] = recommended[part]
    models = {name: metrics.read_lists(lists, users.targets, cutoffs, num_train) for name, lists in rankings.items()}
    facts = {"targets": _targets(users, num_train)}
    fit = baselines.read_fit(corpus, inputs["gid"], config, progress)
    others, chosen = baselines.rank_all(fit, users, max(cutoffs), config.eval.mask_seen)
    models |= {name: metrics.read_lists(lists, users.targets, cutoffs, num_train) for name, lists in others.items()}
    facts |= chosen
    measured, lead = metrics.compare(models, users.targets, cutoffs, config.seed)
    if config.etl.split == "otto":
        of_otto, lead_of_otto = _otto(config, corpus, models, users, progress)
        measured, lead = {model: of | of_otto.get(model, {}) for model, of in measured.items()}, lead | lead_of_otto
    for model, lists in models.items():
        measured[model] |= {name: {"mean": share} for name, share in lists.coverage.items()}
    parts = slices.read_slices(users, num_train, events, corpus.manifest["time_unit"] != "order")
    of_slices = slices.measure(models, users, parts, max(cutoffs), config.seed)
    progress(f"measured {len(models)} models on {len(users):,} users and on {len(of_slices)} slices of them")
    trained = inputs["model"]
    # What the model was trained with, which the settings of [train] may no longer say.
    as_trained = dataclasses.replace(config, train=Train(**trained.manifest["training"]["train"]))
    facts["trained"] = (
        f"{trained.counts['seconds'] / 60:.0f} min on {trained.manifest['training']['world_size']} x "
        f"{trained.manifest['training']['device']}, {trained.counts['step']} steps; "
        f"best valid {'loss' if as_trained.train.best == 'loss' else 'ndcg@10'} after epoch "
        f"{trained.counts['best_epoch']:g}"
    )
    protocol = table.protocol(as_trained, len(users), num_items, device, **facts)
    curves = metrics.recall_curves(models, users.targets, max(cutoffs))
    return table.Results(config.name, protocol, measured, lead, len(users), of_slices, curves)


def _targets(users: EvalUsers, num_train: np.ndarray) -> str:
    """The yardstick of arp: how popular what the users chose is."""
    mean = np.average(num_train[users.targets.values], weights=1 / users.targets.lengths[rows_of(users.targets)])
    return f"{len(users.targets.values):,}; a user's have {mean:,.1f} train events on average"


def _otto(
    config: Config, corpus: Artifact, models: dict[str, Lists], users: EvalUsers, progress: Progress
) -> tuple[dict, dict]:
    if max(config.eval.cutoffs) < otto.CUTOFF:
        progress(f"OTTO's metric is left out: it takes lists of {otto.CUTOFF}, add that to eval.cutoffs")
        return {}, {}
    item_ids = schema.read_items(corpus.path).item_ids
    article_0 = item_ids.index("0") if "0" in item_ids else 0
    return otto.compare(models, users, corpus.manifest["events"], config.seed, article_0)
