"""The planet's own downstream task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from shapely.geometry import box

from data_catalog.errors import UsageError
from geofm.planet.labelled import labelled_folder, served_ground
from geofm.planet.scenery.landcover import CLASSES


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("task")
    return labelled_folder(root, ["red", "green", "blue", "nir"], size_px=32, per_class=4)


def test_every_class_has_its_chips(task: Path) -> None:
    card = json.loads((task / "task.json").read_bytes())
    assert card["name"] == "planet"
    assert card["classes"] == list(CLASSES)
    assert card["bands"] == ["red", "green", "blue", "nir"]
    assert card["scale"] == [0.0001] * 4 and card["gsd_m"] == 10
    for name in CLASSES:
        assert len(list((task / name).glob("*.tif"))) == 4
    assert len(card["groups"]) == 4 * len(CLASSES)


def test_chips_are_apart_from_all_scenes_and_from_each_other(task: Path) -> None:
    areas = []
    for path in sorted(task.glob("*/*.tif")):
        with rasterio.open(path) as source:
            assert source.descriptions == ("red", "green", "blue", "nir")
            assert source.shape == (32, 32) and set(source.dtypes) == {"uint16"}
            assert source.tags()["scale"] == "0.0001"
            assert source.crs.to_epsg() == 32631
            assert source.read().min() > 0
            areas.append(box(*source.bounds))
    assert shapely.distance(served_ground(), np.array(areas)).min() > 0
    tree = shapely.STRtree(areas)
    left, right = tree.query(areas, predicate="overlaps")
    assert len(left) == len(right) == 0


def test_the_same_arguments_give_the_same_bytes(task: Path, tmp_path: Path) -> None:
    again = labelled_folder(tmp_path, ["red", "green", "blue", "nir"], size_px=32, per_class=4)
    names = sorted(p.relative_to(task) for p in task.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((task / name).read_bytes() == (again / name).read_bytes() for name in names)
    before = (again / "task.json").stat().st_mtime_ns
    labelled_folder(tmp_path, ["red", "green", "blue", "nir"], size_px=32, per_class=4)
    assert (again / "task.json").stat().st_mtime_ns == before


def test_classes_can_be_told_apart_but_not_trivially(task: Path) -> None:
    means = {
        name: np.mean(
            [rasterio.open(path).read().mean(axis=(1, 2)) for path in (task / name).glob("*.tif")],
            axis=0,
        )
        for name in CLASSES
    }
    nir, red = 3, 0
    assert means["water"][nir] < min(means[n][nir] for n in CLASSES if n != "water")
    assert means["bare"][red] > means["forest"][red] * 1.5


@pytest.mark.parametrize(
    "arguments", [{"bands": ["ultraviolet"]}, {"bands": ["red"], "size_px": 8}]
)
def test_impossible_settings_are_told(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        labelled_folder(tmp_path, **arguments)  # type: ignore[arg-type]
