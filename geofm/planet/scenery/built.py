"""Towns: districts, street blocks, lots and roofs, denser towards the centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geofm.planet.scenery.mosaic import Bits, bearing, blocks, cover, crowns, plots
from geofm.planet.scenery.network import Town
from geofm.planet.scenery.noise import hash_ints, smoothstep, unit
from geofm.types import Floats, Floats32


@dataclass
class Built:
    """Shares of each pixel by surfaces of a town, shape (H, W); ``share`` is the whole town."""

    share: Floats32
    roof: Floats32
    roof_bits: Bits
    works: Floats32
    street: Floats32
    paved: Floats32
    tree: Floats32
    tall: Floats32


def density(pull: Floats32, towns: Sequence[Town], x: Floats, y: Floats) -> Floats32:
    """Compute how urban points are: 1 and above in a centre, 0 at the rim of a town."""
    urban = np.zeros(x.shape, dtype=np.float32)
    west, east, south, north = x.min(), x.max(), y.min(), y.max()
    for town in towns:
        reach = 2.2 * town.radius
        if not (west - reach < town.x < east + reach and south - reach < town.y < north + reach):
            continue
        far = np.hypot(x - town.x, y - town.y).astype(np.float32) / np.float32(town.radius)
        urban = np.maximum(urban, 1.25 * (pull - far))
    result: Floats32 = np.clip(urban, 0, 1.6)
    return result


def build_up(
    at: dict[str, Floats32],
    towns: Sequence[Town],
    x: Floats,
    y: Floats,
    gsd: float,
    ground: Floats32,
) -> Built:
    """Compute the surfaces of towns at points; ``ground`` is 0 where nothing can be built."""
    urban = density(1 + 0.45 * at["pull"], towns, x, y) * ground
    none = np.zeros(x.shape, dtype=np.float32)
    if not (urban > 0).any():
        return Built(none, none, np.zeros(x.shape, np.uint32), none, none, none, none, none)
    px, py = x + 25 * at["street_x"], y + 25 * at["street_y"]
    district = blocks(63, px, py, 620)
    kind = unit(district.bits, 1)
    works = (kind > 0.84) & (urban < 0.95)
    width = np.where(works, 150, 60 + 45 * unit(district.bits, 2)).astype(np.float32)
    length = width * np.where(works, 1.3, 1.1 + 0.9 * unit(district.bits, 3))
    block = plots(district.bits, px, py, width, length, bearing(district.bits, 4))
    edge = np.minimum(block.edge, district.rim)
    urban_block = urban + 0.3 * (unit(block.bits, 5) - 0.5)
    share = (urban_block > 0.16).astype(np.float32)
    wide = np.where(works, 7.0, 4.0 + 1.5 * (urban > 1)).astype(np.float32)
    street = np.maximum(cover(wide, edge, gsd), cover(7.5, district.rim, gsd)) * share
    # Lots: the block is divided evenly, and most lots have a house.
    lot = np.where(works, 62, np.where(urban > 0.8, 19, 24)).astype(np.float32)
    nx, ny = np.maximum(np.round(block.width / lot), 1), np.maximum(np.round(block.length / lot), 1)
    u, v = block.across / block.width * nx, block.along / block.length * ny
    iu, iv = np.floor(u), np.floor(v)
    bits = hash_ints(64, block.bits, iu, iv)
    du = np.abs(u - iu - 0.5) * block.width / nx
    dv = np.abs(v - iv - 0.5) * block.length / ny
    tight = np.clip(urban, 0, 1.1)
    size_u = block.width / nx * (0.22 + 0.19 * tight + 0.10 * unit(bits, 6))
    size_v = block.length / ny * (0.22 + 0.19 * tight + 0.10 * unit(bits, 7))
    roof = np.minimum(cover(size_u, du, gsd), cover(size_v, dv, gsd))
    park = unit(block.bits, 8) < 0.06
    yard = (edge > 34) & (urban > 0.7) & ~works
    odds = np.where(works, 0.75, 0.5 + 0.5 * tight)
    roof = roof * (unit(bits, 9) < odds) * ~park * ~yard * share * (1 - street)
    tall = np.where(
        works, 9, 5 + 4 * unit(bits, 10) + 11 * smoothstep(0.6, 1.4, urban) * unit(bits, 11)
    )
    paved = np.where(works, 0.85, np.clip(0.25 + 0.6 * (urban - 0.3), 0.1, 0.85)) * ~park
    paved = (paved * share * np.where(yard, 0.3, 1)).astype(np.float32)
    if gsd < 5:
        dome, trees = crowns(65, x, y, 9)
        leafy = unit(trees, 2) < np.where(park, 0.7, 0.34 * (1 - 0.55 * tight))
        tree = dome * leafy * (1 - roof) * (1 - 0.8 * street) * share
    else:
        tree = np.where(park, 0.6, 0.3 * (1 - 0.6 * tight)) * (1 - roof) * (1 - street) * share
    tall = np.maximum(tall * roof, tree * 8)
    return Built(
        share, roof.astype(np.float32), bits, works.astype(np.float32), street.astype(np.float32),
        paved, tree.astype(np.float32), tall.astype(np.float32),
    )  # fmt: skip
