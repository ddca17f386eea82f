"""An open raster: what its file says of the pixels, and the pixels themselves.

The plainest files are read without GDAL, all others and all doubtful ones by it; nobody can tell
from what comes out.
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

from geofm.raster.tiff import DECODED, PlainTiff, Read, Unsure, parse
from geofm.remote.assets import Piece, remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.ranges import Range, RangeFile, RangeSource
from geofm.remote.url_policy import Access, Signing
from geofm.runtime.threads import shared_pool

# Opening remote rasters safely: the driver is chosen here, and nothing beside the file is read.
# GDAL opens whatever it recognises; a VRT named ``.tif`` then reads files of this machine. So the
# first bytes decide (TIFF or JPEG 2000, nothing else), the driver is pinned, and GDAL sees only a
# memory file or one Python file object: no directory, no sidecar, no address of its own to follow.

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
# A file without georeference is a quarantine, not a warning among others.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def driver_of(head: bytes, where: str) -> str:
    """The GDAL driver by the first bytes of a file.

    Raises:
        Quarantine: ``not_a_tiff`` with what it looks like instead.
    """
    for magic, driver in _MAGIC.items():
        if head.startswith(magic):
            return driver
    looks = head.lstrip()[:9].lower()
    kind = "an HTML page" if looks.startswith((b"<!doctype", b"<html")) else "something else"
    kind = "a VRT" if looks.startswith(b"<vrt") else kind
    raise Quarantine("not_a_tiff", f"{where} is neither TIFF nor JPEG 2000 but {kind}")


def fetch(href: str, access: Access, signing: Signing, whole: bool = True) -> Piece | RangeSource:
    """An asset's bytes, or its beginning; any thread may wait for them.

    Args:
        href: as stored in the item.
        access: what may be read, and how.
        signing: how the source signs.
        whole: read files up to ``access.whole_max`` whole; False reads ranges only.

    Raises:
        Quarantine: with the reason.
    """
    asset = remote(href, access, signing)
    piece = asset.whole(access.whole_max) if whole and access.whole_max else None
    return piece or RangeSource(asset, access.retries, where_is(href))


def prefetch(
    href: str, access: Access, signing: Signing, whole: bool = True
) -> Future[Piece | RangeSource]:
    """Begin to `fetch` in the background; errors are raised by the future's result."""
    return shared_pool("geofm-open", OPEN_THREADS).submit(fetch, href, access, signing, whole)


def where_is(href: str) -> str:
    """An address as messages show it."""
    return href.partition("?")[0][:200]


def open_raster(fetched: Piece | RangeSource, href: str, declared_sha256: str = "") -> Raster:
    """Open what was fetched, in the thread that will read it.

    Args:
        fetched: by ``fetch``.
        href: as stored in the item.
        declared_sha256: hex, from the item; compared where the file was read whole.

    Raises:
        Quarantine: with the reason.
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
    """Open by a pinned driver; what GDAL says becomes a quarantine."""
    try:
        dataset = rasterio.open(name, driver=driver, **more)
    except (RasterioError, OSError, UnicodeDecodeError) as error:  # the last: of a CRS's name
        check_source(source)
        raise Quarantine("not_a_tiff", f"{where} can't be opened as {driver}") from error
    if source is not None and source.error is not None:
        dataset.close()
        raise source.error
    return dataset


#: Only what is inside the file counts, and damage is an error rather than a warning. PAM (files
#: beside it) is off; where it is not named as a source, though, GDAL 3.10 gives out memory that
#: nobody wrote as the transform of a JPEG 2000 file without one.
GDAL: dict[str, str | int] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL,PAM",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "VSI_CACHE": "FALSE",
    "GDAL_NUM_THREADS": "1",
    "GDAL_CACHEMAX": 256 * 2**20,
}
#: What a CRS is called, by the keys that plain files state it with; forgotten when too many.
_CRS: dict[bytes, str] = {}
MOST_CRS = 1000


@dataclass(frozen=True)
class Fetched:
    """What is known of an asset's bytes.

    Attributes:
        sha256: hex, or empty.
        sha256_from: ``computed`` over all bytes, ``declared`` by the item, or empty.
        etag: as the server told, only where there is no sha256.
        size: bytes.
    """

    sha256: str
    sha256_from: str
    etag: str
    size: int


@dataclass(frozen=True)
class Layout:
    """What a file says of its pixels; lists have an entry for each band.

    Attributes:
        shape: [height, width].
        transform: a, b, c, d, e, f.
        block_shapes: [height, width] of what is compressed together.
        masked: whether a mask or an alpha band says which pixels are valid.
    """

    shape: tuple[int, int]
    transform: tuple[float, ...]
    dtypes: tuple[str, ...]
    block_shapes: tuple[tuple[int, int], ...]
    nodata: tuple[float | None, ...]
    masked: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Raster:
    """An open raster; ``read`` is the only way to its pixels. For one thread at a time.

    As a context it closes itself.

    Attributes:
        open: has GDAL open it.
        bytes_at: the file's bytes by offset and size.
        plain: the directory of a file that can be read without GDAL.
    """

    open: Callable[[], Any]
    bytes_at: Read
    plain: PlainTiff | None
    known: Fetched
    where: str
    source: RangeSource | None
    closing: ExitStack

    def __enter__(self) -> Raster:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        DECODED.forget(self)
        self.closing.close()

    @cached_property
    def _dataset(self) -> Any:
        return self.open()

    @contextmanager
    def by_gdal(self) -> Iterator[Any]:
        """GDAL's view of it, opened when it is first wanted, to be used in this block alone.

        GDAL's settings are a thread's, and a thread reads several scenes in turns: so they are made
        where GDAL is asked, and last no longer.

        Raises:
            Quarantine: when GDAL can't open it.
        """
        with rasterio.Env(**GDAL):
            yield self._dataset

    @property
    def layout(self) -> Layout:
        """Size, place and types."""
        if self.plain is not None:
            one = self.plain
            return Layout(one.shape, one.transform, (one.dtype,), (one.tile_shape,), (one.nodata,),
                          (False,))  # fmt: skip
        with self.by_gdal() as data:
            flags = [{flag.name for flag in some} for some in data.mask_flag_enums]
            return Layout(
                shape=(int(data.height), int(data.width)),
                transform=tuple(float(v) for v in data.transform[:6]),
                dtypes=tuple(str(dtype) for dtype in data.dtypes),
                block_shapes=tuple(data.block_shapes),
                nodata=tuple(data.nodatavals),
                masked=tuple(bool(some & {"per_dataset", "alpha"}) for some in flags),
            )

    @property
    def crs(self) -> str:
        """The file's CRS as ``EPSG:code`` where there is one, else WKT, empty without any.

        Raises:
            Quarantine: ``bad_crs``.
        """
        found = _CRS.get(self.plain.geokeys) if self.plain is not None else None
        return self._crs_by_gdal() if found is None else found

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
        """What is known of the bytes by now: an ETag may have been a passing fault."""
        if self.source is None or self.known.sha256:
            return self.known
        return replace(self.known, etag=self.source.etag)

    def ranges(self, band: int, window: Window) -> list[Range]:
        """Byte ranges of the compressed blocks that a window touches; empty where nobody knows.

        Raises:
            Quarantine: ``truncated`` when a block lies beyond the end of the file.
        """
        if self.source is None:
            return []
        if self.plain is not None:
            place = (window.row_off, window.col_off, window.height, window.width)
            found = [self.plain.range_of(tile) for tile in self.plain.tiles(*place)]
        else:
            found = self._block_ranges(band, window)
        if any(end > self.source.size for _, end in found):
            raise Quarantine("truncated", f"{self.where} ends before its pixels do")
        return found

    def _block_ranges(self, band: int, window: Window) -> list[Range]:
        found = []
        with self.by_gdal() as data:
            height, width = data.block_shapes[band - 1]
            down = range(window.row_off // height, -(-(window.row_off + window.height) // height))
            over = range(window.col_off // width, -(-(window.col_off + window.width) // width))
            for row, col in product(down, over):
                offset, size = (
                    int(data.get_tag_item(f"BLOCK_{what}_{col}_{row}", "TIFF", bidx=band) or 0)
                    for what in ("OFFSET", "SIZE")
                )
                if offset and size:
                    found.append((offset, offset + size))
        return found

    def read(self, band: int, window: Window) -> NDArray[Any]:
        """Pixels [height, width] of one band (counted from 1) inside the raster.

        Raises:
            Quarantine: ``truncated`` when the file is damaged, or what the network says.
        """
        if self.plain is not None:
            place = (window.row_off, window.col_off, window.height, window.width)
            with suppress(Unsure):
                return self.plain.read(self.bytes_at, self, *place)
        what = f"pixels at {window.col_off},{window.row_off}"
        return self._ask(lambda data: np.asarray(data.read(band, window=window)), what)

    def mask(self, band: int, window: Window) -> NDArray[np.bool_]:
        """Where the file itself (mask or alpha band) says that a pixel is valid.

        Raises:
            Quarantine: as ``read``.
        """
        return self._ask(lambda data: np.asarray(data.read_masks(band, window=window)) > 0,
                         "its mask")  # fmt: skip

    def _ask(self, call: Callable[[Any], NDArray[Any]], what: str) -> NDArray[Any]:
        """What GDAL reads; a fault of the network is one, whatever GDAL makes of it."""
        try:
            with self.by_gdal() as data:
                found = call(data)
        except (RasterioError, ValueError, MemoryError) as error:
            check_source(self.source)
            raise Quarantine("truncated", f"{self.where}: {what} can't be read") from error
        check_source(self.source)
        return found


def check_source(source: RangeSource | None) -> None:
    """Raise what went wrong while GDAL was reading, which it may have taken for an end of file.

    Raises:
        Quarantine: as the network said.
    """
    if source is not None and source.error is not None:
        raise source.error


def opened(raster: Raster) -> Raster:
    """GDAL opens at once, so that faults show, what is not plain or states a CRS as none before."""
    if raster.plain is None:
        with raster.by_gdal():
            pass
    elif raster.plain.geokeys not in _CRS:
        if len(_CRS) >= MOST_CRS:
            _CRS.clear()
        _CRS[raster.plain.geokeys] = raster.crs
    return raster
