from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely
from shapely.geometry import box

from data_catalog.errors import UsageError
from geofm.shards.split import HOLDOUT, RIM, TRAIN, is_held_out, split_cells
from geofm.shards.stats import BandSums, finish_stats, merge_sums
from tests.geofm.shards.conftest import some_chips

ZONE = "EPSG:32631/32x10m"


def cells(lattice: str, count: int, shift: float = 0.0) -> dict[str, bytes]:
    """A strip of cells of 0.01 degrees."""
    return {
        f"{lattice}/{n}/0": shapely.to_wkb(box(n / 100 + shift, 0, (n + 1) / 100 + shift, 0.01))
        for n in range(count)
    }


def test_the_share_is_held_out_and_a_cells_side_depends_on_no_other():
    strip = cells(ZONE, 2000)
    split = split_cells(list(strip), list(strip.values()), 0.1, seed=3)
    held = [cell for cell, side in split.items() if side == HOLDOUT]
    assert 150 < len(held) < 250
    assert set(split.values()) == {TRAIN, HOLDOUT}
    some = dict(list(strip.items())[500:700])
    again = split_cells(list(some), list(some.values()), 0.1, seed=3)
    assert again == {cell: split[cell] for cell in some}
    assert held == [cell for cell in strip if is_held_out(cell, 0.1, 3)]
    more = split_cells(list(strip), list(strip.values()), 0.2, seed=3)
    assert all(more[cell] == HOLDOUT for cell in held)  # a larger share keeps the smaller one


def test_no_ground_is_on_both_sides_where_lattices_overlap():
    """Cells of another zone, half a cell aside: those that touch held-out ground are neither."""
    ground = {**cells(ZONE, 300), **cells("EPSG:32632/32x10m", 300, shift=0.005)}
    split = split_cells(list(ground), list(ground.values()), 0.1, seed=0)
    areas = {cell: shapely.from_wkb(wkb) for cell, wkb in ground.items()}
    held = shapely.union_all([areas[c] for c, side in split.items() if side == HOLDOUT])
    for cell, side in split.items():
        shared = areas[cell].intersection(held).area / areas[cell].area
        assert side == HOLDOUT or (side == RIM) == (shared > 0.01)
    assert 20 < list(split.values()).count(RIM) < 200


def test_all_dates_of_a_cell_are_on_one_side_and_nothing_is_lost(pack):
    chips = some_chips(60)
    for number, chip in enumerate(chips):
        chip.x = 500_000.0 + 500 * (number // 3)  # 20 cells that overlap: their own lattices
    dataset = pack(chips, holdout=0.2)
    manifest = dataset.manifest
    samples = dataset.table("samples.parquet", ["chip_id", "cell", "split"])
    assert (samples.groupby("cell")["split"].nunique() == 1).all()
    index = dataset.table("index.parquet")
    assert (index["split"] == samples["split"]).all()
    assert all(f"-{row.split}-" in row.shard for row in index.itertuples())
    counts = manifest.counts
    assert counts["train"] + counts["holdout"] == counts["rows_out"] == len(index)
    left_out = pd.read_parquet(dataset.local("left_out.parquet"))
    assert manifest.dropped == {"holdout rim": len(left_out)} != {}
    assert counts["rows_in"] == 60 == len(index) + len(left_out)
    assert "no ground is in both" in dataset.path("README.md").read_text()


def test_a_holdout_of_everything_is_refused(pack):
    with pytest.raises(UsageError, match=r"pack\.holdout lower than 0\.999"):
        pack(some_chips(3), holdout=0.999999)


def test_sums_are_exact_whatever_the_order_and_the_grouping():
    rng = np.random.default_rng(0)
    chips = [rng.integers(0, 2**16, (2, 300, 5), dtype=np.uint16) for _ in range(9)]
    scales = [[1e-4, 2e-4], [1e-4, 3e-4], [1e-4, 2e-4]]
    whole, parts = BandSums(), []
    for number, chip in enumerate(chips):
        whole.add(chip, scales[number % 3], 1.0)
    for start in (6, 0, 3):
        part = BandSums()
        for number in (start + 2, start, start + 1):
            part.add(chips[number], scales[number % 3], 1.0)
        parts.append(part.to_json())
    assert merge_sums(parts).to_json() == whole.to_json()
    assert len(whole.by_factors) == 2
    stats = finish_stats(["a", "b"], "uint16", scales[0], whole)
    units = np.concatenate(
        [chip.reshape(2, -1) * np.array(scales[n % 3])[:, None] / 0.3
         for n, chip in enumerate(chips)], axis=1,
    )  # fmt: skip
    np.testing.assert_allclose(stats["mean"], units.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(stats["std"], units.std(axis=1), rtol=1e-9)
