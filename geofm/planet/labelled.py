"""The evaluation task `planet`: chips of ground that no scene shows, with their dominant class.

The chips come from the same world as the scenes, so a model pretrained on the scenes knows the kind
of land but not the location. Seasons, light and haze vary, and up to 30 % of a chip may show other
classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from geofm.planet.scenery.reflectance import reflect, season_of
from geofm.planet.scenery.terrain import CELL, SOUTH, WEST, cell_centres
from geofm.planet.scenes import VERSION, default_plan
from geofm.planet.sensors import SCALE, counts
from geofm.planet.world import build_folder
from geofm.types import Floats32, Indices

#: Least share of its class, on the coarse map from which sites are chosen and in the chip.
MIN_MAP_SHARE, MIN_CHIP_SHARE = 0.72, 0.70
#: Least distance (metres) between a chip and a scene.
MIN_DISTANCE = 300.0
#: Pixels rendered beyond the rim of a chip.
MARGIN = 6
#: Edge (metres) of a group's square: a split keeps the chips of a group together.
GROUP = 2560.0
#: Days of the year of the chips, and drought on these days.
DAYS = ((38.0, 0.0), (104.0, 0.0), (150.0, 0.0), (204.0, 0.35), (236.0, 0.6), (290.0, 0.0))
_BATCH = 60


@dataclass(frozen=True)
class TaskSite:
    """The site of a chip: class (1 to 8), west and north edge in EPSG:32631."""

    label: int
    west: float
    north: float


def planet_task(root: Path, bands: Sequence[str]) -> Path:
    """Draw the task with the bands that the model and the planet share, else with RGB."""
    shared = [band for band in bands if band in sp.BANDS]
    return labelled_folder(root, shared or ["red", "green", "blue"])


def labelled_folder(
    root: Path, bands: Sequence[str], size_px: int = 64, per_class: int = 60, seed: int = 7
) -> Path:
    """Draw the task as a folder with one sub-folder per class, unless it exists.

    Chips are GeoTIFFs of 10 m pixels with counts of 0.0001 reflectance; ``task.json`` describes
    them. The same arguments give the same bytes.

    Args:
        root: Parent of the task's folder.
        bands: Some of blue, green, red, nir and swir16, in the order of the chips' bands.
        size_px: Chip edge in pixels, 32 to 128.
        per_class: Chips of each class.
        seed: Seed of the world.

    Raises:
        UsageError: Unknown bands, or a size out of range.
        CheckError: A chip would show ground of a scene.
    """
    unknown = [band for band in bands if band not in sp.BANDS]
    if unknown or not bands:
        raise UsageError(f"bands: the planet has {', '.join(sp.BANDS)}, not {unknown}")
    if not (32 <= size_px <= 128 and per_class >= 2):
        raise UsageError("size_px is 32 to 128 and per_class at least 2")
    settings = [VERSION, list(bands), size_px, per_class, seed]
    target = root / f"planet-{digest_of(settings)[:12]}"
    write = partial(_write_task, bands=list(bands), size_px=size_px, per_class=per_class, seed=seed)
    return build_folder(target, write)


def served_ground() -> BaseGeometry:
    """Return the ground that the scenes of the default world show, EPSG:32631."""
    plan = default_plan()
    areas = []
    for tile in (*plan.tiles, *plan.aerial):
        area = box(*tile.extent)
        areas.append(area if tile.epsg == 32631 else _to_world(to_degrees(area, tile.epsg)))
    return shapely.union_all(areas)


def _to_world(degrees: shapely.Polygon) -> shapely.Polygon:
    """Transform a polygon from EPSG:4326 into EPSG:32631."""
    transformation = Transformer.from_crs("EPSG:4326", "EPSG:32631", always_xy=True)
    return shapely.Polygon(
        np.column_stack(transformation.transform(*np.asarray(degrees.exterior.coords).T)).tolist()
    )


def _write_task(folder: Path, bands: list[str], size_px: int, per_class: int, seed: int) -> None:
    """Choose sites, render them batch by batch, and write the chips and ``task.json``."""
    tick("planet task", 0, len(CLASSES) * per_class, "choosing sites")
    planet = make_planet(seed)
    written: dict[int, int] = dict.fromkeys(range(1, 9), 0)
    groups: dict[str, str] = {}
    sites = choose_sites(planet, size_px, per_class)
    index = [sp.BANDS.index(band) for band in bands]
    while any(written[label] < per_class and sites[label] for label in written):
        batch = _next_batch(sites, written, per_class)
        number = digest_of([seed, batch[0].west, batch[0].north])
        day, drought = DAYS[int(number[:4], 16) % len(DAYS)]
        day += int(number[4:8], 16) % 17 - 8
        for site, pixels, share in render(planet, batch, size_px, day, drought):
            if share < MIN_CHIP_SHARE or written[site.label] >= per_class:
                continue
            name = CLASSES[site.label - 1]
            path = folder / name / f"{name}-{written[site.label]:04d}.tif"
            written[site.label] += 1
            groups[f"{name}/{path.name}"] = f"{int(site.west // GROUP)}-{int(site.north // GROUP)}"
            _save(path, pixels[index], site, bands)
        tick("planet task", sum(written.values()), len(CLASSES) * per_class)
    short = [CLASSES[label - 1] for label, number in written.items() if number < 2]
    if short:
        raise RunError(
            f"seed {seed} has too little {', '.join(short)} for a task; choose another seed"
        )
    card = {
        "name": "planet", "classes": list(CLASSES), "bands": bands,
        "scale": [SCALE] * len(bands), "gsd_m": 10, "licence": "CC0-1.0", "groups": groups,
    }  # fmt: skip
    text = json.dumps(card, indent=1, sort_keys=True)
    (folder / "task.json").write_text(text + "\n", encoding="utf-8")


def choose_sites(planet: Planet, size_px: int, per_class: int) -> dict[int, list[TaskSite]]:
    """Choose up to twice as many sites of each class as needed, apart from scenes and each other.

    Raises:
        CheckError: A site shows ground of a scene.
    """
    x, y = cell_centres()
    labels = survey(planet, x, y, 10.0).label
    edge = size_px * 10.0
    cells = int(np.ceil(edge / CELL))
    free = np.ones(labels.shape, dtype=bool)
    ground = served_ground()
    for area in getattr(ground, "geoms", [ground]):
        west, south, east, north = area.buffer(MIN_DISTANCE).bounds
        rows = slice(max(int((south - SOUTH) // CELL) - cells, 0), int((north - SOUTH) // CELL) + 1)
        columns = slice(max(int((west - WEST) // CELL) - cells, 0), int((east - WEST) // CELL) + 1)
        free[rows, columns] = False
    free[-cells:], free[:, -cells:], free[:5], free[:, :5] = False, False, False, False
    sites: dict[int, list[TaskSite]] = {}
    taken = ~free
    shares = {
        label: ndimage.uniform_filter(
            (labels == label).astype(np.float32), cells, origin=-(cells // 2)
        )
        for label in range(1, 9)
    }
    rare = sorted(shares, key=lambda label: int((shares[label] > MIN_MAP_SHARE).sum()))
    for label in rare:
        candidates = np.flatnonzero((shares[label] > MIN_MAP_SHARE) & free)
        order = np.random.default_rng([planet.noise.seed, 71, label]).permutation(candidates)
        chosen: list[TaskSite] = []
        for row, column in zip(*np.unravel_index(order, labels.shape), strict=True):
            window = (slice(row, row + cells), slice(column, column + cells))
            if taken[window].any():
                continue
            taken[window] = True
            north = SOUTH + row * CELL + edge
            chosen.append(TaskSite(label, WEST + column * CELL, north))
            if len(chosen) >= per_class * 2:
                break
        sites[label] = chosen
    boxes = [
        box(p.west, p.north - edge, p.west + edge, p.north)
        for chosen in sites.values()
        for p in chosen
    ]
    if shapely.intersects(ground, np.array(boxes)).any():
        raise CheckError("a chip of the planet's task shows ground of a scene: this is a bug")
    return sites


def _next_batch(
    sites: dict[int, list[TaskSite]], written: dict[int, int], per_class: int
) -> list[TaskSite]:
    """Take some sites of every class that still lacks chips off the lists."""
    batch: list[TaskSite] = []
    for label in sorted(sites):
        missing = per_class - written[label]
        take = min(max(1, _BATCH // len(CLASSES)), missing + (missing > 3), len(sites[label]))
        batch += [sites[label].pop() for _ in range(max(take, 0))]
    return batch


def render(
    planet: Planet, batch: list[TaskSite], size_px: int, day: float, drought: float
) -> list[tuple[TaskSite, NDArray[np.uint16], float]]:
    """Render the chips of a batch on a date, as a single image with one chip below the other.

    Returns:
        For each chip its site, its counts (5, size_px, size_px) and the share of its class.
    """
    wide = size_px + 2 * MARGIN
    steps = (np.arange(wide) - MARGIN + 0.5) * 10.0
    x = np.concatenate([np.broadcast_to(p.west + steps, (wide, wide)) for p in batch])
    y = np.concatenate([np.broadcast_to((p.north - steps)[:, None], (wide, wide)) for p in batch])
    ground = survey(planet, x, y, 10.0)
    values = reflect(ground, season_of(day, drought=drought), reach=MARGIN)
    values = ndimage.gaussian_filter(values, (0, 0.5, 0.5), truncate=3)
    inner = slice(MARGIN, MARGIN + size_px)
    chips = []
    for number, site in enumerate(batch):
        rows = slice(number * wide + MARGIN, number * wide + MARGIN + size_px)
        label = ground.label[rows, inner]
        chip = _add_atmosphere(values[:, rows, inner], planet, site)
        chips.append((site, counts(chip, 0), float((label == site.label).mean())))
    return chips


def _add_atmosphere(values: Floats32, planet: Planet, site: TaskSite) -> Floats32:
    """Apply the light and haze of a chip's own day, and the sensor's noise."""
    rng = np.random.default_rng([planet.noise.seed, 73, int(site.west), int(site.north)])
    gain = rng.uniform(0.82, 1.18)
    haze = rng.exponential(0.008) * np.array([1.0, 0.75, 0.6, 0.3, 0.1])
    columns: Indices = (int(site.west) // 10 + np.arange(values.shape[2])).astype(np.int64)
    rows: Indices = (int(site.north) // 10 - np.arange(values.shape[1])).astype(np.int64)
    noisy = values * np.float32(gain) + haze[:, None, None].astype(np.float32)
    for number in range(len(noisy)):
        noisy[number] += planet.noise.grain(900 + number, columns, rows) * (
            0.0012 + 0.012 * noisy[number]
        )
    return np.asarray(np.clip(noisy, 0.0002, 1.6))


def _save(path: Path, pixels: NDArray[np.uint16], site: TaskSite, bands: list[str]) -> None:
    """Write a chip as a GeoTIFF."""
    path.parent.mkdir(exist_ok=True)
    profile = {
        "driver": "GTiff", "dtype": "uint16", "count": len(bands), "crs": "EPSG:32631",
        "height": pixels.shape[1], "width": pixels.shape[2], "compress": "DEFLATE",
        "predictor": 2, "interleave": "band",
        "transform": Affine(10, 0, site.west, 0, -10, site.north),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels)
        target.descriptions = tuple(bands)
        target.update_tags(scale=str(SCALE), label=CLASSES[site.label - 1])
