import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from contract.schema import Ragged
from tests import tiny
from trainer import initial, inputs, loader, packing, ranking
from trainer import model as model_module

# Of nine items, K = 4: one first code has none, one item is alone below its.
GIDS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 2), (0, 3, 0), (1, 0, 0), (1, 0, 1), (1, 2, 3), (2, 1, 1)]


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
    """log p(z_t | X, z_<t) of every code that may follow, {code: log p} of each level, the decoder run anew for every
    prefix, straight from the equation.

    Args:
        states: of one user, (1, L, D), the last of which is h(X).
        gids, v: where leaves are items, the GIDs of all as tuples, {item_idx: tuple}, and v_i, {item_idx: vector}.
    """
    branching, of_prefixes, result = model.config.branching, model.config.codebooks == "prefix", []

    def number(codes):
        total = 0
        for z in codes:
            total = total * branching + z
        return total

    def read(t, code):
        if of_prefixes:
            return model.code_vectors[t][number(gid[:t]), code].mean(0)
        return model.codebook_TKD[t, code]

    def score(t, code, d):
        if not of_prefixes:
            return d @ model.head_TKD[t, code]
        vectors, biases = model.code_vectors[t][number(gid[:t]), code], model.code_biases[t][number(gid[:t]), code]
        return sum((d @ e_m + b_m).exp() for e_m, b_m in zip(vectors, biases, strict=True)).log()

    for t in range(len(gid)):
        embeds = torch.stack([model.start_D, *(read(s, gid[s]) for s in range(t))])
        outputs = model.decoder(inputs_embeds=embeds[None] * embeds.shape[1] ** 0.5, encoder_hidden_states=states)
        d = outputs.last_hidden_state[0, -1] + (states[0, -1] if of_prefixes else 0)
        if t == len(gid) - 1 and of_prefixes:
            scores = {path[-1]: d @ v[item] for item, path in gids.items() if path[:-1] == tuple(gid[:-1])}
        else:
            scores = {k: score(t, k, d) for k in range(branching)}
        total = torch.logsumexp(torch.stack(list(scores.values())), 0)
        result.append({code: value - total for code, value in scores.items()})
    return result


def recommendation_loss(model, states, gid, of_leaves, mass=None):
    """L_rec of one target: the mean over the levels of -sum of wanted(z) log p(z | X, z_<t).

    Args:
        mass: with a teacher, [(item_idx, weight exp(s_ui))] of the items whose sums are its distribution; of the last
            level all items are.
    """
    losses, share = [], model.config.distil if mass else 0.0
    for t, of_codes in enumerate(log_p(model, states, gid, **of_leaves)):
        wanted = {code: 1.0 - share if code == gid[t] else 0.0 for code in of_codes}
        if mass:
            if t == len(gid) - 1:
                mass = [(item, (states[0, -1] @ v).exp()) for item, v in of_leaves["v"].items()]
            below = [(of_leaves["gids"][item], weight) for item, weight in mass]
            below = [(path[t], weight) for path, weight in below if path[:t] == tuple(gid[:t])]
            for code, weight in below:
                wanted[code] += share * weight / sum(weight for _, weight in below)
        assert float(sum(wanted.values())) == pytest.approx(1, abs=1e-5)
        losses.append(-sum(part * of_codes[code] for code, part in wanted.items()))
    return sum(losses) / len(gid)


def masses(batch, scores, target):
    """[(item_idx, weight)] of what a target of a batch is ranked among: those drawn, by how often they are, and itself.

    Args:
        scores: s_ui of the candidates of the batch; target: among them.
    """
    items = batch["candidate"]["item"].tolist()
    drawn = [(j, q) for j, q in zip(batch["random"].tolist(), batch["log_q"].tolist(), strict=True) if j != target]
    return [(items[target], scores[target].exp()), *((items[j], (scores[j] - q).exp()) for j, q in drawn)]


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


@pytest.mark.parametrize(
    ("encoding", "codebooks", "settings"),
    [
        ("tokens", "level", {}),
        ("pooled", "level", {}),
        ("pooled", "prefix", {}),
        ("pooled", "prefix", {"train__negatives": "40"}),  # the softmax is over all items
        ("pooled", "prefix", {"loss__distil": "0"}),
        ("pooled", "prefix", {"loss__softmax": "0"}),  # there is no score to learn from
    ],
)
@torch.no_grad()
def test_losses_are_those_of_the_equations(room, encoding, codebooks, settings):
    config, model, batch = room(history__encoding=encoding, model__codebooks=codebooks, **settings)
    tiny.move_from_start(model)
    losses, of_leaves = model(batch), leaves(model, room.catalog)
    size = len(batch["next_gid"])
    ranks, distils = bool(config.loss.softmax), codebooks == "prefix" and config.loss.distil and config.loss.softmax

    def state(inputs, row):
        alone = rows_of(inputs, row)
        return model.encoder(inputs_embeds=model.embed(alone)).last_hidden_state

    def index_loss(i):
        gid = batch["item"]["gid"][i].tolist()
        return sum(-of_codes[code] for code, of_codes in zip(gid, log_p(model, item[i], gid, **of_leaves), strict=True))

    item = [state(batch["item"], r) for r in range(len(batch["item"]["eos"]))]
    h = [s[0, -1] for s in item]
    scale = config.model.d_model**-0.5
    names = ("rec", "index", "bpr", "softmax", "contrastive")
    expected = {name: 0.0 for name in names if getattr(config.loss, name)}
    v = item_vectors(model, batch["candidate"])
    for row in range(size):
        user = state(batch["user"], row)
        positive, negative, sibling = (int(batch[n][row]) for n in ("positive", "negative", "sibling"))
        weight, mass = batch["weight"][row], None
        if ranks:
            scores, target = v @ user[0, -1], int(batch["next"][row])
            mass = masses(batch, scores, target)
            expected["softmax"] -= (scores[target] - sum(part for _, part in mass).log()) * weight
        rec = recommendation_loss(model, user, batch["next_gid"][row].tolist(), of_leaves, mass if distils else None)
        expected["rec"] += rec * weight
        expected["index"] += (index_loss(positive) + index_loss(negative)) / 3 / size
        expected["bpr"] -= torch.log(torch.sigmoid(scale * user[0, -1] @ (h[positive] - h[negative]))) * weight
        if batch["sibling_weight"][row]:
            expected["contrastive"] -= torch.log(torch.sigmoid(scale * h[positive] @ (h[sibling] - h[negative]))) / size
    assert set(losses) == {*expected, "loss"}
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


@pytest.mark.parametrize(
    "settings",
    [
        {"history__encoding": "tokens"},
        {"history__encoding": "pooled"},
        {"history__attention": "causal"},
        {"loss__distil": "0"},
        {"model__codebooks": "level"},
    ],
    ids=str,
)
def test_losses_and_gradients_do_not_depend_on_the_cut_nor_on_the_ranks(tmp_path, settings):
    config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work", **settings)
    tiny.move_from_start(model)
    # The random items of the softmax, of which the decoder learns, are those of all ranks, which test_exact.py starts.
    of_all_ranks = ("softmax", "rec") if model.config.distils else ("softmax",)
    names = [*of_all_ranks, *(name for name in ("rec", "index", "bpr", "contrastive") if name not in of_all_ranks)]

    def losses(**kwargs):
        """Of each step, the sums over its micro-batches."""
        found = []
        for micros in steps(config, corpus, catalog, **kwargs):
            parts = [model(micro) for micro in micros]
            sum(part["loss"] for part in parts).backward()
            found.append([sum(part[name].item() for part in parts) for name in names])
        return np.array(found)

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    whole = losses(length_groups=1)
    expected = gradients()
    # Cut in groups, in micro-batches, and target by target.
    for cut in ({"length_groups": 4}, {"micro_tokens": 150}, {"micro_tokens": 1, "length_groups": 3}):
        assert np.allclose(losses(**cut), whole, rtol=1e-5)
        for name, gradient in gradients().items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max()), name
    own = slice(len(of_all_ranks), None)
    ranks = [losses(rank=rank, world_size=2, micro_tokens=100)[:, own] for rank in range(2)]
    assert np.allclose(np.mean(ranks, 0), whole[:, own], rtol=1e-5)


def test_a_filler_has_no_influence(tmp_path):
    config, corpus, catalog, model = tiny.tiny_room(tmp_path / "work")
    tiny.move_from_start(model)
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


@pytest.mark.parametrize("codebooks", ["prefix", "level"])
def test_every_weight_learns(room, codebooks):
    _, model, batch = room(model__codebooks=codebooks)
    tiny.move_from_start(model)
    model(batch)["loss"].backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == set()


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("distil", ["0.8", "0"])
def test_a_decoder_that_learns_from_the_score_leaves_it_alone(room, distil, attention):
    _, model, batch = room(loss__distil=distil, history__attention=attention)
    tiny.move_from_start(model)
    model(batch)["rec"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    encoder = {name for name, _ in model.named_parameters() if not name.startswith(("decoder.", "code_", "start_D"))}
    assert {"encoder.block.0.layer.0.SelfAttention.q.weight", "item.weight", "token.weight"} < encoder
    silent = {"user.weight", "recency.weight"} if attention == "causal" else {"user.weight"}  # not of X_u
    assert encoder - moved == (encoder if distil == "0.8" else silent)
    assert moved >= {"start_D", "decoder.final_layer_norm.weight", "code_vectors.0", "code_biases.1"}
    assert "decoder.block.0.layer.1.EncDecAttention.k.weight" in moved


def teacher_of_two_levels(scores, drawn, log_q, target, distil=1.0, gids=GIDS):
    """float32 (K,) each: what a teacher asks for at the root and below the first code of a target.

    Args:
        scores: s_ui of items 1.. with the GIDs `gids`; drawn: item_idx, may repeat; log_q: of each of them.
    """
    config = model_module.ColaRecConfig(gid_length=3, branching=4, codebooks="prefix", distil=distil)
    v = torch.cat([torch.zeros(1), scores])[:, None]
    score_S, score_SQ = ranking.sampled_scores(
        torch.ones(1, 1), v[[target]], torch.tensor([target]), log_q, v[drawn], drawn
    )
    prefixes = torch.tensor([0, *(4 * first + second for first, second, _ in gids)])
    teacher = ranking.Teacher(config, torch.ones(1, 1), score_S, score_SQ, prefixes[drawn])
    first, second, _ = gids[target - 1]
    root = teacher.codes(0, torch.tensor([0]), torch.tensor([first]))
    return root[0], teacher.codes(1, torch.tensor([first]), torch.tensor([second]))[0]


def test_the_teacher_of_all_items_has_the_mass_below_each_code():
    scores = torch.linspace(-2, 3, len(GIDS))
    every = torch.arange(1, len(GIDS) + 1)
    root, below = teacher_of_two_levels(scores, every, torch.zeros(len(GIDS)), target=3, distil=0.75)
    mass = [sum(math.exp(s) for s, path in zip(scores, GIDS, strict=True) if path[0] == k) for k in range(4)]
    assert root.tolist() == pytest.approx([0.75 * m / sum(mass) + 0.25 * (k == 0) for k, m in enumerate(mass)])
    mass = [sum(math.exp(s) for s, path in zip(scores, GIDS, strict=True) if path[:2] == (0, k)) for k in range(4)]
    assert below.tolist() == pytest.approx([0.75 * m / sum(mass) + 0.25 * (k == 1) for k, m in enumerate(mass)])


def test_the_teacher_of_drawn_items_is_on_average_that_of_all():
    """Items drawn by very unequal rates: without log q the mass would be where they are drawn."""
    scores = torch.linspace(-2, 3, len(GIDS))
    rate = torch.linspace(5, 1, len(GIDS)).softmax(0)
    drawn = 1 + torch.multinomial(rate, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = teacher_of_two_levels(scores, drawn, (rate * len(drawn)).log()[drawn - 1], target=3)
    every = torch.arange(1, len(GIDS) + 1)
    expected = teacher_of_two_levels(scores, every, torch.zeros(len(GIDS)), target=3)
    careless = teacher_of_two_levels(scores, drawn, torch.zeros(len(drawn)), target=3)
    for level in range(2):
        assert torch.allclose(found[level], expected[level], atol=0.01)
        assert not torch.allclose(careless[level], expected[level], atol=0.1)


def test_the_teacher_knows_the_target_where_its_score_is_next_to_none():
    """exp(s_ui) of all below a prefix may be 0 beside that of the best item."""
    scores = torch.full((len(GIDS),), -400.0)
    scores[-1] = 300.0
    nothing = torch.zeros(1)
    root, below = teacher_of_two_levels(scores, torch.tensor([len(GIDS)]), nothing, target=3, distil=0.75)
    assert root.tolist() == pytest.approx([0.25, 0, 0.75, 0])
    assert below.tolist() == pytest.approx([0, 1, 0, 0])


def test_items_start_at_the_cf_embeddings_up_to_a_rotation_and_a_factor(room):
    _, model, _ = room()
    embeddings = torch.randn(41, 8)
    mapped = initial.init_items(model, embeddings, seed=1)
    before, after = embeddings[1:] @ embeddings[1:].T, model.item.weight[1:] @ model.item.weight[1:].T
    assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)
    assert model.item.weight[0].abs().sum() == 0
    assert torch.equal(mapped, model.item.weight)


@pytest.mark.parametrize("num_vectors", ["1", "3", "16"])
@pytest.mark.parametrize("known", [True, False])
def test_codes_start_amid_the_items_below_and_count_them(room, monkeypatch, num_vectors, known):
    monkeypatch.setattr(model_module, "ITEMS_PER_VECTOR", 0.1)
    _, model, _ = room(model__code_vectors=num_vectors)
    vectors, gids = torch.randn(41, 16), room.catalog.gids
    before = [table.clone() for table in model.code_vectors]
    initial.init_codes(model, torch.from_numpy(gids), vectors if known else None, seed=1)
    for level, (table, bias) in enumerate(zip(model.code_vectors, model.code_biases, strict=True)):
        assert table.shape == (4**level, 4, int(num_vectors), 16)
        for path in itertools.product(range(4), repeat=level + 1):
            below = 1 + (gids[1:, : level + 1] == path).all(1).nonzero()[0]
            node = sum(code * 4**place for place, code in enumerate(reversed(path)))
            e, b = table.flatten(0, 1)[node], bias.flatten(0, 1)[node]
            counts = b.exp().round().int()
            assert counts.sum() == len(below)
            assert torch.allclose(b, torch.where(counts > 0, counts.log(), initial.NOTHING_BELOW), atol=1e-6)
            if not (known and len(below)):
                assert torch.equal(e, before[level].flatten(0, 1)[node])
            elif len(below) <= int(num_vectors):  # each of them, and where there are no more their mean
                assert sorted(counts[: len(below)].tolist()) == [1] * len(below)
                rows = sorted(map(tuple, e[: len(below)].tolist()))
                assert rows == sorted(map(tuple, vectors[below].tolist()))
                mean = vectors[below].mean(0).expand(int(num_vectors) - len(below), -1)
                assert torch.allclose(e[len(below) :], mean, atol=1e-6)
            else:
                assert torch.allclose((e * counts[:, None]).sum(0), vectors[below].sum(0), atol=1e-5)


def test_parts_of_items_have_their_mean_for_a_centre(monkeypatch):
    x, generator = torch.randn(200, 5), torch.Generator().manual_seed(0)
    node = torch.randint(7, (200,), generator=generator)
    node[node == 6], node[:2] = 5, 6  # a node of two
    found = []
    for rows_at_once in (1 << 18, 33):
        monkeypatch.setattr(initial, "CLUSTER_ROWS", rows_at_once)
        found.append(initial._parts(x, node, 7, 4, torch.Generator().manual_seed(1)))
    (centre, part), again = found
    assert torch.equal(centre, again[0])
    assert torch.equal(part, again[1])
    for n in range(6):
        for m in range(4):
            own = x[(node == n) & (part == m)]
            assert len(own)
            assert torch.allclose(centre[n, m], own.mean(0), atol=1e-5)
    spread = sum(((x[node == n] - x[node == n].mean(0)) ** 2).sum() for n in range(7))
    assert ((x - centre[node, part]) ** 2).sum() < 0.7 * spread
    assert sorted(part[node == 6].tolist()) == [0, 1]
    assert torch.equal(centre[6][part[:2]], x[:2])
    assert torch.allclose(centre[6, 2:], x[:2].mean(0).expand(2, -1))


@torch.no_grad()
def test_leaves_that_are_no_items_take_no_probability(room):
    config, model, _ = room(gid__branching="7")  # 40 items, 2 codes: 5 or 7 items below each of the first 6 codes
    batch = next(loader.eval_batches(config, room.catalog, *room.eval))
    tiny.move_from_start(model)
    log_p = tiny.log_p_of_all_items(config, model, room.catalog, batch)
    first = log_p[:, ::7, 0].exp().sum(1)
    assert log_p.sum(-1).exp().sum(1).tolist() == pytest.approx(first.tolist(), abs=1e-5)
    assert 0.5 < first.min() < first.max() < 0.999  # the seventh code leads nowhere


def test_a_single_level_is_a_softmax_over_the_items(room):
    config, model, batch = room(gid__branching="64")
    assert not model.code_vectors
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
    _, model, batch = room(history__attention="causal")
    tiny.move_from_start(model)
    losses, of_leaves = model(batch), leaves(model, room.catalog)
    states, v = model.encode(batch["user"]), item_vectors(model, batch["candidate"])
    softmax, rec = 0.0, 0.0
    names = ("next_row", "next_at", "next", "next_gid", "next_weight")
    for row, at, target, gid, weight in zip(*(batch[name].tolist() for name in names), strict=True):
        scores = v @ states[row, at]
        mass = masses(batch, scores, target)
        softmax -= (scores[target] - sum(part for _, part in mass).log()) * weight
        rec += recommendation_loss(model, states[row : row + 1, : at + 1], gid, of_leaves, mass) * weight
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
