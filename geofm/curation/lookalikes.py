"""Stage ``alike``: pairs of candidates that show the same view, by their thumbnails.

Candidate pairs come from hashes and from the neighbours of the embedding (``alike.py``); a part is
a range of them, each decided by an exact comparison of the two thumbnails.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_catalog.canonical import digest_of
from data_catalog.stage import Job, Part, Sealed, Stage, prepared
from data_catalog.tables import read_table, write_table
from geofm.curation.alike import (
    KINDS,
    NEIGHBOURS,
    SAME_VIEW,
    decide_alike,
    near_by_embedding,
    propose,
)
from geofm.curation.describe import load_described, load_descriptors
from geofm.curation.parts import file_digests
from geofm.curation.space import make_space
from geofm.curation.vectors import load_vectors

VERSION = "1"
#: Candidate pairs of one part.
PART_PAIRS = 500_000


def _ids(job: Job) -> list[str]:
    """Chips that are compared: the candidates, by id; none where pixels are not to count."""
    if not job.settings.pixel_duplicates:
        return []
    pool = job.inputs["pool"].table("pool.parquet", ["chip_id", "rule"])
    return [str(chip_id) for chip_id in pool.loc[pool["rule"] == "", "chip_id"]]


def _key(job: Job) -> str:
    """Key of the part with the candidate pairs."""
    descriptors, embeddings = (
        file_digests(job.inputs[role]) for role in ("descriptors", "embeddings")
    )
    pool = file_digests(job.inputs["pool"])["pool.parquet"]
    covers = [descriptors, embeddings["embeddings.npy"], pool, job.settings.pixel_duplicates]
    return digest_of({"candidate pairs": VERSION, "covers": covers})


def _propose(job: Job, folder: Path) -> None:
    """``candidates.npy``: pairs of rows [n, 2] of the compared chips."""
    ids = _ids(job)
    space = make_space(load_vectors(job.inputs["embeddings"], ids))
    descriptors = load_described(job.inputs["descriptors"], ids)
    left, right = propose(descriptors, near_by_embedding(space, NEIGHBOURS))
    np.save(folder / "candidates.npy", np.stack([left, right], axis=1))


def plan(job: Job) -> list[Part]:
    """Ranges of candidate pairs."""
    if not _ids(job):
        return []
    key = _key(job)
    pairs = np.load(prepared(job, key, lambda out: _propose(job, out)) / "candidates.npy")
    ranges = range(0, len(pairs), PART_PAIRS)
    return [job.part({"key": key, "first": first}, [key, first, PART_PAIRS]) for first in ranges]


def work(job: Job, part: Part, folder: Path) -> None:
    """Compare a range of candidate pairs: ``alike.parquet``."""
    made = prepared(job, part.payload["key"], lambda out: _propose(job, out))
    first = part.payload["first"]
    every = np.load(made / "candidates.npy", mmap_mode="r")
    pairs = np.asarray(every[first : first + PART_PAIRS])
    ids = _ids(job)
    rows, at = np.unique(pairs, return_inverse=True)
    some = [ids[row] for row in rows]
    descriptors, thumbnails = load_descriptors(job.inputs["descriptors"], some)
    at = at.reshape(pairs.shape)
    found = decide_alike(descriptors, thumbnails, at[:, 0], at[:, 1])
    table = pd.DataFrame(
        {
            "left": [some[row] for row in found.left],
            "right": [some[row] for row in found.right],
            "similarity": found.similarity,
            "kind": [KINDS[kind] for kind in found.kind],
            "orientation": found.orientation.astype(np.int64),
            "down_px": found.shift[:, 0].astype(np.int64),
            "right_px": found.shift[:, 1].astype(np.int64),
        }
    )
    write_table(table, folder / "alike.parquet")


COLUMNS = ("left", "right", "similarity", "kind", "orientation", "down_px", "right_px")


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``alike.parquet``: chip ids of each pair (left below right), likeness, kind, how it lies."""
    tables = [read_table(part / "alike.parquet") for part in folders]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=COLUMNS).astype(
        {"similarity": np.float64}
    )  # fmt: skip
    table = table.sort_values(["left", "right"], ignore_index=True)
    write_table(table, folder / "alike.parquet")
    compared = _ids(job)
    return Sealed(
        counts={"rows_in": len(compared), "rows_out": len(compared), "pairs": len(table)},
        facts={
            "threshold": SAME_VIEW,
            "similarity": "correlation of band-passed thumbnails, aligned",
            "kinds": {kind: int((table["kind"] == kind).sum()) for kind in KINDS},
        },
    )


STAGE = Stage(
    name="alike",
    version=VERSION,
    kind="alike",
    inputs=("descriptors", "embeddings", "pool"),
    software=("numpy", "scipy", "faiss-cpu"),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=("pixel_duplicates",),
)
