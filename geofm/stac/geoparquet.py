"""stac-geoparquet: catalogues that are one table, read as input and written as ``stac.parquet``.

Reading    `read_table_catalogue` lists the items of a file for a search.
Writing    `write_items` writes the good items for other tools. They are migrated to STAC 1.1 for
           this; hashes and the stage `cut` use the canonical text in ``items.parquet``. A column of
           a table has one type, so items that contradict the majority are left out and counted.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import stac_geoparquet.arrow as sga
from pystac.serialization import identify_stac_object, migrate_to_latest

from data_catalog.errors import RunError
from data_catalog.redaction import without_secrets_in
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access
from geofm.runtime.timestamps import format_utc, parse_utc
from geofm.stac.api_client import has_name, short
from geofm.stac.canonical_item import TIMES
from geofm.stac.item import check_geometry, is_number
from geofm.stac.static_catalog import LinkedFile, StaticCatalog, add_item, read_file
from geofm.types import Json

SUFFIXES = (".parquet", ".geoparquet")
#: Largest file (bytes) that is read; it is held in memory.
MAX_BYTES = 2 * 2**30
#: Rows that are converted to items at once.
BATCH_ROWS = 1000

#: Most columns of the written table: each asset key and each field becomes a column.
MAX_FIELDS = 5000
ROW_GROUP = 10_000
#: Most conversions in the search for items that can't be converted.
MAX_CONVERSIONS = 200
_LINK = pa.struct([(name, pa.string()) for name in ("href", "rel", "type", "title")])
#: Exceptions of the libraries for JSON of unexpected types.
_CONVERSION_ERRORS = (
    pystac.STACError,
    pystac.STACTypeError,
    pystac.ExtensionTypeError,
    pa.ArrowException,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    NotImplementedError,
)
#: Top-level members of an item; a property of the same name would collide with their column.
_RESERVED = {
    "type",
    "stac_version",
    "stac_extensions",
    "id",
    "geometry",
    "bbox",
    "links",
    "assets",
    "collection",
    "properties",
}

FieldPath = tuple[str, ...]


def is_table(address: str) -> bool:
    """Check whether an address is that of a stac-geoparquet file, by its suffix."""
    return address.partition("?")[0].lower().endswith(SUFFIXES)


def read_table_catalogue(address: str, access: Access | None = None) -> StaticCatalog:
    """Read all items of a stac-geoparquet file.

    Args:
        address: Address of the file (http, https, s3 or a local path).
        access: Rules for reading it.

    Raises:
        RunError: The file can't be read, or is no stac-geoparquet.
    """
    catalogue = StaticCatalog(address, [])
    file = LinkedFile(address, "", 0)
    try:
        table = pq.ParquetFile(pa.BufferReader(read_file(address, address, MAX_BYTES, access)))
        for name, collection in _collections(table).items():
            catalogue.collections[name] = without_secrets_in(collection)
        for batch in table.iter_batches(BATCH_ROWS):
            for item in sga.stac_table_to_items(pa.Table.from_batches([batch])):
                add_item(catalogue, item, file)
    except Quarantine as problem:
        raise RunError(
            f"{address} cannot be read ({problem.detail}); check search.stac, or run again later"
        ) from problem
    except (*_CONVERSION_ERRORS, OSError) as error:
        raise RunError(
            f"{address} is no stac-geoparquet ({short(error)}); check search.stac"
        ) from error
    return catalogue


def _collections(table: pq.ParquetFile) -> dict[str, Json]:
    """Return the collections in the file's metadata, by id."""
    text = (table.metadata.metadata or {}).get(b"stac-geoparquet", b"{}")
    metadata: Any = json.loads(text)
    stated = metadata.get("collections") if isinstance(metadata, dict) else None
    collections = stated.values() if isinstance(stated, dict) else []
    return {
        str(collection["id"]): collection
        for collection in collections
        if isinstance(collection, dict) and has_name(collection)
    }


def write_items(texts: list[str], path: Path) -> dict[str, int]:
    """Write items in the given order; no file is written if no item can be.

    Args:
        texts: Canonical JSON of the good items.
        path: The file.

    Returns:
        Numbers of ``items`` written and ``left_out``.
    """
    items = _agreeing_items([item for text in texts if (item := _to_latest(text)) is not None])
    table = _to_table(items)
    if table is None and items:
        items = list(_convertible_items(items, [MAX_CONVERSIONS]))
        table = _to_table(items) if items else None
    if table is None:
        return {"items": 0, "left_out": len(texts)}
    batches = table.to_batches(max_chunksize=ROW_GROUP)
    reader = pa.RecordBatchReader.from_batches(table.schema, batches)
    # The JSON of the collections is left out: servers change it daily (extents, addresses).
    try:
        sga.to_parquet(reader, path, compression="zstd")
    except _CONVERSION_ERRORS:  # Arrow has types that Parquet does not have
        path.unlink(missing_ok=True)
        return {"items": 0, "left_out": len(texts)}
    return {"items": len(items), "left_out": len(texts) - len(items)}


def _to_latest(text: str) -> Json | None:
    """Migrate an item to STAC 1.1 in a form that a table can hold; None if that fails."""
    item: Json = json.loads(text)
    item["links"] = []
    item.setdefault("stac_version", "1.0.0")
    try:
        area = check_geometry(item.get("geometry"))
        latest: Json = migrate_to_latest(copy.deepcopy(item), identify_stac_object(item))
        if _RESERVED & set(latest["properties"]):
            return None
        for name in TIMES:
            if name in latest["properties"]:
                latest["properties"][name] = _utc_text(latest["properties"][name])
    except (*_CONVERSION_ERRORS, Quarantine):
        return None
    latest.setdefault("stac_extensions", [])
    bbox = latest.get("bbox")
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox))):
        latest["bbox"] = list(area.bounds)
    return {**_without_empty_objects(latest), "links": []}


def _utc_text(value: Any) -> str:
    """Write a time so that a column of timestamps can hold it."""
    when = parse_utc(value)
    if when is None:
        raise ValueError(f"{value!a:.40} is no time")
    return format_utc(when)


def _without_empty_objects(value: Any) -> Any:
    """Drop empty objects, which Parquet has no column type for."""
    if isinstance(value, dict):
        members = {key: _without_empty_objects(inner) for key, inner in value.items()}
        return {key: inner for key, inner in members.items() if inner != {}}
    if isinstance(value, list):
        return [inner for inner in map(_without_empty_objects, value) if inner != {}]
    return value


def _agreeing_items(items: list[Json]) -> list[Json]:
    """Keep items whose fields all have their usual type, up to ``MAX_FIELDS`` fields."""
    fields_of_items = [set(_field_types(item, ())) for item in items]
    counts: dict[FieldPath, Counter[str]] = defaultdict(Counter)
    for fields in fields_of_items:
        for path, kind in fields:
            counts[path][kind] += 1
    usual = {path: max(sorted(count), key=count.__getitem__) for path, count in counts.items()}
    kept, columns = [], set[FieldPath]()
    for item, fields in zip(items, fields_of_items, strict=True):
        added = {path for path, _ in fields} - columns
        if len(columns) + len(added) > MAX_FIELDS or any(usual[p] != kind for p, kind in fields):
            continue
        columns |= added
        kept.append(item)
    return kept


def _field_types(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, str]]:
    """Yield each field below a value with its type; ``*`` in a path is any list element."""
    if path in (("geometry",), ("bbox",)):
        return
    if isinstance(value, dict):
        yield path, "object"
        for name, inner in value.items():
            yield from _field_types(inner, (*path, name))
    elif isinstance(value, list):
        yield path, "list"
        for inner in value:
            yield from _field_types(inner, (*path, "*"))
    elif value is not None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        yield path, "number" if number else type(value).__name__


def _convertible_items(items: list[Json], budget: list[int]) -> Iterator[Json]:
    """Find the items that make a table by halving; ``budget[0]`` counts the conversions left."""
    budget[0] -= 1
    if _to_table(items) is not None:
        yield from items
    elif len(items) > 1 and budget[0] > 0:
        middle = len(items) // 2
        yield from _convertible_items(items[:middle], budget)
        yield from _convertible_items(items[middle:], budget)


def _to_table(items: list[Json]) -> pa.Table | None:
    """Convert items to one table; None if that fails."""
    try:
        table = sga.parse_stac_items_to_arrow(items).read_all().combine_chunks()
        links = pa.array([[] for _ in items], pa.list_(_LINK))
        return table.set_column(table.schema.get_field_index("links"), "links", links)
    except (*_CONVERSION_ERRORS, StopIteration):
        return None
