from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_catalog.errors import RunError
from data_catalog.run import make_job, plan_parts, run_stage, seal, work_parts
from data_catalog.store import open_store
from geofm.config.recipe import RecipeSection
from geofm.dedup import describe
from geofm.dedup.describe import load_descriptors
from geofm.dedup.descriptors import gradient_energy, halve_large, measure, measure_all, shrink
from geofm.dedup.perceptual_hash import orient
from geofm.raster.radiometry import to_unit
from tests.geofm.dedup.synthetic import BANDS, Chip, make_chips, texture


def _chips() -> list[Chip]:
    chips = [Chip(texture(n, size=64)) for n in range(11)]
    chips[3].status = "dropped"
    chips.append(Chip(np.ascontiguousarray(orient(texture(0, size=64), 3))))
    chips.append(Chip(texture(20, size=48, dtype="uint8")))
    chips.append(Chip(np.full((3, 64, 64), 700, dtype=np.uint16)))
    return chips


def test_one_row_and_one_thumbnail_per_usable_chip(store, catalogue):
    chips = _chips()
    art = make_chips(store, chips, per_part=4)
    found = run_stage(describe.STAGE, store, catalogue, {"chips": art}, RecipeSection())
    ids = [chip.chip_id(n) for n, chip in enumerate(chips) if n != 3]
    assert found.table("descriptors.parquet")["chip_id"].tolist() == ids
    assert found.manifest.counts == {"rows_in": 13, "rows_out": 13}
    assert found.manifest.facts == {"thumbnail_px": 64, "constant": 1}
    table, thumbnails = load_descriptors(found, ids[::-1])
    assert table["chip_id"].tolist() == ids[::-1]
    for row, chip_id in enumerate(ids[::-1]):
        number = next(n for n, chip in enumerate(chips) if chip.chip_id(n) == chip_id)
        facts, thumbnail = measure(chips[number].pixels, BANDS, [1e-4] * 3)
        assert (thumbnails[row] == thumbnail).all()
        assert table["entropy"][row] == facts["entropy"]
        assert list(table["band_means"][row]) == facts["band_means"]
        assert bool(table["constant"][row]) == facts["constant"] == (number == 13)
    by_id = table.set_index("chip_id")
    same = by_id.loc[[ids[0], chips[11].chip_id(11)], "hash_canonical"]
    assert same.nunique() == 1
    assert table["hash_canonical"].nunique() == 12
    with pytest.raises(RunError, match="lack 1 of 1 chips"):
        load_descriptors(found, ["nobody"])


def test_moments_and_thumbnail_by_hand():
    pixels = texture(5, size=128)
    pixels[1] //= 2
    facts, thumbnail = measure(pixels, BANDS, [1e-4] * 3)
    unit = to_unit(pixels, [1e-4] * 3).astype(np.float64)
    assert facts["band_means"] == pytest.approx(unit.mean(axis=(1, 2)), rel=1e-5)
    padded = np.pad(unit, ((0, 0), (1, 1), (1, 1)))
    ones = np.pad(np.ones((128, 128)), 1)
    hat = np.outer([1, 3, 3, 1], [1, 3, 3, 1])
    small = np.zeros((3, 64, 64))
    for row, col in np.ndindex(64, 64):
        window = np.s_[..., 2 * row : 2 * row + 4, 2 * col : 2 * col + 4]
        small[:, row, col] = (padded[window] * hat).sum((1, 2)) / (ones[window] * hat).sum()
    flat = small.reshape(3, -1)
    wanted = np.corrcoef(flat)
    assert facts["band_stds"] == pytest.approx(flat.std(axis=1), rel=1e-4)
    assert facts["band_correlation"] == pytest.approx([wanted[0, 1], wanted[0, 2], wanted[1, 2]],
                                                      abs=1e-3)  # fmt: skip
    grey = np.tensordot([0.299, 0.587, 0.114], small, 1)
    assert facts["thumbnail_low"] == pytest.approx(grey.min(), rel=1e-5)
    span = facts["thumbnail_high"] - facts["thumbnail_low"]
    assert np.abs(facts["thumbnail_low"] + thumbnail / 255 * span - grey).max() <= span / 500
    slope = np.tile(np.arange(8.0), (8, 1))
    assert gradient_energy(slope) == 1.0


@pytest.mark.parametrize("size", [16, 48, 64, 100, 128, 256, 384])
def test_a_flat_picture_stays_flat_at_any_size(size):
    flat = np.full((2, size, size), 7, np.float32)
    np.testing.assert_allclose(shrink(flat), np.full((2, 64, 64), 7), rtol=1e-5)
    ramp = np.broadcast_to(np.linspace(0, 1, size, dtype=np.float32)[:, None], (1, size, size))
    small = shrink(np.ascontiguousarray(ramp))
    assert (np.diff(small[0], axis=0) >= -1e-6).all()
    np.testing.assert_allclose(small, shrink(ramp.transpose(0, 2, 1)).transpose(0, 2, 1), atol=0.02)


def test_large_chips_are_halved_first():
    pixels = texture(6, size=256)
    halves = pixels.reshape(3, 128, 2, 128, 2).mean(axis=(2, 4))
    assert (halve_large(pixels) == halves).all()
    assert halve_large(pixels[:, :128, :128]).shape == (3, 128, 128)
    facts, thumbnail = measure(pixels, BANDS, [1e-4] * 3)
    small, same = measure(np.rint(halves).astype(np.uint16), BANDS, [1e-4] * 3)
    assert facts["entropy"] == pytest.approx(small["entropy"], abs=0.05)
    assert np.abs(thumbnail.astype(int) - same).max() <= 1


def test_chips_described_together_are_described_as_each_alone():
    chips = [texture(n, size=256, bands=4) for n in range(5)]
    chips.append(np.full((4, 256, 256), 900, np.uint16))
    chips.append(np.full((4, 256, 256), 65535, np.uint16))
    bands, scale = ["red", "green", "blue", "nir"], [1e-4, 2e-4, 1e-4, 3e-4]
    measured, thumbnails = measure_all(iter(chips), bands, scale)
    rows = [dict(zip(measured, row, strict=True)) for row in zip(*measured.values(), strict=True)]
    assert len(rows) == len(thumbnails) == len(chips)
    for pixels, row, thumbnail in zip(chips, rows, thumbnails, strict=True):
        alone, same = measure(pixels, bands, scale)
        assert row == alone
        assert (thumbnail == same).all()
    assert [row["constant"] for row in rows] == [False] * 5 + [True, True]
    assert rows[-1]["saturation"] == 1 and rows[-2]["saturation"] == 0
    assert rows[-1]["entropy"] == rows[-1]["gradient"] == 0
    assert rows[-1]["band_correlation"] == [0] * 6


def test_bytes_do_not_depend_on_workers_or_order(tmp_path: Path):
    digests = set()
    for workers in (1, 3):
        store = open_store(tmp_path / f"s{workers}")
        inputs = {"chips": make_chips(store, _chips(), per_part=4)}
        job = make_job(describe.STAGE, store, inputs, RecipeSection())
        parts = plan_parts(describe.STAGE, job)
        with ThreadPoolExecutor(workers) as pool:
            calls = [pool.submit(work_parts, describe.STAGE, job, [part]) for part in parts[::-1]]
        assert sum(call.result() for call in calls) == len(parts)
        digests.add(seal(describe.STAGE, job, parts)[0].digest)
    assert len(digests) == 1


def test_no_usable_chip(store, catalogue):
    art = make_chips(store, [Chip(texture(0), status="dropped")])
    found = run_stage(describe.STAGE, store, catalogue, {"chips": art}, RecipeSection())
    assert found.manifest.counts == {"rows_in": 0, "rows_out": 0}
