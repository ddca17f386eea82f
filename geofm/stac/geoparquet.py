"""``stac.parquet``: the good items as strict stac-geoparquet, which any tool reads.

Items are brought to STAC 1.1 for it; what is hashed and what the cut reads stays the frozen text of
``items.parquet``. A table has one type per column, so an item that contradicts the others is left
out, and counted.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow as pa
import pystac
import stac_geoparquet.arrow as sga
from pystac.serialization import identify_stac_object, migrate_to_latest

from geofm.remote.quarantine import Quarantine
from geofm.runtime.text import instant
from geofm.stac.canonical_item import TIMES, stamp
from geofm.stac.item import check_geometry, is_number
from geofm.types import Json

#: Columns beyond which items are left out: each asset key and each field is one.
MAX_FIELDS = 5000
ROW_GROUP = 10_000
#: Conversions that are tried to find the items that can't be converted.
TRIES = 200
_LINK = pa.struct([(name, pa.string()) for name in ("href", "rel", "type", "title")])
#: What somebody's JSON may raise in libraries that trust its types.
_STRANGE = (
    pystac.STACError, pystac.STACTypeError, pystac.ExtensionTypeError, pa.ArrowException,
    ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError,
    NotImplementedError,
)  # fmt: skip
#: Members of an item that a property of the same name would fall upon in a table.
_RESERVED = {
    "type", "stac_version", "stac_extensions", "id", "geometry", "bbox", "links", "assets",
    "collection", "properties",
}  # fmt: skip

Field = tuple[str, ...]


def write_items(texts: list[str], path: Path) -> dict[str, int]:
    """Write frozen items, in the order given; no file where none can be written.

    Args:
        texts: frozen JSON of the good items.
        path: of the file.

    Returns:
        ``items`` written and ``left_out``.
    """
    items = agreeing([item for text in texts if (item := to_latest(text)) is not None])
    table = _table(items)
    if table is None and items:
        items = list(_fitting(items, [TRIES]))
        table = _table(items) if items else None
    if table is None:
        return {"items": 0, "left_out": len(texts)}
    batches = table.to_batches(max_chunksize=ROW_GROUP)
    reader = pa.RecordBatchReader.from_batches(table.schema, batches)
    # without the collections' own JSON: servers write it anew each day (extents, addresses)
    try:
        sga.to_parquet(reader, path, compression="zstd")
    except _STRANGE:  # what Arrow holds and Parquet does not
        path.unlink(missing_ok=True)
        return {"items": 0, "left_out": len(texts)}
    return {"items": len(items), "left_out": len(texts) - len(items)}


def _fitting(items: list[Json], tries: list[int]) -> Iterator[Json]:
    """The items that make a table, found by halving; ``tries`` counts down to when it gives up."""
    tries[0] -= 1
    if _table(items) is not None:
        yield from items
    elif len(items) > 1 and tries[0] > 0:
        middle = len(items) // 2
        yield from _fitting(items[:middle], tries)
        yield from _fitting(items[middle:], tries)


def to_latest(text: str) -> Json | None:
    """A frozen item as STAC 1.1 and as a table can hold it; None where that can't be done."""
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
                latest["properties"][name] = _full(latest["properties"][name])
    except (*_STRANGE, Quarantine):
        return None
    latest.setdefault("stac_extensions", [])
    corners = latest.get("bbox")
    if not (isinstance(corners, list) and len(corners) == 4 and all(map(is_number, corners))):
        latest["bbox"] = list(area.bounds)
    return {**_filled(latest), "links": []}


def _full(value: Any) -> str:
    """A time that a column of times can hold."""
    when = instant(value)
    if when is None:
        raise ValueError(f"{value!a:.40} is no time")
    return stamp((when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC).isoformat())


def _filled(value: Any) -> Any:
    """The value without empty objects, which are no column."""
    if isinstance(value, dict):
        inner = {key: _filled(one) for key, one in value.items()}
        return {key: one for key, one in inner.items() if one != {}}
    if isinstance(value, list):
        return [one for one in map(_filled, value) if one != {}]
    return value


def agreeing(items: list[Json]) -> list[Json]:
    """The items whose fields have the kind that they have in most, and not endlessly many."""
    kept, known = [], set[Field]()
    kinds: dict[Field, Counter[str]] = defaultdict(Counter)
    found = [set(_kinds(item, ())) for item in items]
    for fields in found:
        for field, kind in fields:
            kinds[field][kind] += 1
    usual = {field: max(sorted(count), key=count.__getitem__) for field, count in kinds.items()}
    for item, fields in zip(items, found, strict=True):
        new = {field for field, _ in fields} - known
        if len(known) + len(new) > MAX_FIELDS or any(usual[f] != kind for f, kind in fields):
            continue
        known |= new
        kept.append(item)
    return kept


def _kinds(value: Any, place: Field) -> Iterator[tuple[Field, str]]:
    """Each field below a value with the kind of what is in it; ``*`` stands for list elements."""
    if place in (("geometry",), ("bbox",)):
        return
    if isinstance(value, dict):
        yield place, "object"
        for name, one in value.items():
            yield from _kinds(one, (*place, name))
    elif isinstance(value, list):
        yield place, "list"
        for one in value:
            yield from _kinds(one, (*place, "*"))
    elif value is not None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        yield place, "number" if number else type(value).__name__


def _table(items: list[Json]) -> pa.Table | None:
    """The items as one table, None where they are none."""
    try:
        table = sga.parse_stac_items_to_arrow(items).read_all().combine_chunks()
        links = pa.array([[] for _ in items], pa.list_(_LINK))
        return table.set_column(table.schema.get_field_index("links"), "links", links)
    except (*_STRANGE, StopIteration):
        return None
