"""The ablations of the paper as variants of one config: what each takes away, and which stages that concerns."""

import os
from dataclasses import dataclass
from pathlib import Path

from contract import config as config_module
from contract.artifacts import SHAPE_NO_MODEL, STAGES, open_artifact
from contract.disk import write_atomically
from contract.settings import Config

FULL = "full"


@dataclass(frozen=True)
class Variant:
    """A model to compare with the full one."""

    name: str
    what: str  # differs, in words
    settings: dict[str, object]  # {dotted key: value}, where it differs from the config
    first: str = "model"  # the first artifact that is not the full model's: gid, model or eval

    @property
    def stages(self) -> list[str]:
        """The artifacts of its own, in the order they are made."""
        names = list(STAGES)
        return names[names.index(self.first) :]


def variants(config: Config) -> list[Variant]:
    """The full model and its ablations, in the order of the table.

    Left out are those that would be the full model again, or would have nothing to learn or to know items by.
    """
    order = "set" if config.history.order == "time" else "time"
    encoding = "tokens" if config.history.encoding == "pooled" else "pooled"
    ablations = [
        Variant("no_rec", "no recommendation loss", {"loss.rec": 0.0}),
        Variant("no_index", "no indexing loss", {"loss.index": 0.0})
        if config.loss.index
        else Variant("with_index", "an indexing loss, as in the paper", {"loss.index": 0.02}),
        *_of_the_decoder(config),
        Variant(
            "no_ranking",
            "no ranking loss (BPR, softmax), nor its score beside log p",
            {"loss.bpr": 0.0, "loss.softmax": 0.0, "eval.hybrid": 0.0},
        ),
        Variant("no_contrastive", "no contrastive loss", {"loss.contrastive": 0.0}),
        Variant("ranking_bpr", "BPR for a ranking loss, as in the paper", {"loss.bpr": 1.0, "loss.softmax": 0.0}),
        Variant("gid_collaborative", "prefixes of GIDs: like users", {"gid.method": "collaborative"}, "gid"),
        Variant("gid_content", "prefixes of GIDs: like words", {"gid.method": "content"}, "gid"),
        Variant("gid_fused", "prefixes of GIDs: like users and words", {"gid.method": "fused"}, "gid"),
        Variant("gid_random", "GIDs at random", {"gid.method": "random"}, "gid"),
        Variant("no_content", "no texts in the encoder", {"history.content": False}),
        Variant(
            "no_slots",
            "no atomic embeddings, texts alone",
            {"model.item_table": "none", "history.user_slots": 0},
        ),
        Variant("items_random", "item embeddings that start at random", {"model.item_init": "random"}),
        Variant("codebooks_level", "one codebook for all prefixes of a level", {"model.codebooks": "level"}),
        Variant("attention_full", "both directions, a history for each target", {"history.attention": "full"}),
        Variant(
            f"order_{order}",
            {"set": "histories as sets", "time": "histories in time order"}[order],
            {"history.order": order},
        ),
        # Causal attention is for pooled histories: what this is compared with is attention_full.
        Variant(
            f"encoding_{encoding}",
            {"tokens": "an encoder position per token", "pooled": "an encoder position per item"}[encoding],
            {"history.encoding": encoding, "history.attention": "full"},
        ),
        Variant("no_average", "the weights themselves, not their average over the steps", {"train.ema": 0.0}),
        Variant("no_neighbours", "lists without the neighbours of a history's items", {"eval.neighbours": 0.0}, "eval"),
        Variant("lists_generative", "lists by log p alone, as in the paper", {"eval.mode": "generative"}, "eval"),
    ]
    return [Variant(FULL, "all of it", {}), *(variant for variant in ablations if _differs(config, variant))]


def _of_the_decoder(config: Config) -> list[Variant]:
    """What gives to the generated lists, where codebooks are of prefixes."""
    if config.model.codebooks != "prefix":
        return []
    one_vector = Variant("one_code_vector", "one vector of each code after a prefix", {"model.code_vectors": 1})
    if not (config.loss.softmax and config.loss.rec):
        return [one_vector]
    alone = "a decoder that learns the targets' codes alone, and trains the encoder"
    return [Variant("no_distil", alone, {"loss.distil": 0.0}), one_vector]


def _differs(config: Config, variant: Variant) -> bool:
    try:
        changed = config_module.replace(config, variant.settings)
    except ValueError:  # nothing would be left to learn, or to know items by
        return False
    return _ranking(changed) != _ranking(config) if variant.first == "eval" else changed != config


def _ranking(config: Config) -> tuple:
    """By what the items of a list are ordered."""
    if config.eval.ranks_by != "hybrid":
        return (config.eval.ranks_by,)
    return "hybrid", config.eval.hybrid, config.eval.neighbours if config.gid.neighbours else 0.0


def choose(config: Config, only: str) -> list[Variant]:
    """The full model and the variants that `only` names, separated by commas; all when it is empty.

    Raises:
        ValueError: there is no such variant of this config.
    """
    every = variants(config)
    names = [variant.name for variant in every]
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(
            f"--only={only}: {', '.join(unknown)} would be the full model again or is no ablation; of this config "
            f"there are {', '.join(names[1:])}"
        )
    return [variant for variant in every if not wanted or variant.name in (FULL, *wanted)]


def variant_config(config: Config, variant: Variant, parent: str = "") -> Config:
    """The config of a variant, with a work folder in the experiment's. `parent`: MLflow run of the ablation."""
    return config_module.replace(
        config,
        {
            **variant.settings,
            "name": f"{config.name}/{variant.name}",
            "work": str(config.work_dir / "ablations" / variant.name),
            "eval.baselines": (),
            "tracking.parent": parent,
        },
    )


def write_config(config: Config) -> Path:
    """Writes a variant's settings into its work folder, for its stages and for those who run one of them by hand."""
    file = config.work_dir / "config.toml"
    write_atomically(file, config_module.to_toml(config))
    return file


def is_there(config: Config, stage: str) -> bool:
    """Whether the work folder of `config` holds the artifact, complete and made with these settings and inputs."""
    try:
        artifact = open_artifact(config, stage)
    except (FileNotFoundError, ValueError):
        return False
    if stage != "model":
        return True
    trained, wanted = artifact.manifest["training"]["train"], vars(config.train)
    return all(trained.get(key, value) == value for key, value in wanted.items() if key not in SHAPE_NO_MODEL)


def shares(config: Config, variant: Variant, stage: str) -> bool:
    """Whether a variant uses an artifact that is not its own: corpus/, mostly gid/, and the full model where the
    experiment has it or the lists alone differ."""
    return stage not in variant.stages or (stage == "model" and variant.name == FULL and is_there(config, stage))


def link_inputs(config: Config, variant: Variant, its_config: Config) -> None:
    """Makes the work folder of a variant, with links to the artifacts that it shares with the experiment or, a model,
    with the full variant, which is complete before it."""
    its_config.work_dir.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        link = its_config.work_dir / name
        if shares(config, variant, name) and not link.exists():
            link.unlink(missing_ok=True)
            owner = Path(os.pardir, FULL) if name == "model" and variant.name != FULL else Path(os.pardir, os.pardir)
            link.symlink_to(owner / name)  # relative: the work folder may be moved
