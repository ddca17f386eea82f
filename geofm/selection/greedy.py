"""Two greedy orders of a neighbourhood, exact: facility location and farthest first."""

from __future__ import annotations

import numpy as np

from geofm.embeddings.neighbours import NEIGHBOUR
from geofm.embeddings.vectors import ONE, Space, lattice
from geofm.types import Floats, Indices


def similarities(space: Space, rows: Indices) -> Floats:
    """Similarity of every two rows [n, n] in whole numbers 0..ONE, ONE on the diagonal.

    Below zero counts as zero: a chip is not worse off for one that is unlike it.
    """
    vectors = lattice(space, rows)
    worth = np.clip((vectors @ vectors.T).astype(np.float64), 0, ONE)
    np.fill_diagonal(worth, ONE)
    return worth


def rare_weights(worth: Floats, rarity: float) -> Floats:
    """How much each row counts: its radius to the 16th nearest row to the power ``rarity``.

    Whole 256ths, at least one of them; all the same where ``rarity`` is 0.
    """
    if rarity == 0:
        return np.ones(len(worth))
    kth = min(NEIGHBOUR, len(worth) - 1)  # the row itself comes first
    near = -np.partition(-worth, kth, axis=1)[:, kth]
    return np.asarray(np.maximum(np.rint(256 * (1 - near / ONE) ** rarity), 1))


def facility_order(worth: Floats, weights: Floats, count: int) -> tuple[Indices, Floats]:
    """The greedy order of facility location, and what each choice gained.

    The value of a set is the weighted sum over all rows of the similarity to their most similar
    row in it. Each step takes the row that adds most, ties to the lower. This is the answer of
    lazy greedy (Minoux 1978); but instead of asking again for gains that may be out of date, all
    are kept up to date: a choice changes them only through the rows that it serves better than
    the choices before it, which soon are few. All sums are of whole numbers below 2**53: exact.

    Args:
        worth: symmetric whole numbers [n, n] in 0..ONE, ONE on the diagonal.
        weights: whole numbers, how much each row counts [n].
        count: choices to make, at most n.

    Returns:
        Chosen positions and their gains (never rising), in order.
    """
    gains, reached = worth @ weights, np.zeros(len(worth))
    order, gained = np.empty(count, dtype=np.int64), np.empty(count)
    for number in range(count):
        best = int(gains.argmax())
        order[number], gained[number] = best, gains[best]
        served = np.flatnonzero(worth[best] > reached)
        before, after = reached[served], worth[best, served]
        # what a row adds through one that is served was max(worth, before) − before
        lost = worth[served]
        np.maximum(lost, before[:, None], out=lost)
        np.minimum(lost, after[:, None], out=lost)
        gains -= weights[served] @ lost - weights[served] @ before
        gains[best] = -1
        reached[served] = after
    return order, gained


def farthest_order(worth: Floats, count: int) -> tuple[Indices, Floats]:
    """k-centre greedy (Gonzalez 1985): each step takes the row least like those chosen so far.

    Starts with the first row; ties go to the lower. Returns positions and how far each was from
    the choices before it: ONE − similarity, ONE for the first.
    """
    order, distance = np.empty(count, dtype=np.int64), np.empty(count)
    reached = np.zeros(len(worth))
    for number in range(count):
        best = int(reached.argmin())
        order[number], distance[number] = best, ONE - reached[best]
        reached = np.maximum(reached, worth[best])
        reached[best] = 2 * ONE  # never again, not even after its equals
    return order, distance
