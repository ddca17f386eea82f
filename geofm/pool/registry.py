"""The registry of evaluation sets, whose content pretraining data must not contain.

A registry is a YAML file or a folder. The file has a list ``sets`` of name, footprints, images,
bands and scale, with paths relative to it. In a folder, the set NAME consists of ``NAME.geojson``
or ``NAME.parquet``, and of a folder ``NAME`` with images. Footprints are polygons or points in
degrees. Images are PNG, JPEG and the like, GeoTIFF or JP2.
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
from data_catalog.hashing import digest_of, sha256_file

#: Suffixes of files with footprints, of images that rasterio reads, and that Pillow reads.
FOOTPRINTS = (".geojson", ".json", ".parquet")
RASTERS, PICTURES = (".tif", ".tiff", ".jp2"), (".png", ".jpg", ".jpeg", ".bmp", ".webp")
#: Errors of the readers of images; Pillow reports a broken PNG chunk as SyntaxError.
_UNREADABLE = (
    RasterioIOError,
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
#: Columns that may hold the id of a footprint; the first one in the file is used.
ID_COLUMNS = ("id", "item_id", "chip_id", "image_id", "name")
#: Bytes of images that ``check_registry`` decodes; it reads the header of the others.
CHECKED_BYTES = 64 * 2**20
_NO_AREAS: NDArray[np.object_] = np.empty(0, dtype=object)


class RegistryEntry(BaseModel):
    """An entry of the YAML file.

    Attributes:
        name: name of the set.
        footprints: file with footprints.
        images: folder with images.
        bands: bands of a raster that are red, green and blue, from 1.
        scale: reflectance per count of images that are not 8-bit.
    """

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    footprints: str | None = None
    images: str | None = None
    bands: list[int] = Field([1, 2, 3], min_length=1, max_length=3)
    scale: float = Field(1e-4, gt=0)


@dataclass(frozen=True)
class EvaluationSet:
    """An evaluation set: areas and images with their ids.

    Attributes:
        name: name of the set.
        areas: shapely geometries, EPSG:4326, shape (n,).
        area_ids: id of each area.
        images: files by id (path below the set's folder).
        bands: bands of a raster that are red, green and blue, from 1.
        scale: reflectance per count of images that are not 8-bit.
        sha256: digest of the areas, the images, bands and scale.
    """

    name: str
    areas: NDArray[np.object_]
    area_ids: list[str]
    images: dict[str, Path] = field(default_factory=dict)
    bands: tuple[int, ...] = (1, 2, 3)
    scale: float = 1e-4
    sha256: str = ""


def load_registry(path: str | Path) -> list[EvaluationSet]:
    """Load the evaluation sets of a registry, sorted by name.

    Raises:
        UsageError: The registry does not exist or is empty, it names a set twice, or a file in it
            is not readable.
    """
    entries, base = _read_entries(path)
    return [_load(entry, base) for entry in sorted(entries, key=lambda entry: entry.name)]


def check_registry(path: str | Path) -> None:
    """Open all evaluation sets of a registry: all footprints, and at least the header of images.

    Raises:
        UsageError: As for ``load_registry`` and ``read_images``.
    """
    entries, base = _read_entries(path)
    for entry in entries:
        if entry.footprints:
            _read_footprints(base / entry.footprints, entry.name)
        total = 0
        images = _image_files(entry, base)
        for image_id, file in images.items():
            total += file.stat().st_size
            if total <= CHECKED_BYTES:
                image = {image_id: file}
                bands = tuple(entry.bands)
                next(read_images(EvaluationSet(entry.name, _NO_AREAS, [], image, bands)))
            else:
                _check_header(entry.name, image_id, file)
        if not entry.footprints and not images:
            raise UsageError(f"evaluation set {entry.name} has neither footprints nor images")


def registry_sha256(sets: list[EvaluationSet]) -> str:
    """Compute the digest of the content of all sets, for keys and certificates."""
    return digest_of([[evaluation.name, evaluation.sha256] for evaluation in sets])


# Entries of a registry.


def _read_entries(path: str | Path) -> tuple[list[RegistryEntry], Path]:
    """Read the entries of a registry, and the folder to which their paths are relative."""
    source = Path(path)
    if source.is_dir():
        entries, base = _entries_of_folder(source), source
    elif source.is_file():
        entries, base = _entries_of_yaml(source), source.parent
    else:
        raise UsageError(f"there is no registry of evaluation sets {source}: give a folder or YAML")
    names = [entry.name for entry in entries]
    if not entries or len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(
            f"registry {source}: "
            + (f"{', '.join(repeated)} is listed twice" if repeated else "no evaluation set in it")
        )
    return entries, base


def _entries_of_folder(folder: Path) -> list[RegistryEntry]:
    """List the sets of a folder by the names of its files and folders."""
    sets: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            sets.setdefault(path.name, {})["images"] = path.name
        elif path.suffix in FOOTPRINTS:
            sets.setdefault(path.stem, {})["footprints"] = path.name
    return _validate_entries([{"name": name, **files} for name, files in sets.items()], folder)


def _entries_of_yaml(file: Path) -> list[RegistryEntry]:
    """Read the sets of a YAML file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"registry {file} is not valid YAML: {error}") from error
    except (OSError, UnicodeError) as error:
        raise UsageError(f"registry {file} cannot be read: {error}") from error
    entries = content.get("sets") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UsageError(f"registry {file}: give a list `sets:` of name, footprints, images")
    return _validate_entries(entries, file)


def _validate_entries(entries: list[Any], source: Path) -> list[RegistryEntry]:
    """Validate entries against the schema."""
    try:
        return [RegistryEntry.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise UsageError(f"registry {source}: {error}") from error


# Areas and images of a set.


def _load(entry: RegistryEntry, base: Path) -> EvaluationSet:
    """Load an evaluation set and compute its digest."""
    areas = _NO_AREAS
    ids: list[str] = []
    content: list[Any] = [entry.bands, entry.scale]
    if entry.footprints:
        areas, ids = _read_footprints(base / entry.footprints, entry.name)
        shapes = [hashlib.sha256(shapely.to_wkb(area)).hexdigest() for area in areas]
        content.append([list(pair) for pair in zip(ids, shapes, strict=True)])
    images = _image_files(entry, base)
    if entry.images:
        content.append([[image_id, sha256_file(file)] for image_id, file in images.items()])
    if not len(areas) and not images:
        raise UsageError(f"evaluation set {entry.name} has neither footprints nor images")
    return EvaluationSet(
        name=entry.name,
        areas=areas,
        area_ids=ids,
        images=images,
        bands=tuple(entry.bands),
        scale=entry.scale,
        sha256=digest_of(content),
    )


def _image_files(entry: RegistryEntry, base: Path) -> dict[str, Path]:
    """List the image files of a set by id; none if it has no folder of images."""
    if not entry.images:
        return {}
    root = base / entry.images
    if not root.is_dir():
        raise UsageError(f"evaluation set {entry.name}: there is no folder of images {root}")
    files = (f for f in sorted(root.rglob("*")) if f.suffix.lower() in RASTERS + PICTURES)
    return {file.relative_to(root).as_posix(): file for file in files}


def _read_footprints(file: Path, name: str) -> tuple[NDArray[np.object_], list[str]]:
    """Read the areas of the set ``name`` in EPSG:4326, and their ids."""
    try:
        frame = gpd.read_parquet(file) if file.suffix == ".parquet" else gpd.read_file(file)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"evaluation set {name}: no footprints in {file}: {error}") from error
    if not isinstance(frame, gpd.GeoDataFrame):
        raise UsageError(f"evaluation set {name}: {file} has no geometries")
    if frame.crs is not None:
        frame = frame.to_crs(4326)
    missing = frame.geometry.isna() | frame.geometry.is_empty
    if missing.any():
        raise UsageError(
            f"evaluation set {name}: {int(missing.sum())} of {len(frame)} footprints in {file} "
            "have no geometry; remove these rows or give them one"
        )
    lowest, highest = np.array([-360, -90, -360, -90]), np.array([360, 90, 360, 90])
    bounds = frame.geometry.bounds.to_numpy()
    if not ((bounds >= lowest) & (bounds <= highest)).all():
        raise UsageError(
            f"evaluation set {name}: footprints in {file} are not in degrees; state the CRS in the "
            "file, or convert them to EPSG:4326"
        )
    column = next((column for column in ID_COLUMNS if column in frame), None)
    ids = [str(value) for value in (frame[column] if column else range(len(frame)))]
    return np.asarray(frame.geometry.to_numpy(), dtype=object), ids


def _read_raster(file: Path, bands: tuple[int, ...]) -> NDArray[Any]:
    """Read three bands of a raster; the first band if it has fewer."""
    driver = "JP2OpenJPEG" if file.suffix.lower() == ".jp2" else "GTiff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # images need no location
        with rasterio.open(file, driver=driver) as source:
            present = [band for band in bands if band <= source.count]
            return np.asarray(source.read(present if len(present) == 3 else [1]))


def read_images(evaluation: EvaluationSet) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the id and the pixels, shape (1 or 3, height, width), of each image of a set.

    Raises:
        UsageError: A file is no image.
    """
    for image_id, file in evaluation.images.items():
        try:
            if file.suffix.lower() in RASTERS:
                yield image_id, _read_raster(file, evaluation.bands)
            else:
                with Image.open(file) as picture:
                    yield image_id, np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        except _UNREADABLE as error:
            raise _unreadable(evaluation.name, image_id, error) from error


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
    """Make the error for an image that cannot be read."""
    return UsageError(f"evaluation set {name}: {image_id} cannot be read as an image ({error})")
