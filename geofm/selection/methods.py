"""Select a given number of chips: seven methods with one interface.

A method gives each candidate a priority. ``strata.take_best`` first gives each stratum its
guaranteed share, then fills the rest of the budget with the chips of highest priority. Ties go to
the lower chip id. No result depends on the order of the input or on the number of threads.

- ``facility-location`` (default): greedy choice of the chips that most increase the sum, over all
  chips of the group, of the similarity to the most similar kept chip. Rare chips weigh more
  (``rarity``). Without strata, the sum is at least 1 - 1/e of the best possible sum (Nemhauser et
  al. 1978).
- ``k-centre``: farthest first (Gonzalez 1985). It prefers outliers.
- ``balanced-kmeans``: the same number from each cluster of a hierarchy (Vo et al. 2024).
- ``density``: random, with probability proportional to 1 / density^power, where the density is
  1 / kNN radius.
- ``entropy``: the highest grey-level entropy. It is for comparison only: noise has the highest.
- ``per-tile``: random, with probability proportional to 1 / number of chips of the same tile.
- ``random``: random, with equal probabilities.

Facility location and k-centre divide the pool into groups: clusters of at most 2,048 chips. They
use the similarities within a group only, so memory and time are linear in the pool. The gains of a
greedy order never rise, so the orders of all groups are merged by gain. Strata are quotas on the
merged order and do not divide the groups: a chip of water gains less if similar water of another
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
from geofm.runtime.threads import map_on_cores
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
#: Largest number of chips in a group; the similarities of a group take 32 MiB.
GROUP_ROWS = 2048


@dataclass(frozen=True)
class Candidates:
    """Chips to select from.

    Attributes:
        space: space in which chips are compared.
        rows: rows of the space, shape (n,).
        chip_ids: chip id of each row.
        entropy: grey-level entropy (bits) of each row, for the method ``entropy``.
        tiles: tile of each row, for example its ground region, for the method ``per-tile``.
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
        method: name of the method (see the module's docstring).
        count: number of chips to select.
        strata: number of each candidate's stratum, from 0 (``strata.divide_into_strata``); None:
            one stratum.
        min_share: share of the budget that is guaranteed to the strata.
        equal: whether that share is divided equally instead of by size.
        rarity: exponent of the weight of rare chips in facility location; 0: equal weights.
        power: exponent of the density, for the method ``density``.
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
    """Return an optional column of the candidates that the method needs.

    Raises:
        UsageError: The candidates do not have the column.
    """
    if values is None:
        raise UsageError(f"curate.method {method} needs the {name} of every candidate")
    return values


def _random_priority(ids: NDArray[np.str_], weights: Floats, seed: int) -> Floats:
    """Draw priorities for weighted sampling without replacement: log(u) / weight.

    The number u is a hash of seed and chip id, so it does not depend on other chips.
    Source: Efraimidis and Spirakis 2006.
    """
    digests = [hashlib.sha256(f"{seed} select {chip_id}".encode()).digest()[:8] for chip_id in ids]
    uniform = (np.frombuffer(b"".join(digests), dtype=">u8").astype(np.float64) + 1) / 2.0**64
    return np.asarray(np.log(uniform) / np.maximum(weights, 1e-12))


def _greedy_priority(
    space: EmbeddingSpace, rows: Indices, rarity: float | None, seed: int
) -> Floats:
    """Compute the gains of facility location; if ``rarity`` is None, distances of k-centre."""
    priority = np.empty(len(rows))
    groups = divide_into_groups(space, rows, GROUP_ROWS, seed)

    def order_group(group: Indices) -> tuple[Indices, Floats]:
        similarity = similarity_matrix(space, rows[group])
        if rarity is None:
            return farthest_order(similarity, len(group))
        return facility_order(similarity, rare_weights(similarity, rarity), len(group))

    done = 0
    ordered = map_on_cores(order_group, groups)
    for group, (order, gained) in zip(groups, ordered, strict=True):
        priority[group[order]] = gained
        done += len(group)
        tick("selection", done, len(rows), "chips")
    return priority
