"""Recommendations of a model: its tree of GIDs and the vectors of its items, on one device.

What ranks the items is `eval.mode`:

    generative  log p(GID | X_u), of what a beam of `eval.beams` prefixes finds
    dense       h(X_u) . v_i, of all items
    hybrid      (log p(GID | X_u) + w h(X_u) . v_i) / (1 + w) + w_c c(u, i), of the best `eval.beams` by each of them
                that weighs anything

w is `eval.hybrid`, w_c `eval.neighbours`; c is what trainer/neighbours.py says, where gid/ has neighbours. The weights
of a trained model are those that ranked best when it was validated, unless they are set.

With `eval.exhaustive`, or where the beam is as wide as the catalog, log p of every item is computed, and all modes rank
all items. A score is the same either way: the width of the beam decides which items are scored, not how.

Axes in names: B users, N items of each, C items of the tree, D width.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from contract.artifacts import Artifact
from contract.settings import Config
from gid.tree import GidTree
from trainer import dense
from trainer.beam import all_items, beam_search, best_items, gid_log_p
from trainer.export import load_model
from trainer.inputs import Catalog, read_catalog
from trainer.model import ColaRec
from trainer.neighbours import Neighbours
from trainer.packing import to_device

# Best first: item_idx int64 (B, k), 0 where there are no more, and scores float32 (B, k), -inf there.
Ranked = tuple[torch.Tensor, torch.Tensor]


class Candidates(NamedTuple):
    """What the parts of the hybrid found, beam, search and neighbours side by side, and all scores of all of it; an
    item may be there more than once."""

    generated: Ranked
    near: Ranked
    item_BN: torch.Tensor
    log_p_BN: torch.Tensor
    near_BN: torch.Tensor
    neighbours_BN: torch.Tensor | None
    again_BN: torch.Tensor  # bool: item 0, or one that stands further left as well
    not_without_near_BN: torch.Tensor  # bool: the same where search weighs nothing, and all that it found

    def best(self, weight: float, of_neighbours: float, k: int) -> Ranked:
        """The k best by `hybrid_score`, of what those parts found that weigh anything."""
        score_BN = hybrid_score(self.log_p_BN, self.near_BN, self.neighbours_BN, weight, of_neighbours)
        score_BN = score_BN.masked_fill(self.again_BN if weight else self.not_without_near_BN, -torch.inf)
        if not of_neighbours:
            score_BN[:, self.generated[0].shape[1] + self.near[0].shape[1] :] = -torch.inf
        return best_items(self.item_BN, score_BN, k)


def hybrid_score(
    log_p: torch.Tensor, near: torch.Tensor, neighbours: torch.Tensor | None, weight: float, of_neighbours: float
) -> torch.Tensor:
    """(log p + weight h . v) / (1 + weight) + of_neighbours c: an average of two log-probabilities, but for a constant
    of the user, and what is counted."""
    score = (log_p + weight * near) / (1 + weight)
    return score + of_neighbours * neighbours if of_neighbours and neighbours is not None else score


def with_chosen_weights(config: Config, model: Artifact) -> Config:
    """The config with the weights of the hybrid that the model's validation chose, unless it has some of its own."""
    unset = [name for name in ("hybrid", "neighbours") if getattr(config.eval, name) < 0]
    if not unset:
        return config
    best = model.counts["best"]  # has none where nothing but GIDs was learned
    chosen = dataclasses.replace(config.eval, **{name: best.get(name, 0.0) for name in unset})
    return dataclasses.replace(config, eval=chosen)


def load(
    config: Config, inputs: dict[str, Artifact], device: torch.device, only: np.ndarray | None = None
) -> "Recommender":
    """A trained model's. inputs: corpus, gid and model."""
    catalog = read_catalog(inputs["corpus"], inputs["gid"])
    model = load_model(inputs["model"]).to(device)
    return Recommender(with_chosen_weights(config, inputs["model"]), catalog, model, device, only)


class Recommender:
    """Ranks all items of the catalog, or some of them, for batches of users.

    Within a process group all ranks make it together, for each computes its share of the items' vectors.

    Args:
        model: on `device`, in eval mode.
        only: item_idx of the candidates; by default all items. The tree and the dense search hold no others, so every
            beam stays on the way to a candidate.

    Raises:
        ValueError: there are no candidates, or one is not in 1..I; neighbours have a weight and gid/ has none.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        model: ColaRec,
        device: torch.device,
        only: np.ndarray | None = None,
    ):
        self.config, self.catalog, self.model, self.device = config, catalog, model, device
        items_C = _candidates(catalog.num_items, only)
        self._ranks_by = config.eval.ranks_by
        self._exhaustive = config.eval.exhaustive or config.eval.beams >= len(items_C)
        self._may_be_scored = torch.zeros(self.catalog.num_items + 1, dtype=torch.bool, device=device)
        self._may_be_scored[torch.from_numpy(np.append(items_C, 0)).to(device)] = True
        self._tree = GidTree(catalog.gids, config.gid.branching, items_C).to(device)
        self._gids = torch.from_numpy(catalog.gids.astype(np.int16)).to(device)
        self._v_ID = None
        if model.config.leaves_are_items:  # of all, as they compete with all below a prefix; 0 only fills up
            every = np.arange(catalog.num_items + 1)
            self._v_ID = dense.item_vectors(config, model, catalog, device, every, "v")
        if self._ranks_by != "generative":
            which = dense.found_by(model)
            if which == "v" and self._v_ID is not None:
                vectors_CD = self._v_ID[1:] if only is None else self._v_ID[items_C]
            else:
                vectors_CD = dense.item_vectors(config, model, catalog, device, items_C, which)
            self._index = dense.Index(vectors_CD, items_C, catalog.num_items)
        self._neighbours = None
        if self._ranks_by == "hybrid" and config.eval.neighbours > 0 and not catalog.neighbours:
            raise ValueError(
                f"eval.neighbours = {config.eval.neighbours:g}, but gid/ has no neighbours: it was built without them "
                "(gid.neighbours = 0, or an older version); run: python gid/build.py, or set "
                "--eval.neighbours=0"
            )
        if self._ranks_by == "hybrid" and config.eval.neighbours and catalog.neighbours:
            may_be_found = self._may_be_scored.clone()
            may_be_found[0] = False
            self._neighbours = Neighbours(catalog.neighbours, may_be_found)

    @torch.no_grad()
    def recommend(self, batch: dict, k: int, states_BLD: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The k best candidates of each user.

        Args:
            batch: user, X_u of B users (`trainer.inputs.user_inputs`); and, where there are any, seen_row and seen_item
                int64 (S,), a row of user and an item_idx each, which must not be returned.
            states_BLD: what the encoder makes of them, where that is known.

        Returns:
            item_idx int32 (B, k), best first, equal scores by item_idx, 0 where there are no more; score float32
            (B, k), -inf there. With 'hybrid' also int32 (B, k) what its parts would return: generative and dense, each
            alone, and, where there are neighbours, without_neighbours.
        """
        user, *seen = self._on_device(batch)
        states_BLD = self.model.encode(user) if states_BLD is None else states_BLD
        if self._ranks_by == "generative":
            return _found(self._generate(states_BLD, user, seen, k))
        user_BD = dense.user_vectors(self.model, states_BLD, user)
        if self._ranks_by == "dense":
            return _found(self._index.search(user_BD, k, *seen))
        of_neighbours = [0.0, self.config.eval.neighbours] if self._neighbours else [0.0]
        if self._exhaustive:
            near = self._index.search(user_BD, k, *seen)
            generated, *best = self._rank_all(states_BLD, user, user_BD, seen, k)
        else:
            found = self._candidates(states_BLD, user, user_BD, seen, k)
            generated, near = found.generated, found.near
            best = [found.best(self.config.eval.hybrid, weight, k) for weight in of_neighbours]
        parts = {"generative": generated, "dense": near}
        if self._neighbours:
            parts["without_neighbours"] = best[0]
        return _found(best[-1]) | {name: part[0][:, :k].int() for name, part in parts.items()}

    @torch.no_grad()
    def score(self, batch: dict, item_idx_BN: torch.Tensor) -> torch.Tensor:
        """The scores by which `recommend` ranks, float32 (B, N), of N items for each user, seen or not; -inf for 0.

        Raises:
            ValueError: an item is no candidate.
        """
        item_BN = item_idx_BN.to(self.device).long()
        self._check_items(item_BN)
        user, *_ = self._on_device(batch)
        states_BLD = self.model.encode(user)
        if self._ranks_by != "dense":
            score_BN = self.log_p(states_BLD, user["mask"], item_BN).sum(-1)
        if self._ranks_by != "generative":
            near_BN = self._index.scores(dense.user_vectors(self.model, states_BLD, user), item_BN)
        if self._ranks_by == "dense":
            score_BN = near_BN
        elif self._ranks_by == "hybrid":
            c_BN = self._neighbours.of(user["item"]).scores(item_BN) if self._neighbours else None
            score_BN = hybrid_score(score_BN, near_BN, c_BN, self.config.eval.hybrid, self.config.eval.neighbours)
        return score_BN.masked_fill(item_BN == 0, -torch.inf)

    @torch.no_grad()
    def log_p(self, states_BLD: torch.Tensor, mask_BL: torch.Tensor, item_BN: torch.Tensor) -> torch.Tensor:
        """log p of each code of the GIDs of N items for each user, float32 (B, N, l); of item 0 meaningless."""
        item_BN = item_BN.clamp_min(1)
        gid_BNT = self._gids[item_BN].long()
        return gid_log_p(self.model, self._tree, states_BLD, mask_BL, item_BN, gid_BNT, self._v_ID)

    @torch.no_grad()
    def candidates(self, batch: dict, k: int, states_BLD: torch.Tensor) -> Candidates:
        """What the hybrid ranks, for whoever tries several weights. states_BLD: what the encoder makes of the batch."""
        user, *seen = self._on_device(batch)
        return self._candidates(states_BLD, user, dense.user_vectors(self.model, states_BLD, user), seen, k)

    def _candidates(
        self, states_BLD: torch.Tensor, user: dict, user_BD: torch.Tensor, seen: list, k: int
    ) -> Candidates:
        width = max(k, self.config.eval.beams)
        near = self._index.search(user_BD, width, *seen)
        generated = self._generate(states_BLD, user, seen, width)
        others = [near[0]]
        if self._neighbours:
            of_users = self._neighbours.of(user["item"])
            others.append(self._neighbours.best(of_users, width, *seen)[0])
        other_BN = torch.cat(others, 1)
        item_BN = torch.cat([generated[0], other_BN], 1)
        log_p_BN = torch.cat([generated[1], self.log_p(states_BLD, user["mask"], other_BN).sum(-1)], 1)
        near_BN = self._index.scores(user_BD, item_BN)
        neighbours_BN = of_users.scores(item_BN) if self._neighbours else None
        again_BN = dense.repeated(item_BN) | (item_BN == 0)
        others_BN = item_BN.clone()
        others_BN[:, width : 2 * width] = 0  # what neighbours have as well counts as theirs
        without_near_BN = dense.repeated(others_BN) | (others_BN == 0)
        return Candidates(generated, near, item_BN, log_p_BN, near_BN, neighbours_BN, again_BN, without_near_BN)

    def _on_device(self, batch: dict) -> tuple:
        """user, seen_row and seen_item of a batch, None for those that it lacks."""
        names = ("user", "seen_row", "seen_item")
        moved = to_device({name: batch[name] for name in names if name in batch}, self.device)
        return tuple(moved.get(name) for name in names)

    def _generate(self, states_BLD: torch.Tensor, user: dict, seen: list, k: int) -> Ranked:
        if self._exhaustive:
            return self._rank_all(states_BLD, user, None, seen, k)[0]
        return beam_search(self.model, self._tree, user, self.config.eval.beams, k, *seen, states_BLD, self._v_ID)

    def _rank_all(
        self, states_BLD: torch.Tensor, user: dict, user_BD: torch.Tensor | None, seen: list, k: int
    ) -> list[Ranked]:
        """The best of all items by log p, and, with user_BD, by the hybrid's sum without neighbours and, if there are
        any, with them."""
        none = torch.zeros(len(states_BLD), 0, dtype=torch.long, device=self.device), states_BLD[:, 0, :0].float()
        best = [none] * (1 if user_BD is None else 2 + (self._neighbours is not None))
        of_users = self._neighbours.of(user["item"]) if self._neighbours else None
        weight, of_neighbours = self.config.eval.hybrid, self.config.eval.neighbours
        for item_C, log_p_BC in all_items(self.model, self._tree, states_BLD, user["mask"], v_ID=self._v_ID):
            scores = [log_p_BC]
            if user_BD is not None:
                near_BC = user_BD @ self._index.vectors(item_C).T
                scores.append(hybrid_score(log_p_BC, near_BC, None, weight, 0.0))
                if of_users:
                    c_BC = of_users.scores(item_C.repeat(len(user_BD), 1))
                    scores.append(hybrid_score(log_p_BC, near_BC, c_BC, weight, of_neighbours))
            for i, score_BC in enumerate(scores):
                item_BN = torch.cat([best[i][0], item_C.expand_as(score_BC)], 1)
                score_BN = torch.cat([best[i][1], score_BC], 1)
                best[i] = best_items(item_BN, score_BN, k, self.catalog.num_items, *seen)
        return best

    def _check_items(self, item_BN: torch.Tensor) -> None:
        known_BN = (item_BN >= 0) & (item_BN <= self.catalog.num_items)
        known_BN &= self._may_be_scored[item_BN.clamp(0, self.catalog.num_items)]
        if not known_BN.all():
            raise ValueError(f"item_idx {int(item_BN[~known_BN][0])} is no candidate, so that it has no score")


def _found(ranked: Ranked) -> dict[str, torch.Tensor]:
    return {"item_idx": ranked[0].int(), "score": ranked[1]}


def _candidates(num_items: int, only: np.ndarray | None) -> np.ndarray:
    """item_idx, int64 (C,), ascending, each once."""
    items_C = np.arange(1, num_items + 1) if only is None else np.unique(np.asarray(only, np.int64))
    if not len(items_C):
        raise ValueError("there are no candidates to recommend: give at least one item")
    if items_C[0] < 1 or items_C[-1] > num_items:
        raise ValueError(f"candidates are item_idx in 1..{num_items}; those given are in {items_C[0]}..{items_C[-1]}")
    return items_C
