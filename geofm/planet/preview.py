"""A picture of a world: the thumbnails of its scenes, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from geofm.planet.catalog.cog import png_bytes
from geofm.planet.world import world_items
from geofm.types import Json

#: Edge of a scene in the picture (pixels).
EDGE = 320


def contact_sheet(root: Path, columns: int = 7) -> NDArray[np.uint8]:
    """Arrange the thumbnails of all scenes of a built world, shape (3, height, width)."""
    items = sorted(world_items(root), key=_order)
    rows = -(-len(items) // columns)
    sheet = np.full((3, rows * (EDGE + 6), columns * (EDGE + 6)), 24, dtype=np.uint8)
    for number, item in enumerate(items):
        with rasterio.open(root / item["assets"]["thumbnail"]["href"]) as source:
            picture = source.read(out_shape=(3, EDGE, EDGE))
        row, column = divmod(number, columns)
        top, left = row * (EDGE + 6) + 3, column * (EDGE + 6) + 3
        sheet[:, top : top + EDGE, left : left + EDGE] = picture
    return sheet


def _order(item: Json) -> tuple[bool, str, str]:
    """Sort satellite scenes before aerial scenes, then by tile and id."""
    return item["collection"] == "planet-hr", item["id"].split("_")[1], item["id"]


def save_preview(root: Path, path: Path) -> None:
    """Write the contact sheet of a world as a PNG."""
    path.write_bytes(png_bytes(contact_sheet(root)))
