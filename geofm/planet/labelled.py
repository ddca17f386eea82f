"""A land-cover task from ground that no scene shows: chips with the class that dominates them.

The chips come from the same world as the scenes, so a model pretrained on these has met the kind of
land but never the place. Seasons, light and haze vary, and up to 30 % of a chip is something else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.hashing import digest_of
from data_catalog.progress import tick
from geofm.planet.catalog.site import Planet, make_planet
from geofm.planet.catalog.stac_items import to_degrees
from geofm.planet.scenery import spectra as sp
from geofm.planet.scenery.landcover import CLASSES, survey
from geofm.planet.scenery.noise import Ints
from geofm.planet.scenery.reflectance import reflect, season_of
from geofm.planet.scenery.terrain import CELL, SOUTH, WEST, cell_centres
from geofm.planet.scenes import VERSION, default_plan
from geofm.planet.sensors import SCALE, counts
from geofm.types import Floats32

#: Least share of a chip that its class takes, on the map that chips are chosen by and in the chip.
WANTED, LEAST = 0.72, 0.70
#: Metres between a chip and the nearest scene.
APART = 300.0
#: Pixels rendered beyond the rim of a chip.
MARGIN = 6
#: Chips closer than this (metres) are one group: a split keeps them on one side.
GROUP = 2560.0
#: Days of the year on which chips are seen, and how dry it is then.
DAYS = ((38.0, 0.0), (104.0, 0.0), (150.0, 0.0), (204.0, 0.35), (236.0, 0.6), (290.0, 0.0))
_BATCH = 60


@dataclass(frozen=True)
class Place:
    """A chip to be: class (1 to 8) and west and north edge in EPSG:32631."""

    label: int
    west: float
    north: float


def planet_task(root: Path, bands: Sequence[str]) -> Path:
    """Draw the evaluation task ``planet`` on those of a model's bands that the planet has."""
    shared = [band for band in bands if band in sp.BANDS]
    return labelled_folder(root, shared or ["red", "green", "blue"])


def labelled_folder(
    root: Path, bands: Sequence[str], size_px: int = 64, per_class: int = 60, seed: int = 7
) -> Path:
    """The task ``planet``: a folder under ``root`` with one sub-folder per class.

    Chips are GeoTIFFs of counts with 0.0001 reflectance each, 10 m; ``task.json`` describes them.
    The same arguments give the same bytes; a folder that exists is complete.

    Args:
        root: folder to put the task's folder into.
        bands: of blue, green, red, nir and swir16, in the order wanted.
        size_px: chip edge, 32 to 128.
        per_class: chips of each class.
        seed: of the world.

    Raises:
        UsageError: unknown bands or an impossible size.
        CheckError: a chip would show ground of a scene.
    """
    unknown = [band for band in bands if band not in sp.BANDS]
    if unknown or not bands:
        raise UsageError(f"bands: the planet has {', '.join(sp.BANDS)}, not {unknown}")
    if not (32 <= size_px <= 128 and per_class >= 2):
        raise UsageError("size_px is 32 to 128 and per_class at least 2")
    settings = [VERSION, list(bands), size_px, per_class, seed]
    target = root / f"planet-{digest_of(settings)[:12]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        _write(beside, list(bands), size_px, per_class, seed)
        beside.chmod(0o755)
        try:
            beside.rename(target)
        except OSError:  # another process was faster; its bytes are the same
            if not target.is_dir():
                raise
    finally:
        if beside.exists():
            shutil.rmtree(beside)
    return target


def served_ground() -> BaseGeometry:
    """All ground that scenes of the default world show, EPSG:32631."""
    plan = default_plan()
    areas = []
    for tile in (*plan.tiles, *plan.aerial):
        area = box(*tile.extent)
        areas.append(area if tile.epsg == 32631 else _to_world(to_degrees(area, tile.epsg)))
    return shapely.union_all(areas)


def _to_world(degrees: shapely.Polygon) -> shapely.Polygon:
    move = Transformer.from_crs("EPSG:4326", "EPSG:32631", always_xy=True)
    return shapely.Polygon(
        np.column_stack(move.transform(*np.asarray(degrees.exterior.coords).T)).tolist()
    )


def _write(folder: Path, bands: list[str], size_px: int, per_class: int, seed: int) -> None:
    tick("planet task", 0, len(CLASSES) * per_class, "finding places")
    planet = make_planet(seed)
    found: dict[int, int] = dict.fromkeys(range(1, 9), 0)
    groups: dict[str, str] = {}
    places = find_places(planet, size_px, per_class)
    index = [sp.BANDS.index(band) for band in bands]
    while any(found[label] < per_class and places[label] for label in found):
        batch = _next_batch(places, found, per_class)
        number = digest_of([seed, batch[0].west, batch[0].north])
        day, drought = DAYS[int(number[:4], 16) % len(DAYS)]
        day += int(number[4:8], 16) % 17 - 8
        for place, pixels, share in render(planet, batch, size_px, day, drought):
            if share < LEAST or found[place.label] >= per_class:
                continue
            name = CLASSES[place.label - 1]
            path = folder / name / f"{name}-{found[place.label]:04d}.tif"
            found[place.label] += 1
            groups[f"{name}/{path.name}"] = (
                f"{int(place.west // GROUP)}-{int(place.north // GROUP)}"
            )
            _save(path, pixels[index], place, bands)
        tick("planet task", sum(found.values()), len(CLASSES) * per_class)
    short = [CLASSES[label - 1] for label, number in found.items() if number < 2]
    if short:
        raise RunError(f"seed {seed} has too little {', '.join(short)} for a task; take another")
    card = {
        "name": "planet", "classes": list(CLASSES), "bands": bands,
        "scale": [SCALE] * len(bands), "gsd_m": 10, "licence": "CC0-1.0", "groups": groups,
    }  # fmt: skip
    text = json.dumps(card, indent=1, sort_keys=True)
    (folder / "task.json").write_text(text + "\n", encoding="utf-8")


def find_places(planet: Planet, size_px: int, per_class: int) -> dict[int, list[Place]]:
    """Places of chips by class, more than are needed, none overlapping another or a scene.

    Raises:
        CheckError: a place shows ground of a scene.
    """
    x, y = cell_centres()
    labels = survey(planet, x, y, 10.0).label
    edge = size_px * 10.0
    cells = int(np.ceil(edge / CELL))
    free = np.ones(labels.shape, dtype=bool)
    ground = served_ground()
    for area in getattr(ground, "geoms", [ground]):
        west, south, east, north = area.buffer(APART).bounds
        rows = slice(max(int((south - SOUTH) // CELL) - cells, 0), int((north - SOUTH) // CELL) + 1)
        columns = slice(max(int((west - WEST) // CELL) - cells, 0), int((east - WEST) // CELL) + 1)
        free[rows, columns] = False
    free[-cells:], free[:, -cells:], free[:5], free[:, :5] = False, False, False, False
    places: dict[int, list[Place]] = {}
    taken = ~free
    shares = {
        label: ndimage.uniform_filter(
            (labels == label).astype(np.float32), cells, origin=-(cells // 2)
        )
        for label in range(1, 9)
    }
    rare = sorted(shares, key=lambda label: int((shares[label] > WANTED).sum()))
    for label in rare:
        candidates = np.flatnonzero((shares[label] > WANTED) & free)
        order = np.random.default_rng([planet.noise.seed, 71, label]).permutation(candidates)
        chosen: list[Place] = []
        for row, column in zip(*np.unravel_index(order, labels.shape), strict=True):
            window = (slice(row, row + cells), slice(column, column + cells))
            if taken[window].any():
                continue
            taken[window] = True
            north = SOUTH + row * CELL + edge
            chosen.append(Place(label, WEST + column * CELL, north))
            if len(chosen) >= per_class * 2:
                break
        places[label] = chosen
    boxes = [
        box(p.west, p.north - edge, p.west + edge, p.north)
        for each in places.values()
        for p in each
    ]
    if shapely.intersects(ground, np.array(boxes)).any():
        raise CheckError("a chip of the planet's task shows ground of a scene: this is a bug")
    return places


def _next_batch(
    places: dict[int, list[Place]], found: dict[int, int], per_class: int
) -> list[Place]:
    """Some places of every class that still lacks chips; they are taken off the lists."""
    batch: list[Place] = []
    for label in sorted(places):
        lack = per_class - found[label]
        take = min(max(1, _BATCH // len(CLASSES)), lack + (lack > 3), len(places[label]))
        batch += [places[label].pop() for _ in range(max(take, 0))]
    return batch


def render(
    planet: Planet, batch: list[Place], size_px: int, day: float, drought: float
) -> list[tuple[Place, NDArray[np.uint16], float]]:
    """Chips of one date: place, counts [5, size, size] and the share of the place's class.

    The chips are rendered one below the other as a single image.
    """
    wide = size_px + 2 * MARGIN
    steps = (np.arange(wide) - MARGIN + 0.5) * 10.0
    x = np.concatenate([np.broadcast_to(p.west + steps, (wide, wide)) for p in batch])
    y = np.concatenate([np.broadcast_to((p.north - steps)[:, None], (wide, wide)) for p in batch])
    ground = survey(planet, x, y, 10.0)
    values = reflect(ground, season_of(day, drought=drought), reach=MARGIN)
    values = ndimage.gaussian_filter(values, (0, 0.5, 0.5), truncate=3)
    inner = slice(MARGIN, MARGIN + size_px)
    found = []
    for number, place in enumerate(batch):
        rows = slice(number * wide + MARGIN, number * wide + MARGIN + size_px)
        label = ground.label[rows, inner]
        chip = _through_air(values[:, rows, inner], planet, place)
        found.append((place, counts(chip, 0), float((label == place.label).mean())))
    return found


def _through_air(values: Floats32, planet: Planet, place: Place) -> Floats32:
    """Light and haze of a chip's own day, and the sensor's noise."""
    rng = np.random.default_rng([planet.noise.seed, 73, int(place.west), int(place.north)])
    gain = rng.uniform(0.82, 1.18)
    haze = rng.exponential(0.008) * np.array([1.0, 0.75, 0.6, 0.3, 0.1])
    columns: Ints = (int(place.west) // 10 + np.arange(values.shape[2])).astype(np.int64)
    rows: Ints = (int(place.north) // 10 - np.arange(values.shape[1])).astype(np.int64)
    noisy = values * np.float32(gain) + haze[:, None, None].astype(np.float32)
    for number in range(len(noisy)):
        noisy[number] += planet.noise.grain(900 + number, columns, rows) * (
            0.0012 + 0.012 * noisy[number]
        )
    return np.asarray(np.clip(noisy, 0.0002, 1.6))


def _save(path: Path, pixels: NDArray[np.uint16], place: Place, bands: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    profile = {
        "driver": "GTiff", "dtype": "uint16", "count": len(bands), "crs": "EPSG:32631",
        "height": pixels.shape[1], "width": pixels.shape[2], "compress": "DEFLATE",
        "predictor": 2, "interleave": "band",
        "transform": Affine(10, 0, place.west, 0, -10, place.north),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)
        target.descriptions = tuple(bands)
        target.update_tags(scale=str(SCALE), label=CLASSES[place.label - 1])
