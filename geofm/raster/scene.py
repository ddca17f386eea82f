"""An open scene: the bands of an item, checked against the item, on one grid.

Opening reads and checks headers only. Planning and cutting both open scenes here, so they agree on
the grid and on the reasons for quarantine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

from data_catalog.sources import Source
from geofm.config.area import FULL_TURNS, unwrap_longitudes
from geofm.config.recipe import CutSettings
from geofm.raster.grid import Grid, check_pixels, extent_footprint, make_grid, metres_of
from geofm.raster.reader import Fetched, Raster, open_raster, prefetch
from geofm.remote.assets import Piece
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import RangeSource
from geofm.remote.url_policy import Access, signing_of
from geofm.stac.bands import Band, declared_crs, find_band, find_layer
from geofm.types import Json

#: Most pixels of a raster that is opened.
MAX_PIXELS = 2**31
#: Largest block (bytes, all bands, decompressed): reading a pixel decompresses its whole block.
MAX_BLOCK = 2**28
DTYPES = ("uint8", "uint16", "int16", "float32", "float64")


@dataclass(frozen=True)
class Header:
    """The header of a band in its file. ``transform`` is a, b, c, d, e, f, north up."""

    crs: str
    transform: tuple[float, ...]
    shape: tuple[int, int]
    dtype: str
    nodata: float | None
    masked: bool


@dataclass(frozen=True)
class Channel:
    """A band with its header and the open raster that holds it."""

    band: Band
    header: Header
    raster: Raster


@dataclass(frozen=True)
class Scene:
    """The channels of an item on one grid; ``layer`` is the cloud layer, None without one."""

    grid: Grid
    channels: tuple[Channel, ...]
    layer: Channel | None
    resampling: str

    @property
    def all_channels(self) -> tuple[Channel, ...]:
        """The bands, and the cloud layer if there is one."""
        return (*self.channels, self.layer) if self.layer else self.channels

    def fetched(self) -> Mapping[str, Fetched]:
        """Return digest, ETag and size of each file, by asset key."""
        return {channel.band.asset: channel.raster.fetched for channel in self.all_channels}


@dataclass(frozen=True)
class PendingScene:
    """A scene whose files are being fetched.

    Attributes:
        item: The item in canonical form.
        settings: Settings of the stage cut.
        bands: The bands, in the order of the settings.
        layer: The cloud layer, None without one.
        files: A band of each file and the pending fetch of the file, by asset key.
    """

    item: Json
    settings: CutSettings
    bands: list[Band]
    layer: Band | None
    files: dict[str, tuple[Band, Future[Piece | RangeSource]]]

    @contextmanager
    def open(self, geometry: BaseGeometry) -> Iterator[Scene]:
        """Wait for the files, and open and check all bands.

        Args:
            geometry: The item's footprint, EPSG:4326.

        Raises:
            Quarantine: A file or its header can't be used.
        """
        wanted = [*self.bands, self.layer] if self.layer else self.bands
        with ExitStack() as stack:
            rasters = {
                key: stack.enter_context(open_raster(future.result(), band.href, band.sha256))
                for key, (band, future) in self.files.items()
            }
            channels = []
            for band in wanted:
                raster = rasters[band.asset]
                header = read_header(raster, band, declared_crs(self.item, band.asset))
                channels.append(Channel(band, header, raster))
            bands = channels[: len(self.bands)]
            rasters_of_bands = [(c.header.crs, c.header.transform, c.header.shape) for c in bands]
            grid = finest_grid(rasters_of_bands, self.settings, geometry)
            layer = channels[-1] if self.layer else None
            yield Scene(grid, tuple(bands), layer, self.settings.resampling)


@contextmanager
def prefetch_scene(
    item: Json, source: Source, settings: CutSettings, access: Access, whole: bool = True
) -> Iterator[PendingScene]:
    """Start to fetch an item's files; fetches that are still pending at the end are cancelled.

    Args:
        item: A good item of the search, in canonical form.
        source: Profile of its collection.
        settings: Bands, chip size and ground sample distance.
        access: Rules for reading.
        whole: Read small assets whole, and check their digests.

    Raises:
        Quarantine: The item lacks a band, or an address is refused.
    """
    bands = [find_band(item, name, source) for name in settings.bands]
    layer = find_layer(item, source.cloud.asset) if source.cloud else None
    signing = signing_of(source)
    first = {band.asset: band for band in reversed([*bands, layer] if layer else bands)}
    with ExitStack() as stack:
        files = {}
        for key, band in first.items():
            future = prefetch(band.href, access, signing, whole, band.bytes)
            stack.callback(future.cancel)
            files[key] = band, future
        yield PendingScene(item, settings, bands, layer, files)


@contextmanager
def open_scene(
    item: Json,
    geometry: BaseGeometry,
    source: Source,
    settings: CutSettings,
    access: Access,
    whole: bool = True,
) -> Iterator[Scene]:
    """Fetch and open a scene; arguments as for `prefetch_scene` and `PendingScene.open`."""
    with (
        prefetch_scene(item, source, settings, access, whole) as pending,
        pending.open(geometry) as scene,
    ):
        yield scene


def read_header(raster: Raster, band: Band, item_crs: str) -> Header:
    """Read the header of a band and check it against the item.

    Raises:
        Quarantine: ``shape_mismatch``, ``too_many_pixels``, ``no_crs``, ``bad_dtype``, ...
    """
    data, where = raster.layout, raster.where
    shape, count = data.shape, len(data.dtypes)
    if band.size is not None and band.size != shape:
        raise Quarantine(
            "shape_mismatch", f"{where} has {shape} pixels, its item states {band.size}"
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise Quarantine("too_many_pixels", f"{where} has {shape} pixels")
    if not 1 <= band.index <= count:
        raise Quarantine("missing_band", f"{where} has {count} bands, not {band.index}")
    dtype = data.dtypes[band.index - 1]
    if dtype not in DTYPES:
        raise Quarantine("bad_dtype", f"{where} holds {dtype}, not {', '.join(DTYPES)}")
    rows, cols = data.block_shapes[band.index - 1]
    if rows * cols * count * np.dtype(dtype).itemsize > MAX_BLOCK:
        raise Quarantine(
            "too_many_pixels", f"{where} has blocks of {rows} x {cols} pixels, {count} bands"
        )
    crs = raster.crs or item_crs
    if not crs:
        raise Quarantine("no_crs", f"neither {where} nor its item names a CRS")
    if item_crs and crs != item_crs and ":" in crs:
        raise Quarantine("crs_mismatch", f"{where} is in {crs}, its item states {item_crs}")
    transform = upright(raster, band)
    check_pixels(transform, metres_of(crs))
    nodata = data.nodata[band.index - 1]
    return Header(
        crs=crs,
        transform=transform,
        shape=shape,
        dtype=dtype,
        nodata=float(nodata) if nodata is not None else band.nodata,
        masked=data.masked[band.index - 1],
    )


def upright(raster: Raster, band: Band) -> tuple[float, ...]:
    """Return the affine coefficients of a raster, or the item's if the file has none.

    Raises:
        Quarantine: ``no_transform`` or ``bad_transform``.
    """
    transform = raster.layout.transform
    if transform == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0):
        if band.transform is None:
            raise Quarantine("no_transform", f"{raster.where} is not georeferenced")
        transform = band.transform
    if not is_upright(transform):
        raise Quarantine("bad_transform", f"{raster.where} is not north-up with square pixels")
    return transform


def is_upright(transform: Sequence[float]) -> bool:
    """Check whether affine coefficients mean north up and square pixels."""
    a, b, _, d, e, _ = transform
    square = b == 0 and d == 0 and a > 0 and e < 0 and math.isclose(a, -e, rel_tol=1e-6)
    return square and all(math.isfinite(v) for v in transform)


def finest_grid(
    rasters: Sequence[tuple[str, tuple[float, ...], tuple[int, int]]],
    settings: CutSettings,
    geometry: BaseGeometry,
) -> Grid:
    """Make the grid on the pixels of the finest band.

    Args:
        rasters: CRS, affine coefficients, and height and width of each band.
        settings: Chip size, ground sample distance and anchor.
        geometry: The item's footprint, EPSG:4326.

    Raises:
        Quarantine: ``crs_mismatch``, ``too_many_pixels``, ``footprint_mismatch``, or a reason of
            `make_grid`.
    """
    if any(height * width > MAX_PIXELS for _, _, (height, width) in rasters):
        raise Quarantine("too_many_pixels", f"a band has more than {MAX_PIXELS} pixels")
    if len({crs for crs, _, _ in rasters}) > 1:
        raise Quarantine("crs_mismatch", "the bands are in different CRS")
    finest = min(rasters, key=lambda raster: raster[1][0])
    grid = make_grid(*finest, settings.size_px, settings.gsd_m, settings.anchor == "scene")
    extent, stated = extent_footprint(grid), unwrap_longitudes(geometry)
    shifted = (translate(stated, turn) if turn else stated for turn in FULL_TURNS)
    if grid.width and not any(extent.intersects(area) for area in shifted):
        raise Quarantine("footprint_mismatch", "the pixels lie outside of the item's geometry")
    return grid


def check_finite(channel: Channel, pixels: np.ndarray[Any, Any]) -> None:
    """Refuse NaN and infinite values, except if NaN is the nodata value.

    Raises:
        Quarantine: ``nan_values``.
    """
    if pixels.dtype.kind != "f":
        return
    bad = np.isinf(pixels)
    if channel.header.nodata is None or not math.isnan(channel.header.nodata):
        bad |= np.isnan(pixels)
    if bad.any():
        raise Quarantine(
            "nan_values", f"{channel.raster.where} has NaN or infinite values that are not nodata"
        )
