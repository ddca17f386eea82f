from __future__ import annotations

import heapq

import numpy as np
import pytest

from geofm.embeddings.vectors import QUANTIZED_ONE, make_space, quantize
from geofm.selection.greedy import facility_order, farthest_order, rare_weights, similarity_matrix
from tests.geofm.dedup.pools import skewed_pool


def _lazy_greedy(worth: list[list[int]], weights: list[int], count: int) -> list[tuple[int, int]]:
    """Lazy greedy with a heap, in Python's whole numbers: the rule as it is written."""
    reached = [0] * len(worth)

    def gain(i: int) -> int:
        return sum(w * max(s - r, 0) for w, s, r in zip(weights, worth[i], reached, strict=True))

    heap = [(-gain(i), i) for i in range(len(worth))]
    heapq.heapify(heap)
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count:
        bound, i = heapq.heappop(heap)
        now = gain(i)
        if now < -bound:
            heapq.heappush(heap, (-now, i))
            continue
        chosen.append((i, now))
        reached = [max(r, s) for r, s in zip(reached, worth[i], strict=True)]
    return chosen


@pytest.mark.parametrize("rarity", [0.0, 1.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_facility_order_is_lazy_greedy_bit_for_bit(seed, rarity):
    pool, _ = skewed_pool(seed)
    rows = np.arange(0, 600, 5)
    worth = similarity_matrix(pool.space, rows)
    weights = rare_weights(worth, rarity)
    order, gained = facility_order(worth, weights, len(rows))
    plain = _lazy_greedy(worth.astype(int).tolist(), weights.astype(int).tolist(), len(rows))
    assert list(zip(order.tolist(), gained.astype(int).tolist(), strict=True)) == plain
    assert (np.diff(gained) <= 0).all()


def test_ties_go_to_the_lower_row():
    twice = np.repeat(np.eye(4), 2, axis=0).astype(np.float16)
    space = make_space(twice)
    rows = np.arange(8)
    worth = similarity_matrix(space, rows)
    order, gained = facility_order(worth, np.ones(8), 8)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert gained[4:].tolist() == [0] * 4
    order, _ = farthest_order(worth, 8)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_farthest_first_is_within_twice_the_best_radius():
    angles = np.deg2rad([0, 2, 4, 90, 92, 180, 182, 184])
    space = make_space(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16))
    order, distance = farthest_order(similarity_matrix(space, np.arange(8)), 8)
    modes = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert sorted(modes[order[:3]].tolist()) == [0, 1, 2]
    assert len(set(order.tolist())) == 8
    assert (np.diff(distance[1:]) <= 0).all()


def test_rare_rows_weigh_more():
    pool, modes = skewed_pool()
    weights = rare_weights(similarity_matrix(pool.space, pool.rows), 1.0)
    assert np.median(weights[modes >= 12]) > 3 * np.median(weights[modes < 2])
    assert set(rare_weights(np.ones((3, 3)), 0.0)) == {1.0}


def test_lattice_products_are_whole_and_close_to_the_exact_similarity():
    pool, _ = skewed_pool()
    vectors = quantize(pool.space, pool.rows)
    products = vectors @ vectors.T
    whole = vectors.astype(np.int64) @ vectors.astype(np.int64).T
    assert np.array_equal(products.astype(np.int64), whole)
    left, right = np.triu_indices(60, 1)
    exact = pool.space.similarity(left.astype(np.int64), right.astype(np.int64))
    assert np.abs(whole[left, right] / QUANTIZED_ONE - exact).max() < 5e-4
