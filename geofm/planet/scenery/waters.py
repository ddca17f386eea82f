"""Sea, lakes and rivers, and the wetland around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geofm.planet.catalog.site import Planet, Site
from geofm.planet.scenery.mosaic import cover
from geofm.planet.scenery.noise import smoothstep
from geofm.types import Floats32


@dataclass(frozen=True)
class Waters:
    """Water at points, shape (H, W).

    Attributes:
        river: Distance to the nearest stream in metres.
        river_half: Half the width of that stream in metres.
        still: Share of sea or lake in the pixel.
        flowing: Share of rivers in the pixel.
        water: Share of all water in the pixel.
        depth: Depth of sea or lake in metres; negative on land.
        surface: Height of the ground or of still water.
        beach, wet: Shares of sand by the sea and of wetland.
        murky: Silt in the water, 0 to 1.
        foam: Share of breaking waves.
    """

    river: Floats32
    river_half: Floats32
    still: Floats32
    flowing: Floats32
    water: Floats32
    depth: Floats32
    surface: Floats32
    beach: Floats32
    wet: Floats32
    murky: Floats32
    foam: Floats32


def find_water(planet: Planet, site: Site) -> Waters:
    """Compute the water at a site."""
    height, mottle, dry = site.height, site.mottle, site.dry
    patch, broad, level, steep = (site.at[k] for k in ("patch", "broad", "lake", "steep"))
    river, river_half = planet.rivers.near(site.x, site.y)
    by_lake = level > -500
    depth = np.maximum(-height, np.where(by_lake, level - height, np.float32(-1000)))
    still = cover(depth, np.zeros_like(depth), 0.05 * site.gsd)
    wide = river_half * (1 - 0.8 * dry) * (1 + 0.25 * site.crags)
    flowing = cover(wide, river, site.gsd) * np.where(wide > 1.5, np.float32(1), np.float32(0.45))
    flowing = flowing * (1 - 0.85 * dry)
    water = np.maximum(still, np.where(height < -0.2, 0, flowing))

    beach = smoothstep(2.1, 0.8, height) * smoothstep(-0.4, 0.6, broad + 0.5 * patch) * ~by_lake
    shore = np.minimum(height, np.where(by_lake, np.abs(height - level), np.float32(1000)))
    # Wetland: low ground by lakes and slow rivers, and basins near the sea.
    damp = 1.5 * smoothstep(9, 3, shore) * by_lake
    damp = damp + 1.4 * smoothstep(200, 30, river) * smoothstep(3, 9, river_half)
    damp += 1.7 * smoothstep(0.0, 0.35, site.at["erg"]) * smoothstep(150, 70, height)
    damp += 0.4 * patch + 0.2 * mottle - 26 * steep
    wet = smoothstep(0.9, 1.2, damp) * (1 - dry) * smoothstep(0.09, 0.04, steep) * (1 - beach)

    murky = smoothstep(200, 0, river) * smoothstep(9, 0, depth)
    plume = smoothstep(0.0, 2.4, broad + 0.5 * patch + 0.12 * mottle) * smoothstep(22, 1, depth)
    murky = np.maximum(murky, plume * np.where(by_lake, np.float32(0.35), np.float32(1)))
    surf = smoothstep(1.3, 0.2, np.abs(depth - 0.9 - 0.5 * site.crags))
    return Waters(
        river=river,
        river_half=river_half,
        still=still,
        flowing=flowing,
        water=water.astype(np.float32),
        depth=depth,
        surface=np.where(still > 0.5, np.where(by_lake, level, 0), height).astype(np.float32),
        beach=beach,
        wet=wet,
        murky=murky,
        foam=surf * smoothstep(0.2, 1.3, mottle) * ~by_lake,
    )
