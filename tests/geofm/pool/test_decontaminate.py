from __future__ import annotations

import json
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from PIL import Image
from pyproj import Geod
from rasterio.errors import NotGeoreferencedWarning
from shapely.geometry import Point, box

from data_catalog.errors import UsageError
from geofm.dedup.descriptors import measure
from geofm.dedup.perceptual_hash import hash_thumbnails, orient
from geofm.embeddings.encoders import features, load_encoder
from geofm.embeddings.images import prepare_chip
from geofm.embeddings.vectors import make_space
from geofm.pool.decontaminate import decontaminate, view_images
from geofm.pool.proximity import near_areas
from geofm.pool.registry import load_registry, read_images, registry_sha256
from tests.geofm.dedup.test_alike import BANDS, _cut, _ground

SCALE = [1 / 3000] * 3


def _folder(root: Path, pictures: dict[str, np.ndarray], areas: list) -> Path:
    """A registry with the set ``bench``: areas and images."""
    (root / "bench").mkdir(parents=True)
    for name, pixels in pictures.items():
        levels = np.clip(pixels / 3000 * 255, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(levels).save(root / "bench" / name)
    frame = gpd.GeoDataFrame({"id": [f"area-{n}" for n in range(len(areas))]}, geometry=areas,
                             crs=4326)  # fmt: skip
    frame.to_file(root / "bench.geojson", driver="GeoJSON")
    return root


def _pool(chips: list[np.ndarray]):
    found = [measure(chip, BANDS, SCALE) for chip in chips]
    table, thumbnails = pd.DataFrame([row for row, _ in found]), np.stack([t for _, t in found])
    table["hash"] = hash_thumbnails(thumbnails)
    return table, thumbnails


def _areas(count: int, lon: float = 10.0) -> np.ndarray:
    return np.array([box(lon + n, 0, lon + n + 0.01, 0.01) for n in range(count)], dtype=object)


def test_each_rule_has_its_witness_and_the_certificate_adds_up(tmp_path):
    grounds = [_ground(seed) for seed in range(12)]
    chips = [_cut(ground) for ground in grounds]
    chips.append(np.full((3, 128, 128), 500, np.uint16))
    leak = np.ascontiguousarray(orient(_cut(grounds[3] * 1.1), 5))
    offset = _cut(grounds[4], 84, 72)
    pictures = {"a.png": leak, "sub.png": offset, "other.png": _cut(_ground(99))}
    registry = load_registry(_folder(tmp_path, pictures, [box(12.02, 0, 12.03, 0.01)]))
    encoder = load_encoder("random:resnet10t", seed=1)
    views = view_images(registry, encoder=encoder, size_px=64)
    vectors = [_embed(encoder, chip) for chip in chips]
    space = make_space(np.stack(vectors))
    table, thumbnails = _pool(chips)
    found = decontaminate(_areas(13), table, thumbnails, space, registry, views,
                          buffer_m=2000, embedding=None)  # fmt: skip
    rows = found.rows.set_index("row")
    assert rows.index.tolist() == [2, 3, 4]
    assert rows.loc[2, ["rule", "set", "witness"]].tolist() == ["eval_footprint", "bench", "area-0"]
    assert rows.loc[2, "distance_m"] == pytest.approx(1113, rel=0.01)
    assert rows.loc[3, ["rule", "witness"]].tolist() == ["eval_pixels", "a.png"]
    assert rows.loc[4, ["rule", "witness"]].tolist() == ["eval_pixels", "sub.png"]
    assert "a.png of the evaluation set bench" in rows.loc[3, "reason"]
    certificate = found.certificate
    assert certificate["chips_checked"] == 13
    assert certificate["removed_by"] == {
        "eval_footprint": 1, "eval_pixels": 2, "eval_embedding": 0
    }  # fmt: skip
    assert certificate["sets"][0]["checked_by"] == ["footprint", "pixels", "embedding"]
    assert certificate["sets"][0]["removed"] == certificate["chips_removed"] == 3
    json.dumps(certificate)
    low = decontaminate(_areas(13), table, thumbnails, space, registry, views, embedding=0.05)
    assert "eval_embedding" in set(low.rows["rule"])
    plain = decontaminate(_areas(13), table, thumbnails, None, registry, views)
    assert plain.rows["row"].tolist() == [3]  # an offset needs an embedding to be proposed
    assert plain.certificate["sets"][0]["checked_by"] == ["footprint", "pixels"]


def _embed(encoder, chip: np.ndarray) -> np.ndarray:
    image = prepare_chip(chip, BANDS, SCALE, encoder, 64)
    return features(encoder, image[None]).numpy()[0].astype(np.float16)


def test_windows_of_a_large_image_find_what_lies_inside(tmp_path):
    ground = _ground(7)
    registry = load_registry(_folder(tmp_path, {"scene.png": ground}, []))
    assert len(view_images(registry)) == 1
    views = view_images(registry, chip_px=128)
    assert len(views) == 9
    assert set(views.ids) == {"scene.png"}
    table, thumbnails = _pool([_cut(ground, 64, 128), _cut(_ground(8))])
    found = decontaminate(_areas(2), table, thumbnails, None, registry, views)
    assert found.rows["row"].tolist() == [0]


@pytest.mark.parametrize(
    ("one", "other", "metres"),
    [
        (box(179.99, 10, 180.0, 10.01), box(-180, 10, -179.99, 10.01), 0),
        (box(179.98, 10, 179.99, 10.01), box(-179.99, 10, -179.98, 10.01), None),
        (box(179.98, 10, 179.99, 10.01), box(180.01, 10, 180.02, 10.01), None),
        (box(10, 89.95, 11, 89.96), box(-170, 89.95, -169, 89.96), None),
        (box(10, 60, 10.01, 60.01), Point(10.05, 60.02), None),
        (box(10, 60, 10.01, 60.01), box(10.005, 60.005, 10.02, 60.02), 0),
        (Point(30, -40), box(29, -41, 31, -39), 0),
    ],
)
def test_distances_are_geodesic_everywhere(one, other, metres):
    if metres is None:
        corners = [np.array(shapely.get_coordinates(area)) for area in (one, other)]
        pairs = [(a, b) for a in corners[0] for b in corners[1]]
        geod = Geod(ellps="WGS84")
        metres = min(geod.inv(*a, *b)[2] for a, b in pairs)
    left, right = (np.array([area], dtype=object) for area in (one, other))
    near = near_areas(left, right, metres * 1.02 + 1)
    assert near.distance_m == pytest.approx([metres], rel=0.02, abs=1)
    assert len(near_areas(right, left, metres * 1.02 + 1).left) == 1
    if metres:
        assert len(near_areas(left, right, metres * 0.97).left) == 0


def test_missing_areas_are_near_to_nothing():
    areas = np.array([None, Point(), box(0, 0, 1, 1)], dtype=object)
    near = near_areas(areas, areas, 1e6)
    assert (near.left.tolist(), near.right.tolist()) == ([2], [2])
    assert len(near_areas(areas[:0], areas, 10).left) == 0


def test_registry_as_yaml_and_its_identity(tmp_path):
    root = _folder(tmp_path / "r", {"a.png": _cut(_ground(1))}, [box(0, 0, 1, 1)])
    file = tmp_path / "registry.yaml"
    file.write_text("sets:\n- {name: bench, footprints: r/bench.geojson, images: r/bench}\n")
    from_yaml, from_folder = load_registry(file), load_registry(root)
    assert registry_sha256(from_yaml) == registry_sha256(from_folder)
    assert [(i, p.shape) for i, p in read_images(from_yaml[0])] == [("a.png", (3, 128, 128))]
    Image.new("RGB", (9, 9)).save(root / "bench" / "b.png")
    assert registry_sha256(load_registry(root)) != registry_sha256(from_yaml)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sets: []", "no evaluation set"),
        ("a: 1", "give a list"),
        ("sets: [{name: x}]", "neither footprints nor images"),
        ("sets: [{name: x, images: nowhere}]", "no folder of images"),
        ("sets: [{name: x, footprints: nowhere.geojson}]", "no footprints in"),
        ("sets: [{name: ../x, images: y}]", "name"),
        ("sets: [{name: x, images: y}, {name: x, images: y}]", "x is listed twice"),
        ("sets: [", "not valid YAML"),
    ],
)
def test_a_bad_registry_says_what_is_wrong(tmp_path, text, problem):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=problem):
        load_registry(file)
    with pytest.raises(UsageError, match="no registry"):
        load_registry(tmp_path / "absent")


def test_rasters_of_any_depth(tmp_path):
    pixels = _cut(_ground(5))
    (tmp_path / "bench").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        for name, count in (("rgb.tif", 3), ("grey.tif", 1)):
            with rasterio.open(tmp_path / "bench" / name, "w", driver="GTiff", count=count,
                               dtype="uint16", height=128, width=128) as file:  # fmt: skip
                file.write(pixels[:count])
    registry = load_registry(tmp_path)
    found = dict(read_images(registry[0]))
    assert (found["rgb.tif"] == pixels).all()
    assert (found["grey.tif"] == pixels[:1]).all()
    views = view_images(registry)
    table, thumbnails = _pool([np.ascontiguousarray(orient(pixels, 2))])
    result = decontaminate(_areas(1), table, thumbnails, None, registry, views)
    assert result.rows["rule"].tolist() == ["eval_pixels"]


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.png").write_text("hello")
    with pytest.raises(UsageError, match=r"a\.png cannot be read as an image"):
        view_images(load_registry(tmp_path))
