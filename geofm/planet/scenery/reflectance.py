"""Surface reflectance on a date: surfaces are painted in order, then lit by the sun."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geofm.planet.scenery import spectra as sp
from geofm.planet.scenery.farms import ORCHARD, RAPE
from geofm.planet.scenery.landcover import STRIP, Ground, rows_of
from geofm.planet.scenery.noise import smoothstep, unit
from geofm.types import Floats32


@dataclass(frozen=True)
class Sun:
    """The direction of the sun: azimuth clockwise from north and elevation, in degrees."""

    azimuth: float
    elevation: float


@dataclass(frozen=True)
class Season:
    """A season: day of the year, sun, snow line in metres, and drought (0 to 1)."""

    day: float
    sun: Sun
    snow_line: float
    drought: float = 0.0


def season_of(day: float, latitude: float = 45.0, drought: float = 0.0) -> Season:
    """Compute sun and snow line of a day at 10:30 local time."""
    declination = math.radians(-23.44 * math.cos(2 * math.pi * (day + 10) / 365.25))
    phi, hour = math.radians(latitude), math.radians(-20.0)
    up = math.asin(
        math.sin(phi) * math.sin(declination)
        + math.cos(phi) * math.cos(declination) * math.cos(hour)
    )
    east = -math.cos(declination) * math.sin(hour)
    north = math.cos(phi) * math.sin(declination) - math.sin(phi) * math.cos(
        declination
    ) * math.cos(hour)
    azimuth = math.degrees(math.atan2(east, north)) % 360
    winter = 0.5 + 0.5 * math.cos(2 * math.pi * (day - 35) / 365.25)
    return Season(day, Sun(azimuth, math.degrees(up)), 2450 - 1500 * winter**1.3, drought)


class Canvas:
    """Reflectance, shape (5, H, W), on which surfaces are painted."""

    def __init__(self, base: Floats32) -> None:
        self.values = base

    def paint(self, share: Floats32, colour: Floats32) -> None:
        """Cover a share of each pixel with a colour, shape (5,) or (5, H, W)."""
        if not share.any():
            return
        tone = colour[:, None, None] if colour.ndim == 1 else colour
        self.values += share * (tone - self.values)


def blend(share: Floats32, a: sp.Spectrum | Floats32, b: sp.Spectrum | Floats32) -> Floats32:
    """Mix spectra, shape (5,) or (5, H, W), by a share (H, W); 1 gives ``b``."""
    low = a[:, None, None] if a.ndim == 1 else a
    high = b[:, None, None] if b.ndim == 1 else b
    mixed: Floats32 = (low + np.clip(share, 0, 1) * (high - low)).astype(np.float32)
    return mixed


def reflect(ground: Ground, season: Season, reach: int = 24) -> Floats32:
    """Compute the reflectance of the ground without clouds, seen from above.

    Args:
        ground: The ground.
        season: The season.
        reach: Longest shadow in pixels.

    Returns:
        Reflectance, shape (5, H, W).
    """
    lit = light(ground, season.sun, reach)
    height, width = lit.shape
    values = np.empty((len(sp.BANDS), height, width), dtype=np.float32)
    step = max(1, STRIP // width)
    for at in range(0, height, step):
        rows = slice(at, at + step)
        values[:, rows] = _paint(rows_of(ground, rows), season, lit[rows])
    return values


def _paint(ground: Ground, season: Season, lit: Floats32) -> Floats32:
    """Paint all surfaces in order, apply the light, and add snow."""
    day = season.day
    green_grass = sp.grass_green(day) - 0.4 * season.drought
    soil = blend(0.5 + 0.45 * ground.soil, sp.SOIL_DARK, blend(ground.dry, sp.SOIL, sp.SOIL_PALE))
    soil = blend(0.35 * smoothstep(0.3, 1.6, ground.soil), soil, sp.SOIL_RED)
    lush = np.clip(green_grass + 0.22 * ground.lush - 0.8 * ground.dry, 0, 1)
    alpine = smoothstep(900, 1500, ground.height)
    turf = blend(lush, sp.HAY, sp.GRASS)
    turf = blend(0.75 * alpine, turf, blend(lush, sp.HAY * 0.8, sp.TURF))
    bare = np.clip(0.10 + 0.1 * ground.in_field + 0.75 * ground.dry, 0, 0.92)
    canvas = Canvas(blend(bare, turf, soil))
    _paint_fields(canvas, ground, season, soil)
    dunes = blend(smoothstep(-0.1, 0.12, np.abs(ground.ripple)), sp.GRAVEL, sp.DUNE)
    dunes *= 1 + 0.10 * ground.soil + 0.22 * ground.ripple + 0.03 * ground.in_field
    sand = blend(ground.dry, sp.BEACH, dunes)
    canvas.paint(ground.sand, sand)
    _paint_forest(canvas, ground, season)
    rocks = blend(0.5 + 0.5 * ground.in_field, sp.ROCK, sp.SCREE) * (1 + 0.16 * ground.soil)
    rocks = blend(0.3 * smoothstep(-0.2, 1.0, ground.lush), rocks, sp.TURF)
    canvas.paint(ground.rock * (0.82 + 0.18 * ground.reed), rocks)
    reed_green = float(
        np.interp(day, [0, 100, 165, 250, 310, 366], [0.1, 0.15, 0.95, 0.9, 0.2, 0.1])
    )
    marsh = blend(np.full_like(ground.wet, reed_green), sp.REED_DRY, sp.REED)
    marsh *= 0.85 + 0.4 * ground.reed
    marsh = blend(0.85 * smoothstep(0.22, 0.08, ground.reed), marsh, sp.LAKE * 1.2)
    canvas.paint(ground.wet, marsh)
    _paint_town(canvas, ground, season)
    canvas.paint(ground.road * 0.9, sp.ASPHALT)
    _paint_water(canvas, ground)
    values = canvas.values * lit
    cold = ground.height + 130 * ground.in_field - 60 * ground.rock
    white = smoothstep(season.snow_line - 60, season.snow_line + 140, cold) * (1 - ground.water)
    white *= 1 - 0.72 * ground.forest
    steep_rock = ground.rock * smoothstep(1.0, 0.35, lit)
    white *= 1 - 0.5 * steep_rock
    snow = sp.SNOW[:, None, None] * (0.25 + 0.75 * np.clip(lit, 0, 1.25))
    values += white * (snow - values)
    # Skylight makes shadows bluish instead of black.
    values[0] += 0.006
    values[1] += 0.003
    return np.asarray(np.clip(values, 0.001, 1.2))


def _paint_fields(canvas: Canvas, ground: Ground, season: Season, soil: Floats32) -> None:
    """Paint crops and tracks."""
    shift = (unit(ground.crop_bits, 21) - 0.5) * 26
    vigour = 0.82 + 0.3 * unit(ground.crop_bits, 22) + 0.10 * ground.in_field
    green, dry = sp.growth(ground.crop, (season.day + shift).astype(np.float32))
    green = np.clip(green * vigour - 0.25 * season.drought * (1 - ground.pivot), 0, 1)
    tilled = soil * (0.86 + 0.34 * unit(ground.crop_bits, 23)) * (1 + 0.05 * ground.in_field)
    orchard = ground.crop == ORCHARD
    green = np.where(orchard, green * (0.35 + 0.65 * ground.rows), green)
    green = np.where(orchard, green, green * (1 - 0.35 * ground.rows))
    leaf = blend(unit(ground.crop_bits, 24), sp.LEAF, sp.GRASS)
    in_flower = math.exp(-(((season.day - 122) / 14) ** 2))
    leaf = blend(0.85 * in_flower * (ground.crop == RAPE), leaf, sp.FLOWER)
    colour = blend(
        np.clip(dry, 0, 0.9), tilled, sp.STRAW[:, None, None] * (0.9 + 0.1 * ground.soil)
    )
    colour = blend(green, colour, leaf)
    canvas.paint(ground.field, colour)
    canvas.paint(ground.track, sp.TRACK)


def _paint_forest(canvas: Canvas, ground: Ground, season: Season) -> None:
    """Paint forest and hedges."""
    out, turned = sp.leaves(season.day)
    spread = np.clip(turned + 0.35 * (ground.crown - 0.5) * (turned > 0), 0, 1)
    broad = blend(spread, sp.BROADLEAF, sp.AUTUMN)
    broad = blend(np.full_like(ground.forest, 1 - out), broad, sp.TWIGS)
    trees = blend(ground.conifer, broad, sp.NEEDLE)
    trees *= 0.62 + 0.62 * ground.crown
    canvas.paint(np.maximum(ground.forest, 0.9 * ground.hedge), trees)


def _paint_town(canvas: Canvas, ground: Ground, season: Season) -> None:
    """Paint lawns, streets, trees and roofs."""
    built = ground.built
    if not built.share.any():
        return
    lawn = blend(np.full_like(built.share, sp.grass_green(season.day)), sp.HAY, sp.GRASS)
    canvas.paint(built.share, lawn)
    canvas.paint(built.paved, blend(unit(built.roof_bits, 31), sp.ASPHALT * 1.2, sp.CONCRETE))
    canvas.paint(built.street * 0.92, sp.ASPHALT)
    out, _ = sp.leaves(season.day)
    canvas.paint(built.tree * (0.3 + 0.6 * out), sp.BROADLEAF * 1.1)
    draw = unit(built.roof_bits, 32)
    kinds = np.where(
        built.works > 0.5, np.searchsorted(sp.WORKS, draw), np.searchsorted(sp.HOUSES, draw)
    )
    tone = 0.75 + 0.5 * unit(built.roof_bits, 33)
    canvas.paint(built.roof, np.moveaxis(sp.ROOFS[np.minimum(kinds, 5)], -1, 0) * tone)


def _paint_water(canvas: Canvas, ground: Ground) -> None:
    """Paint water by its depth, and foam."""
    depth = np.clip(ground.depth, 0, 60)
    through = np.exp(-sp.CLARITY[:, None, None] * depth)
    inland = ground.height > 0.5
    deep = blend(inland.astype(np.float32), sp.DEEP, sp.LAKE)
    bottom = sp.SHALLOW[:, None, None] * (0.8 + 0.25 * ground.reed)
    colour = deep + (bottom - deep) * through * np.where(inland, 0.35, 0.9)
    colour = blend(0.7 * ground.murky, colour, sp.TURBID)
    colour = blend((ground.depth < 0).astype(np.float32), colour, sp.TURBID * 0.75)  # rivers
    colour *= 1 + 0.05 * ground.in_field
    canvas.paint(ground.water, colour)
    canvas.paint(ground.foam * 0.5 * (ground.depth > 0.1) * (ground.depth < 3), sp.FOAM)


def light(ground: Ground, sun: Sun, reach: int) -> Floats32:
    """Compute the brightness factor of slopes and shadows; 1 on flat open ground."""
    azimuth, elevation = math.radians(sun.azimuth), math.radians(sun.elevation)
    fine = ground.gsd < 5
    surface = ground.height + (ground.tall if fine else 0.35 * ground.tall)
    gy, gx = np.gradient(surface, ground.gsd)
    east = math.sin(azimuth) * math.cos(elevation)
    north = math.cos(azimuth) * math.cos(elevation)
    up = math.sin(elevation)
    # Rows run southwards, so ground that rises with the row number faces north.
    cosine = (up - east * gx + north * gy) / np.sqrt(1 + gx**2 + gy**2)
    direct = np.clip(cosine, 0, None) / up
    direct = np.minimum(direct, 2.2) ** (0.75 if not fine else 0.55)
    shade = cast_shadow(ground.height + ground.tall, ground.gsd, sun, reach)
    diffuse = 0.24
    lit: Floats32 = (diffuse + (1 - diffuse) * direct * (1 - shade)).astype(np.float32)
    return lit


def cast_shadow(surface: Floats32, gsd: float, sun: Sun, reach: int) -> Floats32:
    """Compute the share of each pixel that is in shadow, 0 to 1."""
    azimuth, elevation = math.radians(sun.azimuth), math.radians(sun.elevation)
    rise = math.tan(elevation) * gsd
    steps = [1, 2, 3, 4, 6, 8, 11, 14, 18, 23] if gsd < 5 else [1, 2, 3, 5, 8, 12, 17, 23]
    rows, wide = surface.shape
    highest = np.full(surface.shape, -1e9, dtype=np.float32)
    for step in (number for number in steps if number <= reach):
        dy, dx = round(-math.cos(azimuth) * step), round(math.sin(azimuth) * step)
        down, up = slice(max(0, -dy), rows - max(0, dy)), slice(max(0, dy), rows - max(0, -dy))
        west, east = slice(max(0, -dx), wide - max(0, dx)), slice(max(0, dx), wide - max(0, -dx))
        ray = surface[up, east] - np.float32(rise * math.hypot(dy, dx))
        np.maximum(highest[down, west], ray, out=highest[down, west])
    soft = max(0.6 * gsd * math.tan(elevation), 0.8)
    shadow: Floats32 = np.clip((highest - surface) / np.float32(soft), 0, 1)
    return shadow
