"""Stage ``buckets``: which vectors are compared with which: identical ones, cells, homes, visits.

The frame (centre and cells, see ``frame.py``) is made before the parts are planned and kept in
the store as a part of its own. It is inherited: when the same stage ran before with the same
settings and its pool was of a like size, its frame serves again, so that yesterday's pairs are
still those of today's vectors (``incremental.py``). The manifest says where the frame is from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.canonical import digest_of
from data_catalog.errors import RunError
from data_catalog.stage import Job, Part, Sealed, Stage, link
from geofm.curation.duplicates import collapse_vectors, hash_rows
from geofm.curation.frame import Cells, Frame, assign, complete_reach, sort_cells, train_frame
from geofm.curation.parts import file_digests
from geofm.curation.space import Indices, Space, make_space

VERSION = "1"
#: Rows of a part.
RANGE = 250_000
#: A frame is inherited while the pool is between this part and this multiple of its first pool.
GROWTH = 2.0
FRAME = ("centre.npy", "centroids.npy", "reach.npy")
POOL = ("hashes.npy", "same.npy")


def joined_rows(job: Job) -> Indices:
    """Rows of the embeddings whose chips are compared, ascending: all of them."""
    return np.arange(len(open_vectors(job.inputs["embeddings"])), dtype=np.int64)


def threshold_of(job: Job) -> tuple[float, str]:
    """The least similarity of a pair, and where it is from."""
    return float(job.settings.threshold), "curate.threshold"


def open_vectors(embeddings: Artifact) -> NDArray[np.float16]:
    """Embeddings [n, d] as stored, mapped from the file."""
    vectors = np.load(embeddings.local("embeddings.npy"), mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise RunError(
            f"embeddings {embeddings.digest[:12]} are {vectors.dtype} {vectors.shape}, not "
            "float16 [chips, width]; embed the chips again"
        )
    found: NDArray[np.float16] = vectors
    return found


def read_frame(folder: Path) -> Frame:
    """The frame from its files."""
    return Frame(
        np.load(folder / "centre.npy"),
        np.load(folder / "centroids.npy"),
        float(np.load(folder / "reach.npy")),
    )


def frame_identity(buckets: Artifact) -> list[str]:
    """Digests of a frame's files: two frames are the same if these are."""
    digests = file_digests(buckets)
    return [digests[name] for name in FRAME]


def frame_key(job: Job, rows: Indices) -> str:
    """Key of the part that holds the frame and what is known of the pool before its parts."""
    pool = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    covers = [file_digests(job.inputs["embeddings"])["embeddings.npy"], pool]
    before = inherited(job, len(rows))
    frame = None if before is None else frame_identity(before)
    return digest_of(
        {"frame": VERSION, "covers": covers, "threshold": threshold_of(job)[0], "seed": job.seed,
         "inherited": frame}
    )  # fmt: skip


def inherited(job: Job, rows: int) -> Artifact | None:
    """The earlier artifact whose frame serves again, if there is one."""
    before = job.previous
    if before is None:
        return None
    facts = before.manifest.facts
    first, wide = int(facts["frame_rows"]), open_vectors(job.inputs["embeddings"]).shape[1]
    same = facts["threshold"] == threshold_of(job)[0] and facts["width"] == wide
    return before if same and first / GROWTH <= rows <= first * GROWTH else None


def plan(job: Job) -> list[Part]:
    """Make the frame where it is missing; parts are ranges of rows, none for a small pool."""
    rows = joined_rows(job)
    key = frame_key(job, rows)
    if not job.store.has_part(key):
        with job.store.staging() as folder:
            out = folder / "part"
            out.mkdir()
            _prepare(job, rows, out)
            job.store.publish_part(key, out)
    frame = read_frame(_fetch(job, key))
    count = len(open_vectors(job.inputs["embeddings"]))
    if frame.whole:
        return []
    return [
        job.part({"frame": key, "first": first, "last": min(first + RANGE, count)},
                 [key, first, min(first + RANGE, count)])
        for first in range(0, count, RANGE)
    ]  # fmt: skip


def _fetch(job: Job, key: str) -> Path:
    """The folder of a part that was made before."""
    folder = job.store.fetch_part(key)
    if folder is None:
        raise RunError(f"part {key} of buckets was damaged and has been removed; run again")
    return folder


def _prepare(job: Job, rows: Indices, out: Path) -> None:
    """Hashes, who stands for whom, and the frame."""
    stored = open_vectors(job.inputs["embeddings"])
    hashes = hash_rows(stored)
    same = np.full(len(stored), -1, dtype=np.int64)
    if len(rows) == len(stored):
        same[:] = collapse_vectors(stored, hashes)
    else:
        same[rows] = rows[collapse_vectors(stored[rows], hashes[rows])]
    np.save(out / "hashes.npy", hashes)
    np.save(out / "same.npy", same)
    before = inherited(job, len(rows))
    if before is not None:
        for name in FRAME:
            link(before.local(name), out / name)
        return
    pool = np.flatnonzero(same == np.arange(len(same)))
    space = make_space(stored, pool)
    frame = train_frame(space, threshold_of(job)[0], job.seed, pool)
    np.save(out / "centre.npy", frame.centre)
    np.save(out / "centroids.npy", frame.centroids)
    np.save(out / "reach.npy", np.float64(frame.reach))


def work(job: Job, part: Part, folder: Path) -> None:
    """Homes and visits of a range of rows."""
    made = _fetch(job, part.payload["frame"])
    frame, same = read_frame(made), np.load(made / "same.npy")
    space = Space(open_vectors(job.inputs["embeddings"]), frame.centre)
    pool = same == np.arange(len(same))
    cells = assign(frame, space, part.payload["first"], part.payload["last"], pool)
    _save(cells, folder)


def _save(cells: Cells, folder: Path) -> None:
    np.save(folder / "home.npy", cells.home)
    np.save(folder / "visit_row.npy", cells.row)
    np.save(folder / "visit_cell.npy", cells.cell)


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Put the ranges together; the frame's files beside them."""
    rows = joined_rows(job)
    made = _fetch(job, frame_key(job, rows))
    frame, same = read_frame(made), np.load(made / "same.npy")
    pool = same == np.arange(len(same))
    if frame.whole:
        nothing = Cells(np.where(pool, 0, -1).astype(np.int32), *_no_visits())
        cells = nothing
    else:
        homes = [np.load(part / "home.npy") for part in folders]
        begins = np.cumsum([0, *(len(home) for home in homes)])
        cells = sort_cells(
            np.concatenate(homes),
            np.concatenate(
                [np.load(p / "visit_row.npy") + b for p, b in zip(folders, begins, strict=False)]
            ),
            np.concatenate([np.load(part / "visit_cell.npy") for part in folders]),
        )
    _save(cells, folder)
    for name in (*FRAME, *POOL):
        link(made / name, folder / name)
    threshold, source = threshold_of(job)
    before = inherited(job, len(rows))
    sizes = np.bincount(cells.home[pool], minlength=frame.count) if pool.any() else np.zeros(1)
    groups = np.bincount(same[same >= 0]) if len(rows) else np.zeros(1, dtype=np.int64)
    return Sealed(
        counts={"rows_in": len(same), "rows_out": int(pool.sum())},
        dropped={
            "identical": int(len(rows) - pool.sum()), "not_compared": len(same) - len(rows)
        },
        facts={
            "threshold": threshold,
            "threshold_from": source,
            "width": len(frame.centre),
            "cells": frame.count,
            "reach": round(frame.reach, 9),
            "complete_reach": round(complete_reach(threshold), 9),
            "largest_cell": int(sizes.max(initial=0)),
            "largest_identical": int(groups.max(initial=0)),
            "visits": len(cells.row),
            "frame_rows": len(rows) if before is None else before.manifest.facts["frame_rows"],
            "frame_from": "trained" if before is None else _origin(before),
        },
    )  # fmt: skip


def _no_visits() -> tuple[Indices, NDArray[np.int32]]:
    return np.empty(0, np.int64), np.empty(0, np.int32)


def _origin(before: Artifact) -> str:
    """Digest of the artifact that first had this frame."""
    source: Any = before.manifest.facts["frame_from"]
    return before.digest if source == "trained" else str(source)


def read_cells(buckets: Artifact) -> Cells:
    """Homes and visits from the artifact."""
    return Cells(
        np.load(buckets.local("home.npy")),
        np.load(buckets.local("visit_row.npy")),
        np.load(buckets.local("visit_cell.npy")),
    )


STAGE = Stage(
    name="buckets",
    version=VERSION,
    kind="buckets",
    inputs=("embeddings",),
    software=("faiss-cpu", "numpy", "torch"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
    follows=True,
)
