"""The bucket join: all searched pairs of some cells, at or above a threshold, decided exactly.

A cell's rows are multiplied with each other and with the rows that visit it, tile by tile; what a
tile proposes is decided in float64. Cells are independent: any group of them is a part that can
be worked on anywhere, and the pairs of all groups together are those of the pool.

A cell in which nearly everything is near everything (open water, a snow field) is *dense*: its
pairs are not written down, for they are a square number; the leader rule asks for the few it
needs (see ``leader.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.dedup.edges import Edges, no_edges, sort_edges
from geofm.dedup.matmul import (
    COLUMN_STEP,
    Precision,
    TooManyProposals,
    as_factors,
    best_precision,
    near_pairs,
    on_every_core,
    pick,
)
from geofm.dedup.partition import Cells, Frame
from geofm.embeddings.vectors import BLOCK, READ, Space, take_rows, unit_rows
from geofm.runtime.native import torch
from geofm.types import Indices

#: Rows made units at once: they stay in a core's cache.
IN_CACHE = 1024
#: Pairs of one cell beyond which it may be dense: at least, and per row in it.
DENSE_PAIRS, DENSE_PER_ROW = 1_000_000, 256
#: Rows of a cell that are compared exactly to estimate how many pairs it has.
DENSE_SAMPLE = 256
#: Pairs beyond which a threshold is taken for a mistake (2.4 GB of edges).
MOST_EDGES = 100_000_000


class TooManyPairs(UsageError):
    """The threshold makes nearly everything a duplicate of everything."""


@dataclass(frozen=True)
class Found:
    """What some cells have: edges, and the numbers of cells that are dense."""

    edges: Edges
    dense: list[int]


def join_cells(
    space: Space,
    frame: Frame,
    cells: Cells,
    numbers: Sequence[int],
    threshold: float,
) -> Found:
    """Search the cells with these numbers.

    Args:
        space: where the rows are.
        frame: the cells' centroids.
        cells: who is where.
        numbers: the cells to search.
        threshold: least similarity of a pair.
    """
    precision = best_precision()
    members = [cells.members(number) for number in numbers]
    here = np.zeros(len(space), dtype=np.bool_)
    for pair in members:
        for part in pair:
            here[part] = True
    rows = np.flatnonzero(here)
    factors = load_factors(space, rows, precision)
    place = np.zeros(len(space), dtype=np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)

    def work(at: int) -> tuple[Indices, Indices] | None:
        homes, visitors = members[at]
        return _propose(space, factors, place, homes, visitors, threshold, precision)

    lefts, rights, dense, found = [], [], [], 0
    for at, proposed in enumerate(on_every_core(work, range(len(members)))):
        tick("duplicates", at + 1, len(members), f"{found} proposals")
        if proposed is None:
            dense.append(int(numbers[at]))
            continue
        found += len(proposed[0])
        if found > MOST_EDGES:
            raise too_many(threshold)
        lefts.append(proposed[0])
        rights.append(proposed[1])
    if not lefts:
        return Found(no_edges(), dense)
    edges = decide_pairs(
        space, frame, cells, np.concatenate(lefts), np.concatenate(rights), threshold
    )
    return Found(edges, dense)


def too_many(threshold: float, most: int = MOST_EDGES) -> TooManyPairs:
    """The error that names the remedy."""
    return TooManyPairs(
        f"curate.threshold: more than {most} pairs of chips are at least {threshold} "
        f"similar; raise it (e.g. to {min(1.0, threshold + 0.02):.2f}), or choose fewer "
        "scenes of the same kind"
    )


def load_factors(space: Space, rows: Indices, precision: Precision) -> torch.Tensor:
    """The unit vectors of some rows (ascending) in the type in which they are multiplied."""
    factors = torch.empty((len(rows), space.stored.shape[1]), dtype=precision.dtype)

    def work(first: int) -> None:
        stored = take_rows(space.stored, rows[first : first + READ])
        for begin in range(0, len(stored), IN_CACHE):
            units = unit_rows(stored[begin : begin + IN_CACHE], space.centre)
            place = slice(first + begin, first + begin + len(units))
            factors[place] = as_factors(units, precision)

    for _ in on_every_core(work, range(0, len(rows), READ)):
        pass
    return factors


def _propose(
    space: Space,
    factors: torch.Tensor,
    place: NDArray[np.int32],
    homes: Indices,
    visitors: Indices,
    threshold: float,
    precision: Precision,
) -> tuple[Indices, Indices] | None:
    """Pairs of rows of one cell that may be near; None when the cell is dense."""
    most = dense_from(len(homes), len(visitors))
    ours = pick(factors, place[homes], COLUMN_STEP, into="homes")
    theirs = pick(factors, place[visitors], COLUMN_STEP, into="visitors")
    for limit in (most, MOST_EDGES):
        try:
            i, j = near_pairs(ours, ours, threshold, precision, True, limit, (len(homes),) * 2)
            k, m = near_pairs(
                ours, theirs, threshold, precision, False, limit, (len(homes), len(visitors))
            )
        except TooManyProposals:
            if limit == MOST_EDGES:
                raise too_many(threshold) from None
            if is_dense(space, homes, visitors, threshold):
                return None
        else:
            left = np.concatenate([homes[i], homes[k]])
            return left, np.concatenate([homes[j], visitors[m]])
    return None


def dense_from(homes: int, visitors: int) -> int:
    """How many pairs make a cell of so many rows dense."""
    return max(DENSE_PAIRS, DENSE_PER_ROW * (homes + visitors))


def is_dense(space: Space, homes: Indices, visitors: Indices, threshold: float) -> bool:
    """Whether a cell has more pairs than are written down, estimated exactly on some rows.

    The processor has no say in it: the estimate is in float64, on evenly spaced rows.
    """
    some = homes[np.linspace(0, len(homes) - 1, min(DENSE_SAMPLE, len(homes))).astype(np.int64)]
    asked = space.exact(some)
    near = {0.5: 0, 1.0: 0}
    for weight, rows in ((0.5, homes), (1.0, visitors)):
        for first in range(0, len(rows), BLOCK):
            products = asked @ space.exact(rows[first : first + BLOCK]).T
            near[weight] += int((products >= threshold).sum())
    pairs = sum(weight * count for weight, count in near.items()) * len(homes) / len(some)
    return pairs > dense_from(len(homes), len(visitors))


def decide_pairs(
    space: Space, frame: Frame, cells: Cells, left: Indices, right: Indices, threshold: float
) -> Edges:
    """Of proposed pairs, those that are searched and at or above the threshold, each once."""
    real = left != right
    left, right = np.minimum(left, right)[real], np.maximum(left, right)[real]
    rows, at = np.unique(np.concatenate([left, right]), return_inverse=True)
    stored = np.empty((len(rows), space.stored.shape[1]), dtype=np.float16)

    def read(first: int) -> None:
        stored[first : first + READ] = take_rows(space.stored, rows[first : first + READ])

    for _ in on_every_core(read, range(0, len(rows), READ)):
        pass
    part = Space(stored, space.centre)
    i, j = at[: len(left)], at[len(left) :]
    similarity = np.full(len(left), -1.0)

    def work(first: int) -> None:
        end = min(first + BLOCK, len(left))
        some = np.arange(first, end)[part.may_be(i[first:end], j[first:end], threshold)]
        similarity[some] = part.similarity(i[some], j[some])

    for _ in on_every_core(work, range(0, len(left), BLOCK)):
        pass
    near = similarity >= threshold
    near[near] = searched(part, frame, cells.home[rows], i[near], j[near])
    return sort_edges(left[near], right[near], similarity[near])


def exact_pairs(
    space: Space, left: Indices, right: Indices, threshold: float
) -> tuple[Indices, Indices]:
    """Of proposed pairs, those at or above the threshold: (lower, higher), each once."""
    real = left != right
    low, high = np.minimum(left, right)[real], np.maximum(left, right)[real]
    low, high = np.divmod(np.unique(low * len(space) + high), len(space))
    rows, at = np.unique(np.concatenate([low, high]), return_inverse=True)
    part = Space(take_rows(space.stored, rows), space.centre)
    near = part.similarity(at[: len(low)], at[len(low) :]) >= threshold
    return low[near], high[near]


def searched(
    space: Space, frame: Frame, home: NDArray[np.int32], left: Indices, right: Indices
) -> NDArray[np.bool_]:
    """Which pairs of rows the frame covers: one home, or one within the margin of the other's."""
    inside = np.ones(len(left), dtype=np.bool_)
    if frame.whole:
        return inside
    cross = np.flatnonzero(home[left] != home[right])
    for first in range(0, len(cross), BLOCK):
        some = cross[first : first + BLOCK]
        a, b = left[some], right[some]
        planes = frame.centroids[home[a]].astype(np.float64) - frame.centroids[home[b]]
        planes /= np.sqrt(np.einsum("ij,ij->i", planes, planes))[:, None]
        ours = np.einsum("ij,ij->i", space.exact(a), planes)
        theirs = -np.einsum("ij,ij->i", space.exact(b), planes)
        inside[some] = np.minimum(ours, theirs) <= frame.margin
    return inside


def hidden_pairs(
    space: Space, frame: Frame, cells: Cells, dense: Sequence[int], threshold: float
) -> tuple[Callable[[Indices, Indices], Edges], Indices]:
    """How the leader rule asks for pairs of dense cells, and the rows of those cells.

    The function takes two ascending lists of rows and returns the searched pairs at or above the
    threshold between one and the other that lie in dense cells.
    """
    precision = best_precision()
    members = [cells.members(number) for number in dense]
    everyone = np.unique(np.concatenate([part for pair in members for part in pair]))

    def hidden(left: Indices, right: Indices) -> Edges:
        ours, theirs = load_factors(space, left, precision), load_factors(space, right, precision)
        lefts, rights = [], []
        for homes, visitors in members:
            whole = np.union1d(homes, visitors)
            for a, b in ((homes, whole), (visitors, homes)):
                i, j = np.flatnonzero(np.isin(left, a)), np.flatnonzero(np.isin(right, b))
                if len(i) and len(j):
                    k, m = near_pairs(pick(ours, i), pick(theirs, j), threshold, precision)
                    lefts.append(left[i[k]])
                    rights.append(right[j[m]])
        if not lefts:
            return no_edges()
        return decide_pairs(
            space, frame, cells, np.concatenate(lefts), np.concatenate(rights), threshold
        )

    return hidden, everyone
