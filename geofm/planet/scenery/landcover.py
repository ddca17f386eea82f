"""Land cover as a function of world coordinates, the same for every sensor and date.

``survey`` returns the ground at points: relief, surfaces and their shares of each pixel. Colours
and seasons follow in ``reflectance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofm.planet.catalog.site import Planet, Site, site_of
from geofm.planet.scenery.built import Built, build_up
from geofm.planet.scenery.farms import MEADOW, Farms, lay_out
from geofm.planet.scenery.mosaic import Bits, cover, crowns
from geofm.planet.scenery.noise import Noise, smoothstep, unit
from geofm.planet.scenery.waters import Waters, find_water
from geofm.types import Bools, Floats, Floats32

CLASSES = (
    "water", "forest", "cropland", "grassland", "town", "bare", "wetland", "mountain",
)  # fmt: skip
WATER, FOREST, CROPLAND, GRASSLAND, TOWN, BARE, WETLAND, MOUNTAIN = range(1, 9)
#: Points computed at a time, so that intermediate arrays stay in the processor's cache.
STRIP = 50_000


@dataclass
class Ground:
    """The ground at points; all arrays have the shape (H, W).

    Shares (0 to 1) are of the pixel. ``label`` is the true class, 1 to 8 in the order of
    ``CLASSES``. ``height`` is that of the ground or water surface in metres, ``tall`` the height of
    objects on it.
    """

    gsd: float
    label: NDArray[np.uint8]
    height: Floats32
    tall: Floats32
    dry: Floats32
    soil: Floats32
    lush: Floats32
    field: Floats32
    crop: NDArray[np.uint8]
    crop_bits: Bits
    in_field: Floats32
    rows: Floats32
    pivot: Floats32
    hedge: Floats32
    track: Floats32
    forest: Floats32
    conifer: Floats32
    crown: Floats32
    rock: Floats32
    sand: Floats32
    ripple: Floats32
    wet: Floats32
    reed: Floats32
    road: Floats32
    water: Floats32
    depth: Floats32
    murky: Floats32
    foam: Floats32
    built: Built


def survey(planet: Planet, x: Floats, y: Floats, gsd: float) -> Ground:
    """Compute the ground at points.

    Args:
        planet: The world, from ``make_planet``.
        x: Eastings, EPSG:32631, shape (H, W).
        y: Northings, shape (H, W).
        gsd: Pixel edge in metres; edges are softened to it, finer detail is left out.
    """
    step = max(1, STRIP // x.shape[1])
    strips = [slice(at, at + step) for at in range(0, len(x), step)]
    return _concatenate([_survey_strip(planet, x[rows], y[rows], gsd) for rows in strips])


def _concatenate(parts: Sequence[Ground]) -> Ground:
    """Put grounds one below the other."""
    values: dict[str, Any] = {"gsd": parts[0].gsd}
    for name in (f.name for f in fields(Ground) if f.name not in ("gsd", "built")):
        values[name] = _stack([getattr(part, name) for part in parts])
    values["built"] = Built(
        *(_stack([getattr(part.built, f.name) for part in parts]) for f in fields(Built))
    )
    return Ground(**values)


def _stack(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Put arrays one below the other, in single precision."""
    stacked = np.concatenate(parts)
    return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked


def rows_of(ground: Ground, rows: slice) -> Ground:
    """Return some rows of a ground."""
    values: dict[str, Any] = {"gsd": ground.gsd}
    for name in (f.name for f in fields(Ground) if f.name not in ("gsd", "built")):
        values[name] = getattr(ground, name)[rows]
    values["built"] = Built(*(getattr(ground.built, f.name)[rows] for f in fields(Built)))
    return Ground(**values)


def _survey_strip(planet: Planet, x: Floats, y: Floats, gsd: float) -> Ground:
    """Compute the ground of a strip of points."""
    site = site_of(planet, x, y, gsd)
    waters = find_water(planet, site)
    farms = lay_out(site)
    at, height, mottle, crags = site.at, site.height, site.mottle, site.crags
    steep, patch, broad = at["steep"], at["patch"], at["broad"]
    wood = _woods(site, waters, farms)
    conifer = smoothstep(-0.4, 0.5, 0.9 * at["conifer"] + (height - 520) / np.float32(320))
    rock = smoothstep(0.62, 0.78, steep + 0.07 * crags)
    rock = np.maximum(rock, smoothstep(1150, 1620, height + 170 * mottle + 330 * steep))
    desert = smoothstep(0.62, 0.78, site.dry + 0.1 * mottle) * (1 - farms.pivot)
    sand = np.maximum(waters.beach, desert)
    firm = smoothstep(0.2, 0.08, steep) * (1 - waters.still) * (waters.flowing < 0.3)
    built = build_up(at, planet.towns, x, y, gsd, firm)
    road_far, road_half = planet.roads.near(x, y)
    crown, tone = _canopy(planet.noise, site)
    tall = np.maximum(wood, farms.hedge) * crown * (16 + 5 * conifer) * (1 - built.share)
    ground = Ground(
        gsd=gsd,
        label=np.zeros(x.shape, dtype=np.uint8),
        height=waters.surface,
        tall=np.maximum(tall, built.tall) * (1 - waters.water),
        dry=site.dry,
        soil=0.6 * broad + 0.5 * patch,
        lush=0.5 * patch + 0.5 * mottle,
        field=farms.field,
        crop=farms.crop,
        crop_bits=farms.bits,
        in_field=0.6 * mottle + 0.4 * crags,
        rows=farms.rows,
        pivot=farms.pivot,
        hedge=farms.hedge,
        track=farms.track * (1 - wood),
        forest=wood,
        conifer=conifer,
        crown=crown + 0.45 * tone,
        rock=rock,
        sand=sand,
        ripple=site.ripple,
        wet=waters.wet,
        reed=smoothstep(-1.1, 0.9, 0.5 * crags + 0.8 * mottle),
        road=cover(road_half, road_far, gsd) * (1 - waters.still),
        water=waters.water,
        depth=waters.depth,
        murky=waters.murky,
        foam=waters.foam,
        built=built,
    )
    _name_classes(ground, (height > 1020 + 110 * patch) | (rock > 0.5))
    return ground


def _name_classes(ground: Ground, mountain: Bools) -> None:
    """Set the true class; later assignments cover earlier ones."""
    label = ground.label
    label[:] = GRASSLAND
    label[(ground.field > 0.5) & (ground.crop != MEADOW)] = CROPLAND
    label[mountain] = MOUNTAIN
    label[(ground.sand > 0.5) | ((ground.dry > 0.72) & (ground.field < 0.5))] = BARE
    label[ground.wet > 0.5] = WETLAND
    label[ground.forest > 0.5] = FOREST
    label[ground.built.share > 0.5] = TOWN
    label[ground.water > 0.5] = WATER


def _woods(site: Site, waters: Waters, farms: Farms) -> Floats32:
    """Compute the share of forest: on slopes and hills, in copses of a plot, along rivers."""
    steep, mottle, dry = site.at["steep"], site.mottle, site.dry
    climb = 1.5 * smoothstep(0.05, 0.26, steep) + 0.5 * smoothstep(120, 420, site.height)
    stand = site.at["stand"] + climb - 2.5 * dry - 0.3 * mottle
    copse = unit(farms.plot.bits, 6) < 0.10 + 0.10 * smoothstep(0, 1.5, stand)
    copse = copse & (farms.plot.width < 220)
    inside = cover(farms.plot.edge - 4, np.zeros_like(steep), site.gsd)
    bank = smoothstep(55, 25, waters.river - waters.river_half) * (waters.river_half > 0)
    bank = bank * smoothstep(-0.7, 0.2, mottle) * (1 - 0.7 * waters.wet) * (1 - dry)
    wood = smoothstep(1.05, 1.25, stand)
    wood = np.maximum(wood, copse * farms.field * inside * (1 - farms.pivot))
    wood = np.maximum(wood, np.float32(0.9) * bank)
    wood *= smoothstep(1130, 930, site.height + 110 * site.at["patch"] + 40 * mottle)
    wood *= (1 - waters.beach) * smoothstep(0.72, 0.6, steep + 0.05 * site.crags)
    wood *= np.where(waters.wet > 0.5, np.float32(0.15), np.float32(1))
    return np.asarray(wood)


def _canopy(noise: Noise, site: Site) -> tuple[Floats32, Floats32]:
    """Compute height (0 to 1) and tone of the canopy, with single crowns if resolved."""
    if site.fine:
        dome, bits = crowns(56, site.x, site.y, 7.5)
        return dome, unit(bits, 9) - np.float32(0.5)
    grain = noise.at(57, site.x, site.y, 60, 0.6, site.gsd)
    crown: Floats32 = np.clip(0.62 + 0.16 * grain, 0.1, 1)
    return crown, np.float32(0.25) * grain
