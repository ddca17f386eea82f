"""The planet of a seed, and sites: points with the fields that all surfaces need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from geofm.planet.scenery.fields import Fields, make_fields
from geofm.planet.scenery.network import Lines, Town, make_rivers, make_roads, make_towns
from geofm.planet.scenery.noise import Noise, smoothstep
from geofm.planet.scenery.terrain import CELL, SOUTH, WEST, Relief, km, make_relief
from geofm.types import Floats, Floats32

#: Lakes that the scenes show: kilometres east, north and radius, depth in metres.
LAKES = [(33.5, 26.5, 2.3, 26.0), (24.0, 15.0, 1.0, 12.0), (45.0, 20.5, 1.4, 18.0)]
#: Towns that the scenes show: kilometres east and north, radius in metres; number of others.
TOWNS = [(27.5, 30.5, 2600.0), (13.8, 21.5, 1700.0), (24.5, 12.0, 900.0), (40.5, 12.5, 800.0)]
MORE_TOWNS = 44


@dataclass(frozen=True)
class Planet:
    """The parts of a world that are computed once per seed."""

    noise: Noise
    relief: Relief
    spline: Floats32
    fields: Fields
    rivers: Lines
    roads: Lines
    towns: tuple[Town, ...]


@lru_cache(maxsize=2)
def make_planet(seed: int) -> Planet:
    """Make the world of a seed; takes a few seconds and is cached in the process."""
    noise = Noise(seed)
    relief = make_relief(noise, LAKES)
    towns = make_towns(relief, noise, TOWNS, MORE_TOWNS)
    return Planet(
        noise=noise,
        relief=relief,
        spline=ndimage.spline_filter(relief.height, order=3, mode="nearest").astype(np.float32),
        fields=make_fields(noise, relief),
        rivers=make_rivers(relief, noise),
        roads=make_roads(relief, towns),
        towns=tuple(towns),
    )


@dataclass(frozen=True)
class Site:
    """Points of the world; all arrays have the shape (H, W).

    Attributes:
        x: Eastings, EPSG:32631.
        y: Northings.
        gsd: Distance of the points in metres.
        at: Smooth fields by name.
        height: Height of the ground, metres above the sea.
        mottle: Noise with wavelengths of some hundred metres.
        crags: Finer noise.
        dry: Desert, 0 to 1.
        ripple: Dunes, from -0.5 in their troughs to 0.5 on their crests.
    """

    x: Floats
    y: Floats
    gsd: float
    at: dict[str, Floats32]
    height: Floats32
    mottle: Floats32
    crags: Floats32
    dry: Floats32
    ripple: Floats32

    @property
    def fine(self) -> bool:
        """Whether single trees and rows are resolved."""
        return self.gsd < 5


def site_of(planet: Planet, x: Floats, y: Floats, gsd: float) -> Site:
    """Compute relief and climate at points."""
    east, north = km(x, y)
    at = planet.fields.at(x, y)
    steep = at["steep"]
    mottle = planet.noise.at(40, x, y, 700, 1.1, gsd)
    crags = planet.noise.at(43, x, y, 420, 1.5, gsd)
    rows, columns = (y - SOUTH) / CELL - 0.5, (x - WEST) / CELL - 0.5
    height = ndimage.map_coordinates(
        planet.spline, [rows, columns], order=3, mode="nearest", prefilter=False
    ).astype(np.float32)
    height += crags * np.minimum(26 * steep**1.1, 9)
    height += smoothstep(0.07, 0.02, steep) * mottle * np.float32(0.9)
    dry = smoothstep(36.5, 42.5, east + 1.2 * at["broad"])
    dry = dry * smoothstep(17.5, 11.5, north + 1.2 * at["patch"])
    # Dunes: waves that are steep on the lee side.
    erg = dry * smoothstep(-1.3, -0.3, at["erg"]) * smoothstep(0.12, 0.05, steep)
    phase = (east * 0.92 + north * 0.39) / 0.36 + 0.8 * at["dune"] + 0.05 * mottle
    saw = phase - np.floor(phase)
    wave = np.where(saw < 0.72, smoothstep(0, 0.72, saw), smoothstep(1, 0.72, saw))
    height += erg * (14 + 6 * at["patch"]) * wave
    ripple = ((wave - 0.5) * erg).astype(np.float32)
    return Site(x, y, gsd, at, height, mottle, crags, dry, ripple)
