"""Reflectance of surfaces in five bands, and the growth of plants over the year.

The numbers are typical surface reflectances in Sentinel-2's bands 2, 3, 4, 8 and 11, estimated from
common spectral libraries. They make plausible pictures, but are no radiometric reference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geofm.types import Floats32

BANDS = ("blue", "green", "red", "nir", "swir16")

Spectrum = Floats32


def _s(*values: float) -> Spectrum:
    """Make a spectrum."""
    return np.array(values, dtype=np.float32)


SOIL = _s(0.085, 0.120, 0.160, 0.235, 0.310)
SOIL_RED = _s(0.075, 0.115, 0.185, 0.260, 0.330)
SOIL_PALE = _s(0.150, 0.195, 0.240, 0.310, 0.390)
SOIL_DARK = _s(0.055, 0.070, 0.090, 0.140, 0.200)
LEAF = _s(0.036, 0.096, 0.046, 0.470, 0.190)
GRASS = _s(0.046, 0.106, 0.066, 0.390, 0.220)
HAY = _s(0.092, 0.140, 0.160, 0.280, 0.320)
STRAW = _s(0.115, 0.170, 0.215, 0.320, 0.370)
FLOWER = _s(0.055, 0.185, 0.170, 0.430, 0.210)
BROADLEAF = _s(0.030, 0.070, 0.038, 0.390, 0.160)
AUTUMN = _s(0.040, 0.082, 0.108, 0.300, 0.210)
TWIGS = _s(0.050, 0.064, 0.078, 0.170, 0.190)
NEEDLE = _s(0.026, 0.050, 0.032, 0.230, 0.090)
REED = _s(0.042, 0.086, 0.060, 0.290, 0.140)
REED_DRY = _s(0.070, 0.095, 0.110, 0.210, 0.220)
DUNE = _s(0.125, 0.195, 0.270, 0.345, 0.430)
GRAVEL = _s(0.120, 0.165, 0.210, 0.260, 0.330)
BEACH = _s(0.200, 0.255, 0.295, 0.350, 0.390)
ROCK = _s(0.125, 0.140, 0.150, 0.190, 0.220)
SCREE = _s(0.165, 0.180, 0.195, 0.235, 0.270)
TURF = _s(0.045, 0.080, 0.070, 0.270, 0.250)
ASPHALT = _s(0.085, 0.092, 0.098, 0.120, 0.135)
CONCRETE = _s(0.165, 0.180, 0.195, 0.230, 0.250)
TRACK = _s(0.130, 0.165, 0.200, 0.260, 0.320)
DEEP = _s(0.044, 0.036, 0.018, 0.008, 0.004)
LAKE = _s(0.026, 0.036, 0.020, 0.010, 0.005)
TURBID = _s(0.060, 0.085, 0.080, 0.032, 0.010)
SHALLOW = _s(0.130, 0.185, 0.200, 0.210, 0.150)
FOAM = _s(0.300, 0.310, 0.310, 0.280, 0.150)
SNOW = _s(0.720, 0.720, 0.710, 0.640, 0.110)
CLOUD = _s(0.620, 0.610, 0.610, 0.640, 0.420)
#: Attenuation per metre of water, down and up again.
CLARITY = _s(0.10, 0.09, 0.42, 3.0, 9.0)
#: Roofs: tiles, slate, light flat roof, metal, gravel, old tiles.
ROOFS = np.stack([
    _s(0.090, 0.115, 0.200, 0.260, 0.280), _s(0.075, 0.080, 0.088, 0.105, 0.115),
    _s(0.250, 0.265, 0.280, 0.310, 0.300), _s(0.180, 0.190, 0.195, 0.215, 0.210),
    _s(0.130, 0.135, 0.145, 0.170, 0.190), _s(0.105, 0.120, 0.160, 0.210, 0.240),
])  # fmt: skip
#: Cumulated shares of the roofs among houses and among works.
HOUSES = (0.42, 0.58, 0.64, 0.68, 0.80, 1.0)
WORKS = (0.06, 0.20, 0.62, 0.86, 1.0, 1.0)

#: Days of the year on which a crop turns green, is full, starts to ripen, is ripe, is harvested.
#: Rows: wheat, maize, rape, meadow, fallow, orchard, beet (the order of ``farms``).
CALENDAR = np.array([
    [40, 115, 160, 188, 208],
    [135, 190, 235, 268, 285],
    [35, 95, 165, 190, 205],
    [45, 110, 190, 245, 400],
    [300, 350, 360, 365, 366],
    [85, 135, 265, 310, 400],
    [115, 175, 275, 315, 322],
], dtype=np.float32)  # fmt: skip
PEAK = np.array([0.95, 0.92, 0.92, 0.85, 0.12, 0.62, 0.95], dtype=np.float32)


def growth(crop: NDArray[np.uint8], day: Floats32) -> tuple[Floats32, Floats32]:
    """Compute the shares of green and of dry plants in fields.

    Args:
        crop: Number of the crop.
        day: Day of the year, with a shift of its own for each field.
    """
    sown, full, ripens, ripe, cut = (CALENDAR[:, k][crop] for k in range(5))
    rise = np.clip((day - sown) / (full - sown), 0, 1)
    fall = np.clip((day - ripens) / (ripe - ripens), 0, 1)
    green = PEAK[crop] * rise * rise * (3 - 2 * rise) * (1 - 0.92 * fall)
    dry = PEAK[crop] * fall * rise
    after = day > cut
    green = np.where(after, 0.04, green)
    dry = np.where(after, 0.45 * np.clip(1 - (day - cut) / 45, 0, 1), dry)
    # Winter crops are sown in autumn, and grass stays all year.
    green = np.where(
        (crop == 0) & (day > 290),
        0.25,
        np.where((crop == 0) & (day <= 60), np.maximum(green, 0.3), green),
    )
    green = np.where(
        (crop == 2) & (day > 265),
        0.45,
        np.where((crop == 2) & (day <= 60), np.maximum(green, 0.4), green),
    )
    autumn = np.clip((day - 255) / 40, 0, 1)
    meadow = np.where(day > 200, np.maximum(green, 0.5 * autumn + 0.32), np.maximum(green, 0.5))
    green = np.where(crop == 3, meadow, green)
    dry = np.where(crop == 3, np.clip(0.9 - green, 0, 0.7), dry)
    return green.astype(np.float32), dry.astype(np.float32)


def leaves(day: float) -> tuple[float, float]:
    """Return the share of leaves on broadleaved trees, and of leaves in autumn colour (0 to 1)."""
    out = float(np.clip((day - 92) / 40, 0, 1) * np.clip((322 - day) / 35, 0, 1))
    turned = float(np.clip((day - 262) / 35, 0, 1))
    return out, turned


def grass_green(day: float) -> float:
    """Return the greenness of grassland: best in late spring, parched in August, pale in winter."""
    days = [0, 60, 120, 165, 215, 250, 290, 330, 366]
    level = [0.45, 0.5, 0.95, 0.9, 0.5, 0.5, 0.7, 0.55, 0.45]
    return float(np.interp(day, days, level))
