from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from geofm.embeddings.clusters import cluster, divide_into_groups, rows_by_label
from geofm.embeddings.vectors import make_space
from geofm.selection.balanced import balanced_rank, in_turn
from tests.geofm.dedup.pools import skewed_pool


def test_clusters_are_the_same_for_any_number_of_threads():
    pool, modes = skewed_pool()
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(cluster(pool.space, pool.rows, 16, seed=3))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
    labels = found[0][0]
    for mode in (0, 1):  # a large mode is not torn into others' clusters
        mine = np.unique(labels[modes == mode])
        assert not np.isin(labels[modes != mode], mine).any()


def test_neighbourhoods_divide_the_rows_and_are_no_larger_than_asked():
    pool, _ = skewed_pool()
    groups = divide_into_groups(pool.space, pool.rows, 50, seed=0)
    assert max(map(len, groups)) <= 50
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(600))
    assert all((np.diff(group) > 0).all() for group in groups)


def test_equal_vectors_are_cut_anyway():
    space = make_space(np.ones((500, 8), dtype=np.float16))
    groups = divide_into_groups(space, np.arange(500), 64, seed=0)
    assert max(map(len, groups)) <= 64
    assert len(np.concatenate(groups)) == 500


def test_members_by_label():
    groups = rows_by_label(np.array([2, 0, 2, 0]), 4)
    assert [group.tolist() for group in groups] == [[1, 3], [], [0, 2], []]


def test_balanced_ranks_take_turns():
    assert in_turn([np.array([5, 6, 7]), np.array([1]), np.array([2, 3])]).tolist() == [
        5, 1, 2, 6, 3, 7
    ]  # fmt: skip
    pool, modes = skewed_pool()
    rank = balanced_rank(pool.space, pool.rows, seed=0)
    first = np.argsort(rank, kind="stable")[:60]
    # two modes hold 5/6 of the pool; a balanced choice gives them far less of the budget
    assert (modes[first] < 2).mean() < 0.7
    assert len(np.unique(modes[first])) >= 10
