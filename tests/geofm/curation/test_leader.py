from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.curation.duplicates import Edges, find_edges
from geofm.curation.leader import LeaderRuleBroken, check_leaders, choose_leaders, total_order
from geofm.curation.space import make_space


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
