"""Windows of a scene as integer counts: resampled where needed, offset applied once, measured."""

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

Mask = NDArray[np.bool_]
#: Reflectance per count of floats and of integers whose scale nobody states.
USUAL_SCALE = 1e-4
#: Scales (reflectance per stored number) that are believed, and offsets (counts).
SCALES = (1e-8, 1e4)
MAX_OFFSET = 2**31
VISIBLE = ("red", "green", "blue")
#: Is shown a band's name, its stored numbers and where they are valid.
Seen = Callable[[str, NDArray[Any], Mask], None]


@dataclass(frozen=True)
class Radiometry:
    """From stored numbers to counts (stored * gain + add); reflectance is counts * scale.

    Attributes:
        gain: 1 for integers, which stay as they are but for the offset.
        add: counts added where a pixel is valid (the column ``dn_offset``).
    """

    scale: float
    gain: float
    add: int


@dataclass(frozen=True)
class Strip:
    """A window of all bands.

    Attributes:
        counts: [bands, height, width], uint8 or uint16; 0 where a band has no data.
        valid: [height, width], where all bands have data.
        classes: [height, width] of the cloud layer, None without one.
    """

    counts: NDArray[Any]
    valid: Mask
    classes: NDArray[Any] | None

    def part(self, col: int, width: int) -> Strip:
        """Some columns of it; counts in one piece, since they are hashed and written."""
        some = slice(col, col + width)
        classes = None if self.classes is None else self.classes[:, some]
        return Strip(np.ascontiguousarray(self.counts[:, :, some]), self.valid[:, some], classes)


def chip_dtype(scene: Scene) -> np.dtype[Any]:
    """uint8 when all bands are, else uint16.

    Raises:
        Quarantine: ``mixed_dtypes``: bytes and reflectance have no common scale.
    """
    kinds = {channel.header.dtype == "uint8" for channel in scene.channels}
    if len(kinds) > 1:
        raise Quarantine("mixed_dtypes", "some bands are 8-bit pictures and others are not")
    return np.dtype(np.uint8 if kinds.pop() else np.uint16)


def radiometry(channel: Channel) -> Radiometry:
    """Scale, gain and offset of a band.

    The offset in counts is ``round(offset / scale)``, e.g. -0.1 / 0.0001 = -1000 for Sentinel-2
    from baseline 04.00 on.

    Raises:
        Quarantine: ``bad_scale`` for a scale or an offset that no sensor has.
    """
    band, dtype = channel.band, channel.header.dtype
    floats = dtype.startswith("float")
    usual = 1 / 255 if dtype == "uint8" else band.usual_scale or USUAL_SCALE
    stated = band.scale or (1.0 if floats else usual)
    scale = USUAL_SCALE if floats else stated
    least, most = SCALES
    if not least <= stated <= most or abs(band.offset) > MAX_OFFSET * scale:
        raise Quarantine(
            "bad_scale", f"{band.name} has the scale {stated:g} and the offset {band.offset:g}"
        )
    return Radiometry(scale, stated / USUAL_SCALE if floats else 1.0, round(band.offset / scale))


def read_strip(
    scene: Scene, row: int, col: int, height: int, width: int, seen: Seen | None = None
) -> Strip:
    """A window of the scene's grid.

    Args:
        scene: open.
        row: of the window's upper left pixel.
        col: the same.
        height: pixels.
        width: pixels.
        seen: is shown each band's stored numbers before any offset.

    Raises:
        Quarantine: for what is found wrong with the pixels.
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
    """How a band is brought to the grid: empty where it is on the grid already."""
    return scene.resampling if not on_grid(scene, channel) else ""


def on_grid(scene: Scene, channel: Channel) -> bool:
    """Whether a band's pixels are the grid's."""
    to, grid = channel.header.transform, scene.grid
    shifts = ((grid.west - to[2]) / to[0], (to[5] - grid.north) / to[0])
    return math.isclose(to[0], grid.gsd, rel_tol=1e-9) and all(
        abs(shift - round(shift)) < 1e-6 for shift in shifts
    )


def read_channel(
    scene: Scene, channel: Channel, window: tuple[int, int, int, int], method: str
) -> tuple[NDArray[Any], Mask]:
    """Stored numbers of a band on the grid, and where they are valid."""
    down, over = axes(scene, channel, window, method)
    if isinstance(down, AxisWeights) and isinstance(over, AxisWeights):
        (top, bottom), (left, right) = down.span, over.span
        stored, good = read_native(channel, top, left, bottom - top, right - left)
        if method == "nearest":
            return resample_nearest(stored, good, down, over)
        values, valid = resample(stored, good, down, over)
        return (values if stored.dtype.kind == "f" else np.rint(values)), valid
    return read_native(channel, cast(int, down), cast(int, over), window[2], window[3])


def axes(
    scene: Scene, channel: Channel, window: tuple[int, int, int, int], method: str
) -> tuple[AxisWeights, AxisWeights] | tuple[int, int]:
    """For both axes of a window of the grid: a band's first pixel, or taps that resample it."""
    row, col, height, width = window
    to, grid = channel.header.transform, scene.grid
    east, south = (grid.west - to[2]) / to[0], (to[5] - grid.north) / to[0]
    if on_grid(scene, channel):
        return row + round(south), col + round(east)
    rows, cols = channel.header.shape
    ratio = grid.gsd / to[0]
    return (
        axis_weights(row, height, ratio, south, rows, method),
        axis_weights(col, width, ratio, east, cols, method),
    )


def file_window(scene: Scene, channel: Channel, window: tuple[int, int, int, int]) -> Window | None:
    """The pixels of a band's file that a window of the grid (row, col, height, width) needs."""
    method = "nearest" if channel is scene.layer else scene.resampling
    down, over = axes(scene, channel, window, method)
    if isinstance(down, AxisWeights) and isinstance(over, AxisWeights):
        (top, bottom), (left, right) = down.span, over.span
    else:
        top, left = cast(int, down), cast(int, over)
        bottom, right = top + window[2], left + window[3]
    return inside(channel, top, left, bottom, right)


def inside(channel: Channel, top: int, left: int, bottom: int, right: int) -> Window | None:
    """The part of a window that lies in the file, None where there is none."""
    rows, cols = channel.header.shape
    top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, rows), min(right, cols)
    if bottom <= top or right <= left:
        return None
    return Window(left, top, right - left, bottom - top)


def read_native(
    channel: Channel, row: int, col: int, height: int, width: int
) -> tuple[NDArray[Any], Mask]:
    """A window of the file, which may reach past its edge (not valid there)."""
    window = inside(channel, row, col, row + height, col + width)
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
    place = (slice(top, top + window.height), slice(left, left + window.width))
    stored[place], good[place] = pixels, valid
    return stored, good


def is_valid(channel: Channel, pixels: NDArray[Any], window: Window) -> Mask:
    """Where a band has data: by its nodata value, its mask, and NaN for floats."""
    nodata = channel.header.nodata
    if nodata is None or math.isnan(nodata):
        good = np.ones(pixels.shape, np.bool_)
    else:  # whole numbers are compared as such, which is much faster
        whole = pixels.dtype.kind in "iu" and nodata.is_integer()
        good = np.asarray(pixels != (int(nodata) if whole else nodata))
    if pixels.dtype.kind == "f":
        good &= ~np.isnan(pixels)
    if channel.header.masked:
        good &= channel.raster.mask(channel.band.index, window)
    return good


def to_counts(stored: NDArray[Any], good: Mask, channel: Channel, into: NDArray[Any]) -> None:
    """Write stored numbers as counts; 0 is kept for pixels without data wherever there are such."""
    how, dtype = radiometry(channel), into.dtype
    most = int(np.iinfo(dtype).max)
    plain = channel.header.nodata is None and not channel.header.masked and how.add == 0
    least = 0 if plain else 1
    if how.gain == 1.0 and stored.dtype == dtype and abs(how.add) < most:
        # the usual case, in the band's own type: saturate first, then shift; by rows of limits,
        # since numpy takes four times as long with a single number
        low, high = max(0, least - how.add), min(most, most - how.add)
        np.maximum(stored, np.full(stored.shape[-1], low, dtype), out=into)
        np.minimum(into, np.full(stored.shape[-1], high, dtype), out=into)
        into += dtype.type(how.add % (most + 1))
        if not good.all():
            into[~good] = 0
        return
    if how.gain == 1.0 and stored.dtype.kind in "iu":
        wide = stored.astype(np.int64) + how.add
    else:
        safe = np.where(good, stored, 0).astype(np.float64)
        with np.errstate(over="ignore"):
            scaled = np.rint(safe * how.gain)
        wide = np.clip(scaled, -(2.0**40), 2.0**40).astype(np.int64) + how.add
    into[...] = np.where(good, np.clip(wide, least, most), 0)


def cloud_shares(classes: NDArray[Any] | None, cloud: Cloud | None) -> tuple[float, float]:
    """Shares of cloud and of cloud shadow among all pixels; NaN where nothing tells."""
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
    """Share of pixels that are burnt out.

    8 bit: 255 in all visible bands. 16 bit: reflectance of 1 or more in all visible bands, or the
    largest count in any band.
    """
    seen = [n for n, name in enumerate(bands) if name in VISIBLE] or list(range(len(bands)))
    counts = strip.counts
    most = int(np.iinfo(counts.dtype).max)
    small = counts.dtype == np.uint8
    bright = np.ones(counts.shape[1:], np.bool_)
    for n in seen:
        bright &= counts[n] >= (most if small else math.ceil(1 / scales[n]))
    if not small:
        for band in counts:
            bright |= band == most
    return float(np.count_nonzero(bright) / bright.size)


def is_constant(counts: NDArray[Any]) -> bool:
    """Whether each band has one value only."""
    flat = counts.reshape(counts.shape[0], -1)
    if (flat[:, 0] != flat[:, -1]).any():
        return False
    return bool((flat.min(axis=1) == flat.max(axis=1)).all())
