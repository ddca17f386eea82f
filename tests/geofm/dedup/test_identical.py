from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.dedup.certificate import MissedPairs, recall_bound, require_complete
from geofm.dedup.edges import Edges
from geofm.dedup.identical import collapse_groups, collapse_vectors
from geofm.dedup.incremental import match_previous_rows
from geofm.dedup.join import TooManyPairs
from geofm.embeddings.vectors import make_space, nearest_rows
from tests.geofm.dedup.search import audit_edges, find_edges


def _vectors(rows: int = 700, width: int = 48) -> np.ndarray:
    draw = np.random.default_rng(1)
    base = draw.normal(size=(rows // 2, width)) + 3  # a large common part, as real features have
    near = base + draw.normal(0, 0.25, base.shape)
    return np.concatenate([base, near]).astype(np.float16)


def _brute(vectors: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    exact = vectors.astype(np.float64)
    exact = exact - exact.mean(axis=0)
    exact = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    similarity = exact @ exact.T
    left, right = np.nonzero(np.triu(similarity >= threshold, 1))
    return {(int(a), int(b)): similarity[a, b] for a, b in zip(left, right, strict=True)}


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95, 0.97])
def test_edges_are_those_of_brute_force_in_float64(threshold):
    vectors = _vectors()
    edges = find_edges(make_space(vectors), threshold)
    expected = _brute(vectors, threshold)
    assert len(expected) > 5
    pairs = zip(edges.left.tolist(), edges.right.tolist(), strict=True)
    found = dict(zip(pairs, edges.similarity, strict=True))
    assert found.keys() == expected.keys()
    assert all(abs(found[pair] - expected[pair]) < 1e-11 for pair in found)


def test_certificate_of_a_complete_search():
    space = make_space(_vectors())
    edges = find_edges(space, 0.9)
    certificate = audit_edges(space, edges, 0.9, seed=3)
    assert certificate["missed"] == 0
    assert certificate["queries"] == len(space)
    assert certificate["found"] == certificate["pairs"] == len(edges)
    assert certificate["recall_lower_bound"] == pytest.approx(0.01 ** (1 / len(edges)))
    require_complete(certificate)


def test_certificate_finds_a_planted_missing_edge():
    space = make_space(_vectors())
    edges = find_edges(space, 0.9)
    fewer = Edges(edges.left[1:], edges.right[1:], edges.similarity[1:])
    certificate = audit_edges(space, fewer, 0.9, seed=3)
    assert certificate["missed"] == 1
    assert certificate["recall_lower_bound"] < 1
    with pytest.raises(MissedPairs, match="1 of"):
        require_complete(certificate)


def test_recall_bound_is_clopper_pearson():
    assert recall_bound(0, 0) is None
    assert recall_bound(0, 10) == 0.0
    assert recall_bound(299, 299) == pytest.approx(0.01 ** (1 / 299))
    # the bound is the share at which so many finds have a chance of 1 %
    from scipy.stats import binom

    bound = recall_bound(95, 100)
    assert bound is not None
    assert binom.sf(94, 100, bound) == pytest.approx(0.01)


def test_identical_content_collapses_to_the_best():
    order = np.array([2, 0, 3, 1])
    assert collapse_groups(["x", "y", "x", "y"], order).tolist() == [2, 3, 2, 3]


def test_a_flood_of_like_vectors_is_refused_with_a_remedy():
    draw = np.random.default_rng(0)
    vectors = (np.ones((400, 16)) + draw.normal(0, 0.01, (400, 16))).astype(np.float16)
    vectors[:40] = draw.normal(size=(40, 16)) * 5
    with pytest.raises(TooManyPairs, match=r"curate\.threshold"):
        find_edges(make_space(vectors), 0.3, most=1000)


def test_degenerate_pools():
    empty = make_space(np.zeros((0, 8), dtype=np.float16))
    assert len(find_edges(empty, 0.9)) == 0
    assert audit_edges(empty, find_edges(empty, 0.9), 0.9, 0)["pairs"] == 0
    zeros = make_space(np.zeros((3, 8), dtype=np.float16))
    assert len(find_edges(zeros, 0.9)) == 0  # no direction: similar to nothing
    one = np.arange(1, 9, dtype=np.float16)
    same = make_space(np.stack([one, one]))
    assert find_edges(same, 1.0).similarity.tolist() == [1.0]  # small pools are not centred


def test_nearest_is_exact_and_ties_go_to_the_lower_row():
    space = make_space(_vectors(200))
    rows = np.arange(200)
    found, similarity = nearest_rows(space, rows, rows, 3)
    for row in (0, 57, 199):
        exact = space.similarity(np.full(200, row), rows)
        exact[row] = -2
        order = np.lexsort((rows, -exact))[:3]
        assert found[row].tolist() == order.tolist()
        assert similarity[row].tolist() == exact[order].tolist()
    twins = make_space(np.tile(np.arange(1, 5, dtype=np.float16), (4, 1)))
    assert nearest_rows(twins, np.array([3]), np.arange(4), 2)[0].tolist() == [[0, 1]]
    alone, _ = nearest_rows(twins, np.array([2]), np.array([2]), 1)
    assert alone.tolist() == [[-1]]


#: Hashes of which many begin with the same bits, so that they share places in a table.
HASHES = st.builds(lambda high, low: high << 60 | low, st.integers(0, 3), st.integers(0, 20))


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.tuples(HASHES, st.booleans()), unique_by=lambda row: row[0], max_size=40),
    now=st.lists(HASHES, max_size=40),
)
def test_rows_are_matched_as_a_dictionary_would(before, now):
    home = np.array([0 if searched else -1 for _, searched in before], dtype=np.int32)
    known = {value: row for row, (value, searched) in enumerate(before) if searched}
    found = match_previous_rows(
        np.array([value for value, _ in before], dtype=np.uint64),
        home,
        np.array(now, dtype=np.uint64),
    )
    assert found.tolist() == [known.get(value, -1) for value in now]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(HASHES, st.integers(0, 2)), max_size=40))
def test_vectors_collapse_as_a_dictionary_would(rows):
    """Hashes that lie are among them: vectors differ while their hashes do not."""
    first: dict[tuple[int, int], int] = {}
    wanted = [first.setdefault(row, number) for number, row in enumerate(rows)]
    stored = np.array([[value % 21, more] for value, more in rows], dtype=np.float16)
    hashes = np.array([value for value, _ in rows], dtype=np.uint64)
    assert collapse_vectors(stored.reshape(-1, 2), hashes).tolist() == wanted
