"""Task images as unit pixels on the bands a model wants.

8-bit images become DN / 255, 16-bit ones reflectance / 0.3 (``geofm.raster.radiometry``). Bands
are matched by name. A band that a task lacks is filled with that band's mean over the pretraining
set, which the model's own normalisation turns into zero: it says "nothing known", where 0 would
say "black".
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
from geofm.runtime.native import torch

RGB: tuple[str, ...] = ("red", "green", "blue")
#: Reflectance per count where a 16-bit task does not say (Sentinel-2, harmonised Landsat).
USUAL_SCALE = 1e-4
#: Larger images are counted as unreadable: a header must not be able to exhaust the memory.
MOST_PIXELS = 64_000_000
_PICTURES = (".png", ".jpg", ".jpeg")


class ImageUnreadable(TaskError):
    """One image cannot be decoded; the task goes on without it."""


@dataclass(frozen=True)
class TaskImage:
    """One image: unit pixels [bands, height, width], their bands, and the stored pixels' digest."""

    unit: NDArray[np.float32]
    bands: tuple[str, ...]
    pixel_sha256: str


def read_image(path: Path, card: TaskCard) -> TaskImage:
    """Read one image of a task.

    Raises:
        ImageUnreadable: the file is damaged, too large, or not uint8 or uint16.
        TaskError: nothing says which bands the file has.
    """
    if path.suffix.lower() in _PICTURES:
        pixels, bands, scales = _read_picture(path), RGB, [1.0] * 3
        return TaskImage(to_unit(pixels, scales), bands, pixel_sha256(pixels))
    counts, named = _read_tiff(path)
    bands = tuple(card.bands) or named
    if len(bands) != len(counts):
        raise TaskError(
            f"evaluate.tasks: {path} has {len(counts)} bands, but {len(bands)} name(s) for them; "
            "list them as `bands` in task.json or as the TIFF's band descriptions"
        )
    scale = card.scale if card.scale is not None else USUAL_SCALE
    scales = scale if isinstance(scale, list) else [scale] * len(bands)
    if len(scales) != len(bands):
        raise TaskError(
            f"evaluate.tasks: `scale` in task.json has {len(scales)} values for {len(bands)} "
            "bands; give one number, or one per band"
        )
    return TaskImage(to_unit(counts, scales), bands, pixel_sha256(counts))


def _read_picture(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ImageUnreadable(f"{path} is larger than {MOST_PIXELS} pixels; cut it up")
            pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    # Pillow reports a broken PNG chunk as SyntaxError
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageUnreadable(f"{path} is not a readable PNG or JPEG ({error})") from error
    return pixels.transpose(2, 0, 1)


def _read_tiff(path: Path) -> tuple[NDArray[np.generic], tuple[str, ...]]:
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


def on_bands(
    unit: NDArray[np.float32], have: Sequence[str], want: Sequence[str], fill: Sequence[float]
) -> NDArray[np.float32]:
    """The bands wanted, in their order; one that is missing is filled.

    Args:
        unit: [bands, height, width].
        have: names of its bands.
        want: names of the bands to return.
        fill: value (unit) per wanted band where it is missing: the pretraining set's mean.
    """
    out = np.empty((len(want), *unit.shape[1:]), dtype=np.float32)
    for number, (name, value) in enumerate(zip(want, fill, strict=True)):
        out[number] = unit[list(have).index(name)] if name in have else value
    return out


def missing_bands(have: Sequence[str], want: Sequence[str]) -> list[str]:
    """The bands wanted that are not there."""
    return [name for name in want if name not in have]


def resize_square(unit: NDArray[np.float32], size_px: int) -> torch.Tensor:
    """The centre square of an image at [bands, size_px, size_px], bilinear with antialiasing."""
    _, height, width = unit.shape
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = torch.from_numpy(np.ascontiguousarray(unit[:, top : top + edge, left : left + edge]))
    if edge == size_px:
        return square
    return torch.nn.functional.interpolate(
        square[None], size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False
    )[0]
