"""The similarity join: all covered pairs of vectors at or above a threshold, verified in float64.

1. ``join_cells`` multiplies the residents of a cell with each other and with its visitors, tile by
   tile; the products propose pairs (``matmul.py``).
2. ``verify_pairs`` computes the exact similarity of each proposed pair and drops those below the
   threshold or not covered by the partition.

Cells are independent. Any group of cells is a part that can be searched anywhere, and the pairs of
all groups together are those of the pool.

A cell in which nearly everything is near everything (open water, a snow field) is *dense*: it has
too many pairs to list. The leader rule requests those that it needs (``dense_pair_search``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.dedup.edges import Edges, empty_edges, sort_edges
from geofm.dedup.matmul import (
    COLUMN_STEP,
    Precision,
    TooManyProposals,
    as_factors,
    best_precision,
    gather_rows,
    near_pairs,
)
from geofm.dedup.partition import Cells, Partition, is_covered
from geofm.embeddings.vectors import BLOCK, READ_ROWS, EmbeddingSpace, take_rows, unit_rows
from geofm.runtime.native import torch
from geofm.runtime.threads import map_on_cores
from geofm.types import Indices

#: Rows that are converted to unit vectors at once: they stay in the cache of a core.
CONVERTED_ROWS = 1024
#: A cell may be dense if it has more pairs than this, and more than this per row in it.
DENSE_PAIRS, DENSE_PER_ROW = 1_000_000, 256
#: Rows of a cell that are compared exactly to estimate its number of pairs.
DENSE_SAMPLE = 256
#: Number of pairs from which a threshold is taken for a mistake (2.4 GB of edges).
MOST_EDGES = 100_000_000


class TooManyPairs(UsageError):
    """The threshold makes nearly everything a duplicate of everything."""


@dataclass(frozen=True)
class JoinedCells:
    """Result of a join: the edges, and the numbers of the cells that are dense."""

    edges: Edges
    dense: list[int]


@dataclass(frozen=True)
class _Factors:
    """Unit vectors of some rows, ready to be multiplied.

    Attributes:
        values: factors, shape (loaded rows, d).
        position: position of each row of the space in ``values``, shape (n,).
        precision: precision of the factors.
    """

    values: torch.Tensor
    position: NDArray[np.int32]
    precision: Precision

    def gather(self, rows: Indices, step: int, buffer: str) -> torch.Tensor:
        """Copy the factors of some rows into memory of this thread."""
        return gather_rows(self.values, self.position[rows], step, buffer)


def join_cells(
    space: EmbeddingSpace,
    partition: Partition,
    cells: Cells,
    numbers: Sequence[int],
    threshold: float,
) -> JoinedCells:
    """Search the pairs of some cells.

    Args:
        space: space of all rows.
        partition: cells of the pool.
        cells: residents and visitors of each cell.
        numbers: cells to search.
        threshold: least similarity of a pair.

    Raises:
        TooManyPairs: The threshold is so low that the pairs would not fit into memory.
    """
    members = [cells.members(number) for number in numbers]
    factors = _load_members(space, members)

    def propose(at: int) -> tuple[Indices, Indices] | None:
        return _propose_pairs(space, factors, *members[at], threshold)

    lefts, rights, dense, count = [], [], [], 0
    for at, proposed in enumerate(map_on_cores(propose, range(len(members)))):
        tick("duplicates", at + 1, len(members), f"{count} proposals")
        if proposed is None:
            dense.append(int(numbers[at]))
            continue
        count += len(proposed[0])
        if count > MOST_EDGES:
            raise too_many_pairs(threshold)
        lefts.append(proposed[0])
        rights.append(proposed[1])
    if not lefts:
        return JoinedCells(empty_edges(), dense)
    left, right = np.concatenate(lefts), np.concatenate(rights)
    edges = verify_pairs(space, left, right, threshold, partition, cells.home)
    return JoinedCells(edges, dense)


def _load_members(space: EmbeddingSpace, members: list[tuple[Indices, Indices]]) -> _Factors:
    """Load the vectors of all members of some cells, each once."""
    needed = np.zeros(len(space), dtype=np.bool_)
    for residents, visitors in members:
        needed[residents] = True
        needed[visitors] = True
    rows = np.flatnonzero(needed)
    precision = best_precision()
    position = np.zeros(len(space), dtype=np.int32)
    position[rows] = np.arange(len(rows), dtype=np.int32)
    return _Factors(load_factors(space, rows, precision), position, precision)


def load_factors(space: EmbeddingSpace, rows: Indices, precision: Precision) -> torch.Tensor:
    """Load unit vectors of some rows (ascending) as factors, shape (rows, d)."""
    factors = torch.empty((len(rows), space.stored.shape[1]), dtype=precision.dtype)

    def load(first: int) -> None:
        stored = take_rows(space.stored, rows[first : first + READ_ROWS])
        for begin in range(0, len(stored), CONVERTED_ROWS):
            units = unit_rows(stored[begin : begin + CONVERTED_ROWS], space.centre)
            target = slice(first + begin, first + begin + len(units))
            factors[target] = as_factors(units, precision)

    for _ in map_on_cores(load, range(0, len(rows), READ_ROWS)):
        pass
    return factors


def _propose_pairs(
    space: EmbeddingSpace,
    factors: _Factors,
    residents: Indices,
    visitors: Indices,
    threshold: float,
) -> tuple[Indices, Indices] | None:
    """Propose the pairs of one cell; None if the cell is dense."""
    own = factors.gather(residents, COLUMN_STEP, "residents")
    guests = factors.gather(visitors, COLUMN_STEP, "visitors")
    among_own, with_guests = (len(residents),) * 2, (len(residents), len(visitors))
    precision = factors.precision
    for limit in (dense_limit(len(residents), len(visitors)), MOST_EDGES):
        try:
            i, j = near_pairs(own, own, threshold, precision, True, limit, among_own)
            k, m = near_pairs(own, guests, threshold, precision, False, limit, with_guests)
        except TooManyProposals:
            if limit == MOST_EDGES:
                raise too_many_pairs(threshold) from None
            if is_dense(space, residents, visitors, threshold):
                return None
        else:
            left = np.concatenate([residents[i], residents[k]])
            return left, np.concatenate([residents[j], visitors[m]])
    return None


def verify_pairs(
    space: EmbeddingSpace,
    left: Indices,
    right: Indices,
    threshold: float,
    partition: Partition | None = None,
    home: NDArray[np.int32] | None = None,
) -> Edges:
    """Keep the proposed pairs at or above a threshold, each once, with their exact similarity.

    Args:
        space: space of all rows.
        left: rows of the proposed pairs, shape (pairs,); may be repeated in both directions.
        right: rows, shape (pairs,).
        threshold: least similarity.
        partition: cells of the pool: only pairs that it covers are kept. None: all.
        home: cell in which each row of the space resides, with ``partition``.
    """
    distinct = left != right
    left, right = np.minimum(left, right)[distinct], np.maximum(left, right)[distinct]
    rows, position = np.unique(np.concatenate([left, right]), return_inverse=True)
    stored = np.empty((len(rows), space.stored.shape[1]), dtype=np.float16)

    def read(first: int) -> None:
        stored[first : first + READ_ROWS] = take_rows(space.stored, rows[first : first + READ_ROWS])

    for _ in map_on_cores(read, range(0, len(rows), READ_ROWS)):
        pass
    part = EmbeddingSpace(stored, space.centre)
    i, j = position[: len(left)], position[len(left) :]
    similarity = np.full(len(left), -1.0)
    home_of_rows = None if home is None else home[rows]

    def compare(first: int) -> int:
        end = min(first + BLOCK, len(left))
        likely = np.arange(first, end)[part.can_reach(i[first:end], j[first:end], threshold)]
        values = part.similarity(i[likely], j[likely])
        found = likely[values >= threshold]
        similarity[found] = values[values >= threshold]
        if partition is not None and home_of_rows is not None:
            covered = is_covered(partition, part, home_of_rows, i[found], j[found])
            similarity[found[~covered]] = -1.0
        return end

    for end in map_on_cores(compare, range(0, len(left), BLOCK)):
        tick("verifying", end, len(left), "pairs")
    near = similarity >= threshold
    return sort_edges(left[near], right[near], similarity[near])


def dense_limit(residents: int, visitors: int) -> int:
    """Compute the number of pairs from which a cell with so many rows is dense."""
    return max(DENSE_PAIRS, DENSE_PER_ROW * (residents + visitors))


def is_dense(
    space: EmbeddingSpace, residents: Indices, visitors: Indices, threshold: float
) -> bool:
    """Whether a cell has more pairs than are listed, estimated on evenly spaced residents.

    The estimate is in float64, so it does not depend on the processor.
    """
    sample_size = min(DENSE_SAMPLE, len(residents))
    sample = residents[np.linspace(0, len(residents) - 1, sample_size).astype(np.int64)]
    queries = space.exact_units(sample)
    near = {0.5: 0, 1.0: 0}  # by weight: a pair of two residents is counted from both sides
    for weight, rows in ((0.5, residents), (1.0, visitors)):
        for first in range(0, len(rows), BLOCK):
            products = queries @ space.exact_units(rows[first : first + BLOCK]).T
            near[weight] += int((products >= threshold).sum())
    sampled = sum(weight * count for weight, count in near.items())
    return sampled * len(residents) / len(sample) > dense_limit(len(residents), len(visitors))


def dense_pair_search(
    space: EmbeddingSpace,
    partition: Partition,
    cells: Cells,
    dense: Sequence[int],
    threshold: float,
) -> tuple[Callable[[Indices, Indices], Edges], Indices]:
    """Make the search by which the leader rule requests pairs of dense cells.

    Args:
        space: space of all rows.
        partition: cells of the pool.
        cells: residents and visitors of each cell.
        dense: numbers of the dense cells.
        threshold: least similarity of a pair.

    Returns:
        A function, and the rows of all dense cells. The function takes two ascending lists of rows.
        It returns the covered pairs between one list and the other, at or above the threshold, that
        lie in a dense cell.
    """
    precision = best_precision()
    members = [cells.members(number) for number in dense]
    dense_rows = np.unique(np.concatenate([rows for pair in members for rows in pair]))

    def search(left: Indices, right: Indices) -> Edges:
        left_factors = load_factors(space, left, precision)
        right_factors = load_factors(space, right, precision)
        lefts, rights = [], []
        for residents, visitors in members:
            members_of_cell = np.union1d(residents, visitors)
            for own, others in ((residents, members_of_cell), (visitors, residents)):
                i, j = np.flatnonzero(np.isin(left, own)), np.flatnonzero(np.isin(right, others))
                if len(i) and len(j):
                    k, m = near_pairs(
                        gather_rows(left_factors, i),
                        gather_rows(right_factors, j),
                        threshold,
                        precision,
                    )
                    lefts.append(left[i[k]])
                    rights.append(right[j[m]])
        if not lefts:
            return empty_edges()
        proposed = np.concatenate(lefts), np.concatenate(rights)
        return verify_pairs(space, *proposed, threshold, partition, cells.home)

    return search, dense_rows


def too_many_pairs(threshold: float, most: int = MOST_EDGES) -> TooManyPairs:
    """Make the error that names the remedy."""
    return TooManyPairs(
        f"curate.threshold: more than {most} pairs of chips are at least {threshold} "
        f"similar; raise it (e.g. to {min(1.0, threshold + 0.02):.2f}), or choose fewer "
        "scenes of the same kind"
    )
