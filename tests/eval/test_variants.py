"""Which ablations a config has, and what of an experiment their work folders share."""

from pathlib import Path

import pytest

from contract import config as config_module
from contract.disk import write_record
from eval import variants
from tests import tiny


@pytest.fixture
def config(tmp_path):
    return tiny.tiny_config(tmp_path / "work", loss__softmax="1", eval__hybrid="4")


def names(config) -> list[str]:
    return [variant.name for variant in variants.variants(config)]


def test_the_ablations_of_the_paper(config):
    losses = ["no_rec", "no_index", "no_distil", "one_code_vector", "no_ranking", "no_contrastive", "ranking_bpr"]
    gids, inputs = ["gid_content", "gid_fused", "gid_random"], ["order_set", "encoding_tokens"]
    items = ["no_content", "no_slots", "items_random", "codebooks_level"]
    assert names(config) == ["full", *losses, *gids, *items, *inputs, "no_average", "lists_generative"]
    causal = config_module.replace(config, {"history.attention": "causal"})
    assert names(causal)[-5:-2] == ["attention_full", "order_set", "encoding_tokens"]
    attention = [variants.variant_config(causal, v).history.attention for v in variants.variants(causal)[-5:-2]]
    assert attention == ["full", "causal", "full"]
    flat = config_module.flatten(config)
    for variant in variants.variants(config)[1:]:
        assert any(flat[key] != value for key, value in variant.settings.items()), variant.name


def test_what_would_be_the_full_model_again_or_no_model_is_left_out(config):
    paper = {"gid.method": "random", "history.order": "set", "history.encoding": "tokens", "loss.contrastive": 0.0}
    assert not {"gid_random", "no_contrastive"} & set(names(config_module.replace(config, paper)))
    assert {"gid_collaborative", "order_time"} < set(names(config_module.replace(config, paper)))
    alone = dict.fromkeys(("loss.index", "loss.bpr", "loss.softmax", "loss.contrastive"), 0.0)
    assert "no_rec" not in names(config_module.replace(config, alone))
    assert "no_slots" not in names(config_module.replace(config, {"history.content": False}))
    lists = {"no_neighbours", "lists_generative"}
    with_both = {"eval.neighbours": 1.0, "gid.neighbours": 10}
    assert lists <= set(names(config_module.replace(config, with_both)))
    assert "no_neighbours" not in names(config_module.replace(config, with_both | {"gid.neighbours": 0}))
    assert lists <= set(names(config_module.replace(config, with_both | {"eval.hybrid": 0.0})))
    neither = with_both | {"eval.hybrid": 0.0, "eval.neighbours": 0.0}
    assert not lists & set(names(config_module.replace(config, neither)))
    dense = names(config_module.replace(config, with_both | {"eval.mode": "dense"}))
    assert lists & set(dense) == {"lists_generative"}


def test_ablations_of_the_decoder_are_there_where_it_learns_from_the_score(config):
    decoder = {"no_distil", "one_code_vector"}
    assert decoder < set(names(config))
    assert not decoder & set(names(config_module.replace(config, {"model.codebooks": "level"})))
    assert decoder & set(names(config_module.replace(config, {"loss.softmax": 0.0}))) == {"one_code_vector"}
    once = config_module.replace(config, {"loss.distil": 0.0, "model.code_vectors": 1})
    assert not decoder & set(names(once))
    without = config_module.replace(config, {"loss.index": 0.0})
    assert {"no_index", "with_index"} & set(names(without)) == {"with_index"}
    (_, variant) = variants.choose(without, "with_index")
    assert variants.variant_config(without, variant).loss.index == 0.02


def test_an_unknown_variant_names_those_that_there_are(config):
    chosen = [variant.name for variant in variants.choose(config, "gid_random, no_index")]
    assert chosen == ["full", "no_index", "gid_random"]
    with pytest.raises(ValueError, match=r"no_gid, gid_collaborative would be the full .* no_rec, no_index"):
        variants.choose(config, "no_gid,gid_collaborative")


def test_a_variant_has_a_work_folder_and_a_name_of_its_own_and_no_baselines(config):
    (_, variant) = variants.choose(config, "no_ranking")
    changed = variants.variant_config(config, variant, "abc")
    assert (changed.name, changed.eval.baselines, changed.tracking.parent) == ("tiny/no_ranking", (), "abc")
    assert (changed.loss.bpr, changed.loss.softmax, changed.eval.hybrid) == (0, 0, 0)
    assert changed.work_dir == config.work_dir / "ablations" / "no_ranking"


def test_a_work_folder_shares_what_is_not_its_own(config):
    tiny.write_corpus(config)
    tiny.write_gids(config)
    for variant in variants.choose(config, "no_index,gid_random"):
        its_config = variants.variant_config(config, variant)
        variants.link_inputs(config, variant, its_config)
        variants.link_inputs(config, variant, its_config)  # again, as when it goes on
        assert variants.is_there(its_config, "corpus")
        assert variants.is_there(its_config, "gid") == (variant.name != "gid_random")
        assert not variants.is_there(its_config, "model")
    moved = config_module.replace(config, {"work": str(config.work_dir.parent / "moved")})
    config.work_dir.rename(moved.work_dir)
    assert variants.is_there(variants.variant_config(moved, variants.variants(moved)[0]), "gid")


def test_a_variant_of_the_lists_reads_the_model_of_the_full_variant(config):
    (full, lists) = variants.choose(config, "lists_generative")
    its_config = variants.variant_config(config, lists)
    assert lists.stages == ["eval"]
    for variant in (full, lists):
        variants.link_inputs(config, variant, variants.variant_config(config, variant))
    own = variants.variant_config(config, full).work_dir / "model"
    assert not own.exists()  # the experiment has none; the full variant is trained first
    own.mkdir()
    assert (its_config.work_dir / "model").resolve() == own.resolve()
    assert (its_config.work_dir / "corpus").readlink() == Path("../../corpus")


def test_a_model_of_another_training_is_not_there(config):
    tiny.write_corpus(config)
    tiny.write_gids(config)
    path = config.work_dir / "model"
    path.mkdir()
    digests = {name: variants.open_artifact(config, name).digest for name in ("corpus", "gid")}
    manifest = {
        "counts": {},
        "digest": "",
        "inputs": digests,
        "files": {},
        "config": config_module.section(config, "seed", "history", "model", "loss"),
        "training": {"train": vars(config.train)},
    }
    write_record(path / "manifest.json", manifest)
    assert variants.is_there(config, "model")
    assert variants.is_there(config_module.replace(config, {"train.log_every": 7}), "model")
    assert not variants.is_there(config_module.replace(config, {"train.epochs": 7}), "model")
    assert not variants.is_there(config_module.replace(config, {"loss.rec": 7.0}), "model")
