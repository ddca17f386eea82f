"""Two exact greedy orders of a group of chips: facility location and farthest first."""

from __future__ import annotations

import numpy as np

from geofm.embeddings.neighbours import NEIGHBOUR
from geofm.embeddings.vectors import QUANTIZED_ONE, EmbeddingSpace, quantize
from geofm.types import Floats, Indices

#: ``rare_weights`` are whole numbers of 1 / ``WEIGHT_STEPS``.
WEIGHT_STEPS = 256


def similarity_matrix(space: EmbeddingSpace, rows: Indices) -> Floats:
    """Compute the similarities of all pairs of rows as whole numbers, shape (n, n).

    Values are in 0..``QUANTIZED_ONE``, with ``QUANTIZED_ONE`` on the diagonal. A negative
    similarity counts as 0.
    """
    vectors = quantize(space, rows)
    similarity = np.clip((vectors @ vectors.T).astype(np.float64), 0, QUANTIZED_ONE)
    np.fill_diagonal(similarity, QUANTIZED_ONE)
    return similarity


def rare_weights(similarity: Floats, rarity: float) -> Floats:
    """Compute the weight of each row: its distance to the 16th nearest, to the power ``rarity``.

    Args:
        similarity: result of ``similarity_matrix``, shape (n, n).
        rarity: exponent; with 0 all weights are equal.

    Returns:
        Weights in whole 256ths, at least 1, shape (n,).
    """
    if rarity == 0:
        return np.ones(len(similarity))
    kth = min(NEIGHBOUR, len(similarity) - 1)  # position 0 is the row itself
    nearest = -np.partition(-similarity, kth, axis=1)[:, kth]
    distance = 1 - nearest / QUANTIZED_ONE
    return np.asarray(np.maximum(np.rint(WEIGHT_STEPS * distance**rarity), 1))


def facility_order(similarity: Floats, weights: Floats, count: int) -> tuple[Indices, Floats]:
    """Order rows by their greedy gain in facility location.

    The value of a set S is f(S) = sum over rows i of weight_i * max over j in S of similarity_ij.
    Each step adds the row with the largest gain; ties go to the lower row. The order is that of
    lazy greedy (Minoux 1978), but all gains are updated after each step. An update is cheap: it
    needs only the rows that are more similar to the new choice than to all earlier choices, and
    these soon are few. All sums are whole numbers below 2**53, so they are exact.

    Args:
        similarity: symmetric whole numbers, shape (n, n).
        weights: whole numbers, shape (n,).
        count: number of choices, at most n.

    Returns:
        Chosen rows, shape (count,); their gains, shape (count,), which never rise.
    """
    gains, served_by = similarity @ weights, np.zeros(len(similarity))
    order, gained = np.empty(count, dtype=np.int64), np.empty(count)
    for number in range(count):
        best = int(gains.argmax())
        order[number], gained[number] = best, gains[best]
        better = np.flatnonzero(similarity[best] > served_by)
        before, after = served_by[better], similarity[best, better]
        # Row j gained max(similarity_ij, before_i) - before_i from row i, and now gains
        # max(similarity_ij, after_i) - after_i.
        lost = similarity[better]
        np.maximum(lost, before[:, None], out=lost)
        np.minimum(lost, after[:, None], out=lost)
        gains -= weights[better] @ lost - weights[better] @ before
        gains[best] = -1
        served_by[better] = after
    return order, gained


def farthest_order(similarity: Floats, count: int) -> tuple[Indices, Floats]:
    """Order rows farthest first: each step takes the row least similar to the chosen rows.

    The order begins with row 0; ties go to the lower row. Source: k-centre greedy, Gonzalez 1985.

    Args:
        similarity: whole numbers, shape (n, n).
        count: number of choices, at most n.

    Returns:
        Chosen rows, shape (count,); distance of each row (``QUANTIZED_ONE`` - similarity) from the
        nearest row chosen before it, shape (count,), ``QUANTIZED_ONE`` for the first.
    """
    order, distance = np.empty(count, dtype=np.int64), np.empty(count)
    nearest = np.zeros(len(similarity))
    for number in range(count):
        best = int(nearest.argmin())
        order[number], distance[number] = best, QUANTIZED_ONE - nearest[best]
        nearest = np.maximum(nearest, similarity[best])
        nearest[best] = 2 * QUANTIZED_ONE  # larger than any similarity: the row is not chosen again
    return order, distance
