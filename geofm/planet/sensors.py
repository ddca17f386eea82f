"""Sensors: from the ground to delivered pixels, with clouds, blur, noise, counts and classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer
from scipy import ndimage, special

from geofm.planet.catalog.site import Planet
from geofm.planet.scenery import spectra as sp
from geofm.planet.scenery.landcover import Ground, survey
from geofm.planet.scenery.noise import smoothstep
from geofm.planet.scenery.reflectance import Season, reflect, season_of
from geofm.planet.scenes import Take, Tile
from geofm.types import Bools, Floats, Floats32, Indices

#: Pixels surveyed beyond the rim of a tile, for shadows and blur.
MARGIN = 24
#: Reflectance per count, and counts that baselines from 04.00 on add.
SCALE = 1e-4
ADDED = 1000
#: Height of clouds above the ground (metres).
CLOUD_HEIGHT = 1100.0


Pixel = TypeVar("Pixel", bound=np.generic)


@dataclass(frozen=True)
class View:
    """The ground of a tile and its margin; coordinates in EPSG:32631, pixel numbers in its CRS."""

    tile: Tile
    x: Floats
    y: Floats
    columns: Indices
    rows: Indices
    ground: Ground

    @property
    def label(self) -> NDArray[np.uint8]:
        """The true classes of the tile, shape (size, size)."""
        return crop(self.ground.label)


def crop(image: NDArray[Pixel]) -> NDArray[Pixel]:
    """Cut the margin off an image, shape (..., H, W)."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def look_at(planet: Planet, tile: Tile) -> View:
    """Survey the ground of a tile."""
    columns = round(tile.west / tile.gsd) - MARGIN + np.arange(tile.size + 2 * MARGIN)
    rows = round(tile.north / tile.gsd) + MARGIN - 1 - np.arange(tile.size + 2 * MARGIN)
    x, y = np.meshgrid((columns + 0.5) * tile.gsd, (rows + 0.5) * tile.gsd)
    if tile.epsg != 32631:
        x, y = to_world(x, y, tile.epsg)
    return View(tile, x, y, columns, rows, survey(planet, x, y, tile.gsd))


def to_world(x: Floats, y: Floats, epsg: int) -> tuple[Floats, Floats]:
    """Transform coordinates of another CRS into EPSG:32631."""
    transformation = Transformer.from_crs(f"EPSG:{epsg}", "EPSG:32631", always_xy=True)
    u, v = transformation.transform(x, y)
    return np.asarray(u), np.asarray(v)


@dataclass(frozen=True)
class Sky:
    """Clouds, shape (H, W): opacity, thickness, and depth of their shadow on the ground."""

    opaque: Floats32
    thick: Floats32
    shadow: Floats32


def sky_over(planet: Planet, take: Take, season: Season, x: Floats, y: Floats) -> Sky | None:
    """Compute the clouds of an overpass at world coordinates; None for a clear sky."""
    if take.clouds <= 0:
        return None
    wave = 2600 if take.cumulus else 9000
    level = float(special.ndtri(1 - take.clouds)) + 0.1

    def body(px: Floats, py: Floats) -> Floats32:
        shape = planet.noise.at(take.key, px, py, wave, 1.6)
        field = shape + 0.55 * planet.noise.at(take.key + 1, px, py, 4 * wave, 2.2)
        return (field / np.float32(1.14)).astype(np.float32)

    overhead = body(x, y)
    soft = 0.6 if take.cumulus else 1.0
    offset = CLOUD_HEIGHT / math.tan(math.radians(max(season.sun.elevation, 12)))
    azimuth = math.radians(season.sun.azimuth)
    sunward = body(x + offset * math.sin(azimuth), y + offset * math.cos(azimuth))
    return Sky(
        smoothstep(level - 0.12, level + soft, overhead) * 0.96,
        smoothstep(level, level + 1.6, overhead),
        smoothstep(level - 0.05, level + soft, sunward) * 0.58,
    )


@dataclass(frozen=True)
class Shot:
    """Reflectance as a sensor sees it, shape (5, size, size), with cloud and shadow shares."""

    values: Floats32
    cloud: Floats32
    shadow: Floats32
    season: Season


def shoot(planet: Planet, view: View, take: Take) -> Shot:
    """Render a tile on the date of an overpass: light, clouds, blur and noise."""
    season = season_of(take.day, drought=take.drought)
    values = reflect(view.ground, season)
    sky = sky_over(planet, take, season, view.x, view.y)
    none = np.zeros(view.x.shape, dtype=np.float32)
    if sky is not None:
        dark = 1 - sky.shadow * (1 - sky.opaque)
        values *= dark * np.array([1, 0.99, 0.98, 0.96, 0.95], np.float32)[:, None, None]
        bright = sp.CLOUD[:, None, None] * (0.48 + 0.8 * sky.thick)
        values += sky.opaque * (bright - values)
    sigma = 0.5 if view.tile.gsd > 5 else 0.42
    values = ndimage.gaussian_filter(values, (0, sigma, sigma), truncate=3)
    for number in range(len(values)):
        key = take.key * 8 + number + view.tile.epsg
        grain = planet.noise.grain(key, view.columns, view.rows)
        values[number] += grain * (0.0012 + 0.012 * values[number])
    np.clip(values, 0.0002, 1.6, out=values)
    cloud, shadow = (sky.opaque, sky.shadow) if sky is not None else (none, none)
    return Shot(crop(values), crop(cloud), crop(shadow), season)


def halve(image: Floats32) -> Floats32:
    """Average 2 × 2 pixels, shape (..., H / 2, W / 2)."""
    top, bottom = image[..., ::2, :], image[..., 1::2, :]
    rows = top + bottom
    means: Floats32 = (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)
    return means


def counts(values: Floats32, added: int) -> NDArray[np.uint16]:
    """Convert reflectance to counts; 0 means no data."""
    dn = np.rint(values / np.float32(SCALE)).astype(np.int32)
    return np.asarray(np.clip(dn, 1, 30_000) + added, dtype=np.uint16)


def swath_gap(tile: Tile, share: float) -> Bools:
    """Mark the pixels beyond the slanting end of the swath, shape (size, size)."""
    row, column = np.mgrid[: tile.size // 2, : tile.size // 2]
    edge = share * tile.size / 2 - 0.21 * (row - tile.size / 4)
    # Whole 20 m pixels, so that all bands end at the same line.
    return np.repeat(np.repeat(column > edge, 2, axis=0), 2, axis=1)


def satellite_bands(shot: Shot, baseline: str) -> dict[str, NDArray[np.uint16]]:
    """Return the counts of the five bands; swir16 has half the resolution."""
    added = ADDED if baseline >= "04.00" else 0
    bands = {name: counts(shot.values[k], added) for k, name in enumerate(sp.BANDS[:4])}
    bands["swir16"] = counts(halve(shot.values[4]), added)
    return bands


def scene_classes(shot: Shot, view: View) -> NDArray[np.uint8]:
    """Return the class layer at half resolution, in the codes of Sentinel-2's scl."""
    blue, green, red, nir, swir = halve(shot.values)
    ndvi = (nir - red) / np.maximum(nir + red, 1e-4)
    cloud, shadow = halve(shot.cloud), halve(shot.shadow)
    water = halve((view.label == 1).astype(np.float32)) > 0.5
    classes = np.where(ndvi > 0.38, 4, 5)
    classes = np.where(water, 6, classes)
    snow = ((green - swir) / (green + swir) > 0.35) & (blue > 0.28)
    classes = np.where(snow, 11, classes)
    classes = np.where(shadow > 0.3, 3, classes)
    classes = np.where(cloud > 0.22, 8, classes)
    classes = np.where(cloud > 0.6, 9, classes)
    return classes.astype(np.uint8)


def aerial_bands(shot: Shot) -> dict[str, NDArray[np.uint8]]:
    """Return the 8-bit bands of a camera, with gains and a tone curve; 0 means no data."""
    bands = {}
    for number, (name, white) in enumerate(
        (("blue", 0.27), ("green", 0.29), ("red", 0.30), ("nir", 0.62))
    ):
        tone = np.clip(shot.values[number] / np.float32(white), 0, 1) ** np.float32(0.78)
        bands[name] = np.clip(np.rint(tone * 255), 1, 255).astype(np.uint8)
    return bands
