"""The tables of a chips artifact: their columns, types and order, the same for every run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import shapely
from pyarrow import feather
from shapely.geometry.base import BaseGeometry

from data_catalog.canonical import digest_of
from geofm.imagery.items import Json

TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()

#: Columns of ``chips.parquet``: type, and what a row has that says nothing of it.
CHIP_COLUMNS: dict[str, tuple[Any, Any]] = {
    "chip_id": (TEXT, ""),
    "item_id": (TEXT, ""),
    "item_sha256": (TEXT, ""),
    "collection": (TEXT, ""),
    "source": (TEXT, ""),
    "cell": (TEXT, ""),
    "row": (WHOLE, -1),
    "col": (WHOLE, -1),
    "width": (WHOLE, 0),
    "height": (WHOLE, 0),
    "gsd_m": (REAL, math.nan),
    "crs": (TEXT, ""),
    "transform": (pa.list_(REAL), []),
    "geometry": (pa.binary(), None),
    "bands": (pa.list_(TEXT), []),
    "dtype": (TEXT, ""),
    "scale": (pa.list_(REAL), []),
    "dn_offset": (pa.list_(WHOLE), []),
    "pixel_sha256": (TEXT, ""),
    "valid_fraction": (REAL, math.nan),
    "cloud_fraction": (REAL, math.nan),
    "shadow_fraction": (REAL, math.nan),
    "saturated_fraction": (REAL, math.nan),
    "constant": (pa.bool_(), False),
    "part": (TEXT, ""),
    "offset": (WHOLE, -1),
    "size": (WHOLE, 0),
    "status": (TEXT, "ok"),
    "reason": (TEXT, ""),
    "detail": (TEXT, ""),
    "witness": (TEXT, ""),
    "datetime": (TEXT, ""),
    "licence": (TEXT, ""),
}

#: Columns of ``assets.parquet``.
ASSET_COLUMNS: dict[str, tuple[Any, Any]] = {
    "item_id": (TEXT, ""),
    "item_sha256": (TEXT, ""),
    "collection": (TEXT, ""),
    "asset": (TEXT, ""),
    "band": (TEXT, ""),
    "href": (TEXT, ""),
    "sha256": (TEXT, ""),
    "sha256_from": (TEXT, ""),
    "etag": (TEXT, ""),
    "size": (WHOLE, -1),
    "scale": (REAL, math.nan),
    "dn_offset": (WHOLE, 0),
    "resampling": (TEXT, ""),
    "finding": (TEXT, ""),
    "finding_detail": (TEXT, ""),
    "status": (TEXT, "ok"),
    "reason": (TEXT, ""),
}


def chip_id(
    collection: str, item_id: str, item_sha256: str, cell: str, bands: list[str], size: int
) -> str:
    """24 hex digits: the same for the same item content, cell and bands, in any run."""
    return digest_of([collection, item_id, item_sha256, cell, bands, size])[:24]


def write_rows(rows: list[Json], columns: dict[str, tuple[Any, Any]], path: Path) -> None:
    """Write a part's rows; what a row lacks is filled in, geometries become WKB."""
    table = {
        name: pa.array([_plain(row.get(name, usual)) for row in rows], kind)
        for name, (kind, usual) in columns.items()
    }
    feather.write_feather(pa.table(table), path, "uncompressed")


def _plain(value: Any) -> Any:
    """A value as a table holds it: a geometry as WKB."""
    return shapely.to_wkb(value) if isinstance(value, BaseGeometry) else value


def read_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of all parts, a GeoDataFrame (EPSG:4326) where they have geometries."""
    frame: pd.DataFrame = pa.concat_tables([feather.read_table(path) for path in paths]).to_pandas()
    if "geometry" not in frame:
        return frame
    areas = shapely.from_wkb(frame["geometry"].to_numpy())
    joined: pd.DataFrame = gpd.GeoDataFrame(frame.assign(geometry=areas), crs=4326)
    return joined
