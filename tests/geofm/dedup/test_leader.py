from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.dedup import join, leader
from geofm.dedup.edges import Edges, merge_edges, sort_edges
from geofm.dedup.join import dense_pair_search
from geofm.dedup.leader import LeaderRuleBroken, check_leaders, choose_leaders, total_order
from geofm.embeddings.vectors import make_space
from tests.geofm.dedup.search import find_edges, find_pairs

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "40"))


def _space(seed: int, rows: int, spread: float):
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(max(1, rows // 6), 8))
    vectors = centres[draw.integers(0, len(centres), rows)] + draw.normal(0, spread, size=(rows, 8))
    return make_space(vectors.astype(np.float16))


def _brute_leaders(space, order, threshold: float) -> list[int]:
    """The rule in its plainest words."""
    kept: list[int] = []
    for row in order:
        others = np.array(kept, dtype=np.int64)
        mine = np.full(len(kept), row, dtype=np.int64)
        if not (space.similarity(mine, others) >= threshold).any():
            kept.append(int(row))
    return kept


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 60),
    spread=st.sampled_from([0.02, 0.2, 0.6]),
    threshold=st.sampled_from([0.8, 0.95, 0.999]),
)
def test_leader_rule_covers_and_separates_like_brute_force(seed, rows, spread, threshold):
    space = _space(seed, rows, spread)
    edges = find_edges(space, threshold)
    order = np.random.default_rng(seed).permutation(rows)
    leaders = choose_leaders(order, edges)
    kept = np.flatnonzero(leaders.kept)
    assert sorted(_brute_leaders(space, order, threshold)) == kept.tolist()

    everyone = np.arange(rows)
    exact = np.array([space.similarity(everyone, np.full(rows, k)) for k in kept])
    for row in np.flatnonzero(~leaders.kept):
        best = exact[:, row].max()
        assert best >= threshold
        assert leaders.similarity[row] == best
        assert leaders.witness[row] == kept[np.flatnonzero(exact[:, row] == best)[0]]
    for a, row in enumerate(kept):
        assert (np.delete(exact[a][kept], a) < threshold).all(), row


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 50))
def test_result_does_not_depend_on_the_order_of_the_input(seed, rows):
    draw = np.random.default_rng(seed)
    stored = _space(seed, rows, 0.2).stored
    quality = np.round(draw.uniform(size=rows), 1)
    ids = [f"chip{number:03d}" for number in draw.permutation(rows)]

    def kept_ids(shuffle: np.ndarray) -> set[str]:
        # sums in another order may differ in the last bit; similarities are rounded beyond it
        space = make_space(stored[shuffle])
        names = [ids[i] for i in shuffle]
        order = total_order(quality[shuffle], names)
        leaders = choose_leaders(order, find_edges(space, 0.9))
        return {names[i] for i in np.flatnonzero(leaders.kept)}

    assert kept_ids(np.arange(rows)) == kept_ids(draw.permutation(rows))


def _graph(draw: np.random.Generator, rows: int, kind: str) -> Edges:
    """A random graph: sparse, dense, a long chain, or stars."""
    if kind == "chain":
        left, right = np.arange(rows - 1), np.arange(1, rows)
    elif kind == "stars":
        left, right = np.arange(rows) // 7 * 7, np.arange(rows)
    else:
        count = rows * (3 if kind == "sparse" else rows // 4)
        left, right = draw.integers(0, rows, (2, count))
    real = left != right
    shuffle = draw.permutation(rows)
    return sort_edges(shuffle[left[real]], shuffle[right[real]], np.full(int(real.sum()), 0.97))


def _sequential(order: np.ndarray, edges: Edges) -> set[int]:
    """The rule in its plainest words, on a graph."""
    near: dict[int, set[int]] = {int(row): set() for row in order}
    for a, b in zip(edges.left.tolist(), edges.right.tolist(), strict=True):
        near[a].add(b)
        near[b].add(a)
    kept: set[int] = set()
    for row in order.tolist():
        if not near[row] & kept:
            kept.add(row)
    return kept


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    rows=st.integers(2, 120),
    kind=st.sampled_from(["sparse", "dense", "chain", "stars"]),
    pieces=st.integers(1, 8),
    rounds=st.sampled_from([1, 200]),
)
def test_rounds_are_the_sequential_rule_on_any_graph(seed, rows, kind, pieces, rounds):
    draw = np.random.default_rng(seed)
    edges, order = _graph(draw, rows, kind), draw.permutation(rows)
    # edges come from 1 to 8 workers, in any order, some of them twice
    owner = draw.integers(0, pieces, len(edges))
    parts = [
        Edges(edges.left[mine], edges.right[mine], edges.similarity[mine])
        for mine in [draw.permutation(np.flatnonzero(owner == n)) for n in range(pieces)]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leader, "MOST_ROUNDS", rounds)
        leaders = choose_leaders(order, merge_edges([*parts, parts[0]]))
    kept = set(np.flatnonzero(leaders.kept).tolist())
    assert kept == _sequential(order, edges)
    pairs = set(zip(edges.left.tolist(), edges.right.tolist(), strict=True))
    assert not [pair for pair in pairs if kept.issuperset(pair)]
    for row in range(rows):
        if row not in kept:
            other = int(leaders.witness[row])
            assert other in kept
            assert (min(row, other), max(row, other)) in pairs


@settings(max_examples=max(12, EXAMPLES // 4), deadline=None)
@given(seed=st.integers(0, 100_000), rows=st.integers(150, 400), at_once=st.integers(3, 90))
def test_a_dense_cell_gives_the_sequential_answer_without_its_pairs(seed, rows, at_once):
    draw = np.random.default_rng(seed)
    sea = draw.normal(size=8) + draw.normal(0, draw.uniform(0.02, 0.15), (rows - 60, 8))
    vectors = np.concatenate([sea, draw.normal(size=(60, 8))]).astype(np.float16)
    space = make_space(draw.permutation(vectors))
    order = draw.permutation(rows)
    everything = find_edges(space, 0.97)
    expected = choose_leaders(order, everything)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "DENSE_PAIRS", 100)
        patch.setattr(join, "DENSE_PER_ROW", 1)
        patch.setattr(leader, "BLOCK_ROWS", at_once)
        found = find_pairs(space, 0.97)
        search, dense = dense_pair_search(space, found.partition, found.cells, [0], 0.97)
        leaders = choose_leaders(order, found.edges, search, dense)
    if len(everything) > 4 * rows:
        assert found.dense == [0]
    assert leaders.kept.tolist() == expected.kept.tolist()
    assert leaders.witness.tolist() == expected.witness.tolist()
    assert np.array_equal(leaders.similarity, expected.similarity, equal_nan=True)


def test_best_quality_stays_and_ties_go_by_id():
    order = total_order(np.array([0.5, 0.9, 0.9]), ["a", "c", "b"])
    assert order.tolist() == [2, 1, 0]


def test_a_chain_loses_only_its_middle():
    # 0-1 and 1-2 are edges, 0-2 is not: components would keep one, the rule keeps both ends
    edges = Edges(np.array([0, 1]), np.array([1, 2]), np.array([0.96, 0.97]))
    leaders = choose_leaders(np.array([0, 1, 2]), edges)
    assert leaders.kept.tolist() == [True, False, True]
    assert leaders.witness[1] == 2
    assert leaders.similarity[1] == 0.97


def test_broken_results_are_refused():
    edges = Edges(np.array([0]), np.array([1]), np.array([0.99]))
    good = choose_leaders(np.array([0, 1]), edges)
    both = type(good)(np.array([True, True]), good.witness, good.similarity)
    with pytest.raises(LeaderRuleBroken, match="kept chips are within"):
        check_leaders(both, edges)
    alone = type(good)(np.array([True, False]), np.array([-1, -1]), good.similarity)
    with pytest.raises(LeaderRuleBroken, match="no kept witness"):
        check_leaders(alone, edges)
