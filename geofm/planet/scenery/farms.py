"""Farmland: crops on plots, hedges and tracks between them, and irrigated circles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geofm.planet.catalog.site import Site
from geofm.planet.scenery.mosaic import Bits, Plots, bearing, blocks, cover, plots
from geofm.planet.scenery.noise import hash_ints, smoothstep, unit
from geofm.planet.scenery.terrain import km
from geofm.types import Floats32, Indices

#: Crops, in the order of ``spectra.CALENDAR``.
WHEAT, MAIZE, RAPE, MEADOW, FALLOW, ORCHARD, BEET = range(7)
#: Metres between the centres of irrigated circles.
CIRCLES = 860.0


@dataclass(frozen=True)
class Farms:
    """Farmland at points, shape (H, W); shares are of the pixel.

    Attributes:
        plot: The plots, farmed or not.
        field: Share of farmed land.
        pivot: Share of farmed land in irrigated circles.
        crop: Number of the crop.
        bits: Hash of the plot or circle.
        rows: Tramlines and rows of trees, 0 to 1.
        hedge, track: Shares of hedges and tracks.
    """

    plot: Plots
    field: Floats32
    pivot: Floats32
    crop: NDArray[np.uint8]
    bits: Bits
    rows: Floats32
    hedge: Floats32
    track: Floats32


def lay_out(site: Site) -> Farms:
    """Compute the farmland of a site."""
    steep, dry, mottle, gsd = site.at["steep"], site.dry, site.mottle, site.gsd
    px, py = site.x + 60 * site.at["bend_x"], site.y + 60 * site.at["bend_y"]
    farm = blocks(48, px, py, 1350)
    width = 55 + 130 * unit(farm.bits, 11) ** 1.5 + 90 * dry
    length = width * (1.3 + 2.6 * unit(farm.bits, 12))
    plot = plots(farm.bits, px, py, width, length, bearing(farm.bits, 13))
    edge = np.minimum(plot.edge, farm.rim)
    pasture = smoothstep(-0.1, 1.2, site.at["pasture"] + 2.2 * (steep > 0.07))
    pasture = 0.05 + 0.9 * pasture + 0.4 * smoothstep(300, 620, site.height)
    crop = _rotation(unit(plot.bits, 2), unit(farm.bits, 14))
    crop = np.where(unit(plot.bits, 1) < pasture, MEADOW, crop)
    arable = smoothstep(0.17, 0.13, steep + 0.015 * mottle)
    arable = arable * smoothstep(700, 560, site.height + 60 * site.at["patch"])
    arable *= 1 - smoothstep(0.25, 0.4, dry + 0.1 * mottle)
    pivot, circle_bits, circle_crop = _circles(site)
    inside = pivot > 0.5
    grown = np.where(inside, circle_crop, crop).astype(np.uint8)

    hedge = cover(3.2 if site.fine else 4.5, edge, gsd) * smoothstep(-1.2, 0.3, mottle)
    hedge = hedge * (unit(plot.bits, 7) < 0.35 + 0.3 * np.minimum(pasture, 1)) * (1 - dry)
    track = cover(2.0, farm.rim, gsd) * np.float32(0.9)
    return Farms(
        plot=plot,
        field=np.maximum(arable, pivot),
        pivot=pivot,
        crop=grown,
        bits=np.where(inside, circle_bits, plot.bits),
        rows=_rows(plot, grown, site),
        hedge=hedge * arable * (1 - track),
        track=track * arable,
    )


def _rotation(drawn: Floats32, mixture: Floats32) -> Indices:
    """Choose a crop for each plot; farms differ in their shares of wheat and maize."""
    wheat = 0.32 - 0.14 * mixture
    maize = wheat + 0.14 + 0.16 * mixture
    bounds = [wheat, maize, maize + 0.14, maize + 0.20, maize + 0.30, maize + 0.40]
    order = [WHEAT, MAIZE, RAPE, FALLOW, ORCHARD, BEET]
    return np.select([drawn < bound for bound in bounds], order, MEADOW)


def _circles(site: Site) -> tuple[Floats32, Bits, Indices]:
    """Compute irrigated circles at the rim of the desert: share, hash and crop."""
    column, row = np.floor(site.x / CIRCLES), np.floor(site.y / CIRCLES)
    dx, dy = site.x - (column + 0.5) * CIRCLES, site.y - (row + 0.5) * CIRCLES
    east, north = km((column + 0.5) * CIRCLES, (row + 0.5) * CIRCLES)
    rim = smoothstep(37.0, 38.5, east) * smoothstep(45.5, 43.0, east)
    rim = rim * smoothstep(16.0, 14.5, north)
    bits = hash_ints(51, column, row)
    share = cover(260 + 150 * unit(bits, 2), np.hypot(dx, dy).astype(np.float32), site.gsd)
    share = share * (unit(bits, 1) < 0.75 * rim)
    # Some circles are sown by quarters.
    quarter = np.floor(np.arctan2(dy, dx) * (2 / np.pi))
    sown = hash_ints(52, bits, np.where(unit(bits, 3) < 0.35, quarter, 0))
    kind = unit(sown, 5)
    crop = np.select([kind < 0.3, kind < 0.6, kind < 0.8], [WHEAT, MAIZE, BEET], FALLOW)
    return share, sown, crop


def _rows(plot: Plots, crop: NDArray[np.uint8], site: Site) -> Floats32:
    """Compute tramlines, if they are resolved, and rows of fruit trees."""
    trees = np.mod(plot.along, np.float32(8.0 if site.fine else 40.0))
    lines = np.mod(plot.along, np.float32(20)) < (2.2 if site.fine else 0)
    orchard = cover(1.9, np.abs(trees - 4), site.gsd)
    return np.where(crop == ORCHARD, orchard, lines).astype(np.float32)
