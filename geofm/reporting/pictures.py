"""Chips as pictures: thumbnails for the page and sheets of them as files."""

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

#: Reflectance is shown with this gamma: forests and water are dark, and a screen makes them black.
GAMMA = 1.5
THUMB_PX = 128
#: Edge of each chip in the picture of a pair.
PAIR_PX = 384


def displayed(pixels: NDArray[Any], bands: Sequence[str], scale: Sequence[float]) -> NDArray[Any]:
    """A chip [bands, H, W] as it is shown: uint8 [H, W, 3]; 8-bit imagery is left as it is."""
    rgb = to_rgb(pixels, list(bands), list(scale))
    if pixels.dtype != np.uint8:
        rgb = rgb ** np.float32(1 / GAMMA)
    return np.asarray(np.round(rgb * 255).astype(np.uint8).transpose(1, 2, 0))


def chip_picture(chips: Artifact, row: Any, size_px: int = THUMB_PX) -> NDArray[np.uint8]:
    """A chip's picture [size_px, size_px, 3]; small chips keep hard pixels, large are averaged."""
    shown = displayed(read_chip(chips, row), list(row.bands), list(row.scale))
    if shown.shape[:2] == (size_px, size_px):
        return shown
    larger = size_px > max(shown.shape[:2])
    method = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(shown).resize((size_px, size_px), method), dtype=np.uint8)


def png(picture: NDArray[np.uint8]) -> bytes:
    """Pixels [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sheet(pictures: Sequence[NDArray[np.uint8]], columns: int, gap: int = 4) -> bytes:
    """A contact sheet as PNG: pictures of one size in rows on white."""
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].shape[:2]
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return png(canvas)


def pair(chips: Artifact, chip_ids: Sequence[str]) -> bytes | None:
    """Chips beside each other as PNG, in the order given; None where none has stored pixels."""
    table = chips.table("chips.parquet", ["chip_id", "part", "offset", "size", "bands", "scale"])
    table = stored(table[table["chip_id"].isin(list(chip_ids))]).set_index("chip_id", drop=False)
    rows = each(table.loc[[chip_id for chip_id in chip_ids if chip_id in table.index]])
    return sheet([chip_picture(chips, row, PAIR_PX) for row in rows], len(rows)) if rows else None


def spread(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most ``most`` rows, evenly spaced in the order of collection and id."""
    ordered = table.sort_values(["collection", "chip_id"], kind="stable")
    if len(ordered) <= most:
        return ordered
    rows = np.unique(np.linspace(0, len(ordered) - 1, most).round().astype(int))
    return ordered.iloc[rows]


def stored(table: pd.DataFrame) -> pd.DataFrame:
    """Rows whose pixels are in the artifact; a chip that was never cut has none."""
    return table[table["part"].fillna("").astype(str) != ""]
