"""The parts of the stages that work on chips: one part per tar of a chips artifact.

`chips_by_part` lists the chips of each tar, `covers` names the content of a part for its cache key,
and `read_pixels` reads its chips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError
from geofm.formats.npy import chip_from_bytes
from geofm.formats.tar import read_ranges

COLUMNS = ["chip_id", "status", "part", "offset", "size", "pixel_sha256", "bands", "scale"]


@dataclass(frozen=True)
class ChipRef:
    """A usable chip: its id, the byte range of its ``.npy``, and its bands and scales."""

    chip_id: str
    offset: int
    size: int
    pixel_sha256: str
    bands: list[str]
    scale: list[float]

    def identity(self) -> list[Any]:
        """Return the fields that results on this chip depend on, besides the bytes of the tar."""
        return [self.chip_id, self.offset, self.size, self.bands, self.scale]


@lru_cache(maxsize=2)
def chips_by_part(chips: Artifact) -> dict[str, list[ChipRef]]:
    """Group the chips with status ok by tar; tars are sorted by name, chips by offset."""
    table = chips.table("chips.parquet", COLUMNS)
    table = table[table["status"] == "ok"].sort_values(["part", "offset"], kind="stable")
    return {
        str(part): [_chip_ref(row) for row in rows.itertuples(index=False)]
        for part, rows in table.groupby("part", sort=True)
    }


def _chip_ref(row: Any) -> ChipRef:
    """Make the reference of a row of ``chips.parquet``."""
    return ChipRef(
        chip_id=str(row.chip_id),
        offset=int(row.offset),
        size=int(row.size),
        pixel_sha256=str(row.pixel_sha256),
        bands=[str(band) for band in row.bands],
        scale=[float(value) for value in row.scale],
    )


def file_digests(artifact: Artifact) -> dict[str, str]:
    """Return the SHA-256 of each file of an artifact, from its manifest."""
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def covers(chips: Artifact, part: str, refs: list[ChipRef]) -> list[Any]:
    """Return the content of a part for its cache key: the tar's digest and its usable chips.

    Raises:
        CheckError: The manifest does not list the tar.
    """
    digests = file_digests(chips)
    if part not in digests:
        raise CheckError(
            f"the table of chips {chips.digest[:12]} names the file {part}, which their manifest "
            "lacks; run `geofm verify` on them and cut them again"
        )
    return [digests[part], [ref.identity() for ref in refs]]


def read_pixels(chips: Artifact, part: str, refs: list[ChipRef]) -> Iterator[NDArray[Any]]:
    """Yield the pixels (bands, height, width) of each chip of a part, in order.

    The arrays are read-only views and valid until the next one is read (see ``read_ranges``).
    """
    for data in read_ranges(chips.local(part), [(ref.offset, ref.size) for ref in refs]):
        yield chip_from_bytes(data)


def ok_chips(chips: Artifact, columns: list[str]) -> pd.DataFrame:
    """Return the rows of ``chips.parquet`` with status ok, in file order, numbered from 0."""
    table = chips.table("chips.parquet", [*columns, "status"])
    return table[table["status"] == "ok"].drop(columns="status").reset_index(drop=True)
