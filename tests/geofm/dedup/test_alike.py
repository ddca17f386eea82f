from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, shift

from geofm.dedup import alike
from geofm.dedup.alike import KINDS, NOISY_VIEW, SAME_VIEW, compare_thumbnails
from geofm.dedup.descriptors import measure
from geofm.dedup.perceptual_hash import (
    BUCKET,
    hamming_distance,
    hash_orientations,
    hash_thumbnails,
    near_by_hash,
    orient,
    slice_bits,
)
from tests.geofm.dedup.search import find_alike

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "25"))
SIZE, BANDS, SCALE = 128, ["red", "green", "blue"], [1e-4] * 3


def _ground(seed: int, noise: float = 0.0) -> np.ndarray:
    """Counts [3, 256, 256] with structure of every size, or only a sensor's noise."""
    draw = np.random.default_rng(seed)
    white = draw.normal(size=(256, 256))
    total = sum(width * gaussian_filter(white, width) for width in (1.0, 2.0, 4.0, 8.0, 16.0))
    grey = 900 + 400 * total / total.std() if not noise else np.full((256, 256), 420.0)
    bands = grey[None] * np.array([1.0, 0.8, 0.6])[:, None, None]
    bands = bands + draw.normal(0, noise or 3.0, (3, 256, 256))
    return np.clip(bands, 1, 60_000)


def _cut(ground: np.ndarray, top: int = 64, left: int = 64) -> np.ndarray:
    return np.rint(ground[:, top : top + SIZE, left : left + SIZE]).astype(np.uint16)


def _describe(chips: list[np.ndarray]) -> tuple[pd.DataFrame, np.ndarray]:
    found = [measure(chip, BANDS, SCALE) for chip in chips]
    table, thumbnails = pd.DataFrame([row for row, _ in found]), np.stack([t for _, t in found])
    table["hash"] = hash_thumbnails(thumbnails)
    return table, thumbnails


def _compare(chips: list[np.ndarray], left: list[int], right: list[int]):
    table, thumbnails = _describe(chips)
    return compare_thumbnails(thumbnails, _contrast(table), np.array(left), np.array(right))


def _contrast(table: pd.DataFrame) -> np.ndarray:
    return table[["thumbnail_low", "thumbnail_high"]].to_numpy(np.float32)


@given(st.integers(0, 10_000), st.integers(0, 7), st.integers(-15, 15), st.integers(-15, 15),
       st.floats(0.6, 1.6), st.sampled_from([0.0, 6.0]))  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_turned_shifted_and_brightened_view_is_the_same(seed, which, down, across, gain, noise):
    ground = _ground(seed, noise)
    first, moved = _cut(ground), _cut(ground * gain + 30, 64 + down, 64 + across)
    like = _compare([first, np.ascontiguousarray(orient(moved, which))], [0], [1])
    assert like.similarity[0] > 0.98
    common = (SIZE - abs(down)) * (SIZE - abs(across))
    assert like.iou[0] == pytest.approx(common / (2 * SIZE * SIZE - common), abs=0.08)
    back = [w for w in range(8) if (orient(orient(np.arange(6).reshape(2, 3), which), w)
                                    .tolist() == [[0, 1, 2], [3, 4, 5]])]  # fmt: skip
    assert like.orientation[0] in back


def test_half_a_pixel_and_haze():
    ground = _ground(4)
    half = _cut(np.stack([shift(band, (0.5, -0.5), order=1) for band in ground]))
    ramp = np.linspace(0.85, 0.95, 256)[:, None]
    haze = _cut(ground * ramp + (1 - ramp) * 1700)
    like = _compare([_cut(ground), half, haze], [0, 0, 1], [1, 2, 2])
    assert (like.similarity > 0.98).all()
    assert (np.abs(like.shift) <= 1).all()


def test_other_ground_flat_water_and_negatives_are_not_alike():
    seas = [_cut(_ground(seed, noise=7.0)) for seed in range(4)]
    flat = np.full((3, SIZE, SIZE), 500, np.uint16)
    land = _cut(_ground(9))
    chips = [land, _cut(_ground(10)), *seas, flat, flat + 1, (3000 - land).astype(np.uint16)]
    pairs = [(a, b) for a in range(len(chips)) for b in range(a + 1, len(chips))]
    like = _compare(chips, [a for a, _ in pairs], [b for _, b in pairs])
    assert like.similarity.max() < 0.8
    assert like.similarity[pairs.index((6, 7))] == 0


def _water(seed: int, noise: float = 0.0) -> np.ndarray:
    """Counts [3, 64, 64] of calm water: waves of 9 counts, and noise of a sensor in each band."""
    waves = gaussian_filter(np.random.default_rng(seed).normal(size=(64, 64)), 1.5)
    bands = 300 + 9 * waves / waves.std() + np.zeros((3, 1, 1))
    return bands * 1.03 + np.random.default_rng([seed, 1]).normal(0, noise, bands.shape)


def _whole(counts: np.ndarray) -> np.ndarray:
    return np.rint(counts).astype(np.uint16)


@pytest.mark.parametrize("clean_first", [True, False])
@pytest.mark.parametrize("noise", [7.5, 9.0])
def test_noise_of_a_sensor_is_no_difference_over_calm_water(noise, clean_first, monkeypatch):
    pairs = [[_whole(_water(seed)), _whole(_water(seed, noise))] for seed in range(20)]
    chips = [chip for pair in pairs for chip in (pair if clean_first else pair[::-1])]
    firsts, seconds = list(range(0, 40, 2)), list(range(1, 40, 2))
    assert (_compare(chips, firsts, seconds).similarity >= SAME_VIEW).all()
    assert (_compare(chips, firsts[:-1], seconds[1:]).similarity < NOISY_VIEW).all()
    monkeypatch.setattr(alike, "MOST_NOISE", 0)
    assert (_compare(chips, firsts, seconds).similarity < SAME_VIEW).all()


def test_a_faint_other_pattern_is_a_difference():
    """As large as noise that is none: its contrast is in the band, not in the grain."""
    first, second = _water(1), _water(2)
    both = [_whole(first), _whole(first + 0.28 * (second - second.mean()))]
    similarity = _compare(both, [0, 1], [1, 0]).similarity
    assert ((similarity > NOISY_VIEW) & (similarity < SAME_VIEW - 0.01)).all()


def test_texture_stronger_than_noise_is_a_difference():
    """Rough land, whose white texture is as large a share of the contrast as noise of water."""
    land = 2000 + 40 * (_water(1) - 309)
    other = land + 40 * np.random.default_rng(3).normal(0, 7, land.shape)
    similarity = _compare([_whole(land), _whole(other)], [0], [1]).similarity
    assert NOISY_VIEW < similarity[0] < SAME_VIEW


def test_pairs_do_not_depend_on_their_company():
    chips = [_cut(_ground(seed)) for seed in range(6)]
    left, right = np.triu_indices(6, 1)
    together = _compare(chips, list(left), list(right))
    table, thumbnails = _describe(chips)
    for n in (0, 7, 14):
        alone = compare_thumbnails(thumbnails, _contrast(table), left[n : n + 1], right[n : n + 1])
        assert alone.similarity[0] == together.similarity[n]
        assert (alone.shift[0] == together.shift[n]).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 400))
@settings(max_examples=EXAMPLES, deadline=None)
def test_hash_search_finds_every_pair_within_its_slices(seed, count):
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 2**63, count, dtype=np.uint64)
    for row in range(0, count - 1, 2):  # neighbours: some bits of a turned copy
        one = hash_orientations(hashes[row : row + 1])[0, draw.integers(8)]
        for bit in draw.integers(0, 63, draw.integers(0, 5)):
            one ^= np.uint64(1) << np.uint64(bit)
        hashes[row + 1] = one
    hashes[draw.integers(0, count)] = 0
    left, right = near_by_hash(hashes, bits=12)
    found = set(zip(left.tolist(), right.tolist(), strict=True))
    surely = 64 // slice_bits(count) - 1
    views = hash_orientations(hashes)
    for a in range(count):
        distance = hamming_distance(views[a][:, None], hashes[None, a + 1 :]).min(axis=0)
        for b in np.flatnonzero((distance <= surely) & (hashes[a + 1 :] != 0)) + a + 1:
            assert hashes[a] == 0 or (a, int(b)) in found
    assert all(hamming_distance(views[a], hashes[b]).min() <= 12 and a < b for a, b in found)


def test_a_flood_of_like_hashes_stays_linear():
    hashes = np.concatenate([np.full(900, 5, np.uint64), np.full(900, 7, np.uint64)])
    left, _ = near_by_hash(hashes)
    assert 0 < len(left) <= 1800 * BUCKET * 8


def test_find_alike_names_the_kind():
    ground = [_ground(seed) for seed in range(5)]
    chips = [_cut(g) for g in ground]
    chips += [np.ascontiguousarray(orient(_cut(ground[0]), 5)), _cut(ground[1] * 1.2)]
    chips += [_cut(ground[2], 80, 70), _cut(ground[3], 124, 64), _cut(ground[4], 66, 64)]
    found = find_alike(*_describe(chips))
    kinds = {(a, b): KINDS[k] for a, b, k in zip(found.left, found.right, found.kind, strict=True)}
    # 3 and 8 share too little ground; 4 and 9 are one thumbnail pixel apart
    assert set(kinds) == {(0, 5), (1, 6), (2, 7), (4, 9)}
    assert kinds[0, 5] == "turned"
    assert kinds[1, 6] == kinds[4, 9] == "same view"
    assert kinds[2, 7] == "overlap"
    assert (found.left < found.right).all()
    assert list(zip(found.left, found.right, strict=True)) == sorted(kinds)


def test_nothing_to_compare():
    table, thumbnails = _describe([_cut(_ground(1))])
    assert len(find_alike(table, thumbnails)) == 0
    assert len(find_alike(table[:0], thumbnails[:0])) == 0
