"""From the ground to what a sensor delivers: clouds, blur, noise, counts and the class layer."""

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
from geofm.planet.scenery.noise import Coords, Mask, smoothstep
from geofm.planet.scenery.reflectance import Season, reflect, season_of
from geofm.planet.scenes import Take, Tile
from geofm.types import Floats32

#: Pixels surveyed beyond the rim of a tile, so that shadows and blur know their neighbours.
MARGIN = 24
#: Reflectance per count, and what newer baselines add to counts.
SCALE = 1e-4
ADDED = 1000
#: Height of clouds above ground, metres.
CLOUD_HEIGHT = 1100.0


Pixel = TypeVar("Pixel", bound=np.generic)


@dataclass(frozen=True)
class View:
    """A tile's ground with its margin; coordinates in EPSG:32631 and pixel numbers in its CRS."""

    tile: Tile
    x: Coords
    y: Coords
    columns: NDArray[np.int64]
    rows: NDArray[np.int64]
    ground: Ground

    @property
    def label(self) -> NDArray[np.uint8]:
        """True classes of the tile, [size, size]."""
        return crop(self.ground.label)


def crop(image: NDArray[Pixel]) -> NDArray[Pixel]:
    """An image [..., H, W] without its margin."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def look_at(planet: Planet, tile: Tile) -> View:
    """Survey a tile."""
    columns = round(tile.west / tile.gsd) - MARGIN + np.arange(tile.size + 2 * MARGIN)
    rows = round(tile.north / tile.gsd) + MARGIN - 1 - np.arange(tile.size + 2 * MARGIN)
    x, y = np.meshgrid((columns + 0.5) * tile.gsd, (rows + 0.5) * tile.gsd)
    if tile.epsg != 32631:
        x, y = to_world(x, y, tile.epsg)
    return View(tile, x, y, columns, rows, survey(planet, x, y, tile.gsd))


def to_world(x: Coords, y: Coords, epsg: int) -> tuple[Coords, Coords]:
    """Coordinates of another CRS in that of the world; exact at knots 16 pixels apart."""
    move = Transformer.from_crs(f"EPSG:{epsg}", "EPSG:32631", always_xy=True)
    u, v = move.transform(x, y)
    return np.asarray(u), np.asarray(v)


@dataclass(frozen=True)
class Sky:
    """Clouds [H, W]: how opaque they are, how thick, and how deep the shadow on the ground."""

    opaque: Floats32
    thick: Floats32
    shadow: Floats32


def sky_over(planet: Planet, take: Take, season: Season, x: Coords, y: Coords) -> Sky | None:
    """Clouds of an overpass, a function of world coordinates; None for a clear sky."""
    if take.clouds <= 0:
        return None
    wave = 2600 if take.cumulus else 9000
    level = float(special.ndtri(1 - take.clouds)) + 0.1

    def body(px: Coords, py: Coords) -> Floats32:
        shape = planet.noise.at(take.key, px, py, wave, 1.6)
        field = shape + 0.55 * planet.noise.at(take.key + 1, px, py, 4 * wave, 2.2)
        return (field / np.float32(1.14)).astype(np.float32)

    here = body(x, y)
    soft = 0.6 if take.cumulus else 1.0
    far = CLOUD_HEIGHT / math.tan(math.radians(max(season.sun.elevation, 12)))
    azimuth = math.radians(season.sun.azimuth)
    there = body(x + far * math.sin(azimuth), y + far * math.cos(azimuth))
    return Sky(
        smoothstep(level - 0.12, level + soft, here) * 0.96,
        smoothstep(level, level + 1.6, here),
        smoothstep(level - 0.05, level + soft, there) * 0.58,
    )


@dataclass(frozen=True)
class Shot:
    """Reflectance [5, size, size] as a sensor sees it; cloud and shadow shares; snow mask."""

    values: Floats32
    cloud: Floats32
    shadow: Floats32
    season: Season


def shoot(planet: Planet, view: View, take: Take) -> Shot:
    """Light, clouds, blur and noise."""
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
    """Means of 2 x 2 pixels, [..., H / 2, W / 2]."""
    top, bottom = image[..., ::2, :], image[..., 1::2, :]
    rows = top + bottom
    found: Floats32 = (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)
    return found


def counts(values: Floats32, added: int) -> NDArray[np.uint16]:
    """Counts of a reflectance band; 0 is kept for no data."""
    dn = np.rint(values / np.float32(SCALE)).astype(np.int32)
    return np.asarray(np.clip(dn, 1, 30_000) + added, dtype=np.uint16)


def swath_gap(tile: Tile, share: float) -> Mask:
    """Pixels beyond the end of the swath, [size, size]: a slanting line through the tile."""
    row, column = np.mgrid[: tile.size // 2, : tile.size // 2]
    edge = share * tile.size / 2 - 0.21 * (row - tile.size / 4)
    # whole 20 m pixels, so that all bands end in the same place
    return np.repeat(np.repeat(column > edge, 2, axis=0), 2, axis=1)


def satellite_bands(shot: Shot, baseline: str) -> dict[str, NDArray[np.uint16]]:
    """Counts of the five bands; swir16 has half the resolution."""
    added = ADDED if baseline >= "04.00" else 0
    found = {name: counts(shot.values[k], added) for k, name in enumerate(sp.BANDS[:4])}
    found["swir16"] = counts(halve(shot.values[4]), added)
    return found


def scene_classes(shot: Shot, view: View) -> NDArray[np.uint8]:
    """The class layer at half resolution, in the codes of Sentinel-2's scl."""
    blue, green, red, nir, swir = halve(shot.values)
    ndvi = (nir - red) / np.maximum(nir + red, 1e-4)
    cloud, shadow = halve(shot.cloud), halve(shot.shadow)
    water = halve((view.label == 1).astype(np.float32)) > 0.5
    found = np.where(ndvi > 0.38, 4, 5)
    found = np.where(water, 6, found)
    found = np.where(
        (green - swir) / (green + swir) > 0.35, np.where(blue > 0.28, 11, found), found
    )
    found = np.where(shadow > 0.3, 3, found)
    found = np.where(cloud > 0.22, 8, found)
    found = np.where(cloud > 0.6, 9, found)
    return found.astype(np.uint8)


def aerial_bands(shot: Shot) -> dict[str, NDArray[np.uint8]]:
    """8-bit bands of a camera: its own gains and a tone curve; 0 is kept for no data."""
    found = {}
    for number, (name, white) in enumerate(
        (("blue", 0.27), ("green", 0.29), ("red", 0.30), ("nir", 0.62))
    ):
        tone = np.clip(shot.values[number] / np.float32(white), 0, 1) ** np.float32(0.78)
        found[name] = np.clip(np.rint(tone * 255), 1, 255).astype(np.uint8)
    return found
