"""The tables of a chips artifact: columns, types and order, the same for every run."""

from __future__ import annotations

import math

import pyarrow as pa

from data_catalog.hashing import digest_of
from data_catalog.tables import Columns

TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()

#: Columns of ``chips.parquet``.
CHIP_COLUMNS: Columns = {
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
ASSET_COLUMNS: Columns = {
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


def chip_columns(*names: str) -> list[str]:
    """Return columns of ``chips.parquet`` by name, for a reader that needs only some of them.

    Raises:
        KeyError: The table has no such column.
    """
    if unknown := [name for name in names if name not in CHIP_COLUMNS]:
        raise KeyError(f"chips.parquet has no columns {unknown}: see CHIP_COLUMNS")
    return list(names)


def chip_id(
    collection: str, item_id: str, item_sha256: str, cell: str, bands: list[str], size: int
) -> str:
    """Return 24 hex digits that depend on item content, cell and bands alone."""
    return digest_of([collection, item_id, item_sha256, cell, bands, size])[:24]
