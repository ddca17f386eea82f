"""The tables of a chips artifact: their columns, types and order, the same for every run."""

from __future__ import annotations

import math
from typing import Any

import geopandas as gpd
import pandas as pd

from data_catalog.canonical import digest_of
from geofm.imagery.items import Json

_TEXTS = {
    "chip_id", "item_id", "item_sha256", "collection", "source", "cell", "crs", "dtype",
    "pixel_sha256", "part", "status", "reason", "detail", "witness", "datetime", "licence",
}  # fmt: skip
_WHOLE = {"row", "col", "width", "height", "offset", "size"}
_SHARES = {"gsd_m", "valid_fraction", "cloud_fraction", "shadow_fraction", "saturated_fraction"}

#: Columns of ``chips.parquet`` with what an item-level row has in them.
CHIP_COLUMNS: dict[str, Any] = {
    "chip_id": "",
    "item_id": "",
    "item_sha256": "",
    "collection": "",
    "source": "",
    "cell": "",
    "row": -1,
    "col": -1,
    "width": 0,
    "height": 0,
    "gsd_m": math.nan,
    "crs": "",
    "transform": (),
    "geometry": None,
    "bands": (),
    "dtype": "",
    "scale": (),
    "dn_offset": (),
    "pixel_sha256": "",
    "valid_fraction": math.nan,
    "cloud_fraction": math.nan,
    "shadow_fraction": math.nan,
    "saturated_fraction": math.nan,
    "constant": False,
    "part": "",
    "offset": -1,
    "size": 0,
    "status": "ok",
    "reason": "",
    "detail": "",
    "witness": "",
    "datetime": "",
    "licence": "",
}

#: Columns of ``assets.parquet``.
ASSET_COLUMNS: dict[str, Any] = {
    "item_id": "",
    "item_sha256": "",
    "collection": "",
    "asset": "",
    "band": "",
    "href": "",
    "sha256": "",
    "sha256_from": "",
    "etag": "",
    "size": -1,
    "scale": math.nan,
    "dn_offset": 0,
    "resampling": "",
    "status": "ok",
    "reason": "",
}


def chip_id(
    collection: str, item_id: str, item_sha256: str, cell: str, bands: list[str], size: int
) -> str:
    """24 hex digits: the same for the same item content, cell and bands, in any run."""
    return digest_of([collection, item_id, item_sha256, cell, bands, size])[:24]


def chip_frame(rows: list[Json]) -> gpd.GeoDataFrame:
    """Rows of ``chips.parquet``; what a row lacks is filled in."""
    columns = {name: [row.get(name, usual) for row in rows] for name, usual in CHIP_COLUMNS.items()}
    frame = gpd.GeoDataFrame(columns, geometry="geometry", crs=4326)
    for name in CHIP_COLUMNS:
        if name in _TEXTS:
            frame[name] = frame[name].astype("str")
        elif name in _WHOLE:
            frame[name] = frame[name].astype("int64")
        elif name in _SHARES:
            frame[name] = frame[name].astype("float64")
    for name, kind in (("transform", float), ("bands", str), ("scale", float), ("dn_offset", int)):
        frame[name] = [[kind(value) for value in values] for values in columns[name]]
    frame["constant"] = frame["constant"].astype("bool")
    return frame


def asset_frame(rows: list[Json]) -> pd.DataFrame:
    """Rows of ``assets.parquet``."""
    columns = {
        name: [row.get(name, usual) for row in rows] for name, usual in ASSET_COLUMNS.items()
    }
    frame = pd.DataFrame(columns)
    for name, usual in ASSET_COLUMNS.items():
        frame[name] = frame[name].astype(type(usual))
    return frame
