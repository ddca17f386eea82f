"""A wrong offset flag is told from dark pixels, and bright scenes tell nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geofm.chips.offset_check import (
    LIMITS,
    MIN_PIXELS,
    Dark,
    OffsetFinding,
    check_offset,
    count_dark,
)

#: Mean reflectance of surfaces in blue, green, red and near infrared.
SURFACES = {
    "forest": (0.025, 0.045, 0.03, 0.32), "water": (0.03, 0.025, 0.012, 0.004),
    "soil": (0.09, 0.13, 0.18, 0.26), "desert": (0.16, 0.24, 0.33, 0.42),
    "snow": (0.85, 0.84, 0.82, 0.75), "cloud": (0.5, 0.5, 0.52, 0.55),
}  # fmt: skip
BANDS = ("blue", "green", "red", "nir")


def scene(shares: dict[str, float], stored_offset: int, seed: int = 0) -> dict[str, Dark]:
    """What is dark in a scene of surfaces, as stored with (1000) or without (0) the offset."""
    draw = np.random.default_rng(seed)
    sizes = {name: round(40_000 * share) for name, share in shares.items()}
    found = {}
    for number, band in enumerate(BANDS):
        parts = [
            draw.normal(SURFACES[name][number], 0.004 + 0.1 * SURFACES[name][number], size)
            for name, size in sizes.items()
        ]
        counts = np.rint(np.concatenate(parts) * 10_000).astype(np.int64) + stored_offset
        stored = np.clip(counts, 1, 65_535).astype(np.uint16)  # 0 is nodata
        found[band] = count_dark(stored[None], np.ones((1, len(stored)), np.bool_))
    return found


def look(found: dict[str, Dark], added: int, baseline: str = "05.00") -> str | None:
    finding = check_offset(found, dict.fromkeys(found, added), baseline)
    return finding.kind if finding else None


MIXES = {
    "forest and water": {"forest": 0.9, "water": 0.1},
    "fields": {"forest": 0.4, "soil": 0.58, "water": 0.02},
    "coast under cloud": {"cloud": 0.6, "water": 0.4},
    "forest": {"forest": 1.0},
    "snow": {"snow": 1.0},
    "desert": {"desert": 1.0},
    "overcast": {"cloud": 1.0},
}


@pytest.mark.parametrize("mix", MIXES)
def test_an_honest_item_is_never_reported(mix: str) -> None:
    assert look(scene(MIXES[mix], 1000), -1000) is None  # in the pixels, to be subtracted
    assert look(scene(MIXES[mix], 0), 0) is None  # gone from the pixels
    assert look(scene(MIXES[mix], 0), 0, "02.14") is None  # never there


@pytest.mark.parametrize(
    ("mix", "twice", "missing"),
    [
        ("forest and water", True, True), ("fields", True, True), ("coast under cloud", True, True),
        ("forest", True, True), ("snow", False, False), ("desert", False, False),
        ("overcast", False, False),
    ],
)  # fmt: skip
def test_a_lie_is_told_where_there_is_dark_ground(mix: str, twice: bool, missing: bool) -> None:
    assert look(scene(MIXES[mix], 0), -1000) == ("offset_twice" if twice else None)
    assert look(scene(MIXES[mix], 1000), 0) == ("offset_missing" if missing else None)


def test_a_finding_names_its_figures() -> None:
    found = check_offset(scene(MIXES["forest"], 0), dict.fromkeys(BANDS, -1000), "05.00")
    assert isinstance(found, OffsetFinding)
    assert "100% of blue lie below 800 counts" in found.detail
    missing = check_offset(scene(MIXES["fields"], 1000), dict.fromkeys(BANDS, 0), "05.09")
    assert missing is not None
    assert missing.detail.startswith("baseline 05.09, and the darkest pixels of")


def test_what_can_not_be_known_is_not_reported() -> None:
    with_offset = scene(MIXES["fields"], 1000)
    assert look(with_offset, 0, "") is None  # no baseline
    assert look(with_offset, 0, "03.01") is None
    assert look({"red": with_offset["red"]}, 0) is None  # one band alone may be a bright one
    assert look({name: dark // 40 for name, dark in with_offset.items()}, 0) is None
    assert (
        look({name: dark // 40 for name, dark in scene(MIXES["forest"], 0).items()}, -1000) is None
    )
    assert check_offset({}, {}, "05.00") is None
    assert look(dict.fromkeys(BANDS, np.zeros(len(LIMITS) + 1, np.int64)), -1000) is None


def test_a_little_noise_below_the_offset_is_legitimate() -> None:
    found = scene(MIXES["forest and water"], 1000)
    # 3 % of edge pixels and over-corrected shadow
    found = {band: dark + int(dark[-1] * 0.03) for band, dark in found.items()}
    assert look(found, -1000) is None
    assert look(found, 0) is None  # then an offset that is missing can't be told any more


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(SURFACES)), st.floats(0.05, 1), min_size=1),
    st.integers(0, 2**32 - 1),
)
def test_no_mixture_of_surfaces_is_reported_when_the_item_is_right(
    shares: dict[str, float], seed: int
) -> None:
    whole = {name: share / sum(shares.values()) for name, share in shares.items()}
    assert look(scene(whole, 1000, seed), -1000) is None
    assert look(scene(whole, 0, seed), 0) is None


def test_what_is_dark_in_strips_adds_up() -> None:
    stored = np.random.default_rng(1).integers(0, 5000, (64, 64)).astype(np.uint16)
    valid = stored > 0
    whole = count_dark(stored, valid)
    strips = [count_dark(stored[a : a + 16], valid[a : a + 16]) for a in range(0, 64, 16)]
    assert np.array_equal(whole, np.sum(strips, axis=0))
    assert whole[-1] == valid.sum()
    assert (whole.shape, whole.dtype) == ((len(LIMITS) + 1,), np.int64)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_each_valid_pixel_below_a_limit_is_counted(dtype: type) -> None:
    span = np.iinfo(dtype)
    stored = np.random.default_rng(2).integers(span.min, span.max, (50, 40), dtype, endpoint=True)
    valid = stored % 3 > 0
    counts = stored[valid].tolist()
    expected = [sum(count < limit for count in counts) for limit in LIMITS]
    assert count_dark(stored, valid).tolist() == [*expected, len(counts)]
    everywhere = np.ones(stored.shape, np.bool_)
    assert count_dark(stored, everywhere)[-1] == stored.size
    assert count_dark(stored, everywhere)[0] == (stored.astype(np.int64) < LIMITS[0]).sum()


def read(path: Path) -> NDArray[np.uint16]:
    with rasterio.open(path) as file:
        return np.asarray(file.read(1))


def dark_of(pixels: NDArray[np.uint16], more: int = 0) -> Dark:
    valid = pixels > 0
    return count_dark(np.where(valid, pixels.astype(np.int64) + more, 0), valid)


def test_real_products_of_baseline_04_hold_their_offset(shared: Path) -> None:
    names = sorted((shared / "data" / "misc_scenes").glob("*_N04.00_R60m_B01.jp2"))
    found = {path.name: dark_of(read(path)) for path in names}
    assert len(found) == 2
    assert look(found, -1000, "04.00") is None
    assert look(found, 0, "04.00") == "offset_missing"
    gone = {path.name: dark_of(read(path), -1000) for path in names}
    assert look(gone, 0, "04.00") is None


def test_no_item_of_the_world_is_reported_and_half_of_the_lies_are(shared: Path) -> None:
    world = shared / "worlds" / "dev"
    twice = with_offset = 0
    for path in sorted((world / "items").glob("*.json")):
        item = json.loads(path.read_text())
        assets = {band: item["assets"][band] for band in ("green", "red", "nir", "swir16")}
        pixels = {band: read(path.parent / asset["href"]) for band, asset in assets.items()}
        found = {band: dark_of(counts) for band, counts in pixels.items()}
        if min(dark[-1] for dark in found.values()) < MIN_PIXELS:
            continue
        added = round(assets["red"]["raster:bands"][0].get("offset", 0) * 10_000)
        if item["properties"].get("earthsearch:boa_offset_applied"):
            added = 0
        assert look(found, added, item["properties"]["s2:processing_baseline"]) is None
        if added:
            with_offset += 1
            continue
        twice += look(found, -1000) == "offset_twice"
        raised = {band: dark_of(counts, 1000) for band, counts in pixels.items()}
        assert look(raised, -1000) is None
    assert with_offset == 3  # as the world's truth has it
    assert twice >= 12
