"""Stage ``describe``: descriptors, perceptual hash and thumbnail of every usable chip.

plan    one part per tar of chips
work    describe the chips of a tar                       (descriptors.py, perceptual_hash.py)
seal    join the parts in the order of ``chips.parquet``

Later stages find here what they need of the pixels, so no tar is opened twice. Nothing depends on a
setting or a seed.
"""

from __future__ import annotations

from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import read_rows, write_columns, write_table
from geofm.dedup.descriptors import THUMBNAIL, measure_all
from geofm.dedup.perceptual_hash import canonical_hash, hash_thumbnails
from geofm.formats.npy import npy_head
from geofm.runtime.parts import chips_by_part, covers, ok_chips, read_pixels

VERSION = "5"
#: Files of the artifact, and the rows of a part.
TABLE, THUMBNAILS, ROWS = "descriptors.parquet", "thumbnails.npy", "rows.arrow"
#: Chips that are described together: their band thumbnails are in memory at once.
TOGETHER = 16
_REAL, _REALS, _HASH = pa.float64(), pa.list_(pa.float64()), pa.uint64()
#: Columns of ``descriptors.parquet``.
COLUMNS = {
    "chip_id": pa.string(),
    "hash": _HASH,
    "hash_canonical": _HASH,
    "entropy": _REAL,
    "gradient": _REAL,
    "saturation": _REAL,
    "constant": pa.bool_(),
    "band_means": _REALS,
    "band_stds": _REALS,
    "band_correlation": _REALS,
    "thumbnail_low": _REAL,
    "thumbnail_high": _REAL,
}


def plan(job: Job) -> list[Part]:
    """List one part per tar; its key covers the tar and its usable chips."""
    chips = job.inputs["chips"]
    return [
        job.part({"part": part}, covers(chips, part, refs))
        for part, refs in chips_by_part(chips).items()
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe the chips of one tar: ``rows.arrow`` and ``thumbnails.npy``."""
    chips, name = job.inputs["chips"], part.payload["part"]
    refs = chips_by_part(chips)[name]
    pixels = read_pixels(chips, name, refs)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    thumbnails = np.empty((len(refs), THUMBNAIL, THUMBNAIL), np.uint8)
    for (bands, scale), same_bands in groupby(refs, lambda ref: (ref.bands, ref.scale)):
        while group := list(islice(same_bands, TOGETHER)):
            done = len(columns["chip_id"])
            target = slice(done, done + len(group))
            measured, thumbnails[target] = measure_all(islice(pixels, len(group)), bands, scale)
            columns["chip_id"] += [ref.chip_id for ref in group]
            for column, values in measured.items():
                columns[column] += values
    hashes = hash_thumbnails(thumbnails)
    write_columns(
        folder / ROWS,
        {**columns, "hash": hashes, "hash_canonical": canonical_hash(hashes)},
        COLUMNS,
    )
    np.save(folder / THUMBNAILS, thumbnails)


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Join the parts in the order of ``chips.parquet``: row r of both files is the same chip."""
    ids = ok_chips(job.inputs["chips"], ["chip_id"])["chip_id"].astype(str)
    row_of = {chip_id: row for row, chip_id in enumerate(ids)}
    if not len(ids):
        np.save(folder / THUMBNAILS, np.empty((0, THUMBNAIL, THUMBNAIL), np.uint8))
        write_table(pd.DataFrame({"chip_id": ids}), folder / TABLE)
        return Sealed(counts={"rows_in": 0, "rows_out": 0}, facts={"thumbnail_px": THUMBNAIL})
    joined = read_rows(part / ROWS for part in folders)
    rows = [row_of[chip_id] for chip_id in joined["chip_id"]]
    _join_thumbnails(folders, rows, folder / THUMBNAILS)
    write_table(joined.iloc[np.argsort(rows, kind="stable")], folder / TABLE)
    return Sealed(
        counts={"rows_in": len(ids), "rows_out": len(joined)},
        facts={"thumbnail_px": THUMBNAIL, "constant": int(joined["constant"].sum())},
    )


def _join_thumbnails(folders: list[Path], rows: list[int], target: Path) -> None:
    """Write the thumbnails of all parts as one array, each at its row, part by part.

    The file is written, not mapped: a mapped file ends the process if the disk is full.
    """
    row = iter(rows)
    head = npy_head(np.dtype(np.uint8), (len(rows), THUMBNAIL, THUMBNAIL))
    with target.open("wb") as file:
        file.write(head)
        for part in folders:
            for thumbnail in np.load(part / THUMBNAILS):
                offset = len(head) + next(row) * THUMBNAIL**2
                if file.tell() != offset:
                    file.seek(offset)
                file.write(thumbnail)


def load_descriptors(
    descriptors: Artifact, chip_ids: list[str]
) -> tuple[pd.DataFrame, NDArray[np.uint8]]:
    """Read rows and thumbnails, shape (n, 64, 64), of some chips, in the order of ``chip_ids``.

    Raises:
        RunError: A chip is not described.
    """
    table = load_described(descriptors, chip_ids)
    thumbnails = np.load(descriptors.local(THUMBNAILS), mmap_mode="r", allow_pickle=False)
    return table.reset_index(drop=True), thumbnails[table.index.to_numpy()]


def load_described(descriptors: Artifact, chip_ids: list[str]) -> pd.DataFrame:
    """Read rows of some chips, in the order of ``chip_ids``; the index is that of the thumbnails.

    Raises:
        RunError: A chip is not described.
    """
    table = descriptors.table(TABLE)
    rows = pd.Index(table["chip_id"].astype(str)).get_indexer(pd.Index(chip_ids))
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise RunError(
            f"descriptors {descriptors.digest[:12]} lack {len(missing)} of {len(chip_ids)} chips, "
            f"e.g. {chip_ids[missing[0]]}; describe these chips"
        )
    return table.iloc[rows]


STAGE = Stage(
    name="describe",
    version=VERSION,
    kind="descriptors",
    inputs=("chips",),
    software=("numpy",),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=(),
)
