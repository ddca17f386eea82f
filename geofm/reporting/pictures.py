"""Chips as pictures: thumbnails for the page, and contact sheets as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from data_catalog.artifact import Artifact
from geofm.formats.npy import read_chip
from geofm.raster.radiometry import to_rgb
from geofm.runtime.text import each

#: Gamma for reflectance: without it forests and water are almost black on a screen.
GAMMA = 1.5
THUMB_PX = 128
#: Edge of each chip in a side-by-side picture.
PAIR_PX = 384


def display_pixels(
    pixels: NDArray[Any], bands: Sequence[str], scale: Sequence[float]
) -> NDArray[Any]:
    """Convert a chip to RGB for display.

    Args:
        pixels: Stored pixels, shape (bands, H, W). 8-bit pixels get no gamma.
        bands: Names of the bands.
        scale: Unit-space scale of each band.

    Returns:
        uint8, shape (H, W, 3).
    """
    rgb = to_rgb(pixels, list(bands), list(scale))
    if pixels.dtype != np.uint8:
        rgb = rgb ** np.float32(1 / GAMMA)
    return np.asarray(np.round(rgb * 255).astype(np.uint8).transpose(1, 2, 0))


def chip_picture(chips: Artifact, row: Any, size_px: int = THUMB_PX) -> NDArray[np.uint8]:
    """Read a chip as a picture of shape (size_px, size_px, 3).

    Enlarging repeats pixels, so that small chips keep their edges; reducing uses a Lanczos filter.
    """
    shown = display_pixels(read_chip(chips, row), list(row.bands), list(row.scale))
    if shown.shape[:2] == (size_px, size_px):
        return shown
    enlarge = size_px > max(shown.shape[:2])
    method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(shown).resize((size_px, size_px), method), dtype=np.uint8)


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """Encode a picture of shape (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def arrange_in_sheet(pictures: Sequence[NDArray[np.uint8]], columns: int, gap: int = 4) -> bytes:
    """Arrange pictures of one size in rows on white; returns a PNG."""
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].shape[:2]
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return encode_png(canvas)


def side_by_side(chips: Artifact, chip_ids: Sequence[str]) -> bytes | None:
    """Show chips beside each other in the given order; None if none has stored pixels."""
    table = chips.table("chips.parquet", ["chip_id", "part", "offset", "size", "bands", "scale"])
    table = with_pixels(table[table["chip_id"].isin(list(chip_ids))])
    table = table.set_index("chip_id", drop=False)
    rows = each(table.loc[[chip_id for chip_id in chip_ids if chip_id in table.index]])
    if not rows:
        return None
    return arrange_in_sheet([chip_picture(chips, row, PAIR_PX) for row in rows], len(rows))


def evenly_spaced(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """Select at most ``most`` chips, evenly spaced in the order of collection and id."""
    ordered = table.sort_values(["collection", "chip_id"], kind="stable")
    if len(ordered) <= most:
        return ordered
    rows = np.unique(np.linspace(0, len(ordered) - 1, most).round().astype(int))
    return ordered.iloc[rows]


def with_pixels(table: pd.DataFrame) -> pd.DataFrame:
    """Select the chips whose pixels are in the artifact; a chip that was not cut has none."""
    return table[table["part"].fillna("").astype(str) != ""]
