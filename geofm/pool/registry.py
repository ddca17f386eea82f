"""The registry of evaluation sets: what pretraining data must not contain.

A registry is a YAML file (``sets:`` a list of name, footprints, images, bands, scale; paths
relative to it) or a folder in which ``NAME.geojson`` or ``NAME.parquet`` and the folder ``NAME``
with images make up the set NAME. Footprints are polygons or points in degrees; images are PNG, JPEG
and the like, GeoTIFF or JP2.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import rasterio
import shapely
import yaml
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of

FOOTPRINTS = (".geojson", ".json", ".parquet")
#: What the readers of images raise; Pillow reports a broken PNG chunk as SyntaxError.
_UNREADABLE = (
    RasterioIOError, UnidentifiedImageError, OSError, SyntaxError, ValueError,
    Image.DecompressionBombError,
)  # fmt: skip
RASTERS, PICTURES = (".tif", ".tiff", ".jp2"), (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_NO_AREAS: NDArray[np.object_] = np.empty(0, dtype=object)
#: Columns that may name a footprint, the first that is there.
NAMES = ("id", "item_id", "chip_id", "image_id", "name")


class Listed(BaseModel):
    """One entry of the YAML file."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    footprints: str | None = None
    images: str | None = None
    bands: list[int] = Field([1, 2, 3], min_length=1, max_length=3)
    scale: float = Field(1e-4, gt=0)


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set: areas with their ids, image files by id.

    Attributes:
        areas: shapely geometries, EPSG:4326.
        area_ids: one per area.
        images: files by id (path below the set's folder).
        bands: which bands of a raster are red, green and blue, from 1.
        scale: reflectance per count of images that are not 8-bit.
        sha256: of everything that is checked against.
    """

    name: str
    areas: NDArray[np.object_]
    area_ids: list[str]
    images: dict[str, Path] = field(default_factory=dict)
    bands: tuple[int, ...] = (1, 2, 3)
    scale: float = 1e-4
    sha256: str = ""


def load_registry(path: str | Path) -> list[EvaluationSet]:
    """The evaluation sets of a registry, by name.

    Raises:
        UsageError: it is absent or empty, names a set twice, or a file in it is not readable.
    """
    listed, base = _listed(path)
    return [_load(one, base) for one in sorted(listed, key=lambda one: one.name)]


def _listed(path: str | Path) -> tuple[list[Listed], Path]:
    """The entries of a registry, and the folder that their paths are relative to."""
    place = Path(path)
    if place.is_dir():
        listed, base = _listed_in(place), place
    elif place.is_file():
        listed, base = _read_yaml(place), place.parent
    else:
        raise UsageError(f"there is no registry of evaluation sets {place}: give a folder or YAML")
    names = [one.name for one in listed]
    if not listed or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(
            f"registry {place}: "
            + (f"{', '.join(twice)} is listed twice" if twice else "no evaluation set in it")
        )
    return listed, base


#: Bytes of images that a check decodes; of the others it reads the header.
CHECKED_BYTES = 64 * 2**20


def check_registry(path: str | Path) -> None:
    """Open all evaluation sets of a registry: footprints whole, of images at least the header.

    Raises:
        UsageError: as ``load_registry`` and ``read_images``.
    """
    listed, base = _listed(path)
    for one in listed:
        if one.footprints:
            _footprints(base / one.footprints, one.name)
        decoded = 0
        images = _images(one, base)
        for image_id, file in images.items():
            decoded += file.stat().st_size
            some = EvaluationSet(one.name, _NO_AREAS, [], {image_id: file}, tuple(one.bands))
            if decoded <= CHECKED_BYTES:
                next(read_images(some))
            else:
                _check_header(one.name, image_id, file)
        if not one.footprints and not images:
            raise UsageError(f"evaluation set {one.name} has neither footprints nor images")


def registry_sha256(sets: list[EvaluationSet]) -> str:
    """Identity of all that is checked against: for cache keys and certificates."""
    return digest_of([[one.name, one.sha256] for one in sets])


def _listed_in(folder: Path) -> list[Listed]:
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            found.setdefault(entry.name, {})["images"] = entry.name
        elif entry.suffix in FOOTPRINTS:
            found.setdefault(entry.stem, {})["footprints"] = entry.name
    return _checked([{"name": name, **parts} for name, parts in found.items()], folder)


def _read_yaml(file: Path) -> list[Listed]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"registry {file} is no YAML: {error}") from error
    except (OSError, UnicodeError) as error:
        raise UsageError(f"registry {file} cannot be read: {error}") from error
    entries = content.get("sets") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UsageError(f"registry {file}: give a list `sets:` of name, footprints, images")
    return _checked(entries, file)


def _checked(entries: list[Any], place: Path) -> list[Listed]:
    try:
        return [Listed.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise UsageError(f"registry {place}: {error}") from error


def _load(listed: Listed, base: Path) -> EvaluationSet:
    areas: NDArray[np.object_] = np.empty(0, dtype=object)
    ids: list[str] = []
    what: list[Any] = [listed.bands, listed.scale]
    if listed.footprints:
        areas, ids = _footprints(base / listed.footprints, listed.name)
        shapes = [hashlib.sha256(shapely.to_wkb(area)).hexdigest() for area in areas]
        what.append([list(pair) for pair in zip(ids, shapes, strict=True)])
    images = _images(listed, base)
    if listed.images:
        what.append([[i, _sha256(file)] for i, file in images.items()])
    if not len(areas) and not images:
        raise UsageError(f"evaluation set {listed.name} has neither footprints nor images")
    return EvaluationSet(
        listed.name, areas, ids, images, tuple(listed.bands), listed.scale, digest_of(what)
    )


def _images(listed: Listed, base: Path) -> dict[str, Path]:
    """The image files of a set by id; none where it lists no folder."""
    if not listed.images:
        return {}
    root = base / listed.images
    if not root.is_dir():
        raise UsageError(f"evaluation set {listed.name}: there is no folder of images {root}")
    files = (f for f in sorted(root.rglob("*")) if f.suffix.lower() in RASTERS + PICTURES)
    return {file.relative_to(root).as_posix(): file for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _footprints(file: Path, name: str) -> tuple[NDArray[np.object_], list[str]]:
    """Areas in degrees and their ids."""
    try:
        frame = gpd.read_parquet(file) if file.suffix == ".parquet" else gpd.read_file(file)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"evaluation set {name}: no footprints in {file}: {error}") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise UsageError(f"evaluation set {name}: {file} has no geometries")
    if frame.crs is not None:
        frame = frame.to_crs(4326)
    bad = frame.geometry.isna() | frame.geometry.is_empty
    if bad.any():
        raise UsageError(
            f"evaluation set {name}: {int(bad.sum())} of {len(frame)} footprints in {file} have no "
            "geometry; remove these rows or give them one"
        )
    limits = np.array([-360, -90, -360, -90]), np.array([360, 90, 360, 90])
    bounds = frame.geometry.bounds.to_numpy()
    if not ((bounds >= limits[0]) & (bounds <= limits[1])).all():
        raise UsageError(
            f"evaluation set {name}: footprints in {file} are not in degrees; state the CRS in the "
            "file, or convert them to EPSG:4326"
        )
    column = next((column for column in NAMES if column in frame), None)
    ids = [str(value) for value in (frame[column] if column else range(len(frame)))]
    return np.asarray(frame.geometry.to_numpy(), dtype=object), ids


def _read_raster(file: Path, bands: tuple[int, ...]) -> NDArray[Any]:
    driver = "JP2OpenJPEG" if file.suffix.lower() == ".jp2" else "GTiff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # images need no place
        with rasterio.open(file, driver=driver) as source:
            some = [band for band in bands if band <= source.count]
            return np.asarray(source.read(some if len(some) == 3 else [1]))


def read_images(one: EvaluationSet) -> Iterator[tuple[str, NDArray[Any]]]:
    """Id and pixels [bands, height, width] (1 or 3 bands) of each image of a set.

    Raises:
        UsageError: a file is no image.
    """
    for image_id, file in one.images.items():
        try:
            if file.suffix.lower() in RASTERS:
                yield image_id, _read_raster(file, one.bands)
            else:
                with Image.open(file) as picture:
                    yield image_id, np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except _UNREADABLE as error:
            raise _unreadable(one.name, image_id, error) from error


def _check_header(name: str, image_id: str, file: Path) -> None:
    """Open an image without decoding it."""
    try:
        if file.suffix.lower() in RASTERS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                rasterio.open(file).close()
        else:
            Image.open(file).close()
    except _UNREADABLE as error:
        raise _unreadable(name, image_id, error) from error


def _unreadable(name: str, image_id: str, error: Exception) -> UsageError:
    return UsageError(f"evaluation set {name}: {image_id} cannot be read as an image ({error})")
