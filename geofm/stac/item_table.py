"""Items from stac-geoparquet, the table form of a catalogue."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import stac_geoparquet.arrow as sga

from data_catalog.errors import RunError
from data_catalog.redaction import without_secrets_in
from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import Access
from geofm.stac.api_client import has_name, short
from geofm.stac.static_catalog import Place, Walk, read_file, take_item
from geofm.types import Json

#: Size (bytes) of a table that is read into memory.
MAX_BYTES = 2 * 2**30
SUFFIXES = (".parquet", ".geoparquet")
ROWS = 1000


def is_table(stac: str) -> bool:
    """Whether an address is that of a stac-geoparquet file."""
    return stac.partition("?")[0].lower().endswith(SUFFIXES)


def read_items(stac: str, access: Access | None = None) -> Walk:
    """All items of a stac-geoparquet file, by http(s), s3 or a local path.

    Args:
        stac: address of the file.
        access: how it may be read.

    Raises:
        RunError: it can't be read, or is no stac-geoparquet.
    """
    found = Walk(stac, [])
    place = Place(stac, "", 0)
    try:
        file = pq.ParquetFile(pa.BufferReader(read_file(stac, stac, MAX_BYTES, access)))
        for name, collection in _collections(file).items():
            found.collections[name] = without_secrets_in(collection)
        for batch in file.iter_batches(ROWS):
            for item in sga.stac_table_to_items(pa.Table.from_batches([batch])):
                take_item(found, item, place)
    except Quarantine as problem:
        raise RunError(
            f"{stac} cannot be read ({problem.detail}); check search.stac, or run again later"
        ) from problem
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OSError,
            RecursionError) as error:  # fmt: skip
        raise RunError(
            f"{stac} is no stac-geoparquet ({short(error)}); check search.stac"
        ) from error
    return found


def _collections(file: pq.ParquetFile) -> dict[str, Json]:
    """The collections that the file's own metadata describes."""
    text = (file.metadata.metadata or {}).get(b"stac-geoparquet", b"{}")
    told: Any = json.loads(text)
    inside = told.get("collections") if isinstance(told, dict) else None
    inside = inside if isinstance(inside, dict) else {}
    return {
        str(one["id"]): one for one in inside.values() if isinstance(one, dict) and has_name(one)
    }
