"""The bucket join for the new rows of a pool: all searched pairs that have one, decided exactly.

The few new rows of a cell are compared with everybody there, and those that visit it with those at
home. To read and multiply everybody is most of the work then, so the sketches of the vectors
propose (``sketch.py``): they are a quarter as long, and their products are never below the vectors'
own. They propose the pairs of single rows as well, for the audit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_catalog.progress import tick
from geofm.dedup.edges import Edges
from geofm.dedup.join import decide_pairs, dense_from, exact_pairs, load_factors
from geofm.dedup.matmul import (
    BF16_SUM,
    BFLOAT16,
    COLUMN_STEP,
    ROW_STEP,
    Precision,
    TooManyProposals,
    best_precision,
    near_pairs,
    on_every_core,
    pick,
)
from geofm.dedup.partition import Cells, Frame
from geofm.dedup.sketch import LEAST, LOST, Sketches
from geofm.embeddings.vectors import READ, Space
from geofm.runtime.native import torch
from geofm.types import Indices

#: Cells that a thread searches before another may need the interpreter.
CELLS_AT_ONCE = 64
#: Neighbouring cells that are multiplied at once: few rows cost as much as ``ROW_STEP`` of them.
TOGETHER = 2


@dataclass(frozen=True)
class Factors:
    """What is multiplied in place of all rows' vectors: a pair's product is at least ``least``."""

    values: torch.Tensor
    least: float
    precision: Precision


def factors_of(space: Space, sketches: Sketches, threshold: float) -> Factors:
    """The sketches of all rows [n, WIDTH]; their vectors where there are none [n, 0]."""
    precision = best_precision()
    if not sketches.shape[1] or threshold < LEAST:
        values = load_factors(space, np.arange(len(space)), precision)
        return Factors(values, threshold, precision)
    values = torch.from_numpy(sketches).view(torch.bfloat16)
    if precision == BFLOAT16:
        precision = Precision("bfloat16", BF16_SUM)
    return Factors(values.to(precision.dtype), threshold - LOST, precision)


def pairs_of(
    space: Space, factors: Factors, rows: Indices, threshold: float
) -> tuple[Indices, Indices]:
    """All pairs of some rows with any other, decided exactly: (lower, higher), each once."""
    asked = pick(factors.values, rows, ROW_STEP)

    def work(first: int) -> tuple[Indices, Indices]:
        others = factors.values[first : first + READ]
        shape = (len(rows), len(others))
        i, j = near_pairs(asked, others, factors.least, factors.precision, shape=shape)
        return rows[i], j + first

    proposed = [(rows[:0], rows[:0])]
    if len(rows):
        proposed.extend(on_every_core(work, range(0, len(space), READ)))
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    return exact_pairs(space, left, right, threshold)


def join_new(
    space: Space, frame: Frame, cells: Cells, threshold: float, new: Indices, factors: Factors
) -> Edges | None:
    """Search the pairs of new rows.

    Args:
        space: where the rows are.
        frame: the cells' centroids.
        cells: who is where.
        threshold: least similarity of a pair.
        new: the rows of which each pair has at least one, ascending.
        factors: of all rows (``factors_of``).

    Returns:
        The edges; None where a cell has so many proposals that it may be dense.
    """
    new = new[np.argsort(cells.home[new], kind="stable")]
    # they stay in a core's cache, in the order of homes
    ours, home = pick(factors.values, new, ROW_STEP), cells.home[new]
    is_new = np.zeros(len(cells.home), dtype=np.bool_)  # so small that it stays there too
    is_new[new] = True
    place = np.empty(len(cells.home), dtype=np.int32)
    place[new] = np.arange(len(new), dtype=np.int32)

    def search(numbers: range) -> Iterator[tuple[Indices, Indices]]:
        members = [cells.members(number) for number in numbers]
        homes, visitors = (list(side) for side in zip(*members, strict=True))
        everyone = np.concatenate([*homes, *visitors])
        theirs = pick(factors.values, everyone, COLUMN_STEP, into="everyone")
        of_theirs = np.cumsum([len(some) for some in (*homes, *visitors)])
        most = dense_from(len(everyone), 0)

        def near(mine: torch.Tensor, shape: tuple[int, int]) -> tuple[Indices, Indices, Indices]:
            """What is near each other, and the cell of the latter, counted from the first."""
            some = theirs[: shape[1] + -shape[1] % COLUMN_STEP]
            i, j = near_pairs(mine, some, factors.least, factors.precision, most=most, shape=shape)
            return i, j, np.searchsorted(of_theirs, j, side="right") % len(numbers)

        begin, end = np.searchsorted(home, [numbers[0], numbers[-1] + 1])
        young = ours[begin : end + -(end - begin) % ROW_STEP]  # more come with them: see shape
        i, j, cell = near(young, (end - begin, len(everyone)))
        same = home[begin + i] == numbers[0] + cell
        yield new[begin + i[same]], everyone[j[same]]

        guests = [place[some[is_new.take(some)]] for some in visitors]
        visiting = np.concatenate(guests)
        shape = len(visiting), int(of_theirs[len(numbers) - 1])
        i, j, cell = near(pick(ours, visiting, ROW_STEP, into="guests"), shape)
        same = np.searchsorted(np.cumsum([len(some) for some in guests]), i, side="right") == cell
        yield new[visiting[i[same]]], everyone[j[same]]

    def work(first: int) -> list[tuple[Indices, Indices]]:
        some = range(first, min(first + CELLS_AT_ONCE, frame.count))
        together = [some[at : at + TOGETHER] for at in range(0, len(some), TOGETHER)]
        return [pairs for numbers in together for pairs in search(numbers)]

    proposed = [(new[:0], new[:0])]
    try:
        for found in on_every_core(work, range(0, frame.count, CELLS_AT_ONCE)):
            tick("duplicates of new chips", len(proposed) // 2, frame.count)
            proposed.extend(found)
    except TooManyProposals:
        return None
    left, right = (np.concatenate(side) for side in zip(*proposed, strict=True))
    # a pair of two new rows may come twice, and each comes with itself: both are sorted out here
    return decide_pairs(space, frame, cells, left, right, threshold)
