"""Tables: Parquet files of artifacts, and Arrow files of parts.

The same rows give the same Parquet bytes. A frame with a geometry is written as GeoParquet. The
tables of parts are Arrow streams, because they are many, small and read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

#: Columns of a part's table: Arrow type, and the value of a row that lacks the column.
Columns = Mapping[str, tuple[Any, Any]]
#: Rows of a row group: a reader that needs some rows reads only their groups.
GROUP_ROWS = 32_768
#: Key of the note in the metadata of a schema.
NOTE = b"note"


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as Parquet without its index, compressed with zstd.

    A GeoDataFrame is written as GeoParquet (WKB). The bytes depend only on the rows and on the
    versions of pyarrow and geopandas.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = frame.reset_index(drop=True)
    if isinstance(plain, gpd.GeoDataFrame):
        plain.to_parquet(path, index=False, compression="zstd", row_group_size=GROUP_ROWS)
    else:
        table = pa.Table.from_pandas(plain, preserve_index=False)
        pq.write_table(table, path, compression="zstd", row_group_size=GROUP_ROWS)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a Parquet file; a GeoParquet file gives a GeoDataFrame with shapely geometries.

    Args:
        path: A local file.
        columns: Columns to read; all by default. A GeoDataFrame results only if ``geometry`` is
            among them.
    """
    wanted = None if columns is None else list(columns)
    geo = b"geo" in (pq.read_schema(path).metadata or {})
    if geo and (wanted is None or "geometry" in wanted):
        frame: pd.DataFrame = gpd.read_parquet(path, columns=wanted)
        return frame
    return pd.read_parquet(path, columns=wanted)


def find_unreadable(path: Path) -> str:
    """Find the first column and rows of a damaged Parquet file that cannot be read.

    Returns:
        A sentence for people; empty if the whole file can be read.
    """
    first = 0
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError):
        return "its header or footer cannot be read"
    for number in range(file.num_row_groups):
        last = first + file.metadata.row_group(number).num_rows - 1
        for column in file.schema_arrow.names:
            try:
                file.read_row_group(number, [column], use_threads=False).validate(full=True)
            except (pa.ArrowException, OSError, ValueError):
                return f"column {column} of rows {first} to {last} cannot be read"
        first = last + 1
    return ""


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dictionaries with string keys."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def write_rows(
    path: Path, *tables: tuple[Sequence[Mapping[str, Any]], Columns], note: bytes = b""
) -> None:
    """Write the tables of a part into one file.

    One file is enough because creating a file costs as much time as writing a small table.

    Args:
        path: The file.
        tables: Rows and columns of each table. Missing values are filled in; geometries are
            written as WKB.
        note: Bytes that are kept in the metadata of the first table.
    """
    sink = pa.BufferOutputStream()
    for rows, columns in tables:
        values = {
            name: [_to_arrow(row.get(name, default)) for row in rows]
            for name, (_, default) in columns.items()
        }
        _append(sink, values, {name: kind for name, (kind, _) in columns.items()}, note)
        note = b""  # only the first table has the note
    path.write_bytes(sink.getvalue())


def write_columns(path: Path, values: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> None:
    """Write a part's table that is given by columns.

    Args:
        path: The file.
        values: List or array of each column.
        kinds: Arrow types of the columns, in the order of the table.
    """
    sink = pa.BufferOutputStream()
    _append(sink, values, kinds, b"")
    path.write_bytes(sink.getvalue())


def _append(
    sink: Any, values: Mapping[str, Any], kinds: Mapping[str, pa.DataType], note: bytes
) -> None:
    arrays = [pa.array(values[name], kind) for name, kind in kinds.items()]
    batch = pa.record_batch(arrays, schema=pa.schema(list(kinds.items()), {NOTE: note}))
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)


def _to_arrow(value: Any) -> Any:
    """Convert a geometry to WKB; other values are unchanged."""
    return shapely.to_wkb(value) if isinstance(value, BaseGeometry) else value


def read_note(path: Path) -> bytes:
    """Read the note of a part's file."""
    with pa.OSFile(str(path)) as file:
        note: bytes = pa.ipc.open_stream(file).schema.metadata[NOTE]
    return note


def read_rows(paths: Iterable[Path], number: int = 0) -> pd.DataFrame:
    """Read the rows of all parts; a GeoDataFrame (EPSG:4326) if they have geometries.

    Args:
        paths: Files of the parts.
        number: Position of the table in each file.
    """
    frame: pd.DataFrame = pa.concat_tables([_table(path, number) for path in paths]).to_pandas()
    if "geometry" not in frame:
        return frame
    areas = shapely.from_wkb(frame["geometry"].to_numpy())
    joined: pd.DataFrame = gpd.GeoDataFrame(frame.assign(geometry=areas), crs=4326)
    return joined


def map_rows(paths: Iterable[Path]) -> list[pa.Table]:
    """Map the first table of each part from its file, without reading it into memory."""
    return [pa.ipc.open_stream(pa.memory_map(str(path))).read_all().replace_schema_metadata()
            for path in paths]  # fmt: skip


def write_sorted(table: pa.Table, order: NDArray[np.int64], path: Path) -> None:
    """Write the rows of a table in some order as Parquet, one row group at a time.

    The bytes depend on the rows and their order alone, not on the chunks of the table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as file:
        for first in range(0, len(order), GROUP_ROWS):
            rows = table.take(order[first : first + GROUP_ROWS]).combine_chunks()
            file.write_table(rows, row_group_size=GROUP_ROWS)


def _table(path: Path, number: int) -> pa.Table:
    with pa.OSFile(str(path)) as file:
        for _ in range(number):
            pa.ipc.open_stream(file).read_all()
        return pa.ipc.open_stream(file).read_all().replace_schema_metadata()
