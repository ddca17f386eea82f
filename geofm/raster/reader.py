"""Open remote rasters safely, and read their pixels.

`fetch` reads an asset's bytes or its beginning; `open_raster` opens them; `Raster.read` returns
pixels. Simple TIFF files are read by ``tiff.py``, all other files by GDAL, with the same result.

GDAL would open any format that it recognises: a VRT named ``.tif`` reads files of this machine. So
the first bytes select the driver (TIFF or JPEG 2000), the driver is pinned, and GDAL sees a memory
file or one Python file object: no directory, no sidecar file, no address.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from geofm.raster.tiff import TILES, PlainTiff, Read, Unsure, parse
from geofm.remote.assets import Piece, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import Range, RangeFile, RangeSource
from geofm.remote.url_policy import Access, Signing
from geofm.runtime.threads import shared_pool

#: Threads of a process that open assets; opening waits for the network.
OPEN_THREADS = 24
_MAGIC = {
    b"II*\x00": "GTiff",
    b"MM\x00*": "GTiff",
    b"II+\x00": "GTiff",
    b"MM\x00+": "GTiff",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
# A file without georeference is quarantined; GDAL's warning adds nothing.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def driver_of(head: bytes, where: str) -> str:
    """Return the GDAL driver for the first bytes of a file.

    Raises:
        Quarantine: ``not_a_tiff``, with the format that it seems to have.
    """
    for magic, driver in _MAGIC.items():
        if head.startswith(magic):
            return driver
    start = head.lstrip()[:9].lower()
    kind = "an HTML page" if start.startswith((b"<!doctype", b"<html")) else "something else"
    kind = "a VRT" if start.startswith(b"<vrt") else kind
    raise Quarantine("not_a_tiff", f"{where} is neither TIFF nor JPEG 2000 but {kind}")


def fetch(
    href: str, access: Access, signing: Signing, whole: bool = True, stated_size: int = 0
) -> Piece | RangeSource:
    """Read an asset's bytes, or its beginning.

    Args:
        href: Address as stored in the item.
        access: Which hosts may be read, and the timeouts.
        signing: How the source signs addresses.
        whole: Read files up to ``access.whole_max`` whole; False reads ranges only.
        stated_size: Size that the item states, bytes; 0 if unknown. A file that is too large to be
            read whole is then not requested whole first.

    Raises:
        Quarantine: The asset can't be read.
    """
    asset = remote(href, access, signing)
    whole = whole and 0 < access.whole_max >= stated_size
    piece = asset.whole(access.whole_max) if whole else None
    return piece or RangeSource(asset, access.retries, where_is(href))


def prefetch(
    href: str, access: Access, signing: Signing, whole: bool = True, stated_size: int = 0
) -> Future[Piece | RangeSource]:
    """Begin to `fetch` in the background; errors are raised by the future's result."""
    pool = shared_pool("geofm-open", OPEN_THREADS)
    return pool.submit(fetch, href, access, signing, whole, stated_size)


def where_is(href: str) -> str:
    """Return an address as messages show it."""
    return href.partition("?")[0][:200]


def open_raster(fetched: Piece | RangeSource, href: str, declared_sha256: str = "") -> Raster:
    """Open a fetched asset, in the thread that will read it.

    Args:
        fetched: Result of `fetch`.
        href: Address as stored in the item.
        declared_sha256: Hex digest from the item; it is compared if the file was read whole.

    Raises:
        Quarantine: The file is not a raster, or has another digest.
    """
    if isinstance(fetched, RangeSource):
        return _open_ranges(fetched, where_is(href), declared_sha256)
    return _open_bytes(fetched, where_is(href), declared_sha256)


def _open_bytes(piece: Piece, where: str, declared: str) -> Raster:
    sha256 = hashlib.sha256(piece.data).hexdigest()
    driver = driver_of(piece.data[:16], where)
    if declared and declared != sha256:
        raise Quarantine("wrong_checksum", f"{where} does not have the sha256 that its item states")
    closing = ExitStack()

    def by_gdal() -> Any:
        memory = MemoryFile(piece.data)
        closing.callback(memory.close)
        return closing.enter_context(_open(memory.name, driver, where, None))

    def bytes_at(offset: int, size: int) -> bytes:
        return piece.data[offset : offset + size]

    fetched = Fetched(sha256, "computed", "", piece.total)
    plain = _plain(driver, bytes_at, piece.total)
    return opened(Raster(by_gdal, bytes_at, plain, fetched, where, None, closing))


def _open_ranges(source: RangeSource, where: str, declared: str) -> Raster:
    driver = driver_of(source.head[:16], where)
    name, closing = f"asset{id(source)}", ExitStack()

    def opener(path: str, mode: str = "rb") -> RangeFile:
        if path != name or mode not in ("r", "rb"):
            raise FileNotFoundError(path)
        return RangeFile(source)

    def by_gdal() -> Any:
        return closing.enter_context(_open(name, driver, where, source, opener=opener))

    fetched = Fetched(
        declared, "declared" if declared else "", "" if declared else source.etag, source.size
    )
    plain = _plain(driver, source.read, source.size)
    closing.callback(source.close)
    return opened(Raster(by_gdal, source.read, plain, fetched, where, source, closing))


def _plain(driver: str, bytes_at: Read, size: int) -> PlainTiff | None:
    return parse(bytes_at, size) if driver == "GTiff" else None


def _open(name: str, driver: str, where: str, source: RangeSource | None, **more: Any) -> Any:
    """Open by a pinned driver; errors of GDAL become a quarantine."""
    try:
        dataset = rasterio.open(name, driver=driver, **more)
    except (RasterioError, OSError, UnicodeDecodeError) as error:  # a CRS's name may be no UTF-8
        check_source(source)
        raise Quarantine("not_a_tiff", f"{where} can't be opened as {driver}") from error
    if source is not None and source.error is not None:
        dataset.close()
        raise source.error
    return dataset


#: Only the content of the file counts, and damage is an error rather than a warning. PAM (sidecar
#: files) is off. It is still named as a source of georeference: without it GDAL 3.10 returns
#: uninitialised memory as the transform of a JPEG 2000 file that has none.
GDAL: dict[str, str | int] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL,PAM",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "VSI_CACHE": "FALSE",
    "GDAL_NUM_THREADS": "1",
    "GDAL_CACHEMAX": 256 * 2**20,
}
#: Names of CRS by the GeoTIFF keys of simple files; cleared at `MOST_CRS` entries.
_CRS: dict[bytes, str] = {}
MOST_CRS = 1000


@dataclass(frozen=True)
class Fetched:
    """Provenance of an asset's bytes.

    Attributes:
        sha256: Hex digest, or empty.
        sha256_from: ``computed`` over all bytes, ``declared`` by the item, or empty.
        etag: ETag of the server, only if there is no sha256.
        size: Size of the file, bytes.
    """

    sha256: str
    sha256_from: str
    etag: str
    size: int


@dataclass(frozen=True)
class Layout:
    """The layout of a file's pixels; tuples have one entry per band.

    Attributes:
        shape: [height, width].
        transform: Affine coefficients a, b, c, d, e, f.
        block_shapes: [height, width] of the compressed blocks.
        masked: A mask or an alpha band marks the valid pixels.
    """

    shape: tuple[int, int]
    transform: tuple[float, ...]
    dtypes: tuple[str, ...]
    block_shapes: tuple[tuple[int, int], ...]
    nodata: tuple[float | None, ...]
    masked: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Raster:
    """An open raster, for one thread at a time; a context manager that closes it.

    Attributes:
        open: Opens the file by GDAL.
        bytes_at: Returns the file's bytes by offset and size.
        plain: Directory of a file that is read without GDAL.
        known: Provenance of the bytes when the file was opened.
        where: Address for messages.
        source: The file if it is read by range; None if it is in memory.
        closing: Closes the file.
    """

    open: Callable[[], Any]
    bytes_at: Read
    plain: PlainTiff | None
    known: Fetched
    where: str
    source: RangeSource | None
    closing: ExitStack

    def __enter__(self) -> Raster:
        """Return the raster."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the raster."""
        TILES.forget(self)
        self.closing.close()

    @cached_property
    def _dataset(self) -> Any:
        return self.open()

    @contextmanager
    def by_gdal(self) -> Iterator[Any]:
        """Yield GDAL's dataset, for this block only; it is opened on first use.

        GDAL's settings belong to a thread, so they are set here and last until the block ends.

        Raises:
            Quarantine: GDAL can't open the file.
        """
        with rasterio.Env(**GDAL):
            yield self._dataset

    @property
    def layout(self) -> Layout:
        """Layout of the pixels."""
        if self.plain is not None:
            plain = self.plain
            return Layout(
                plain.shape,
                plain.transform,
                (plain.dtype,),
                (plain.tile_shape,),
                (plain.nodata,),
                (False,),
            )
        with self.by_gdal() as data:
            flags = [{flag.name for flag in band_flags} for band_flags in data.mask_flag_enums]
            return Layout(
                shape=(int(data.height), int(data.width)),
                transform=tuple(float(v) for v in data.transform[:6]),
                dtypes=tuple(str(dtype) for dtype in data.dtypes),
                block_shapes=tuple(data.block_shapes),
                nodata=tuple(data.nodatavals),
                masked=tuple(bool(names & {"per_dataset", "alpha"}) for names in flags),
            )

    @property
    def crs(self) -> str:
        """The file's CRS as ``EPSG:code`` if it has a code, else WKT; empty if there is none.

        Raises:
            Quarantine: ``bad_crs``.
        """
        known = _CRS.get(self.plain.geokeys) if self.plain is not None else None
        return self._crs_by_gdal() if known is None else known

    def _crs_by_gdal(self) -> str:
        try:
            with self.by_gdal() as data:
                crs = data.crs
                code = crs.to_epsg() if crs else None
                return f"EPSG:{code}" if code else str(crs.to_wkt()) if crs else ""
        except CRSError as error:
            raise Quarantine("bad_crs", f"the CRS of {self.where} can't be read") from error

    @property
    def fetched(self) -> Fetched:
        """Provenance of the bytes, with the current ETag: the first one may have been a fault."""
        if self.source is None or self.known.sha256:
            return self.known
        return replace(self.known, etag=self.source.etag)

    def ranges(self, band: int, window: Window) -> list[Range]:
        """Return the byte ranges of the blocks that a window touches; empty if they are unknown.

        Raises:
            Quarantine: ``truncated`` if a block lies beyond the end of the file.
        """
        if self.source is None:
            return []
        if self.plain is not None:
            native = (window.row_off, window.col_off, window.height, window.width)
            ranges = [self.plain.range_of(tile) for tile in self.plain.tiles(*native)]
        else:
            ranges = self._block_ranges(band, window)
        if any(end > self.source.size for _, end in ranges):
            raise Quarantine("truncated", f"{self.where} ends before its pixels do")
        return ranges

    def _block_ranges(self, band: int, window: Window) -> list[Range]:
        ranges = []
        with self.by_gdal() as data:
            height, width = data.block_shapes[band - 1]
            rows = range(window.row_off // height, -(-(window.row_off + window.height) // height))
            cols = range(window.col_off // width, -(-(window.col_off + window.width) // width))
            for row, col in product(rows, cols):
                offset, size = (
                    int(data.get_tag_item(f"BLOCK_{name}_{col}_{row}", "TIFF", bidx=band) or 0)
                    for name in ("OFFSET", "SIZE")
                )
                if offset and size:
                    ranges.append((offset, offset + size))
        return ranges

    def read(self, band: int, window: Window) -> NDArray[Any]:
        """Read a window of one band.

        Args:
            band: Band, counted from 1.
            window: Window inside the raster.

        Returns:
            Stored numbers, shape (height, width).

        Raises:
            Quarantine: ``truncated`` if the file is damaged, or a failure of the network.
        """
        if self.plain is not None:
            native = (window.row_off, window.col_off, window.height, window.width)
            with suppress(Unsure):
                return self.plain.read(self.bytes_at, self, *native)
        label = f"pixels at {window.col_off},{window.row_off}"
        return self._read_by_gdal(lambda data: np.asarray(data.read(band, window=window)), label)

    def mask(self, band: int, window: Window) -> NDArray[np.bool_]:
        """Read where the file's mask or alpha band marks a pixel as valid, shape (height, width).

        Raises:
            Quarantine: As `read`.
        """
        return self._read_by_gdal(
            lambda data: np.asarray(data.read_masks(band, window=window)) > 0, "its mask"
        )

    def _read_by_gdal(self, read: Callable[[Any], NDArray[Any]], label: str) -> NDArray[Any]:
        """Read by GDAL; a failure of the network is reported as such, not as GDAL reports it."""
        try:
            with self.by_gdal() as data:
                pixels = read(data)
        except (RasterioError, ValueError, MemoryError) as error:
            check_source(self.source)
            raise Quarantine("truncated", f"{self.where}: {label} can't be read") from error
        check_source(self.source)
        return pixels


def check_source(source: RangeSource | None) -> None:
    """Raise the failure that happened while GDAL was reading; GDAL may see an end of file.

    Raises:
        Quarantine: The failure of the network.
    """
    if source is not None and source.error is not None:
        raise source.error


def opened(raster: Raster) -> Raster:
    """Open the file by GDAL now, so that errors show, unless it is simple and its CRS is known."""
    if raster.plain is None:
        with raster.by_gdal():
            pass
    elif raster.plain.geokeys not in _CRS:
        if len(_CRS) >= MOST_CRS:
            _CRS.clear()
        _CRS[raster.plain.geokeys] = raster.crs
    return raster
