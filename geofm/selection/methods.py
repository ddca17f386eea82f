"""Choosing to a budget: seven methods behind one interface.

A method gives every candidate a priority; ``strata.take`` keeps the best to the budget, after each
stratum took what it is sure of. So all methods have the same budgets, quotas, inputs and ties (the
lower chip id), and none depends on the order of its input or on the number of threads.

- ``facility-location`` (default): what a chip adds to the sum over all chips of the similarity to
  their most similar kept chip, in greedy order (1 − 1/e of the best value; Nemhauser et al. 1978).
  Rare chips weigh more (``rarity``).
- ``k-centre``: farthest first (Gonzalez 1985). Seeks outliers.
- ``balanced-kmeans``: the same number from each cluster of a hierarchy (Vo et al. 2024).
- ``density``: by chance, with probability ∝ 1 / density^power, density being 1 / kNN radius.
- ``entropy``: the highest grey-level entropy. To compare with: pure noise has the most.
- ``per-tile``: by chance, with probability ∝ 1 / chips of the same tile.
- ``random``: by chance, all alike.

Facility location and k-centre work in neighbourhoods: clusters of at most 2,048 chips, with all
similarities inside. Memory and time stay linear in the pool, and because a greedy's gains never
rise, the orders of neighbourhoods merge into one by their gains. Strata are quotas on that order;
they do not cut it: water in one tile is worth less when the next tile's water is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.embeddings.clusters import neighbourhoods
from geofm.embeddings.neighbours import knn_radius
from geofm.embeddings.vectors import Space
from geofm.selection.balanced import balanced_rank
from geofm.selection.greedy import facility_order, farthest_order, rare_weights, similarities
from geofm.selection.strata import take
from geofm.types import Floats, Indices

Method = Literal[
    "facility-location", "k-centre", "balanced-kmeans", "density", "entropy", "per-tile", "random"
]
#: Chips of one neighbourhood at most: its similarities take 32 MB.
BLOCK_OF = 2048


@dataclass(frozen=True)
class Candidates:
    """What can be chosen: rows of a space, and per row its id and what some methods ask for.

    ``entropy`` (bits) is for ``entropy``, ``tiles`` (e.g. ground regions) for ``per-tile``.
    """

    space: Space
    rows: Indices
    chip_ids: Sequence[str]
    entropy: Floats | None = None
    tiles: Sequence[str] | None = None


@dataclass(frozen=True)
class Choice:
    """Chosen rows of the space, ascending, and the priority of each candidate, as they came."""

    rows: Indices
    priority: Floats


def select(
    candidates: Candidates,
    method: Method,
    count: int,
    strata: Indices | None = None,
    *,
    min_share: float = 0.5,
    equal: bool = False,
    rarity: float = 1.0,
    power: float = 1.0,
    seed: int = 0,
) -> Choice:
    """Choose ``count`` candidates.

    Args:
        candidates: what to choose from.
        method: how, see above.
        count: how many.
        strata: number of each candidate's stratum from 0, see ``strata.divide``; none: one.
        min_share: share of the budget that strata are sure of.
        equal: divide that share equally instead of by size.
        rarity: facility location weighs a chip by its kNN radius to this power; 0: all alike.
        power: of the density, for ``density``.
        seed: of chance and of clustering.

    Raises:
        UsageError: for an unknown method, or one that lacks its input.
    """
    ids = np.array(candidates.chip_ids, dtype=np.str_)
    order = np.argsort(ids, kind="stable")
    rows = candidates.rows[order]
    of = np.zeros(len(rows), dtype=np.int64) if strata is None else strata[order]
    space = candidates.space
    if method in ("facility-location", "k-centre"):
        weight = rarity if method == "facility-location" else None
        priority = _greedy(space, rows, weight, seed)
    elif method == "balanced-kmeans":
        priority = -balanced_rank(space, rows, seed).astype(np.float64)
    elif method == "density":
        priority = _by_chance(ids[order], knn_radius(space, rows, seed=seed) ** power, seed)
    elif method == "entropy":
        priority = np.asarray(_needed(candidates.entropy, method, "entropy"), np.float64)[order]
    elif method == "per-tile":
        tiles = np.array(_needed(candidates.tiles, method, "tiles"), dtype=np.str_)
        _, tile, sizes = np.unique(tiles[order], return_inverse=True, return_counts=True)
        priority = _by_chance(ids[order], 1 / sizes[tile], seed)
    elif method == "random":
        priority = _by_chance(ids[order], np.ones(len(rows)), seed)
    else:
        raise UsageError(f"curate.method is {method}: give one of {', '.join(get_args(Method))}")
    chosen = take(priority, of, count, min_share, equal)
    back = np.empty(len(rows))
    back[order] = priority
    return Choice(np.sort(rows[chosen]), back)


def _needed(given: Any, method: str, name: str) -> Any:
    if given is None:
        raise UsageError(f"curate.method {method} needs the {name} of every candidate")
    return given


def _by_chance(ids: NDArray[np.str_], weights: Floats, seed: int) -> Floats:
    """Weighted sampling without replacement as priorities (Efraimidis and Spirakis 2006).

    Chance is a hash of seed and id, so that a chip's luck does not depend on the others.
    """
    hashed = [hashlib.sha256(f"{seed} select {chip_id}".encode()).digest()[:8] for chip_id in ids]
    uniform = (np.frombuffer(b"".join(hashed), dtype=">u8").astype(np.float64) + 1) / 2.0**64
    return np.asarray(np.log(uniform) / np.maximum(weights, 1e-12))


def _greedy(space: Space, rows: Indices, rarity: float | None, seed: int) -> Floats:
    """Gains in facility location, or how far away each was in farthest first (rarity None)."""
    priority = np.empty(len(rows))
    done = 0
    for mine in neighbourhoods(space, rows, BLOCK_OF, seed):
        worth = similarities(space, rows[mine])
        if rarity is None:
            order, gained = farthest_order(worth, len(mine))
        else:
            order, gained = facility_order(worth, rare_weights(worth, rarity), len(mine))
        priority[mine[order]] = gained
        done += len(mine)
        tick("selection", done, len(rows))
    return priority
