"""Encode images as COG and PNG bytes; the same pixels give the same bytes."""

from __future__ import annotations

import warnings

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile


def cog_bytes(
    image: NDArray[np.generic],
    epsg: int,
    west: float,
    north: float,
    gsd: float,
    *,
    nodata: int = 0,
    classes: bool = False,
    name: str = "",
) -> bytes:
    """Encode a band as a COG with overviews.

    Args:
        image: Pixels, shape (height, width).
        epsg: EPSG code of the CRS.
        west: Left edge in the CRS.
        north: Upper edge in the CRS.
        gsd: Pixel edge in the CRS.
        nodata: Value of pixels without data.
        classes: The pixels are codes, so overviews take the nearest value instead of means.
        name: Description of the band.
    """
    profile = {
        "driver": "COG", "dtype": image.dtype.name, "count": 1, "nodata": nodata,
        "height": image.shape[0], "width": image.shape[1], "crs": f"EPSG:{epsg}",
        "transform": Affine(gsd, 0, west, 0, -gsd, north), "blocksize": 256,
        "compress": "DEFLATE", "level": 2, "predictor": "NO" if classes else "YES",
        "overview_resampling": "NEAREST" if classes else "AVERAGE", "num_threads": 1,
    }  # fmt: skip
    with rasterio.Env(GDAL_NUM_THREADS=1), MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(image, 1)
            if name:
                target.set_band_description(1, name)
        return bytes(memory.read())


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Encode a picture (3, height, width) as PNG."""
    profile = {
        "driver": "PNG", "dtype": "uint8", "count": 3,
        "height": picture.shape[1], "width": picture.shape[2], "zlevel": 3,
    }  # fmt: skip
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a picture has no position
        with memory.open(**profile) as target:
            target.write(picture)
        return bytes(memory.read())
