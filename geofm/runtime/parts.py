"""The parts of the stages that work on chips: at most ``PART_CHIPS`` neighbours in a tar.

`chip_parts` goes through the tars with their chips, `part_chips` reads the chips of one part,
`covers` names the content of a part for its cache key, and `read_pixels` reads its pixels. The seal
brings the rows of all parts into the order of the chips (`rows_of_parts`).

A scene is one tar of up to some thousand chips: in smaller parts, all cores work on one new scene.
The table of chips stays in Arrow: as Python objects it would take 1.8 kB a chip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, RunError
from geofm.formats.npy import chip_from_bytes
from geofm.formats.tar import read_ranges
from geofm.types import Indices

TABLE = "chips.parquet"
COLUMNS = ["chip_id", "offset", "size", "bands", "scale"]
#: Most chips of a part: a whole number of batches.
PART_CHIPS = 1024
#: Selects the usable chips.
OK = pc.field("status") == "ok"


@dataclass(frozen=True)
class ChipRef:
    """A usable chip: its id, the byte range of its ``.npy``, and its bands and scales."""

    chip_id: str
    offset: int
    size: int
    bands: list[str]
    scale: list[float]

    def identity(self) -> list[Any]:
        """Return the fields that results on this chip depend on, besides the bytes of the tar."""
        return [self.chip_id, self.offset, self.size, self.bands, self.scale]


@dataclass(frozen=True)
class ChipPart:
    """Usable chips of a tar, by offset: those from one offset (bytes) to another, included."""

    tar: str
    first: int
    last: int


def chip_parts(chips: Artifact) -> Iterator[tuple[ChipPart, list[ChipRef]]]:
    """Yield each part with its usable chips; tars are sorted by name, chips by offset."""
    table = pq.read_table(
        chips.local(TABLE), columns=[*COLUMNS, "part"], filters=OK, read_dictionary=["part"]
    )
    if not len(table):
        return
    parts = table.column("part").unify_dictionaries().combine_chunks()
    names = np.array(parts.dictionary.to_pylist(), dtype=np.str_)
    rank = np.argsort(np.argsort(names))
    number = rank[parts.indices.to_numpy()]
    order = np.lexsort((table.column("offset").to_numpy(), number))
    ends = np.cumsum(np.bincount(number, minlength=len(names)))
    table = table.drop_columns("part")
    for name, rows in zip(np.sort(names), np.split(order, ends[:-1]), strict=True):
        for begin in range(0, len(rows), PART_CHIPS):
            refs = _refs(table.take(rows[begin : begin + PART_CHIPS]))
            yield ChipPart(str(name), refs[0].offset, refs[-1].offset), refs


def part_chips(chips: Artifact, part: ChipPart) -> list[ChipRef]:
    """Read the usable chips of a part, by offset; row groups of other tars are not read."""
    offset = pc.field("offset")
    inside = (pc.field("part") == part.tar) & (offset >= part.first) & (offset <= part.last)
    table = pq.read_table(chips.local(TABLE), columns=COLUMNS, filters=OK & inside)
    return _refs(table.sort_by("offset"))


def _refs(table: pa.Table) -> list[ChipRef]:
    """Make the references of the rows of a table."""
    return [ChipRef(**row) for row in table.to_pylist()]


def file_digests(artifact: Artifact) -> dict[str, str]:
    """Return the SHA-256 of each file of an artifact, from its manifest."""
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def covers(chips: Artifact, tar: str, refs: list[ChipRef]) -> list[Any]:
    """Return the content of a part for its cache key: the tar's digest and its usable chips.

    Raises:
        CheckError: The manifest does not list the tar.
    """
    digests = file_digests(chips)
    if tar not in digests:
        raise CheckError(
            f"the table of chips {chips.digest[:12]} names the file {tar}, which their manifest "
            "lacks; run `geofm verify` on them and cut them again"
        )
    return [digests[tar], [ref.identity() for ref in refs]]


def read_pixels(chips: Artifact, tar: str, refs: list[ChipRef]) -> Iterator[NDArray[Any]]:
    """Yield the pixels (bands, height, width) of chips of a tar, in order.

    The arrays are read-only views and valid until the next one is read (see ``read_ranges``).
    """
    for data in read_ranges(chips.local(tar), [(ref.offset, ref.size) for ref in refs]):
        yield chip_from_bytes(data)


def ok_chips(chips: Artifact, columns: list[str]) -> pd.DataFrame:
    """Return the rows of ``chips.parquet`` with status ok, in file order, numbered from 0."""
    table = chips.table(TABLE, [*columns, "status"])
    return table[table["status"] == "ok"].drop(columns="status").reset_index(drop=True)


def ok_chip_ids(chips: Artifact) -> pa.ChunkedArray:
    """Return the ids of the chips with status ok, in file order."""
    return pq.read_table(chips.local(TABLE), columns=["chip_id"], filters=OK).column("chip_id")


def rows_of_parts(ids: pa.ChunkedArray, ids_of_parts: Sequence[pa.Array]) -> list[Indices]:
    """Find the row in ``ids`` of each chip of each part.

    Raises:
        RunError: The parts do not hold each chip once (a defect).
    """
    joined = pa.chunked_array([part_ids.cast(ids.type) for part_ids in ids_of_parts], ids.type)
    rows = np.asarray(pc.fill_null(pc.index_in(joined, value_set=ids), -1), dtype=np.int64)
    if not np.array_equal(np.sort(rows), np.arange(len(ids))):
        raise RunError(
            f"the parts hold {len(rows)} chips, not each of the {len(ids)} chips once; run the "
            "stage again"
        )
    ends = np.cumsum([len(part_ids) for part_ids in ids_of_parts])
    return np.split(rows, ends[:-1]) if len(ends) else []
