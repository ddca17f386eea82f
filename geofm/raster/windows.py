"""Windows of a scene as integer counts, and measurements on them.

A band that is not on the scene's grid is resampled. The offset of a band is applied once, so that
reflectance is count × scale. Measurements: cloud, saturation, constant pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from data_catalog.sources import Cloud
from geofm.raster.resample import AxisWeights, axis_weights, resample, resample_nearest
from geofm.raster.scene import Channel, Scene, check_finite
from geofm.remote.quarantine import Quarantine
from geofm.types import Bools

#: Reflectance per count of floats, and of integers without a stated scale.
USUAL_SCALE = 1e-4
#: Plausible scales (reflectance per stored number) and largest offset (counts).
SCALES = (1e-8, 1e4)
MAX_OFFSET = 2**31
VISIBLE = ("red", "green", "blue")
#: Callback that receives a band's name, its stored numbers and their validity.
Seen = Callable[[str, NDArray[Any], Bools], None]


@dataclass(frozen=True)
class Radiometry:
    """Conversion of a band: count = stored * gain + add; reflectance = count * scale.

    Attributes:
        scale: Reflectance per count.
        gain: Counts per stored number; 1 for integers.
        add: Counts added to valid pixels (the column ``dn_offset``).
    """

    scale: float
    gain: float
    add: int


@dataclass(frozen=True)
class Strip:
    """A window of all bands.

    Attributes:
        counts: uint8 or uint16, 0 where a band has no data, shape (bands, height, width).
        valid: Where all bands have data, shape (height, width).
        classes: Codes of the cloud layer, shape (height, width); None without a layer.
    """

    counts: NDArray[Any]
    valid: Bools
    classes: NDArray[Any] | None

    def part(self, col: int, width: int) -> Strip:
        """Return some columns; the counts are contiguous, because they are hashed and written."""
        columns = slice(col, col + width)
        classes = None if self.classes is None else self.classes[:, columns]
        counts = np.ascontiguousarray(self.counts[:, :, columns])
        return Strip(counts, self.valid[:, columns], classes)


def chip_dtype(scene: Scene) -> np.dtype[Any]:
    """Return uint8 if all bands are uint8, else uint16.

    Raises:
        Quarantine: ``mixed_dtypes``, because pictures and reflectance have no common scale.
    """
    are_bytes = {channel.header.dtype == "uint8" for channel in scene.channels}
    if len(are_bytes) > 1:
        raise Quarantine("mixed_dtypes", "some bands are 8-bit pictures and others are not")
    return np.dtype(np.uint8 if are_bytes.pop() else np.uint16)


def radiometry(channel: Channel) -> Radiometry:
    """Return the conversion of a band.

    The offset in counts is ``round(offset / scale)``, e.g. -0.1 / 0.0001 = -1000 for Sentinel-2
    from baseline 04.00 on.

    Raises:
        Quarantine: ``bad_scale`` for a scale or an offset that is not plausible.
    """
    band, dtype = channel.band, channel.header.dtype
    floats = dtype.startswith("float")
    usual = 1 / 255 if dtype == "uint8" else band.usual_scale or USUAL_SCALE
    stated = band.scale or (1.0 if floats else usual)
    scale = USUAL_SCALE if floats else stated
    smallest, largest = SCALES
    if not smallest <= stated <= largest or abs(band.offset) > MAX_OFFSET * scale:
        raise Quarantine(
            "bad_scale", f"{band.name} has the scale {stated:g} and the offset {band.offset:g}"
        )
    return Radiometry(scale, stated / USUAL_SCALE if floats else 1.0, round(band.offset / scale))


def read_strip(
    scene: Scene, row: int, col: int, height: int, width: int, seen: Seen | None = None
) -> Strip:
    """Read a window of all bands.

    Args:
        scene: The open scene.
        row: Row of the upper left pixel on the scene's grid.
        col: Column of the upper left pixel.
        height: Height in pixels.
        width: Width in pixels.
        seen: Callback for each band's stored numbers, before any offset.

    Raises:
        Quarantine: The pixels can't be used.
    """
    dtype = chip_dtype(scene)
    counts = np.empty((len(scene.channels), height, width), dtype)
    valid = np.ones((height, width), np.bool_)
    for number, channel in enumerate(scene.channels):
        method = channel_method(scene, channel)
        stored, good = read_channel(scene, channel, (row, col, height, width), method)
        if seen is not None:
            seen(channel.band.name, stored, good)
        to_counts(stored, good, channel, counts[number])
        valid &= good
    classes = None
    if scene.layer is not None:
        classes, _ = read_channel(scene, scene.layer, (row, col, height, width), "nearest")
    return Strip(counts, valid, classes)


def channel_method(scene: Scene, channel: Channel) -> str:
    """Return the resampling method of a band; empty if it is on the grid already."""
    return scene.resampling if not on_grid(scene, channel) else ""


def on_grid(scene: Scene, channel: Channel) -> bool:
    """Check whether a band's pixels are the grid's."""
    transform, grid = channel.header.transform, scene.grid
    edge = transform[0]
    shifts = ((grid.west - transform[2]) / edge, (transform[5] - grid.north) / edge)
    return math.isclose(edge, grid.gsd, rel_tol=1e-9) and all(
        abs(shift - round(shift)) < 1e-6 for shift in shifts
    )


def read_channel(
    scene: Scene, channel: Channel, window: tuple[int, int, int, int], method: str
) -> tuple[NDArray[Any], Bools]:
    """Read the stored numbers of a band on the grid, and their validity."""
    rows, cols = axes(scene, channel, window, method)
    if isinstance(rows, AxisWeights) and isinstance(cols, AxisWeights):
        (top, bottom), (left, right) = rows.span, cols.span
        stored, good = read_native(channel, top, left, bottom - top, right - left)
        if method == "nearest":
            return resample_nearest(stored, good, rows, cols)
        values, valid = resample(stored, good, rows, cols)
        return (values if stored.dtype.kind == "f" else np.rint(values)), valid
    return read_native(channel, cast(int, rows), cast(int, cols), window[2], window[3])


def axes(
    scene: Scene, channel: Channel, window: tuple[int, int, int, int], method: str
) -> tuple[AxisWeights, AxisWeights] | tuple[int, int]:
    """Return for both axes of a window the band's first pixel, or its resampling weights."""
    row, col, height, width = window
    transform, grid = channel.header.transform, scene.grid
    edge = transform[0]
    east, south = (grid.west - transform[2]) / edge, (transform[5] - grid.north) / edge
    if on_grid(scene, channel):
        return row + round(south), col + round(east)
    band_height, band_width = channel.header.shape
    ratio = grid.gsd / edge
    return (
        axis_weights(row, height, ratio, south, band_height, method),
        axis_weights(col, width, ratio, east, band_width, method),
    )


def file_window(scene: Scene, channel: Channel, window: tuple[int, int, int, int]) -> Window | None:
    """Return the pixels of a band's file that a window of the grid needs; None outside the file."""
    method = "nearest" if channel is scene.layer else scene.resampling
    rows, cols = axes(scene, channel, window, method)
    if isinstance(rows, AxisWeights) and isinstance(cols, AxisWeights):
        (top, bottom), (left, right) = rows.span, cols.span
    else:
        top, left = cast(int, rows), cast(int, cols)
        bottom, right = top + window[2], left + window[3]
    return clip_to_file(channel, top, left, bottom, right)


def clip_to_file(channel: Channel, top: int, left: int, bottom: int, right: int) -> Window | None:
    """Return the part of a window that lies in the file; None if no part does."""
    rows, cols = channel.header.shape
    top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, rows), min(right, cols)
    if bottom <= top or right <= left:
        return None
    return Window(left, top, right - left, bottom - top)


def read_native(
    channel: Channel, row: int, col: int, height: int, width: int
) -> tuple[NDArray[Any], Bools]:
    """Read a window of the file; pixels past its edge are not valid."""
    window = clip_to_file(channel, row, col, row + height, col + width)
    if window is None:
        return np.zeros((height, width), channel.header.dtype), np.zeros((height, width), np.bool_)
    pixels = channel.raster.read(channel.band.index, window)
    check_finite(channel, pixels)
    valid = is_valid(channel, pixels, window)
    if pixels.shape == (height, width):
        return pixels, valid
    stored = np.zeros((height, width), channel.header.dtype)
    good = np.zeros((height, width), np.bool_)
    top, left = window.row_off - row, window.col_off - col
    part = (slice(top, top + window.height), slice(left, left + window.width))
    stored[part], good[part] = pixels, valid
    return stored, good


def is_valid(channel: Channel, pixels: NDArray[Any], window: Window) -> Bools:
    """Find pixels with data: by the nodata value, the mask, and NaN for floats."""
    nodata = channel.header.nodata
    if nodata is None or math.isnan(nodata):
        good = np.ones(pixels.shape, np.bool_)
    else:  # comparing integers with an integer is much faster than with a float
        whole = pixels.dtype.kind in "iu" and nodata.is_integer()
        good = np.asarray(pixels != (int(nodata) if whole else nodata))
    if pixels.dtype.kind == "f":
        good &= ~np.isnan(pixels)
    if channel.header.masked:
        good &= channel.raster.mask(channel.band.index, window)
    return good


def to_counts(stored: NDArray[Any], good: Bools, channel: Channel, into: NDArray[Any]) -> None:
    """Convert stored numbers to counts; if the band can lack data, only such pixels become 0."""
    conversion, dtype = radiometry(channel), into.dtype
    largest = int(np.iinfo(dtype).max)
    add = conversion.add
    plain = channel.header.nodata is None and not channel.header.masked and add == 0
    smallest = 0 if plain else 1
    if conversion.gain == 1.0 and stored.dtype == dtype and abs(add) < largest:
        # The usual case, in the band's own type: saturate first, then shift. The limits are rows,
        # because numpy takes four times as long with scalars.
        low, high = max(0, smallest - add), min(largest, largest - add)
        np.maximum(stored, np.full(stored.shape[-1], low, dtype), out=into)
        np.minimum(into, np.full(stored.shape[-1], high, dtype), out=into)
        into += dtype.type(add % (largest + 1))
        if not good.all():
            into[~good] = 0
        return
    if conversion.gain == 1.0 and stored.dtype.kind in "iu":
        wide = stored.astype(np.int64) + add
    else:
        safe = np.where(good, stored, 0).astype(np.float64)
        with np.errstate(over="ignore"):
            scaled = np.rint(safe * conversion.gain)
        wide = np.clip(scaled, -(2.0**40), 2.0**40).astype(np.int64) + add
    into[...] = np.where(good, np.clip(wide, smallest, largest), 0)


def cloud_shares(classes: NDArray[Any] | None, cloud: Cloud | None) -> tuple[float, float]:
    """Compute the shares of cloud and of cloud shadow; NaN without a cloud layer."""
    if classes is None or cloud is None:
        return math.nan, math.nan
    whole = classes if classes.dtype.kind == "u" else classes.astype(np.int64)
    shares = []
    for codes in (cloud.cloud, cloud.shadow):
        if cloud.codes == "bits":
            bits = sum(1 << bit for bit in codes) & int(np.iinfo(whole.dtype).max)
            hits = int(np.count_nonzero(whole & whole.dtype.type(bits)))
        else:
            hits = sum(int(np.count_nonzero(whole == code)) for code in set(codes))
        shares.append(hits / classes.size)
    return shares[0], shares[1]


def saturated_share(strip: Strip, bands: list[str], scales: list[float]) -> float:
    """Compute the share of saturated pixels.

    8 bit: 255 in all visible bands. 16 bit: reflectance of 1 or more in all visible bands, or the
    largest count in any band. Without visible bands all bands are used.
    """
    visible = [n for n, name in enumerate(bands) if name in VISIBLE] or list(range(len(bands)))
    counts = strip.counts
    largest = int(np.iinfo(counts.dtype).max)
    is_picture = counts.dtype == np.uint8
    bright = np.ones(counts.shape[1:], np.bool_)
    for n in visible:
        bright &= counts[n] >= (largest if is_picture else math.ceil(1 / scales[n]))
    if not is_picture:
        for band in counts:
            bright |= band == largest
    return float(np.count_nonzero(bright) / bright.size)


def is_constant(counts: NDArray[Any]) -> bool:
    """Check whether each band has a single value."""
    flat = counts.reshape(counts.shape[0], -1)
    if (flat[:, 0] != flat[:, -1]).any():
        return False
    return bool((flat.min(axis=1) == flat.max(axis=1)).all())
