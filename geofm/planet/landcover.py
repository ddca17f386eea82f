"""What covers the ground: a function of world coordinates, the same for every sensor and date.

``survey`` looks at points of the world and returns all that light will need: relief, surfaces and
how much of each pixel they take. Colours and seasons come later, in ``reflectance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from geofm.planet.built import Built, build_up
from geofm.planet.fields import Fields, make_fields
from geofm.planet.mosaic import Bits, bearing, blocks, cover, crowns, plots
from geofm.planet.network import Lines, Town, make_rivers, make_roads, make_towns
from geofm.planet.noise import Coords, Floats, Noise, hash_ints, smoothstep, unit
from geofm.planet.terrain import CELL, SOUTH, WEST, Relief, km, make_relief

CLASSES = (
    "water", "forest", "cropland", "grassland", "town", "bare", "wetland", "mountain",
)  # fmt: skip
WATER, FOREST, CROPLAND, GRASSLAND, TOWN, BARE, WETLAND, MOUNTAIN = range(1, 9)
#: Points worked on at once, so that intermediate arrays stay in the processor's cache.
STRIP = 50_000
#: Crops, in the order of ``spectra.CALENDAR``.
WHEAT, MAIZE, RAPE, MEADOW, FALLOW, ORCHARD, BEET = range(7)

#: Lakes (kilometres east, north, radius, depth in metres) and towns (… , radius in metres) that
#: the served scenes look at.
LAKES = [(33.5, 26.5, 2.3, 26.0), (24.0, 15.0, 1.0, 12.0), (45.0, 20.5, 1.4, 18.0)]
TOWNS = [(27.5, 30.5, 2600.0), (13.8, 21.5, 1700.0), (24.5, 12.0, 900.0), (40.5, 12.5, 800.0)]


@dataclass(frozen=True)
class Planet:
    """All that is computed once for a seed."""

    noise: Noise
    relief: Relief
    spline: Floats
    fields: Fields
    rivers: Lines
    roads: Lines
    towns: tuple[Town, ...]


@lru_cache(maxsize=2)
def make_planet(seed: int) -> Planet:
    """The world of a seed; takes a few seconds, kept for the process."""
    noise = Noise(seed)
    relief = make_relief(noise, LAKES)
    spline = ndimage.spline_filter(relief.height, order=3, mode="nearest").astype(np.float32)
    towns = make_towns(relief, noise, TOWNS, 44)
    return Planet(
        noise, relief, spline, make_fields(noise, relief), make_rivers(relief, noise), make_roads(relief, towns),
        tuple(towns),
    )  # fmt: skip


@dataclass
class Ground:
    """Points of the world, all arrays of one shape [H, W].

    Shares (0..1) are of the pixel; ``label`` is the true class, 1 to 8 in the order of
    ``CLASSES``. ``height`` is of the ground or water surface, ``tall`` what stands on it (m).
    """

    gsd: float
    label: NDArray[np.uint8]
    height: Floats
    tall: Floats
    dry: Floats
    soil: Floats
    lush: Floats
    field: Floats
    crop: NDArray[np.uint8]
    crop_bits: Bits
    in_field: Floats
    rows: Floats
    pivot: Floats
    hedge: Floats
    track: Floats
    forest: Floats
    conifer: Floats
    crown: Floats
    rock: Floats
    sand: Floats
    ripple: Floats
    wet: Floats
    reed: Floats
    road: Floats
    water: Floats
    depth: Floats
    murky: Floats
    foam: Floats
    built: Built


def sample(raster: Floats, x: Coords, y: Coords, order: int = 1) -> Floats:
    """A raster on the relief's grid, at points."""
    at = [(y - SOUTH) / CELL - 0.5, (x - WEST) / CELL - 0.5]
    found = ndimage.map_coordinates(raster, at, order=order, mode="nearest", prefilter=False)
    return found.astype(np.float32)


def survey(planet: Planet, x: Coords, y: Coords, gsd: float) -> Ground:
    """The ground at points.

    Args:
        planet: from ``make_planet``.
        x: EPSG:32631 eastings, [H, W].
        y: northings, [H, W].
        gsd: pixel edge in metres: edges are softened to it, finer detail is left out.
    """
    step = max(1, STRIP // x.shape[1])
    strips = [slice(at, at + step) for at in range(0, len(x), step)]
    return join([_survey(planet, x[rows], y[rows], gsd) for rows in strips])


def join(parts: Sequence[Ground]) -> Ground:
    """Grounds one below the other."""
    values: dict[str, Any] = {"gsd": parts[0].gsd}
    for name in (f.name for f in fields(Ground) if f.name not in ("gsd", "built")):
        values[name] = np.concatenate([getattr(part, name) for part in parts])
    values["built"] = Built(
        *(np.concatenate([getattr(part.built, f.name) for part in parts]) for f in fields(Built))
    )
    return Ground(**values)


def rows_of(ground: Ground, rows: slice) -> Ground:
    """Some rows of a ground."""
    values: dict[str, Any] = {"gsd": ground.gsd}
    for name in (f.name for f in fields(Ground) if f.name not in ("gsd", "built")):
        values[name] = getattr(ground, name)[rows]
    values["built"] = Built(*(getattr(ground.built, f.name)[rows] for f in fields(Built)))
    return Ground(**values)


def _survey(planet: Planet, x: Coords, y: Coords, gsd: float) -> Ground:
    noise = planet.noise
    east, north = km(x, y)
    fine = gsd < 5
    at = planet.fields.at(x, y)
    steep, broad, patch, lake = at["steep"], at["broad"], at["patch"], at["lake"]
    mottle = noise.at(40, x, y, 700, 1.1, gsd)
    height = sample(planet.spline, x, y, 3)
    crags = noise.at(43, x, y, 420, 1.35, gsd)
    height += crags * np.minimum(40 * steep**1.15, 16)
    flat_land = smoothstep(0.07, 0.02, steep)
    height += flat_land * mottle * 0.9
    dry = smoothstep(36.5, 42.5, east + 1.2 * broad) * smoothstep(17.5, 11.5, north + 1.2 * patch)
    # dunes: wind-blown waves, steep on the lee side
    erg = dry * smoothstep(-0.35, 0.4, at["erg"]) * smoothstep(0.12, 0.05, steep)
    phase = (east * 0.92 + north * 0.39) / 0.36 + 1.1 * at["dune"]
    phase += 0.12 * mottle
    saw = phase - np.floor(phase)
    wave = np.where(saw < 0.72, smoothstep(0, 0.72, saw), smoothstep(1, 0.72, saw))
    height += erg * (14 + 6 * patch) * wave
    ripple = (wave - 0.5) * erg

    # water: the sea, lakes at their level, rivers along their lines
    river, river_half = planet.rivers.near(x, y)
    sea_deep = -height
    lake_deep = np.where(lake > -500, lake - height, -1000)
    depth = np.maximum(sea_deep, lake_deep)
    still = np.clip(depth / (0.05 * gsd) + 0.5, 0, 1)
    wide = river_half * (1 - 0.8 * dry) * (1 + 0.25 * crags)
    flowing = cover(wide, river, gsd) * np.where(wide > 1.5, 1, 0.45) * (1 - 0.85 * dry)
    at_sea = height < -0.2
    water = np.maximum(still, np.where(at_sea, 0, flowing)).astype(np.float32)
    shore_height = np.minimum(height, np.where(lake > -500, np.abs(height - lake), 1000))
    low = smoothstep(9, 3, shore_height)
    beach = (
        smoothstep(2.1, 0.8, height) * smoothstep(-0.4, 0.6, broad + 0.5 * patch) * (lake < -500)
    )

    # wetland: low ground by lakes, estuaries and slow rivers
    damp = 1.5 * low * (lake > -500) + 1.4 * smoothstep(200, 30, river) * smoothstep(3, 9, river_half)
    damp += 1.7 * smoothstep(0.0, 0.35, at["erg"]) * smoothstep(150, 70, height)
    damp += 0.4 * patch + 0.2 * mottle - 26 * steep
    wet = smoothstep(0.9, 1.2, damp) * (1 - dry) * smoothstep(0.09, 0.04, steep) * (1 - beach)

    # farm blocks, their plots, and what is grown there
    bend_x, bend_y = 60 * at["bend_x"], 60 * at["bend_y"]
    farm = blocks(48, x + bend_x, y + bend_y, 1350)
    small = unit(farm.bits, 11)
    width = 55 + 130 * small**1.5 + 90 * dry
    length = width * (1.3 + 2.6 * unit(farm.bits, 12))
    plot = plots(farm.bits, x + bend_x, y + bend_y, width, length, bearing(farm.bits, 13))
    edge = np.minimum(plot.edge, farm.rim)
    pick = unit(plot.bits, 1)
    pasture = smoothstep(-0.1, 1.2, at["pasture"] + 2.2 * (steep > 0.07))
    pasture = np.clip(0.05 + 0.9 * pasture + 0.4 * smoothstep(300, 620, height), 0, 1)
    mixture = unit(farm.bits, 14)
    shares = np.cumsum(
        np.stack(
            [
                0.32 - 0.14 * mixture,
                0.14 + 0.16 * mixture,
                np.full_like(mixture, 0.14),
                np.full_like(mixture, 0.06),
                np.full_like(mixture, 0.1),
                np.full_like(mixture, 0.1),
            ]
        ),
        axis=0,
    )
    order = (WHEAT, MAIZE, RAPE, FALLOW, ORCHARD, BEET, MEADOW)
    drawn = unit(plot.bits, 2)
    crop = np.full(x.shape, MEADOW, dtype=np.uint8)
    for number in range(6)[::-1]:
        crop = np.where(drawn < shares[number], order[number], crop)
    meadow = pick < pasture
    crop = np.where(meadow, MEADOW, crop).astype(np.uint8)
    arable = smoothstep(0.17, 0.13, steep + 0.015 * mottle) * smoothstep(
        700, 560, height + 60 * patch
    )
    arable *= 1 - smoothstep(0.25, 0.4, dry + 0.1 * mottle)
    # irrigated circles at the rim of the dry land
    gx, gy = np.floor(x / 860), np.floor(y / 860)
    middle_east, middle_north = km((gx + 0.5) * 860, (gy + 0.5) * 860)
    ring = smoothstep(37.0, 38.5, middle_east) * smoothstep(45.5, 43.0, middle_east)
    ring *= smoothstep(16.0, 14.5, middle_north)
    off = np.hypot(x - (gx + 0.5) * 860, y - (gy + 0.5) * 860).astype(np.float32)
    circle_bits = hash_ints(51, gx, gy)
    radius = 260 + 150 * unit(circle_bits, 2)
    pivot = cover(radius, off, gsd) * (unit(circle_bits, 1) < 0.75 * ring)
    field = np.maximum(arable, pivot).astype(np.float32)
    wedge = np.floor(np.arctan2(y - (gy + 0.5) * 860, x - (gx + 0.5) * 860) * (2 / np.pi))
    split = unit(circle_bits, 3) < 0.35
    pivot_bits = hash_ints(52, circle_bits, np.where(split, wedge, 0))
    on_pivot = pivot > 0.5
    crop_bits = np.where(on_pivot, pivot_bits, plot.bits)
    kind = unit(pivot_bits, 5)
    pivot_crop = np.select([kind < 0.3, kind < 0.6, kind < 0.8], [WHEAT, MAIZE, BEET], FALLOW)
    crop = np.where(on_pivot, pivot_crop, crop).astype(np.uint8)

    # forest: on slopes and hills, in copses that keep to plots on the plain, along rivers
    climb = 1.5 * smoothstep(0.05, 0.26, steep) + 0.5 * smoothstep(120, 420, height)
    stand = at["stand"] + climb - 2.5 * dry - 0.3 * mottle
    copse = (unit(plot.bits, 6) < 0.10 + 0.10 * smoothstep(0, 1.5, stand)) & (plot.width < 220)
    bank = smoothstep(55, 25, river - river_half) * smoothstep(-0.7, 0.2, mottle) * (1 - 0.7 * wet)
    wood = smoothstep(1.05, 1.25, stand)
    wood = np.maximum(wood, copse * field * cover(-4, -edge, gsd) * (1 - pivot))
    wood = np.maximum(wood, 0.9 * bank * (1 - dry) * (river_half > 0))
    tree_line = smoothstep(1130, 930, height + 110 * patch + 40 * mottle)
    wood *= tree_line * (1 - beach) * smoothstep(0.72, 0.6, steep + 0.05 * crags)
    wood *= np.where(wet > 0.5, 0.15, 1)
    conifer = smoothstep(-0.4, 0.5, 0.9 * at["conifer"] + (height - 520) / 320)
    rock = smoothstep(0.62, 0.78, steep + 0.07 * crags)
    rock = np.maximum(rock, smoothstep(1150, 1620, height + 170 * mottle + 330 * steep))
    sand = np.maximum(beach, smoothstep(0.62, 0.78, dry + 0.1 * mottle) * (1 - pivot))

    built = build_up(
        at, planet.towns, x, y, gsd, smoothstep(0.2, 0.08, steep) * (1 - still) * (flowing < 0.3)
    )
    road_far, road_half = planet.roads.near(x, y)
    road = cover(road_half, road_far, gsd) * (1 - still)

    hedge_here = unit(plot.bits, 7) < 0.35 + 0.3 * pasture
    hedge = (
        cover(3.2 if fine else 4.5, edge, gsd)
        * hedge_here
        * (1 - dry)
        * smoothstep(-1.2, 0.3, mottle)
    )
    track = cover(2.0, farm.rim, gsd) * 0.9
    hedge, track = hedge * arable * (1 - track), track * arable * (1 - wood)

    if fine:
        dome, tree_bits = crowns(56, x, y, 7.5)
        crown = dome
        tone = unit(tree_bits, 9) - 0.5
    else:
        grain = noise.at(57, x, y, 60, 0.6, gsd)
        crown = np.clip(0.62 + 0.16 * grain, 0.1, 1).astype(np.float32)
        tone = 0.25 * grain
    rows_at = plot.along if fine else plot.along * 0
    rows = np.where(np.mod(rows_at, 20) < 2.2, 1, 0).astype(np.float32) if fine else rows_at
    orchard_row = np.mod(plot.along, 8.0 if fine else 40.0)
    rows = np.where(crop == ORCHARD, cover(1.9, np.abs(orchard_row - 4), gsd), rows).astype(
        np.float32
    )

    woody = np.maximum(wood, hedge)
    tall = woody * crown * (16 + 5 * conifer) * (1 - built.share)
    tall = np.maximum(tall, built.tall) * (1 - water)

    label = np.full(x.shape, GRASSLAND, dtype=np.uint8)
    label[(field > 0.5) & (crop != MEADOW)] = CROPLAND
    label[(height > 1020 + 110 * patch) | (rock > 0.5)] = MOUNTAIN
    label[sand > 0.5] = BARE
    label[(dry > 0.72) & (field < 0.5)] = BARE
    label[wet > 0.5] = WETLAND
    label[wood > 0.5] = FOREST
    label[built.share > 0.5] = TOWN
    label[water > 0.5] = WATER
    surface = np.where(still > 0.5, np.where(lake > -500, lake, 0), height)
    murky = smoothstep(200, 0, river) * smoothstep(9, 0, depth)
    plume = smoothstep(0.0, 2.4, broad + 0.5 * patch + 0.12 * mottle) * smoothstep(22, 1, depth)
    murky = np.maximum(murky, plume * np.where(lake > -500, 0.35, 1))
    foam = smoothstep(1.3, 0.2, np.abs(depth - 0.9 - 0.5 * crags)) * smoothstep(0.2, 1.3, mottle)
    return Ground(
        gsd=gsd, label=label, height=surface.astype(np.float32), tall=tall.astype(np.float32),
        dry=dry, soil=0.6 * broad + 0.5 * patch, lush=0.5 * patch + 0.5 * mottle,
        field=field, crop=crop, crop_bits=crop_bits, in_field=0.6 * mottle + 0.4 * crags,
        rows=rows, pivot=pivot.astype(np.float32), hedge=hedge.astype(np.float32),
        track=track.astype(np.float32), forest=wood.astype(np.float32), conifer=conifer,
        crown=(crown + 0.45 * tone).astype(np.float32), rock=rock, sand=sand.astype(np.float32),
        ripple=ripple.astype(np.float32), wet=wet.astype(np.float32),
        reed=smoothstep(-0.5, 0.7, crags + 0.6 * mottle), road=road.astype(np.float32), water=water,
        depth=depth.astype(np.float32), murky=murky.astype(np.float32),
        foam=(foam * (lake < -500)).astype(np.float32), built=built,
    )  # fmt: skip
