"""Images of a task as unit pixels in the bands that a model sees.

8-bit images become count / 255, 16-bit images reflectance / 0.3 (``geofm.raster.radiometry``).
Bands are matched by name. A band that a task lacks is filled with its mean over the pretraining
set. The model's own normalisation turns the mean into zero, which carries no information; a fill
value of 0 would mean black.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from geofm.evaluation.tasks import TaskCard, TaskError
from geofm.formats.npy import pixel_sha256
from geofm.raster.radiometry import to_unit
from geofm.raster.resample import resize_images
from geofm.runtime.native import torch

RGB: tuple[str, ...] = ("red", "green", "blue")
#: Reflectance per count if a 16-bit task does not specify it (Sentinel-2, harmonised Landsat).
DEFAULT_SCALE = 1e-4
#: Images with more pixels count as unreadable, so that a forged header cannot exhaust the memory.
MOST_PIXELS = 64_000_000
_PNG_AND_JPEG = (".png", ".jpg", ".jpeg")


class ImageUnreadable(TaskError):
    """An image cannot be decoded; the task is evaluated without it."""


@dataclass(frozen=True)
class TaskImage:
    """A decoded image.

    Attributes:
        unit: Pixels in unit space, shape (bands, height, width).
        bands: Names of the bands.
        pixel_sha256: Digest of the stored pixels.
    """

    unit: NDArray[np.float32]
    bands: tuple[str, ...]
    pixel_sha256: str


def read_task_image(path: Path, card: TaskCard) -> TaskImage:
    """Read an image of a task.

    Args:
        path: A PNG, JPEG or TIFF file.
        card: Card of the task, which may name bands and scale.

    Raises:
        ImageUnreadable: The file is damaged, too large, or not uint8 or uint16.
        TaskError: Neither the card nor the file names the bands.
    """
    if path.suffix.lower() in _PNG_AND_JPEG:
        pixels = _read_png_or_jpeg(path)
        return TaskImage(to_unit(pixels, [1.0] * 3), RGB, pixel_sha256(pixels))
    counts, band_names = _read_tiff(path)
    bands = tuple(card.bands) or band_names
    if len(bands) != len(counts):
        raise TaskError(
            f"evaluate.tasks: {path} has {len(counts)} bands, but {len(bands)} name(s) for them; "
            "list them as `bands` in task.json or as the TIFF's band descriptions"
        )
    scale = card.scale if card.scale is not None else DEFAULT_SCALE
    scales = scale if isinstance(scale, list) else [scale] * len(bands)
    if len(scales) != len(bands):
        raise TaskError(
            f"evaluate.tasks: `scale` in task.json has {len(scales)} values for {len(bands)} "
            "bands; give one number, or one per band"
        )
    return TaskImage(to_unit(counts, scales), bands, pixel_sha256(counts))


def _read_png_or_jpeg(path: Path) -> NDArray[np.uint8]:
    """Pixels as RGB, shape (3, height, width)."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageUnreadable(f"{path} is larger than {MOST_PIXELS} pixels; cut it up")
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
    # Pillow raises SyntaxError for a broken PNG chunk.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} is not a readable PNG or JPEG ({error})") from error
    return pixels.transpose(2, 0, 1)


def _read_tiff(path: Path) -> tuple[NDArray[np.generic], tuple[str, ...]]:
    """Pixels, shape (bands, height, width), and the band names in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, driver="GTiff") as file:
                if file.width * file.height * file.count > MOST_PIXELS:
                    raise ImageUnreadable(f"{path} is larger than {MOST_PIXELS} values; cut it up")
                pixels: NDArray[np.generic] = file.read()
                names = tuple(name.strip().lower() for name in file.descriptions if name)
    except RasterioError as error:
        raise ImageUnreadable(f"{path} is not a readable TIFF ({error})") from error
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ImageUnreadable(f"{path} has {pixels.dtype} pixels; write them as uint8 or uint16")
    if not names and len(pixels) == 3:
        names = RGB
    return pixels, names


def select_bands(
    unit: NDArray[np.float32], have: Sequence[str], want: Sequence[str], fill: Sequence[float]
) -> NDArray[np.float32]:
    """Select bands by name, and fill missing bands.

    Args:
        unit: Pixels in unit space, shape (bands, height, width).
        have: Names of its bands.
        want: Names of the bands to return, in order.
        fill: Unit-space value for each wanted band if it is missing.

    Returns:
        Pixels, shape (len(want), height, width).
    """
    out = np.empty((len(want), *unit.shape[1:]), dtype=np.float32)
    for number, (name, value) in enumerate(zip(want, fill, strict=True)):
        out[number] = unit[list(have).index(name)] if name in have else value
    return out


def missing_bands(have: Sequence[str], want: Sequence[str]) -> list[str]:
    """Names of wanted bands that are missing."""
    return [name for name in want if name not in have]


def centre_square(unit: NDArray[np.float32], size_px: int) -> torch.Tensor:
    """Cut the centre square of an image and resize it, bilinear with antialiasing.

    Args:
        unit: Pixels, shape (bands, height, width).
        size_px: Edge of the result, in pixels.

    Returns:
        Pixels, shape (bands, size_px, size_px).
    """
    _, height, width = unit.shape
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = torch.from_numpy(np.ascontiguousarray(unit[:, top : top + edge, left : left + edge]))
    return resize_images(square[None], size_px)[0]
