"""Parquet that is the same bytes for the same rows; GeoParquet where there is a geometry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write rows in the order given, without an index, compressed with zstd.

    A GeoDataFrame is written as GeoParquet (WKB). The bytes depend on the rows and on the
    versions of pyarrow and geopandas alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = frame.reset_index(drop=True)
    if isinstance(plain, gpd.GeoDataFrame):
        plain.to_parquet(path, index=False, compression="zstd")
    else:
        table = pa.Table.from_pandas(plain, preserve_index=False)
        pq.write_table(table, path, compression="zstd")


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a table; a GeoParquet file comes back with shapely geometries.

    Args:
        path: a local Parquet file.
        columns: only these columns; a GeoDataFrame results only when ``geometry`` is among them.
    """
    wanted = None if columns is None else list(columns)
    geo = b"geo" in (pq.read_schema(path).metadata or {})
    if geo and (wanted is None or "geometry" in wanted):
        frame: pd.DataFrame = gpd.read_parquet(path, columns=wanted)
        return frame
    return pd.read_parquet(path, columns=wanted)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries with string keys."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
