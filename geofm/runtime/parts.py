"""The chips of a chips artifact by the tar that holds them: the parts of embedding and curation."""

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
    """A usable chip: id, byte range of its ``.npy``, and what is needed to make it a picture."""

    chip_id: str
    offset: int
    size: int
    pixel_sha256: str
    bands: list[str]
    scale: list[float]

    def identity(self) -> list[Any]:
        """What results about this chip depend on, besides the bytes of the tar."""
        return [self.chip_id, self.offset, self.size, self.bands, self.scale]


@lru_cache(maxsize=2)
def chips_by_part(chips: Artifact) -> dict[str, list[ChipRef]]:
    """Chips with status ok by part file, parts sorted by name and chips by offset."""
    table = chips.table("chips.parquet", COLUMNS)
    table = table[table["status"] == "ok"].sort_values(["part", "offset"], kind="stable")
    return {
        str(part): [_chip_ref(row) for row in rows.itertuples(index=False)]
        for part, rows in table.groupby("part", sort=True)
    }


def _chip_ref(row: Any) -> ChipRef:
    return ChipRef(
        chip_id=str(row.chip_id),
        offset=int(row.offset),
        size=int(row.size),
        pixel_sha256=str(row.pixel_sha256),
        bands=[str(band) for band in row.bands],
        scale=[float(value) for value in row.scale],
    )


def file_digests(artifact: Artifact) -> dict[str, str]:
    """SHA-256 of each file of an artifact, from its manifest."""
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def covers(chips: Artifact, part: str, refs: list[ChipRef]) -> list[Any]:
    """The content identity of one part: the tar's digest and its usable chips.

    Raises:
        CheckError: when the manifest does not list the tar.
    """
    digests = file_digests(chips)
    if part not in digests:
        raise CheckError(
            f"chips {chips.digest[:12]} name the file {part}, which is not in their manifest; "
            "run `geofm verify` on them and cut them again"
        )
    return [digests[part], [ref.identity() for ref in refs]]


def read_pixels(chips: Artifact, part: str, refs: list[ChipRef]) -> Iterator[NDArray[Any]]:
    """Pixels [bands, height, width] of each chip of a part, in order.

    Not to be written to, and to be used before the next are asked for (``read_ranges``).
    """
    for data in read_ranges(chips.local(part), [(ref.offset, ref.size) for ref in refs]):
        yield chip_from_bytes(data)


def ok_chips(chips: Artifact, columns: list[str]) -> pd.DataFrame:
    """Rows of ``chips.parquet`` with status ok, in file order, with a fresh index."""
    table = chips.table("chips.parquet", [*columns, "status"])
    return table[table["status"] == "ok"].drop(columns="status").reset_index(drop=True)
