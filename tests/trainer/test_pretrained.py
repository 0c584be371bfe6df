"""T5's weights against transformers' T5, adapters against the model they are merged into, and the exported folder."""

import json
import math

import pytest
import torch
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from contract.artifacts import open_artifact, stage_output
from tests import tiny
from trainer import export, loader, pretrained

SHAPE = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


@pytest.fixture
def t5(tmp_path):
    """(a small random T5, the folder it is saved in)"""
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **SHAPE)).eval()
    model.save_pretrained(tmp_path / "t5")
    return model, tmp_path / "t5"


def room(tmp_path, **overrides):
    config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work", **overrides)
    shards = loader.shard_paths(corpus, "train")
    return config, corpus, model, next(iter(loader.TrainBatches(config, catalog, shards, 0, 1, range(3), 10)))[0]


@torch.no_grad()
def test_layers_from_t5_compute_what_t5_computes(tmp_path, t5):
    reference, folder = t5
    config, _, model, batch = room(tmp_path, model__init=str(folder), etl__tokenizer="spiece")
    assert pretrained.init_from_t5(model, config).endswith("with its word embeddings")
    embeds, mask = model.embed(batch["user"]), batch["user"]["mask"]
    expected = reference.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.encode(batch["user"])[mask], expected[mask])
    decoded = reference.decoder(inputs_embeds=embeds[:, :3], encoder_hidden_states=expected).last_hidden_state
    assert not model.decoder.final_layer_norm.weight.any()  # at the start h(X) is all that the decoder says
    model.decoder.final_layer_norm.weight.copy_(reference.decoder.final_layer_norm.weight)
    ours = model.decoder(inputs_embeds=embeds[:, :3], encoder_hidden_states=expected).last_hidden_state
    torch.testing.assert_close(ours, decoded)
    ours, theirs = model.token.weight[1 : tiny.VOCAB_SIZE], reference.shared.weight[1 : tiny.VOCAB_SIZE]
    torch.testing.assert_close(ours / ours.std(), theirs / theirs.std())


def test_a_t5_of_another_shape_names_the_settings(tmp_path, t5):
    config, _, model, _ = room(tmp_path, model__init=str(t5[1]), model__d_ff="64")
    with pytest.raises(ValueError, match=r"use --model\.d_ff=32"):
        pretrained.init_from_t5(model, config)
    config = tiny.tiny_config(tmp_path / "work", model__init=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere': there is no such folder"):
        pretrained.init_from_t5(model, config)


def test_adapters_start_as_nothing_train_alone_and_merge(tmp_path):
    config, _, model, batch = room(tmp_path, model__lora_rank="2")
    names = set(model.state_dict())
    before = model(batch)["loss"]
    frozen = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    pretrained.add_lora(model, config)
    torch.testing.assert_close(model(batch)["loss"], before)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    trained = model(batch)["loss"]
    assert trained < before
    for name, value in model.encoder.named_parameters():
        assert ("lora_" in name) == value.requires_grad
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name

    weights = pretrained.merged(model.state_dict())
    assert set(weights) == names
    plain = tiny.tiny_room(tmp_path / "other")[3]
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(batch)["loss"], trained)


def test_the_exported_folder_is_a_transformers_model(tmp_path):
    config, corpus, model, batch = room(tmp_path)
    with stage_output(config, "model") as output:
        card = export.model_card(config, corpus, model.config, {"valid loss": "1.25"}, 1000)
        export.write_model(output.path, model.state_dict(), model.config, card)
        inputs = {name: open_artifact(config, name).digest for name in ("corpus", "gid")}
        output.commit({"num_parameters": 1}, inputs)
    artifact = open_artifact(config, "model")
    assert sorted(file.name for file in artifact.path.iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    expected = model(batch)["loss"].item()
    for loaded in (export.load_model(artifact), AutoModel.from_pretrained(artifact.path).eval()):
        assert math.isclose(loaded(batch)["loss"].item(), expected, rel_tol=1e-6)
    card = (artifact.path / "README.md").read_text()
    assert "60 users, 40 items" in card
    assert "| valid loss | 1.25 |" in card
    assert json.loads((artifact.path / "config.json").read_text())["experiment"]["history.encoding"] == "pooled"


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    config, _, model, _ = room(tmp_path)
    weights = model.state_dict()
    del weights["start_D"]
    with stage_output(config, "model") as output:
        export.write_model(output.path, weights, model.config, "")
        output.commit({}, {name: open_artifact(config, name).digest for name in ("corpus", "gid")})
    with pytest.raises(ValueError, match="missing or unknown: start_D"):
        export.load_model(open_artifact(config, "model"))
