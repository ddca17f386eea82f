from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.dedup.perceptual_hash import (
    canonical_hash,
    hamming_distance,
    hash_orientations,
    hash_thumbnails,
    orient,
)

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "25"))


def _picture(seed: int, edge: int = 64) -> np.ndarray:
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(30, 220, (8, 8))
    return np.kron(coarse, np.ones((edge // 8, edge // 8))).astype(np.uint8)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES, deadline=None)
def test_hashes_of_turned_pictures_follow_from_one(seed):
    picture = _picture(seed)
    turned = np.stack([orient(picture, which) for which in range(8)])
    hashes = hash_thumbnails(turned)
    assert (hash_orientations(hashes[:1])[0] == hashes).all()
    assert len(set(canonical_hash(hashes).tolist())) == 1


def test_two_pictures_differ_and_a_flat_one_has_no_hash():
    hashes = hash_thumbnails(np.stack([_picture(1), _picture(2), np.full((64, 64), 9, np.uint8)]))
    assert hamming_distance(hashes[:1], hashes[1:2])[0] > 12
    assert hashes[2] == 0
    assert (hash_orientations(hashes[2:]) == 0).all()
    assert hash_orientations(hashes[:0]).shape == (0, 8)
    assert canonical_hash(hashes[:0]).shape == (0,)


@pytest.mark.parametrize("gain", [0.5, 0.9])
def test_gain_and_offset_leave_the_hash(gain):
    picture = _picture(3)
    other = np.rint(picture * gain + 20).astype(np.uint8)
    assert hamming_distance(*hash_thumbnails(np.stack([picture, other])).reshape(2, 1))[0] <= 2
