"""Draw the scenes of `scale.py`: large COGs with known copies, in a static catalogue.

Every 25 scenes of 4096 x 4096 pixels (10 m, uint16, red, green and blue) are 22 different ones, two
exact copies of other scenes under other ids and at other places, and one near copy: gain 1.03 and
noise. A different scene has textures of several scales, fields, roads, and 10 % of calm water.
"""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio.shutil import copy
from torch.nn.functional import interpolate

from benchmarks.big_scenes import EPSG, GSD, stac_item

BANDS = ("red", "green", "blue")
EDGE, WEST, NORTH = 4096, 217_600.0, 3_200_000.0
#: Scenes side by side, so that all stay in one UTM zone.
COLUMNS = 13
#: Of each 25 scenes: the last two repeat the first two, and the one before is a near copy.
EVERY, TWINS, NEAR_COPY = 25, {23: 0, 24: 1}, {22: 2}
#: Gain of a near copy, and standard deviation of its noise (counts of 1e-4 reflectance).
GAIN, NOISE = 1.03, 6.0
#: Share of water, its mean counts by band, and the standard deviation of its waves.
WATER, WATER_COUNTS, WAVES = 0.1, (240, 330, 420), 9.0

Picture = NDArray[np.float32]


def original_of(number: int) -> int:
    """Return the scene that this one repeats; itself if it is a different one."""
    first, place = number - number % EVERY, number % EVERY
    return first + {**TWINS, **NEAR_COPY}.get(place, place)


def make_scenes(folder: Path, count: int, seed: int) -> Path:
    """Write the COGs that are missing, and the catalogue of the first ``count`` scenes.

    Returns:
        The collection's file.
    """
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    tasks = [(assets, number, seed) for number in range(count)]
    missing = [task for task in tasks if not _is_drawn(*task[:2])]
    originals = [task for task in missing if original_of(task[1]) == task[1]]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for tasks_of_round in (originals, [task for task in missing if task not in originals]):
            for number in pool.map(_draw, *zip(*tasks_of_round, strict=True)):
                print(f"scene {number} of {count}", flush=True)
    return write_catalogue(folder, list(range(count)))


def write_catalogue(folder: Path, numbers: list[int]) -> Path:
    """Write ``collection.json`` with some of the scenes, and their items."""
    links = [{"rel": "root", "href": "collection.json"}]
    for number in numbers:
        item = _item(number)
        (folder / f"{item['id']}.json").write_text(json.dumps(item))
        links.append({"rel": "item", "href": f"{item['id']}.json"})
    collection = {
        "type": "Collection", "id": "scale", "stac_version": "1.0.0", "license": "CC0-1.0",
        "description": "drawn scenes", "links": links,
        "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]},
                   "temporal": {"interval": [["2020-01-01T00:00:00Z", None]]}},
    }  # fmt: skip
    path = folder / "collection.json"
    path.write_text(json.dumps(collection))
    return path


def scene_id(number: int) -> str:
    """Return the id of a scene's item."""
    return f"scene-{number:04d}"


def _is_drawn(assets: Path, number: int) -> bool:
    return all((assets / f"{scene_id(number)}-{band}.tif").exists() for band in BANDS)


def _draw(assets: Path, number: int, seed: int) -> int:
    """Write the COGs of one scene; the original of a copy is there already."""
    original = original_of(number)
    draw = np.random.default_rng([seed, number])
    if original == number:
        bands = draw_scene(draw)
    else:
        bands = []
        for band in BANDS:
            with rasterio.open(assets / f"{scene_id(original)}-{band}.tif") as file:
                bands.append(file.read(1).astype(np.float32))
        if number % EVERY in NEAR_COPY:
            noise = (draw.standard_normal((EDGE, EDGE), np.float32) * NOISE for _ in BANDS)
            bands = [band * GAIN + grain for band, grain in zip(bands, noise, strict=True)]
    west, north = _corner(number)
    for name, band in zip(BANDS, bands, strict=True):
        counts = np.clip(np.rint(band), 1, 12_000).astype(np.uint16)
        _write_cog(assets / f"{scene_id(number)}-{name}.tif", counts, west, north)
    return number


def draw_scene(draw: np.random.Generator) -> list[Picture]:
    """Draw the bands of a scene, in counts of 1e-4 reflectance."""
    torch.set_num_threads(1)
    relief = _noise(draw, 512) + 0.5 * _noise(draw, 128)
    # each scale of the texture is strong in some places and weak in others, so that places differ
    texture = np.zeros((EDGE, EDGE), np.float32)
    for scale_px, strength in ((2, 30.0), (4, 45.0), (9, 60.0), (20, 80.0), (45, 90.0)):
        texture += _noise(draw, scale_px) * strength * np.exp(0.9 * _noise(draw, 180))
    field, kind = _fields(draw)
    farmed = _noise(draw, 384) > 0
    water = relief <= np.quantile(relief[::8, ::8], WATER)
    roads = _roads(draw)
    bands = []
    for number, level in enumerate((900.0, 1000.0, 700.0)):
        tint = draw.uniform(-350, 350, 64)[kind].astype(np.float32)
        soil = level + 160 * _noise(draw, 150) + relief * 60
        land = soil + texture * (1 - 0.1 * number)
        land = np.where(farmed, soil + 200 + tint + field * 60 + texture * 0.5, land)
        land = np.where(roads, 1900.0 - 120 * number, land)
        waves = WATER_COUNTS[number] + WAVES * _noise(draw, 3)
        bands.append(np.where(water, waves, np.maximum(land, 60)).astype(np.float32))
    return bands


def _noise(draw: np.random.Generator, scale_px: int) -> Picture:
    """Draw smooth noise of unit variance whose grains are about ``scale_px`` wide."""
    edge = EDGE // scale_px + 3
    grains = torch.from_numpy(draw.standard_normal((1, 1, edge, edge), np.float32))
    size = edge * scale_px
    picture = interpolate(grains, (size, size), mode="bicubic")[0, 0, :EDGE, :EDGE].numpy()
    return np.asarray(picture / picture[::16, ::16].std(), dtype=np.float32)


def _fields(draw: np.random.Generator) -> tuple[Picture, NDArray[np.int64]]:
    """Draw fields: the furrows of each pixel's field, and the number of its crop, 0..63.

    Fields are rectangles, turned by another angle in each square of 512 pixels.
    """
    furrow = np.empty((EDGE, EDGE), np.float32)
    kind = np.empty((EDGE, EDGE), np.int64)
    square = 512
    down, right = np.mgrid[:square, :square].astype(np.float32)
    for top in range(0, EDGE, square):
        for left in range(0, EDGE, square):
            angle, width, length = draw.uniform(0, np.pi), *draw.uniform((10, 20), (40, 90))
            along = right * np.float32(np.cos(angle)) + down * np.float32(np.sin(angle))
            across = down * np.float32(np.cos(angle)) - right * np.float32(np.sin(angle))
            column = np.floor(across / np.float32(width)).astype(np.int64)
            row = np.floor(along / np.float32(length) + 0.37 * column).astype(np.int64)
            crop = (column * 7_919 + row * 104_729 + int(draw.integers(1 << 20))) % 1_009
            inside = (slice(top, top + square), slice(left, left + square))
            kind[inside] = crop % 64
            period = draw.uniform(3, 8)
            furrow[inside] = np.sin(across * np.float32(2 * np.pi / period) + crop)
    return furrow, kind


def _roads(draw: np.random.Generator) -> NDArray[np.bool_]:
    """Draw 40 straight roads, one to three pixels wide."""
    roads = np.zeros((EDGE, EDGE), np.bool_)
    steps = np.arange(2 * EDGE, dtype=np.float32)
    for _ in range(40):
        angle, width = draw.uniform(0, 2 * np.pi), int(draw.integers(1, 4))
        x, y = draw.uniform(0, EDGE, 2)
        for offset in range(width):
            right = np.rint(x + offset + steps * np.float32(np.cos(angle))).astype(np.int64)
            down = np.rint(y + offset + steps * np.float32(np.sin(angle))).astype(np.int64)
            inside = (right >= 0) & (right < EDGE) & (down >= 0) & (down < EDGE)
            roads[down[inside], right[inside]] = True
    return roads


def _write_cog(path: Path, counts: NDArray[np.uint16], west: float, north: float) -> None:
    """Write a COG: deflate, predictor 2, blocks of 512, no overviews."""
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": EDGE, "width": EDGE, "count": 1, "dtype": "uint16",
        "crs": EPSG, "transform": Affine(GSD, 0, west, 0, -GSD, north), "nodata": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder) / "plain.tif"
        with rasterio.open(plain, "w", **profile) as file:
            file.write(counts, 1)
        copy(plain, Path(folder) / "cog.tif", driver="COG", compress="deflate", level=1,
             predictor="2", blocksize=512, overviews="none")  # fmt: skip
        (Path(folder) / "cog.tif").rename(path)


def _corner(number: int) -> tuple[float, float]:
    """Return west and north of a scene (m): whole multiples of a chip's 640 m."""
    column, row = number % COLUMNS, number // COLUMNS
    return WEST + column * EDGE * GSD, NORTH - row * EDGE * GSD


def _item(number: int) -> dict[str, Any]:
    """Make the STAC item of a scene; its assets lie in the folder ``assets``."""
    name = scene_id(number)
    hrefs = {band: f"assets/{name}-{band}.tif" for band in BANDS}
    taken = f"2020-{1 + number % 12:02d}-{1 + number // 12 % 28:02d}T10:00:00Z"
    return stac_item(name, "scale", _corner(number), EDGE, hrefs, taken)
