"""The partition of a pool into cells, in which near duplicates are searched.

The cells are those of an inverted file index (IVF; Sivic and Zisserman 2003): each vector *resides*
in the cell of its most similar centroid. Near duplicates may reside on two sides of a border, so a
vector also *visits* each cell whose border is within a margin.

Let a vector x reside in the cell of centroid a, and let b be another centroid. The border between
the two cells is the plane through the origin, normal to n = (a - b) / |a - b|. The distance of x
from it is x·n, and x visits cell b if x·n <= margin. A pair is *covered* by the partition if both
vectors reside in one cell, or one of them visits the other's cell. So coverage depends on the two
vectors and the partition alone, not on the rest of the pool, its order or how the work is divided.

Choice of the margin. If x resides in a and y in b, then x·n >= 0 >= y·n, and the distances of both
from the border add up to (x - y)·n. For cosine t this is at most |x - y| = sqrt(2 - 2 t), so the
smaller of the two distances is at most half of it: with that margin the search is complete
(``complete_margin``). In many dimensions (x - y)·n is usually far smaller than |x - y|. The margin
is therefore estimated from a sample, as half of 3.5 standard deviations of (x - y)·n. The estimate
is too small if the displacements have heavy tails, or lie along the direction in which cells differ
(for example one scene brighter than another). The stage ``buckets`` tests it on the duplicates of a
random sample, and uses the complete margin if the partition does not cover all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.dedup.matmul import (
    as_factors,
    best_precision,
    multiply,
    near_pairs,
)
from geofm.embeddings.vectors import (
    BLOCK,
    PAIRS,
    SHARED_PAIRS,
    EmbeddingSpace,
    take_rows,
    use_all_cores,
)
from geofm.runtime.native import faiss, torch
from geofm.runtime.threads import map_on_cores
from geofm.types import Floats, Floats32, Indices

#: Pools up to this size are searched exhaustively: n² d / 2 products, a second or two.
EXHAUSTIVE_UP_TO = 50_000
#: Cells per square root of the pool's size; sampled vectors per cell, and rounds of k-means.
CELLS, SAMPLED, ROUNDS = 2.0, 32, 4
#: Two centroids are merged if 1 - cosine is at most this part of that of the threshold.
MERGED = 8
#: Groups of centroids by which cells are numbered.
NEIGHBOURHOODS = 64
#: Sampled vectors from which the margin is estimated, and borders that are considered for each.
PROBES, BORDERS = 2000, 8
#: The margin is half of this many standard deviations of the displacement across a border.
DEVIATIONS = 3.5
#: Rows whose duplicates are searched in the whole pool; fewest and most of these to estimate from.
SEARCHED, FEWEST, MOST_SHARES = 512, 30, 20_000
#: Displacements shorter than this have no direction.
SHORTEST_STEP = 1e-3
#: Rows that are assigned at once; products this close are compared again in float64.
ROWS, TIE = 1024, 1e-5
#: Bound on the error of a squared distance that float64 computes from a cosine near 1.
ROUNDING = 4e-12


@dataclass(frozen=True)
class Partition:
    """Cells of a pool.

    Attributes:
        centre: centre of the pool, subtracted from each embedding, shape (d,).
        centroids: unit vectors, shape (cells, d); none if the pool is searched exhaustively.
        margin: largest distance from a border at which a vector visits the cell beyond.
    """

    centre: Floats
    centroids: Floats32
    margin: float

    @property
    def is_single(self) -> bool:
        """Whether the pool is one cell, which is searched exhaustively."""
        return len(self.centroids) < 2

    @property
    def count(self) -> int:
        """Number of cells."""
        return max(1, len(self.centroids))

    @cached_property
    def distances(self) -> Floats32:
        """Distances between centroids, shape (cells, cells)."""
        squared = 2 - 2 * (self.centroids @ self.centroids.T)
        return np.asarray(np.sqrt(np.maximum(squared, 1e-12)), dtype=np.float32)

    @cached_property
    def largest_distance(self) -> Floats32:
        """Distance of each centroid to the farthest other one, shape (cells,)."""
        return np.asarray(self.distances.max(axis=1))


@dataclass(frozen=True)
class Cells:
    """Residents and visitors of each cell.

    Attributes:
        home: cell in which each row resides, shape (n,); -1 for rows that are not searched.
        row: visiting rows by cell, ascending within a cell, shape (visits,).
        begin: start of each cell in ``row``, shape (cells + 1,).
    """

    home: NDArray[np.int32]
    row: NDArray[np.int32]
    begin: Indices

    @property
    def visited(self) -> NDArray[np.int32]:
        """The cell of each visit, shape (visits,)."""
        return np.repeat(np.arange(len(self.begin) - 1, dtype=np.int32), np.diff(self.begin))

    @cached_property
    def _by_home(self) -> Indices:
        """Rows sorted by home, then row. Numpy sorts 16-bit numbers in linear time."""
        fits = self.home.max(initial=0) <= np.iinfo(np.int16).max
        home = self.home.astype(np.int16) if fits else self.home
        return np.argsort(home, kind="stable").astype(np.int64)

    @cached_property
    def _home_begin(self) -> Indices:
        """Start of each cell's residents in ``_by_home``; the rows with home -1 come first."""
        sizes = np.bincount(self.home + 1, minlength=len(self.begin))
        return np.cumsum(sizes, dtype=np.int64)

    def members(self, cell: int) -> tuple[Indices, Indices]:
        """Return the rows that reside in a cell, and the rows that visit it."""
        return (
            self._by_home[self._home_begin[cell] : self._home_begin[cell + 1]],
            self.row[self.begin[cell] : self.begin[cell + 1]].astype(np.int64),
        )


def is_small(rows: int) -> bool:
    """Whether a pool is searched exhaustively: it has no cells, and nothing to inherit."""
    return rows <= EXHAUSTIVE_UP_TO


def complete_margin(threshold: float) -> float:
    """Compute the margin with which no pair at or above a threshold is missed.

    This is half of the distance sqrt(2 - 2 t) between unit vectors of cosine t. ``ROUNDING`` covers
    the error of float64 for a cosine near 1.
    """
    return float(np.sqrt(max(0.0, 2 - 2 * threshold) + ROUNDING)) / 2


# Training: centroids by k-means, then the margin.


def train_partition(
    space: EmbeddingSpace, threshold: float, seed: int = 0, pool: Indices | None = None
) -> Partition:
    """Compute centroids and margin from a random sample of the pool.

    Args:
        space: space in which vectors are compared.
        threshold: similarity from which two vectors are duplicates.
        seed: seed of the sample.
        pool: rows that are searched, ascending; None for all.

    Returns:
        The partition; without centroids for a small pool.
    """
    pool = np.arange(len(space)) if pool is None else pool
    single = Partition(
        space.centre, np.empty((0, space.stored.shape[1]), dtype=np.float32), margin=0.0
    )
    if is_small(len(pool)):
        return single
    use_all_cores()
    cells = int(CELLS * len(pool) ** 0.5)
    draw = np.random.default_rng([seed, 2])
    rows = pool[np.sort(draw.choice(len(pool), min(cells * SAMPLED, len(pool)), replace=False))]
    sample = EmbeddingSpace(take_rows(space.stored, rows), space.centre).unit_block(0, len(rows))
    kmeans = faiss.Kmeans(
        sample.shape[1],
        cells,
        niter=ROUNDS,
        spherical=True,
        seed=1 + seed % 2**30,
        max_points_per_centroid=SAMPLED,
        min_points_per_centroid=1,
    )
    kmeans.train(sample)
    centroids = _merge_near_centroids(np.asarray(kmeans.centroids), 1 - (1 - threshold) / MERGED)
    widest = complete_margin(threshold)
    partition = Partition(space.centre, centroids, widest)
    if partition.is_single:
        return single
    deviation = _displacement_deviation(partition, space, sample, pool, threshold, draw)
    return replace(partition, margin=min(1.0, DEVIATIONS * deviation) * widest)


def _merge_near_centroids(centroids: Floats32, similarity: float) -> Floats32:
    """Keep centroids of which no two are as similar: a dense blob is one cell, not hundreds."""
    near = centroids @ centroids.T >= similarity
    kept = np.ones(len(centroids), dtype=np.bool_)
    for number in range(len(centroids)):
        if kept[number]:
            near[number, : number + 1] = False
            kept[near[number]] = False
    return _number_by_neighbourhood(np.ascontiguousarray(centroids[kept]))


def _number_by_neighbourhood(centroids: Floats32) -> Floats32:
    """Order centroids so that near cells have near numbers: parts then share their vectors."""
    if len(centroids) < 4 * NEIGHBOURHOODS:
        return centroids
    coarse = faiss.Kmeans(
        centroids.shape[1],
        NEIGHBOURHOODS,
        niter=ROUNDS,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
    )
    coarse.train(centroids)
    neighbourhood = (centroids @ np.asarray(coarse.centroids).T).argmax(axis=1)
    return np.ascontiguousarray(centroids[np.argsort(neighbourhood, kind="stable")])


def _displacement_deviation(
    partition: Partition,
    space: EmbeddingSpace,
    sample: Floats32,
    pool: Indices,
    threshold: float,
    draw: np.random.Generator,
) -> float:
    """Estimate the standard deviation of (x - y)·n / |x - y| for duplicates across a border.

    The larger of two estimates: one from the deviations of sampled vectors from their centroid
    (the way in which this pool varies), one from true duplicates of random rows.
    """
    probes = sample[draw.permutation(len(sample))[:PROBES]]
    home = (probes @ partition.centroids.T).argmax(axis=1)
    own = partition.centroids[home]
    deviation = probes - np.einsum("ij,ij->i", probes, own)[:, None] * own
    nearest = np.argsort(partition.distances, axis=1, kind="stable")[:, 1 : 1 + BORDERS]
    within_cells = [
        _shares_across(partition, deviation, home, nearest[home, number])
        for number in range(nearest.shape[1])
    ]
    of_duplicates = _shares_of_duplicates(partition, space, pool, threshold, draw)
    estimates = [
        float(np.sqrt(np.mean(shares**2)))
        for shares in (np.concatenate(within_cells), of_duplicates)
        if len(shares) >= FEWEST
    ]
    return max(estimates, default=1.0)


def _shares_across(partition: Partition, step: Floats32, home: Indices, other: Indices) -> Floats:
    """Compute step·n / |step|, in -1..1, for the border between two cells."""
    length = np.linalg.norm(step, axis=1)
    across = partition.centroids[home] - partition.centroids[other]
    valid = (length > SHORTEST_STEP) & (home != other)
    normal = across[valid] / np.linalg.norm(across[valid], axis=1, keepdims=True)
    shares = np.einsum("ij,ij->i", step[valid], normal) / length[valid]
    return np.asarray(shares, dtype=np.float64)


def _shares_of_duplicates(
    partition: Partition,
    space: EmbeddingSpace,
    pool: Indices,
    threshold: float,
    draw: np.random.Generator,
) -> Floats:
    """Compute the shares of true duplicates: random rows against the whole pool."""
    precision = best_precision()
    rows = pool[np.sort(draw.choice(len(pool), min(SEARCHED, len(pool)), replace=False))]
    queries = as_factors(space.exact_units(rows).astype(np.float32), precision)
    lefts, rights = [], []
    for first in range(0, len(space), BLOCK):
        units = as_factors(space.unit_block(first, min(first + BLOCK, len(space))), precision)
        i, j = near_pairs(queries, units, threshold, precision)
        lefts.append(rows[i])
        rights.append(j + first)
    left, right = np.concatenate(lefts)[:MOST_SHARES], np.concatenate(rights)[:MOST_SHARES]
    x, y = space.exact_units(left).astype(np.float32), space.exact_units(right).astype(np.float32)
    duplicate = np.einsum("ij,ij->i", x, y) >= threshold
    x, y = x[duplicate], y[duplicate]
    x_products, y_products = x @ partition.centroids.T, y @ partition.centroids.T
    home, other = x_products.argmax(axis=1), y_products.argmax(axis=1)
    # a pair that shares its home counts for the nearest border of x
    x_products[np.arange(len(home)), home] = -2
    other = np.where(other == home, x_products.argmax(axis=1), other)
    return _shares_across(partition, y - x, home, other)


# Assignment: the home of each row, and the cells that it visits.


def assign_cells(
    partition: Partition,
    space: EmbeddingSpace,
    first: int,
    last: int,
    pool: NDArray[np.bool_] | None = None,
) -> Cells:
    """Assign the rows ``first`` to ``last`` to cells; they are numbered from ``first``.

    Args:
        partition: cells of the pool.
        space: space of all rows.
        first: first row.
        last: row after the last.
        pool: whether each row of the space is searched; None for all. The home of other rows is -1.
    """
    if partition.is_single:
        home = np.zeros(last - first, dtype=np.int32)
        return _keep_pool(replace(empty_cells(0, 1), home=home), pool, first)
    starts = range(first, last, ROWS)

    def assign_block(start: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        units = space.unit_block(start, min(start + ROWS, last))
        home, row, cell = _assign_units(partition, units)
        return home, visit_keys(row + (start - first), cell)

    homes, keys = [], []
    for number, (home, key) in enumerate(map_on_cores(assign_block, starts)):
        homes.append(home)
        keys.append(key)
        if number % 64 == 0:
            tick("cells", starts[number] - first, last - first)
    if not homes:
        return empty_cells(0, partition.count)
    return _keep_pool(sort_visits(np.concatenate(homes), keys, partition.count), pool, first)


def _assign_units(
    partition: Partition, units: Floats32
) -> tuple[NDArray[np.int32], Indices, NDArray[np.int32]]:
    """Find the home of each unit vector, and the visits as (row, cell)."""
    products = multiply(torch.from_numpy(units), torch.from_numpy(partition.centroids)).numpy()
    home = products.argmax(axis=1)
    best = products[np.arange(len(home)), home]
    # The error of a float32 product is below TIE, so no cell within the margin is left out.
    margin = np.float32(partition.margin)
    floor = best - (margin * partition.largest_distance[home] + np.float32(2 * TIE))
    row, cell = np.divmod(np.flatnonzero(products >= floor[:, None]), products.shape[1])
    gap = best[row] - products[row, cell]
    tie = (gap <= TIE) & (cell != home[row])
    for number in np.unique(row[tie]):
        tied = np.flatnonzero(best[number] - products[number] <= TIE)
        exact = partition.centroids[tied].astype(np.float64) @ units[number].astype(np.float64)
        home[number] = tied[exact.argmax()]
    # x·n <= margin, multiplied by |a - b|
    near = gap <= margin * partition.distances[home[row], cell] + np.float32(TIE)
    visits = (cell != home[row]) & near
    return home.astype(np.int32), row[visits].astype(np.int64), cell[visits].astype(np.int32)


def empty_cells(rows: int, count: int) -> Cells:
    """Make ``count`` cells without residents and visitors."""
    return Cells(np.full(rows, -1, np.int32), np.empty(0, np.int32), np.zeros(count + 1, np.int64))


def visit_keys(row: Indices | NDArray[np.int32], cell: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Encode visits as whole numbers that sort by cell, then row."""
    return (cell.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)


def sort_visits(home: NDArray[np.int32], keys: list[NDArray[np.uint64]], count: int) -> Cells:
    """Make ``count`` cells from homes, and from visits in any order; empties the list of keys."""
    joined = np.concatenate([np.empty(0, np.uint64), *keys])
    keys.clear()
    joined.sort()
    begin = np.searchsorted(joined, np.arange(count + 1, dtype=np.uint64) << np.uint64(32))
    row = (joined & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return Cells(home, row, begin.astype(np.int64))


def _keep_pool(cells: Cells, pool: NDArray[np.bool_] | None, first: int) -> Cells:
    """Remove the rows that are not searched."""
    if pool is None:
        return cells
    searched = pool[first : first + len(cells.home)]
    home = np.where(searched, cells.home, np.int32(-1)).astype(np.int32)
    kept = searched[cells.row]
    kept_before = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept, out=kept_before[1:])
    return Cells(home, cells.row[kept], kept_before[cells.begin])


def is_covered(
    partition: Partition,
    space: EmbeddingSpace,
    home: NDArray[np.int32],
    left: Indices,
    right: Indices,
) -> NDArray[np.bool_]:
    """Tell for pairs of rows whether the partition covers them (see the module's docstring).

    Args:
        partition: cells of the pool.
        space: space of the rows.
        home: cell in which each row of the space resides, shape (n,).
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).
    """
    covered = np.ones(len(left), dtype=np.bool_)
    if partition.is_single:
        return covered
    cross = np.flatnonzero(home[left] != home[right])
    for first in range(0, len(cross), SHARED_PAIRS):
        part = cross[first : first + SHARED_PAIRS]
        both = np.concatenate([left[part], right[part]])
        rows, position = np.unique(both, return_inverse=True)
        units = space.exact_units(rows)  # a row that is in many pairs is converted once
        for begin in range(0, len(part), PAIRS):
            some = np.arange(begin, min(begin + PAIRS, len(part)))
            x, y = left[part[some]], right[part[some]]
            normal = partition.centroids[home[x]].astype(np.float64) - partition.centroids[home[y]]
            normal /= np.sqrt(np.einsum("ij,ij->i", normal, normal))[:, None]
            from_x = np.einsum("ij,ij->i", units[position[some]], normal)
            from_y = -np.einsum("ij,ij->i", units[position[len(part) + some]], normal)
            covered[part[some]] = np.minimum(from_x, from_y) <= partition.margin
    return covered
