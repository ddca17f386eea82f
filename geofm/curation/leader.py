"""The leader rule: who stays when chips are near duplicates of each other.

Chips are taken in one total order, best first. A chip stays unless one that stayed before it is
within the threshold. Unlike connected components, and unlike "drop what resembles any earlier
one", this loses nothing: no two chips that stay are within the threshold, and every chip that
goes has one that stayed within it, its witness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_catalog.errors import CheckError
from geofm.curation.duplicates import Edges, first_true, neighbour_lists
from geofm.curation.space import Floats, Indices


class LeaderRuleBroken(CheckError):
    """The result does not have the two properties that define the rule."""


@dataclass(frozen=True)
class Leaders:
    """Who stays: ``kept`` [n]; for the others ``witness`` (a row, else -1) and ``similarity``."""

    kept: NDArray[np.bool_]
    witness: Indices
    similarity: Floats


def total_order(quality: Floats, chip_ids: list[str]) -> Indices:
    """Rows by quality, best first, then by id."""
    ids = np.array(chip_ids, dtype=np.str_)
    return np.lexsort((ids, -quality)).astype(np.int64)


def choose_leaders(order: Indices, edges: Edges) -> Leaders:
    """Apply the rule to rows in ``order`` (every row once, best first).

    The witness of a dropped row is the most similar of the kept rows within the threshold,
    ties going to the lower row.

    Raises:
        LeaderRuleBroken: when the result lacks one of the two properties (a defect).
    """
    rows = len(order)
    start, target, value = neighbour_lists(edges, rows)
    kept = np.zeros(rows, dtype=np.bool_)
    covered = np.zeros(rows, dtype=np.bool_)
    for row in order:
        if not covered[row]:
            kept[row] = True
            covered[target[start[row] : start[row + 1]]] = True
    place = first_true(start, kept[target])
    dropped = ~kept & (place >= 0)
    witness = np.full(rows, -1, dtype=np.int64)
    similarity = np.full(rows, np.nan)
    witness[dropped] = target[place[dropped]]
    similarity[dropped] = value[place[dropped]]
    leaders = Leaders(kept, witness, similarity)
    check_leaders(leaders, edges)
    return leaders


def check_leaders(leaders: Leaders, edges: Edges) -> None:
    """No two kept rows share an edge; every other row has a kept witness.

    Raises:
        LeaderRuleBroken: naming the first rows that break it.
    """
    both = np.flatnonzero(leaders.kept[edges.left] & leaders.kept[edges.right])
    if len(both):
        pair = int(edges.left[both[0]]), int(edges.right[both[0]])
        raise LeaderRuleBroken(
            f"{len(both)} pairs of kept chips are within the threshold, e.g. rows {pair}; "
            "this is a defect of the curate stage, nothing was published"
        )
    gone = np.flatnonzero(~leaders.kept)
    alone = gone[(leaders.witness[gone] < 0) | ~leaders.kept[leaders.witness[gone]]]
    if len(alone):
        raise LeaderRuleBroken(
            f"{len(alone)} dropped chips have no kept witness, e.g. row {int(alone[0])}; "
            "this is a defect of the curate stage, nothing was published"
        )
