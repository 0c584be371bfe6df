import dataclasses
import itertools

import numpy as np
import pytest
import torch

from contract.schema import Ragged
from tests import tiny
from trainer import inputs, loader, packing
from trainer import model as model_module


@pytest.fixture
def room(tmp_path):
    """A function (**overrides) -> (config, model in eval mode, first batch); `make.catalog` is the catalog."""

    def make(**overrides):
        config, corpus, make.catalog, model = tiny.tiny_room(tmp_path / "work", **overrides)
        make.eval = corpus, "test", 7, 0, 1
        shards = loader.shard_paths(corpus, "train")
        (batch,) = next(iter(loader.TrainBatches(config, make.catalog, shards, 0, 1, range(3), 10)))
        return config, model, batch

    return make


def rows_of(inputs, row):
    """One row of encoder inputs without padding, as a batch of one."""
    length = int(inputs["mask"][row].sum())
    alone = {k: v[row : row + 1, :length] for k, v in inputs.items() if k not in ("gid", "groups") and v.ndim == 2}
    alone["eos"] = inputs["eos"][row : row + 1]
    if "content_tokens" in inputs:
        alone |= {k: inputs[k] for k in ("content_tokens", "content_offsets")}
    return alone


def log_p(model, states, gid, gids=None, v=None):
    """log p(z_t | X, z_<t) of each level, the decoder run anew for every prefix, straight from the equation.

    Args:
        gids, v: where leaves are items, the GIDs of all as tuples, {item_idx: tuple}, and v_i, {item_idx: vector}.
    """
    branching, result = model.config.branching, []

    def embedding(t, code):
        prefix = 0
        for z in gid[:t]:
            prefix = prefix * branching + z
        own = model.prefix_codebooks[t - 1][prefix, code] if t and model.config.leaves_are_items else 0
        return model.codebook_TKD[t, code] + own

    for t in range(len(gid)):
        embeds = torch.stack([model.start_D, *(embedding(s, gid[s]) for s in range(t))])
        outputs = model.decoder(inputs_embeds=embeds[None] * embeds.shape[1] ** 0.5, encoder_hidden_states=states)
        d = outputs.last_hidden_state[0, -1]
        if t == len(gid) - 1 and model.config.leaves_are_items:
            scores = {path[-1]: d @ v[item] for item, path in gids.items() if path[:-1] == tuple(gid[:-1])}
        else:
            scores = {k: d @ embedding(t, k) for k in range(branching)}
        result.append(scores[gid[t]] - torch.logsumexp(torch.stack(list(scores.values())), 0))
    return result


def leaves(model, catalog):
    """The GIDs and v_i of all items, as `log_p` takes them."""
    every = np.arange(1, catalog.num_items + 1)
    candidate = packing.to_tensors({"item": every, **catalog_bags(catalog, every)})
    v = item_vectors(model, candidate)
    return {
        "gids": {item: tuple(catalog.gids[item].tolist()) for item in every.tolist()},
        "v": dict(zip(every.tolist(), v, strict=True)),
    }


def catalog_bags(catalog, items):
    tokens = [catalog.tokens.row(item) for item in items]
    lengths = [len(row) for row in tokens]
    return {"content_tokens": np.concatenate(tokens), "content_offsets": np.cumsum(lengths) - lengths}


def item_vectors(model, candidate):
    """Slot and mean content token of each, straight from the tables."""
    offsets = [*candidate["content_offsets"].tolist(), len(candidate["content_tokens"])]
    contents = [candidate["content_tokens"][begin:end] for begin, end in itertools.pairwise(offsets)]
    means = [model.token.weight[tokens].mean(0) for tokens in contents]
    return model.item.weight[candidate["item"]] + torch.stack(means)


@pytest.mark.parametrize(("encoding", "codebooks"), [("tokens", "level"), ("pooled", "level"), ("pooled", "prefix")])
@torch.no_grad()
def test_losses_are_those_of_the_equations(room, encoding, codebooks):
    config, model, batch = room(history__encoding=encoding, model__codebooks=codebooks)
    losses, of_leaves = model(batch), leaves(model, room.catalog)
    size = len(batch["next_gid"])

    def state(inputs, row):
        alone = rows_of(inputs, row)
        return model.encoder(inputs_embeds=model.embed(alone)).last_hidden_state

    item = [state(batch["item"], r) for r in range(len(batch["item"]["eos"]))]
    h = [s[0, -1] for s in item]
    scale = config.model.d_model**-0.5
    expected = dict.fromkeys(("rec", "index", "bpr", "softmax", "contrastive"), 0.0)
    v = item_vectors(model, batch["candidate"])
    for row in range(size):
        user = state(batch["user"], row)
        positive, negative, sibling = (int(batch[n][row]) for n in ("positive", "negative", "sibling"))
        weight = batch["weight"][row]
        expected["rec"] -= sum(log_p(model, user, batch["next_gid"][row].tolist(), **of_leaves)) / 3 * weight
        for i in (positive, negative):
            expected["index"] -= sum(log_p(model, item[i], batch["item"]["gid"][i].tolist(), **of_leaves)) / 3 / size
        expected["bpr"] -= torch.log(torch.sigmoid(scale * user[0, -1] @ (h[positive] - h[negative]))) * weight
        scores, target = v @ user[0, -1], batch["next"][row]
        others = batch["random"] != target
        random = scores[batch["random"]][others] - batch["log_q"][others]
        expected["softmax"] -= (scores[target] - torch.logsumexp(torch.cat([random, scores[target, None]]), 0)) * weight
        if batch["sibling_weight"][row]:
            expected["contrastive"] -= torch.log(torch.sigmoid(scale * h[positive] @ (h[sibling] - h[negative]))) / size
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(float(value), rel=1e-4), name
    weighted = sum(getattr(config.loss, name) * losses[name] for name in expected)
    assert losses["loss"].item() == pytest.approx(weighted.item(), rel=1e-5)


def steps(config, corpus, catalog, rank=0, world_size=1, **changes):
    """The first steps of a rank, as lists of micro-batches."""
    train = dataclasses.replace(config.train, **changes)
    config = dataclasses.replace(config, train=train)
    return list(
        loader.TrainBatches(config, catalog, loader.shard_paths(corpus, "train"), rank, world_size, range(3), 10)
    )


@pytest.mark.parametrize("encoding", ["tokens", "pooled"])
@torch.no_grad()
def test_losses_do_not_depend_on_the_cut_nor_on_the_ranks(tmp_path, encoding):
    config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work", history__encoding=encoding)

    names = ("softmax", "rec", "index", "bpr", "contrastive")

    def losses(**kwargs):
        """Of each step, the sums over its micro-batches."""
        found = []
        for micros in steps(config, corpus, catalog, **kwargs):
            parts = [model(micro) for micro in micros]
            found.append([sum(part[name].item() for part in parts) for name in names])
        return np.array(found)

    whole = losses(length_groups=1)
    assert np.allclose(losses(length_groups=4), whole, rtol=1e-5)
    assert np.allclose(losses(micro_tokens=150), whole, rtol=1e-5)
    assert np.allclose(losses(micro_tokens=1, length_groups=3), whole, rtol=1e-5)  # target by target
    # The random items of the softmax are those of all ranks, which test_exact.py starts.
    ranks = [losses(rank=rank, world_size=2, micro_tokens=100)[:, 1:] for rank in range(2)]
    assert np.allclose(np.mean(ranks, 0), whole[:, 1:], rtol=1e-5)


def test_a_filler_has_no_influence(tmp_path):
    config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work")
    micro = loader.filler(steps(config, corpus, catalog, micro_tokens=100)[0][0])
    losses = model(micro)
    assert {loss.item() for loss in losses.values()} == {0}
    losses["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert micro["num_tokens"] == 0


def test_pooled_content_is_the_mean_of_the_token_embeddings(room):
    _, model, batch = room()
    x = model.embed(batch["user"])
    row, column = torch.nonzero(batch["user"]["content_row"])[5]
    bag = batch["user"]["content_row"][row, column] - 1
    offsets = [*batch["user"]["content_offsets"].tolist(), len(batch["user"]["content_tokens"])]
    tokens = batch["user"]["content_tokens"][offsets[bag] : offsets[bag + 1]]
    others = [getattr(model, n)(batch["user"][n][row, column]) for n in ("item", "event", "recency", "gap")]
    expected = (model.token.weight[tokens].mean(0) + sum(others)) * x.shape[-1] ** 0.5
    assert torch.allclose(x[row, column], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("rec", {"index", "bpr", "softmax", "contrastive"}),
        ("index", {"rec", "bpr", "softmax", "contrastive"}),
        ("bpr", {"rec", "index", "softmax", "contrastive"}),
        ("softmax", {"rec", "index", "bpr", "contrastive"}),
        ("contrastive", {"rec", "index", "bpr", "softmax"}),
    ],
)
def test_each_loss_can_be_switched_off(room, off, left):
    _, model, batch = room(**{f"loss__{off}": "0"})
    assert set(model(batch)) == left | {"loss"}


def test_without_item_losses_no_item_is_encoded(room):
    _, model, batch = room(loss__index="0", loss__bpr="0", loss__contrastive="0")
    assert "item" not in batch
    assert set(model(batch)) == {"rec", "softmax", "loss"}


def test_every_weight_learns(room):
    _, model, batch = room(model__tie_codebooks="false")
    model(batch)["loss"].backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == set()


def test_item_init_keeps_inner_products_up_to_a_factor(room):
    _, model, _ = room()
    embeddings, gids = torch.randn(41, 8), torch.from_numpy(room.catalog.gids)
    before = model.prefix_codebooks[0].clone()
    model_module.init_items(model, embeddings, gids, seed=1)
    for code in range(3):  # codes start amid the items below; the fourth has none
        below = (gids[1:, 0] == code).nonzero()[:, 0] + 1
        assert torch.allclose(model.codebook_TKD[0, code], model.item.weight[below].mean(0), atol=1e-6)
        for second in range(4):
            those = below[gids[below, 1] == second]
            expected = model.item.weight[those].mean(0) if len(those) else before[code, second]
            assert torch.allclose(model.prefix_codebooks[0][code, second], expected, atol=1e-6)
    before, after = embeddings[1:] @ embeddings[1:].T, model.item.weight[1:] @ model.item.weight[1:].T
    assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)
    assert model.item.weight[0].abs().sum() == 0


@torch.no_grad()
def test_leaves_that_are_no_items_take_no_probability(room):
    config, model, _ = room(gid__branching="7")  # 40 items, 2 codes: 5 or 7 items below each of the first 6 codes
    batch = next(loader.eval_batches(config, room.catalog, *room.eval))
    log_p = tiny.log_p_of_all_items(config, model, room.catalog, batch)
    first = log_p[:, ::7, 0].exp().sum(1)
    assert log_p.sum(-1).exp().sum(1).tolist() == pytest.approx(first.tolist(), abs=1e-5)
    assert 0.5 < first.min() < first.max() < 0.99  # the seventh code leads nowhere


def test_a_single_level_is_a_softmax_over_the_items(room):
    config, model, batch = room(gid__branching="64")
    assert not model.prefix_codebooks
    model(batch)["loss"].backward()
    users = next(loader.eval_batches(config, room.catalog, *room.eval))
    with torch.no_grad():
        log_p = tiny.log_p_of_all_items(config, model, room.catalog, users)
    assert log_p.shape[-1] == 1
    assert log_p.exp().sum((1, 2)).tolist() == pytest.approx([1.0] * len(log_p), abs=1e-5)


@torch.no_grad()
def test_a_causal_encoder_gives_what_it_would_give_of_the_shorter_history(room):
    _, model, batch = room(history__attention="causal", train__length_groups="2")
    states, eos = model.encode(batch["user"]), batch["user"]["eos"]
    row = int(eos.argmax())
    for length in range(1, int(eos[row]) + 1):
        shorter = {
            k: v[row : row + 1, : length + 1] for k, v in batch["user"].items() if torch.is_tensor(v) and v.ndim > 1
        }
        shorter |= {k: batch["user"][k] for k in ("content_tokens", "content_offsets")}
        assert torch.allclose(model.encode(shorter)[0, -1], states[row, length], atol=1e-5)


@torch.no_grad()
def test_with_a_causal_encoder_the_softmax_has_a_target_after_every_item(room):
    _, model, batch = room(history__attention="causal", loss__softmax="1")
    losses, of_leaves = model(batch), leaves(model, room.catalog)
    states, v = model.encode(batch["user"]), item_vectors(model, batch["candidate"])
    softmax, rec = 0.0, 0.0
    names = ("next_row", "next_at", "next", "next_gid", "next_weight")
    for row, at, target, gid, weight in zip(*(batch[name].tolist() for name in names), strict=True):
        scores, others = v @ states[row, at], batch["random"] != target
        random = scores[batch["random"]][others] - batch["log_q"][others]
        softmax -= (scores[target] - torch.logsumexp(torch.cat([random, scores[target, None]]), 0)) * weight
        rec -= sum(log_p(model, states[row : row + 1, : at + 1], gid, **of_leaves)) / 3 * weight
    assert losses["softmax"].item() == pytest.approx(float(softmax), rel=1e-4)
    assert losses["rec"].item() == pytest.approx(float(rec), rel=1e-4)


@pytest.mark.parametrize("encoding", ["tokens", "pooled"])
@torch.no_grad()
def test_without_an_item_table_items_are_known_by_their_content_alone(tmp_path, encoding):
    changes = {"model__item_table": "none", "history__user_slots": "0", "history__encoding": encoding}
    config, _, catalog, model = tiny.tiny_room(tmp_path / "work", **changes)
    assert not [name for name in model.state_dict() if name.startswith("item.")]
    lengths = np.zeros(catalog.num_items + 1, np.int64)
    lengths[1:] = 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1]) % 40 + 3
    tokens[offsets[7] : offsets[8]] = tokens[offsets[5] : offsets[6]]  # items 5 and 7 are alike, 6 is not
    catalog = dataclasses.replace(catalog, tokens=Ragged(tokens, offsets))
    batch = packing.to_tensors(inputs.item_inputs(config, catalog, np.array([5, 6, 7]), key=0))
    five, six, seven = model.summary(model.encode(batch), batch)
    assert torch.allclose(five, seven, atol=1e-6)
    assert (five - six).abs().max() > 1e-3


def test_the_losses_need_no_item_table(room):
    _, model, batch = room(model__item_table="none", loss__softmax="1")
    losses = model(batch)
    losses["loss"].backward()
    assert set(losses) == {"rec", "index", "bpr", "softmax", "contrastive", "loss"}
    assert losses["loss"].isfinite()
    assert model.token.weight.grad.isfinite().all()
