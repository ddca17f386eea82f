"""Make a pool of chips of real scenes with planted near duplicates, and the truth about its pairs.

For ``eo_duplicates.py`` and ``decontaminate.py``. Each scene is read whole from its COGs
(reflectance counts with the stated offset applied, as the cut does). ``base`` chips are on a grid
of whole windows. Each has copies: shifted by half a pixel (resampled), with haze, with another
gain, rotated or flipped, and windows that overlap it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from scipy import ndimage as ndi
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

BANDS = ["red", "green", "blue", "nir"]
SIZE = 128
SCALE = [1e-4] * len(BANDS)
KINDS = ("half_pixel", "haze", "gain", "rotation", "overlap")
Counts = NDArray[np.uint16]


@dataclass(frozen=True)
class Scene:
    """An acquisition: its tile, day, and counts of shape (bands, height, width)."""

    item: str
    tile: str
    day: str
    counts: Counts


@dataclass(frozen=True)
class Window:
    """A chip of the pool; ``top`` and ``left`` are its position in its scene, in pixels."""

    kind: str
    base: int
    scene: int
    top: float
    left: float
    pixels: Counts


def read_scenes(world: Path, collection: str = "") -> list[Scene]:
    """Read the scenes of a folder of STAC items with relative assets.

    Of several versions of a scene, the newest is read. Of tiles of a day that overlap, the first is
    read, because ``overlaps`` does not know duplicates between tiles.
    """
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted((world / collection / "items").glob("*.json")):
        _, tile, day, _, _ = path.stem.split("_")
        newest[tile, day] = path  # the version is part of the sorted name
    areas: dict[str, list[BaseGeometry]] = defaultdict(list)
    scenes = []
    for (tile, day), path in sorted(newest.items()):
        area = shape(json.loads(path.read_bytes())["geometry"])
        if not any(area.intersects(other) for other in areas[day]):
            areas[day].append(area)
            scenes.append(_scene(path, tile, day))
    return scenes


def _scene(path: Path, tile: str, day: str) -> Scene:
    assets = json.loads(path.read_bytes())["assets"]
    bands = []
    for name in BANDS:
        about = assets[name]["raster:bands"][0]
        with rasterio.open(path.parent / assets[name]["href"]) as file:
            counts = file.read(1).astype(np.int32)
        shift = round(about.get("offset", 0) / about["scale"])
        bands.append(np.where(counts > 0, np.maximum(counts + shift, 1), 0))
    return Scene(path.stem, tile, day, np.stack(bands).astype(np.uint16))


def quiet_sea(scene: Scene, seed: int) -> Scene:
    """Make a monotone water scene from the coarse shading of another scene, with noise (7 DN).

    It serves to choose parameters: the world's own monotone scenes are among those reported.
    """
    draw = np.random.default_rng(seed)
    smooth = np.stack([ndi.gaussian_filter(band.astype(np.float64), 40) for band in scene.counts])
    counts = _counts(400 + 0.02 * smooth + draw.normal(0, 7, smooth.shape))
    return Scene(f"sea of {scene.item}", f"sea-{scene.tile}", scene.day, counts)


def plant(scenes: list[Scene], seed: int) -> list[Window]:
    """Return base chips of each scene, then their copies, without windows that lack data."""
    draw = np.random.default_rng(seed)
    pool: list[Window] = []
    for number, scene in enumerate(scenes):
        rows, cols = scene.counts.shape[1:]
        for top in range(0, rows - SIZE + 1, SIZE):
            for left in range(0, cols - SIZE + 1, SIZE):
                pixels = scene.counts[:, top : top + SIZE, left : left + SIZE]
                if pixels.min() > 0:
                    pool.append(Window("base", len(pool), number, top, left, pixels))
    for base in list(pool):
        scene = scenes[base.scene].counts
        pool += [_half(base, scene, draw), _haze(base, draw), _gain(base, draw), _turn(base, draw)]
        pool += [window for _ in range(2) for window in _overlap(base, scene, draw)]
    return pool


def _counts(values: NDArray[np.floating]) -> Counts:
    return np.clip(np.rint(values), 1, 65_535).astype(np.uint16)


def _half(base: Window, scene: Counts, draw: np.random.Generator) -> Window:
    """Shift by half a pixel (in one direction or both), bilinear or cubic."""
    dy, dx = [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (-0.5, 0.5)][draw.integers(4)]
    order = int(draw.choice([1, 3]))
    top, left = int(base.top), int(base.left)
    rows = slice(max(top - 4, 0), top + SIZE + 4)
    cols = slice(max(left - 4, 0), left + SIZE + 4)
    part = scene[:, rows, cols].astype(np.float32)
    moved = np.stack([ndi.shift(band, (-dy, -dx), order=order, mode="nearest") for band in part])
    y, x = top - rows.start, left - cols.start
    pixels = _counts(moved[:, y : y + SIZE, x : x + SIZE])
    return Window("half_pixel", base.base, base.scene, top + dy, left + dx, pixels)


def _haze(base: Window, draw: np.random.Generator) -> Window:
    """Add airlight that is stronger in blue and uneven over the chip."""
    light = np.array([1400, 1600, 1900, 1300])[:, None, None]
    ramp = np.linspace(-0.02, 0.02, SIZE)
    through = draw.uniform(0.8, 0.97) + ramp[:, None] * draw.uniform(-1, 1)
    pixels = _counts(base.pixels * through + (1 - through) * light)
    return Window("haze", base.base, base.scene, base.top, base.left, pixels)


def _gain(base: Window, draw: np.random.Generator) -> Window:
    pixels = _counts(base.pixels * draw.uniform(0.8, 1.25) + draw.uniform(-50, 50))
    return Window("gain", base.base, base.scene, base.top, base.left, pixels)


def turned(pixels: NDArray[np.generic], which: int) -> NDArray[np.generic]:
    """Apply a flip or rotation, 0 (unchanged) to 7, to pixels of shape (bands, height, width)."""
    flat = pixels[:, :, ::-1] if which >= 4 else pixels
    return np.ascontiguousarray(np.rot90(flat, which % 4, axes=(1, 2)))


def _turn(base: Window, draw: np.random.Generator) -> Window:
    pixels = turned(base.pixels, int(draw.integers(1, 8)))
    return Window("rotation", base.base, base.scene, base.top, base.left, pixels)


def _overlap(base: Window, scene: Counts, draw: np.random.Generator) -> list[Window]:
    """Return a window of the scene with an IoU of 0.6 to 0.95; None if it would leave the scene."""
    for _ in range(200):
        dy, dx = draw.integers(-SIZE // 3, SIZE // 3 + 1, 2)
        top, left = int(base.top + dy), int(base.left + dx)
        if not 0.6 <= iou(base.top, base.left, top, left) <= 0.95:
            continue
        pixels = scene[:, max(top, 0) : top + SIZE, max(left, 0) : left + SIZE]
        if top >= 0 <= left and pixels.shape[1:] == (SIZE, SIZE) and pixels.min() > 0:
            return [Window("overlap", base.base, base.scene, top, left, pixels)]
    return []


def iou(top: float, left: float, other_top: float, other_left: float) -> float:
    """Compute the intersection over union of two windows of a scene."""
    common = max(0.0, SIZE - abs(top - other_top)) * max(0.0, SIZE - abs(left - other_left))
    return common / (2 * SIZE * SIZE - common)


def overlaps(pool: list[Window]) -> NDArray[np.float32]:
    """Compute the IoU, shape (n, n), of chips of an acquisition; 0 between acquisitions."""
    top, left = (np.array([getattr(w, name) for w in pool]) for name in ("top", "left"))
    scene = np.array([w.scene for w in pool])
    high = np.maximum(0, SIZE - np.abs(top[:, None] - top))
    wide = np.maximum(0, SIZE - np.abs(left[:, None] - left))
    common = high * wide
    same = scene[:, None] == scene
    return np.where(same, common / (2 * SIZE * SIZE - common), 0).astype(np.float32)
