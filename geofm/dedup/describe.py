"""Stage ``describe``: descriptors, hash, signature and thumbnail of every usable chip.

plan    parts of the tars of chips
work    describe the chips of a part      (descriptors.py, perceptual_hash.py, signature.py)
seal    join the parts in the order of ``chips.parquet``

Later stages find here what they need of the pixels, so no tar is opened twice. Nothing depends on a
setting or a seed.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike, NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.progress import advance
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import map_rows, write_columns, write_sorted
from geofm.dedup.descriptors import THUMBNAIL, measure_all
from geofm.dedup.perceptual_hash import canonical_hash, hash_thumbnails
from geofm.dedup.signature import WIDTH, signatures
from geofm.formats.npy import write_npy_rows
from geofm.runtime.parts import (
    ChipPart,
    chip_parts,
    covers,
    ok_chip_ids,
    part_chips,
    read_pixels,
    rows_of_parts,
)

VERSION = "6"
#: Files of the artifact, and the rows of a part.
TABLE, ROWS = "descriptors.parquet", "rows.arrow"
THUMBNAILS, SIGNATURES = "thumbnails.npy", "signatures.npy"
#: Arrays of the artifact, with the shape and type of a chip's values.
ARRAYS: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
    THUMBNAILS: ((THUMBNAIL, THUMBNAIL), np.uint8),
    SIGNATURES: ((WIDTH,), np.int8),
}
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
    """List parts of tars; the key of one covers the tar and its usable chips."""
    chips = job.inputs["chips"]
    return [
        job.part(asdict(part), covers(chips, part.tar, refs), rows=len(refs))
        for part, refs in chip_parts(chips)
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe the chips of a part: ``rows.arrow``, ``thumbnails.npy`` and ``signatures.npy``."""
    chips, of_tar = job.inputs["chips"], ChipPart(**part.payload)
    refs = part_chips(chips, of_tar)
    pixels = read_pixels(chips, of_tar.tar, refs)
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
            advance(len(group))
    hashes = hash_thumbnails(thumbnails)
    write_columns(
        folder / ROWS,
        {**columns, "hash": hashes, "hash_canonical": canonical_hash(hashes)},
        COLUMNS,
    )
    low, high = (np.array(columns[f"thumbnail_{end}"], np.float32) for end in ("low", "high"))
    np.save(folder / THUMBNAILS, thumbnails)
    np.save(folder / SIGNATURES, signatures(thumbnails, high - low))


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Join the parts in the order of ``chips.parquet``: row r of all files is the same chip.

    Raises:
        RunError: The parts do not hold each chip once (a defect).
    """
    ids = ok_chip_ids(job.inputs["chips"])
    tables = map_rows(part / ROWS for part in folders)
    of_parts = rows_of_parts(ids, [table.column("chip_id").combine_chunks() for table in tables])
    for name, (shape, kind) in ARRAYS.items():
        arrays = (np.load(part / name) for part in folders)
        write_npy_rows(folder / name, (len(ids), *shape), kind, zip(of_parts, arrays, strict=True))
    joined = pa.concat_tables([pa.schema(list(COLUMNS.items())).empty_table(), *tables])
    order = np.argsort(np.concatenate([np.empty(0, np.int64), *of_parts]), kind="stable")
    write_sorted(joined, order, folder / TABLE)
    constant = int(pc.sum(joined.column("constant")).as_py() or 0)
    return Sealed(
        counts={"rows_in": len(ids), "rows_out": len(ids)},
        facts={"thumbnail_px": THUMBNAIL, "constant": constant},
    )


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
    software=("numpy", "scipy"),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=(),
)
