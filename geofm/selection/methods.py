"""Selection of a number of chips: seven methods behind one interface.

A method gives each candidate a priority. ``strata.take_best`` keeps the best up to the budget,
after each stratum has taken its guaranteed share. So all methods share budgets, quotas, inputs and
the rule for ties (lower chip id), and no result depends on the order of the input or on the number
of threads.

- ``facility-location`` (default): the gain in the sum, over all chips, of the similarity to their
  most similar kept chip, in greedy order (at least 1 - 1/e of the best value; Nemhauser et al.
  1978). Rare chips weigh more (``rarity``).
- ``k-centre``: farthest first (Gonzalez 1985). It favours outliers.
- ``balanced-kmeans``: the same number from each cluster of a hierarchy (Vo et al. 2024).
- ``density``: random, with probability proportional to 1 / density^power, where the density is
  1 / kNN radius.
- ``entropy``: the highest grey-level entropy. It serves comparisons: pure noise has the most.
- ``per-tile``: random, with probability proportional to 1 / number of chips of the same tile.
- ``random``: random, with equal probabilities.

Facility location and k-centre work in groups: clusters of at most 2,048 chips, with all
similarities within a group. So memory and time are linear in the pool. The gains of a greedy order
never rise, so the orders of all groups merge into one by their gains. Strata are quotas on the
merged order; they do not divide the groups. Water of one tile is worth less if water of the next
tile is kept.
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
from geofm.embeddings.clusters import divide_into_groups
from geofm.embeddings.neighbours import knn_radius
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.selection.balanced import balanced_rank
from geofm.selection.greedy import (
    facility_order,
    farthest_order,
    rare_weights,
    similarity_matrix,
)
from geofm.selection.strata import take_best
from geofm.types import Floats, Indices

Method = Literal[
    "facility-location", "k-centre", "balanced-kmeans", "density", "entropy", "per-tile", "random"
]
#: Largest number of chips of a group: its similarities take 32 MB.
GROUP_ROWS = 2048


@dataclass(frozen=True)
class Candidates:
    """Chips to select from.

    Attributes:
        space: space in which chips are compared.
        rows: rows of the space, shape (n,).
        chip_ids: chip id of each row.
        entropy: grey-level entropy (bits) of each row, for ``entropy``.
        tiles: tile of each row, for example its ground region, for ``per-tile``.
    """

    space: EmbeddingSpace
    rows: Indices
    chip_ids: Sequence[str]
    entropy: Floats | None = None
    tiles: Sequence[str] | None = None


@dataclass(frozen=True)
class Selection:
    """Selected rows of the space, ascending, and the priority of each candidate."""

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
) -> Selection:
    """Select ``count`` candidates.

    Args:
        candidates: chips to select from.
        method: method, see the module's docstring.
        count: number of chips to select.
        strata: number of each candidate's stratum, from 0 (``strata.divide_into_strata``); None:
            one stratum.
        min_share: share of the budget that is guaranteed to the strata.
        equal: whether that share is divided equally instead of by size.
        rarity: exponent of a chip's kNN radius, by which facility location weighs it; 0: all equal.
        power: exponent of the density, for ``density``.
        seed: seed of random methods and of the clustering.

    Raises:
        UsageError: The method is unknown, or lacks its input.
    """
    ids = np.array(candidates.chip_ids, dtype=np.str_)
    order = np.argsort(ids, kind="stable")
    rows = candidates.rows[order]
    row_strata = np.zeros(len(rows), dtype=np.int64) if strata is None else strata[order]
    space = candidates.space
    if method == "facility-location":
        priority = _greedy_priority(space, rows, rarity, seed)
    elif method == "k-centre":
        priority = _greedy_priority(space, rows, None, seed)
    elif method == "balanced-kmeans":
        priority = -balanced_rank(space, rows, seed).astype(np.float64)
    elif method == "density":
        weights = knn_radius(space, rows, seed=seed) ** power
        priority = _random_priority(ids[order], weights, seed)
    elif method == "entropy":
        entropy = _require(candidates.entropy, method, "entropy")
        priority = np.asarray(entropy, np.float64)[order]
    elif method == "per-tile":
        tiles = np.array(_require(candidates.tiles, method, "tiles"), dtype=np.str_)
        _, tile, sizes = np.unique(tiles[order], return_inverse=True, return_counts=True)
        priority = _random_priority(ids[order], 1 / sizes[tile], seed)
    elif method == "random":
        priority = _random_priority(ids[order], np.ones(len(rows)), seed)
    else:
        raise UsageError(f"curate.method is {method}: give one of {', '.join(get_args(Method))}")
    taken = take_best(priority, row_strata, count, min_share, equal)
    in_input_order = np.empty(len(rows))
    in_input_order[order] = priority
    return Selection(np.sort(rows[taken]), in_input_order)


def _require(values: Any, method: str, name: str) -> Any:
    """Return an optional column of the candidates.

    Raises:
        UsageError: The candidates lack it.
    """
    if values is None:
        raise UsageError(f"curate.method {method} needs the {name} of every candidate")
    return values


def _random_priority(ids: NDArray[np.str_], weights: Floats, seed: int) -> Floats:
    """Draw priorities for weighted sampling without replacement: log(u) / weight.

    The number u is a hash of seed and chip id, so a chip's number does not depend on other chips.
    Source: Efraimidis and Spirakis 2006.
    """
    digests = [hashlib.sha256(f"{seed} select {chip_id}".encode()).digest()[:8] for chip_id in ids]
    uniform = (np.frombuffer(b"".join(digests), dtype=">u8").astype(np.float64) + 1) / 2.0**64
    return np.asarray(np.log(uniform) / np.maximum(weights, 1e-12))


def _greedy_priority(
    space: EmbeddingSpace, rows: Indices, rarity: float | None, seed: int
) -> Floats:
    """Compute gains in facility location, or distances in farthest first (``rarity`` None)."""
    priority = np.empty(len(rows))
    done = 0
    for group in divide_into_groups(space, rows, GROUP_ROWS, seed):
        similarity = similarity_matrix(space, rows[group])
        if rarity is None:
            order, gained = farthest_order(similarity, len(group))
        else:
            weights = rare_weights(similarity, rarity)
            order, gained = facility_order(similarity, weights, len(group))
        priority[group[order]] = gained
        done += len(group)
        tick("selection", done, len(rows))
    return priority
