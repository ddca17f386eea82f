"""The frame of a pool: its centre, and the cells in which near duplicates are searched.

Every vector has a home, the cell of its most similar centroid, and visits the other cells that
begin close to it. A vector's *margin* to another cell is its distance from the plane between the
two centroids; it visits the cells with a margin up to ``margin``. A pair is *searched* when both
have one home or one of them visits the home of the other: a property of the two vectors and the
frame alone, not of the pool around them, its order, or how the work was divided.

Of a pair with homes a and b, the two margins add up to its displacement across the plane between
a and b. No pair at cosine t can have a displacement above its distance sqrt(2 - 2 t), so with
half of that as margin the search is complete (``complete_margin``). In many dimensions the
displacement in one direction is usually far smaller, so the margin is estimated on a sample, at
half of three and a half standard deviations of the displacement. The estimate is too small where
the displacements have heavy tails or lie along the direction in which cells differ (one scene
brighter than another). So the stage ``buckets`` holds it against the pairs of a random sample and
takes the complete margin if it leaves one of them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.dedup.matmul import as_factors, best_precision, multiply, near_pairs, on_every_core
from geofm.dedup.sketch import find_axes
from geofm.embeddings.vectors import BLOCK, Space, take_rows, use_threads
from geofm.runtime.native import faiss, torch
from geofm.types import Floats, Indices

#: Pools up to this size are searched whole: 2 n² d / 2 products, a second or two.
WHOLE_UP_TO = 50_000
#: Vectors per centroid and rounds of k-means; cells per square root of the pool.
SAMPLED, ROUNDS, CELLS = 32, 4, 2.0
#: Centroids closer to each other than this part of the way to the threshold are one.
MERGED = 8
#: Neighbourhoods by which cells are numbered.
NEIGHBOURHOODS = 64
#: Vectors whose neighbours in the sample are looked at, neighbours of each, borders of each.
PROBES, BORDERS = 2000, 8
#: Standard deviations of the displacement of which half is the margin.
DEVIATIONS = 3.5
#: Vectors that the axes of sketches are found from.
AXES_FROM = 4096
#: Rows whose duplicates are searched in the whole pool, fewest and most of them to learn from.
SEARCHED, FEWEST, MOST_SHARES = 512, 30, 20_000
#: Rows assigned at once; how near two products are to be compared in float64.
ROWS, TIE = 1024, 1e-5
#: Squared distance by which float64 may misjudge a pair.
ROUNDING = 4e-12
Units = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """Centre [d]; centroids [cells, d] of unit length (none: searched whole); the margin.

    ``axes`` [WIDTH or 0, d] are those of sketches (``sketch.py``).
    """

    centre: Floats
    centroids: Units
    margin: float
    axes: Units

    @property
    def whole(self) -> bool:
        """Whether the pool is one cell."""
        return len(self.centroids) < 2

    @property
    def count(self) -> int:
        """Number of cells."""
        return max(1, len(self.centroids))

    @cached_property
    def apart(self) -> Units:
        """Distances between centroids [cells, cells]."""
        squared = 2 - 2 * (self.centroids @ self.centroids.T)
        return np.asarray(np.sqrt(np.maximum(squared, 1e-12)), dtype=np.float32)

    @cached_property
    def widest(self) -> Units:
        """Distance of each centroid to the farthest one."""
        return np.asarray(self.apart.max(axis=1))


@dataclass(frozen=True)
class Cells:
    """Where rows are: ``home`` [n] (-1: not searched); visiting rows by cell, then row.

    Those of cell c are ``row[begin[c]:begin[c + 1]]``.
    """

    home: NDArray[np.int32]
    row: NDArray[np.int32]
    begin: Indices

    @property
    def cell(self) -> NDArray[np.int32]:
        """The cell of each visit."""
        return np.repeat(np.arange(len(self.begin) - 1, dtype=np.int32), np.diff(self.begin))

    @cached_property
    def order(self) -> Indices:
        """Rows sorted by home, then row; numbers of 16 bits numpy sorts in linear time."""
        few = self.home.max(initial=0) <= np.iinfo(np.int16).max
        home = self.home.astype(np.int16) if few else self.home
        return np.argsort(home, kind="stable").astype(np.int64)

    def members(self, cell: int) -> tuple[Indices, Indices]:
        """Rows at home in a cell, and rows that visit it."""
        return (
            self.order[self.homes[cell] : self.homes[cell + 1]],
            self.row[self.begin[cell] : self.begin[cell + 1]].astype(np.int64),
        )

    @cached_property
    def homes(self) -> Indices:
        """Where each cell's rows begin in ``order``."""
        sizes = np.bincount(self.home + 1, minlength=len(self.begin))
        return np.cumsum(sizes, dtype=np.int64)


def is_small(rows: int) -> bool:
    """Whether a pool is searched whole: then it has no cells, and nothing to inherit."""
    return rows <= WHOLE_UP_TO


def train_frame(
    space: Space, threshold: float, seed: int = 0, pool: Indices | None = None
) -> Frame:
    """Centroids and margin from a random sample of the pool; no centroids for a small pool.

    Args:
        space: where vectors are compared.
        threshold: from which they are duplicates.
        seed: chooses the sample.
        pool: the rows that are searched, ascending; None for all.
    """
    pool = np.arange(len(space)) if pool is None else pool
    nothing = np.empty((0, space.stored.shape[1]), dtype=np.float32)
    if is_small(len(pool)):
        return Frame(space.centre, nothing, 0.0, nothing)
    use_threads()
    cells = int(CELLS * len(pool) ** 0.5)
    draw = np.random.default_rng([seed, 2])
    rows = pool[np.sort(draw.choice(len(pool), min(cells * SAMPLED, len(pool)), replace=False))]
    sample = Space(take_rows(space.stored, rows), space.centre).block(0, len(rows))
    means = faiss.Kmeans(
        sample.shape[1], cells, niter=ROUNDS, spherical=True, seed=1 + seed % 2**30,
        max_points_per_centroid=SAMPLED, min_points_per_centroid=1,
    )  # fmt: skip
    means.train(sample)
    centroids = _merge(np.asarray(means.centroids), 1 - (1 - threshold) / MERGED)
    axes = _axes(centroids, sample)
    frame = Frame(space.centre, centroids, complete_margin(threshold), axes)
    if frame.whole:
        return Frame(space.centre, nothing, 0.0, nothing)
    spread = _spread(frame, space, sample, pool, threshold, draw)
    widest = complete_margin(threshold)
    return replace(frame, margin=min(1.0, DEVIATIONS * spread) * widest)


def complete_margin(threshold: float) -> float:
    """Compute the margin with which no pair at or above a threshold can be missed.

    ``ROUNDING`` covers what float64 loses of a cosine near 1.
    """
    return float(np.sqrt(max(0.0, 2 - 2 * threshold) + ROUNDING)) / 2


def _merge(centroids: Units, similarity: float) -> Units:
    """Centroids of which no two are as similar: a dense blob is one cell, not hundreds."""
    near = centroids @ centroids.T >= similarity
    kept = np.ones(len(centroids), dtype=np.bool_)
    for number in range(len(centroids)):
        if kept[number]:
            near[number, : number + 1] = False
            kept[near[number]] = False
    return _in_order(np.ascontiguousarray(centroids[kept]))


def _in_order(centroids: Units) -> Units:
    """Centroids numbered so that those near each other have numbers near each other."""
    if len(centroids) < 4 * NEIGHBOURHOODS:
        return centroids
    coarse = faiss.Kmeans(
        centroids.shape[1], NEIGHBOURHOODS, niter=ROUNDS, spherical=True, seed=1,
        min_points_per_centroid=1,
    )  # fmt: skip
    coarse.train(centroids)
    of = (centroids @ np.asarray(coarse.centroids).T).argmax(axis=1)
    return np.ascontiguousarray(centroids[np.argsort(of, kind="stable")])


def _axes(centroids: Units, sample: Units) -> Units:
    """The axes along which vectors differ most from the centroids of their cells."""
    some = sample[:: -(-len(sample) // AXES_FROM)]
    return find_axes(some - centroids[(some @ centroids.T).argmax(axis=1)])


def _spread(
    frame: Frame,
    space: Space,
    sample: Units,
    pool: Indices,
    threshold: float,
    draw: np.random.Generator,
) -> float:
    """Standard deviation of the step between duplicates across a border, as a share of it.

    The larger of two: what the vectors of a cell have apart from their centroid, which is how
    this pool varies; and the steps between true duplicates of some random rows.
    """
    probes = sample[draw.permutation(len(sample))[:PROBES]]
    home = (probes @ frame.centroids.T).argmax(axis=1)
    own = frame.centroids[home]
    rest = probes - np.einsum("ij,ij->i", probes, own)[:, None] * own
    near = np.argsort(frame.apart, axis=1, kind="stable")[:, 1 : 1 + BORDERS]
    shares = [_shares(frame, rest, home, near[home, number]) for number in range(near.shape[1])]
    found = _true_shares(frame, space, pool, threshold, draw)
    known = [part for part in (np.concatenate(shares), found) if len(part) >= FEWEST]
    return max((float(np.sqrt(np.mean(part**2))) for part in known), default=1.0)


def _shares(frame: Frame, step: Units, home: Indices, other: Indices) -> Floats:
    """How much of a step goes across the plane between two cells, -1 to 1."""
    length = np.linalg.norm(step, axis=1)
    across = frame.centroids[home] - frame.centroids[other]
    real = (length > 1e-3) & (home != other)
    unit = across[real] / np.linalg.norm(across[real], axis=1, keepdims=True)
    return np.asarray(np.einsum("ij,ij->i", step[real], unit) / length[real], dtype=np.float64)


def _true_shares(
    frame: Frame,
    space: Space,
    pool: Indices,
    threshold: float,
    draw: np.random.Generator,
) -> Floats:
    """Steps between the duplicates of some random rows, searched in the whole pool."""
    precision = best_precision()
    rows = pool[np.sort(draw.choice(len(pool), min(SEARCHED, len(pool)), replace=False))]
    asked = as_factors(space.exact(rows).astype(np.float32), precision)
    lefts, rights = [], []
    for first in range(0, len(space), BLOCK):
        units = as_factors(space.block(first, min(first + BLOCK, len(space))), precision)
        i, j = near_pairs(asked, units, threshold, precision)
        lefts.append(rows[i])
        rights.append(j + first)
    left, right = np.concatenate(lefts)[:MOST_SHARES], np.concatenate(rights)[:MOST_SHARES]
    x, y = space.exact(left).astype(np.float32), space.exact(right).astype(np.float32)
    real = np.einsum("ij,ij->i", x, y) >= threshold
    x, y = x[real], y[real]
    ours, theirs = x @ frame.centroids.T, y @ frame.centroids.T
    home, other = ours.argmax(axis=1), theirs.argmax(axis=1)
    ours[np.arange(len(home)), home] = -2  # of a pair with one home: across its nearest border
    return _shares(frame, y - x, home, np.where(other == home, ours.argmax(axis=1), other))


def assign(
    frame: Frame,
    space: Space,
    first: int,
    last: int,
    pool: NDArray[np.bool_] | None = None,
) -> Cells:
    """Homes and visits of the rows ``first`` to ``last`` (numbered from ``first``).

    Args:
        frame: the cells.
        space: where the rows are.
        first: row to begin with.
        last: row to end before.
        pool: of all rows, those that are searched; the others have home -1. None for all.
    """
    if frame.whole:
        home = np.zeros(last - first, dtype=np.int32)
        return _only(replace(no_cells(0, 1), home=home), pool, first)
    starts = range(first, last, ROWS)

    def work(start: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        home, row, cell = _assign(frame, space.block(start, min(start + ROWS, last)))
        return home, visit_codes(row + (start - first), cell)

    homes, codes = [], []
    for number, (home, code) in enumerate(on_every_core(work, starts)):
        homes.append(home)
        codes.append(code)
        if number % 64 == 0:
            tick("cells", starts[number] - first, last - first)
    if not homes:
        return no_cells(0, frame.count)
    return _only(sort_cells(np.concatenate(homes), codes, frame.count), pool, first)


def no_cells(rows: int, count: int) -> Cells:
    """``count`` cells in which no row is."""
    return Cells(np.full(rows, -1, np.int32), np.empty(0, np.int32), np.zeros(count + 1, np.int64))


def visit_codes(row: Indices | NDArray[np.int32], cell: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Visits as whole numbers that sort by cell, then row."""
    return (cell.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)


def _only(cells: Cells, pool: NDArray[np.bool_] | None, first: int) -> Cells:
    """Without the rows that are not searched."""
    if pool is None:
        return cells
    mine = pool[first : first + len(cells.home)]
    home = np.where(mine, cells.home, np.int32(-1)).astype(np.int32)
    there = mine[cells.row]
    return keep_visits(replace(cells, home=home), there)


def slice_cells(cells: Cells, first: int, last: int) -> Cells:
    """The visits of some cells, numbered from the first of them."""
    begin = cells.begin[first : last + 1]
    return replace(cells, row=cells.row[begin[0] : begin[-1]], begin=begin - begin[0])


def keep_visits(cells: Cells, there: NDArray[np.bool_]) -> Cells:
    """With some of the visits."""
    kept = np.zeros(len(there) + 1, dtype=np.int64)
    np.cumsum(there, out=kept[1:])
    return replace(cells, row=cells.row[there], begin=kept[cells.begin])


def sort_cells(home: NDArray[np.int32], codes: list[NDArray[np.uint64]], count: int) -> Cells:
    """``count`` cells from homes and visits in any order; empties the list of codes."""
    whole = np.concatenate([np.empty(0, np.uint64), *codes])
    codes.clear()
    whole.sort()
    begin = np.searchsorted(whole, np.arange(count + 1, dtype=np.uint64) << np.uint64(32))
    row = (whole & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return Cells(home, row, begin.astype(np.int64))


def _assign(frame: Frame, units: Units) -> tuple[NDArray[np.int32], Indices, NDArray[np.int32]]:
    """Home of each unit vector, and its visits (row, cell)."""
    products = multiply(torch.from_numpy(units), torch.from_numpy(frame.centroids)).numpy()
    home = products.argmax(axis=1)
    best = products[np.arange(len(home)), home]
    # float32 products are off by less than TIE: no cell within the margin is left out
    margin = np.float32(frame.margin)
    floor = best - (margin * frame.widest[home] + np.float32(2 * TIE))
    row, cell = np.divmod(np.flatnonzero(products >= floor[:, None]), products.shape[1])
    gap = best[row] - products[row, cell]
    tie = (gap <= TIE) & (cell != home[row])
    for number in np.unique(row[tie]):
        among = np.flatnonzero(best[number] - products[number] <= TIE)
        exact = frame.centroids[among].astype(np.float64) @ units[number].astype(np.float64)
        home[number] = among[exact.argmax()]
    near = gap <= margin * frame.apart[home[row], cell] + np.float32(TIE)
    visits = (cell != home[row]) & near
    return home.astype(np.int32), row[visits].astype(np.int64), cell[visits].astype(np.int32)
