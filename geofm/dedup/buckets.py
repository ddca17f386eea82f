"""Stage ``buckets``: which vectors are compared with which: identical ones, cells, homes, visits.

The frame (centre and cells, see ``frame.py``) is made before the parts are planned and kept in
the store as a part of its own. The frame of a large pool is inherited: when the same stage ran
before with the same settings and seed and its pool was of a like size, its frame serves again, so
that yesterday's pairs are still those of today's vectors (``incremental.py``), and only new
vectors are assigned. The manifest says where the frame is from. Another seed, or an empty
catalogue, gives a frame of its own.

The margin of a frame is measured on a sample, so it can be too small. Before the stage seals, it
compares a random sample of rows with all others (``audit.py``; this is also the certificate of
the search). If the cells leave out a pair of the sample, the margin is widened to the complete
one and all rows are assigned again. The wider margin is part of the frame, so it is inherited.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError
from data_catalog.hashing import digest_of
from data_catalog.stage import Job, Part, Sealed, Stage, link, prepared
from geofm.config.recipe import CurateSettings
from geofm.dedup import certificate as audit
from geofm.dedup.exact_pairs import hash_rows
from geofm.dedup.incremental import (
    carry_cells,
    carry_sketches,
    collapse_known,
    match_rows,
    turn_round,
)
from geofm.dedup.join import searched
from geofm.dedup.newcomers import factors_of, pairs_of
from geofm.dedup.partition import (
    Cells,
    Frame,
    assign,
    complete_margin,
    is_small,
    no_cells,
    sort_cells,
    train_frame,
    visit_codes,
)
from geofm.dedup.sketch import WIDTH, Sketches, sketch_all
from geofm.embeddings.store import open_vectors, rows_of
from geofm.embeddings.vectors import Space, make_space, take_rows
from geofm.runtime.parts import file_digests
from geofm.types import Indices

log = logging.getLogger("geofm.buckets")

VERSION = "3"
#: Rows of a part.
RANGE = 250_000
#: A frame is inherited while the pool is between this part and this multiple of its first pool.
GROWTH = 2.0
FRAME = ("centre.npy", "centroids.npy", "margin.npy", "axes.npy")
CELLS = ("home.npy", "visit_row.npy", "visit_begin.npy")
POOL = ("hashes.npy", "same.npy")
AUDIT = "audit.npz"


def joined_rows(job: Job) -> Indices:
    """Rows of the embeddings whose chips are compared, ascending: the candidates.

    Without the monotone ones: all water has one embedding, so only pixels can tell (``alike``).
    """
    pool = job.inputs["pool"].table("pool.parquet", ["chip_id", "rule", "monotone"])
    mine = (pool["rule"] == "") & ~pool["monotone"].astype(bool)
    ids = pool.loc[mine, "chip_id"].astype(str).tolist()
    return np.sort(rows_of(job.inputs["embeddings"], ids))


def threshold_of(job: Job) -> tuple[float, str]:
    """The least similarity of any pair, and where it is from."""
    found = thresholds_of(job.settings, job.inputs["calibration"])
    source = "curate.threshold" if job.settings.threshold is not None else "calibration"
    return min(found.values(), default=1.0), source


def thresholds_of(settings: CurateSettings, calibration: Artifact) -> dict[str, float]:
    """From which similarity chips are duplicates, by collection; two collections: the larger."""
    calibrated = calibration.manifest.facts["thresholds"]
    given = settings.threshold
    return {
        str(name): float(one["threshold"] if given is None else given)
        for name, one in calibrated.items()
    }


def read_frame(source: Artifact | Path) -> Frame:
    """The frame from its files in an artifact or a folder."""
    centre, centroids, margin, axes = _read(source, FRAME)
    return Frame(centre, centroids, float(margin), axes)


def read_cells(source: Artifact | Path) -> Cells:
    """Homes and visits from their files in an artifact or a folder."""
    return Cells(*_read(source, CELLS))


def _read(source: Artifact | Path, names: tuple[str, ...]) -> list[NDArray[Any]]:
    places = [source.local(n) if isinstance(source, Artifact) else source / n for n in names]
    return [np.load(place) for place in places]


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
    """The earlier artifact whose frame serves again, if there is one.

    It has this job's settings and seed (``Catalogue.last_of``).
    """
    before = job.previous
    if before is None or is_small(rows):
        return None
    facts = before.manifest.facts
    first, wide = int(facts["frame_rows"]), open_vectors(job.inputs["embeddings"]).shape[1]
    same = facts["threshold"] == threshold_of(job)[0] and facts["width"] == wide
    large = facts["cells"] > 1 and first / GROWTH <= rows <= first * GROWTH
    return before if same and large else None


def plan(job: Job) -> list[Part]:
    """Make the frame where it is missing; parts are ranges of rows, none for a small pool."""
    rows = joined_rows(job)
    key = frame_key(job, rows)
    made = prepared(job, key, lambda out: _prepare(job, rows, out))
    if read_frame(made).whole:
        return []
    count = len(np.load(made / "new.npy", mmap_mode="r"))
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
    before = inherited(job, len(rows))
    of = np.full(len(stored), -1, dtype=np.int64)
    if before is not None:
        of = match_rows(np.load(before.local("hashes.npy")), np.load(before.local("home.npy")),
                        hashes)  # fmt: skip
    same = np.full(len(stored), -1, dtype=np.int64)
    if len(rows) == len(stored):
        same[:] = collapse_known(stored, hashes, of)
    else:
        same[rows] = rows[collapse_known(stored[rows], hashes[rows], of[rows])]
    pool = np.flatnonzero(same == np.arange(len(same)))
    np.save(out / "hashes.npy", hashes)
    np.save(out / "same.npy", same)
    np.save(out / "of.npy", of)
    np.save(out / "new.npy", pool[of[pool] < 0])
    if before is not None:
        for name in FRAME:
            link(before.local(name), out / name)
        return
    space = make_space(stored, pool)
    frame = train_frame(space, threshold_of(job)[0], job.seed, pool)
    np.save(out / "centre.npy", frame.centre)
    np.save(out / "centroids.npy", frame.centroids)
    np.save(out / "margin.npy", np.float64(frame.margin))
    np.save(out / "axes.npy", frame.axes)


def work(job: Job, part: Part, folder: Path) -> None:
    """Homes, visits and sketches of a range of the new rows, numbered from its first."""
    made = _fetch(job, part.payload["frame"])
    rows = np.load(made / "new.npy")[part.payload["first"] : part.payload["last"]]
    frame = read_frame(made)
    space = Space(take_rows(open_vectors(job.inputs["embeddings"]), rows), frame.centre)
    _save(assign(frame, space, 0, len(space)), folder)
    np.save(folder / "sketches.npy", sketch_all(space, frame.axes))


def _save(cells: Cells, folder: Path) -> None:
    np.save(folder / "home.npy", cells.home)
    np.save(folder / "visit_row.npy", cells.row)
    np.save(folder / "visit_begin.npy", cells.begin)


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Put the ranges together, audit the margin, and write the frame's files beside them."""
    rows = joined_rows(job)
    made = _fetch(job, frame_key(job, rows))
    threshold, source = threshold_of(job)
    frame, same = read_frame(made), np.load(made / "same.npy")
    pool = same == np.arange(len(same))
    before = inherited(job, len(rows))
    if frame.whole:
        cells = replace(no_cells(0, 1), home=np.where(pool, 0, -1).astype(np.int32))
    else:
        old = no_cells(0, frame.count) if before is None else read_cells(before)
        of, new = np.load(made / "of.npy"), np.load(made / "new.npy")
        to = turn_round(of, len(old.home), pool)
        cells = carry_cells(old, of, to, new, _together(folders, frame.count))
        if len(frame.axes):
            _write_sketches(before, of, pool, new, folders, folder / "sketches.npy")
    space = Space(open_vectors(job.inputs["embeddings"]), frame.centre)
    if before is None:
        hashes = np.load(made / "hashes.npy")
        found = audit.audit_rows(space, hashes, np.flatnonzero(pool), threshold, job.seed)
    else:
        found = _audit_again(job, before, made, space, cells, folder)
    np.savez(folder / AUDIT, **vars(found))
    left_out = int((~searched(space, frame, cells.home, found.low, found.high)).sum())
    if left_out:
        frame = replace(frame, margin=complete_margin(threshold))
        log.info(
            "buckets: the estimated margin leaves out %d of %d pairs of the audit; the complete "
            "margin %.4f is used", left_out, len(found.low), frame.margin,
        )  # fmt: skip
        cells = assign(frame, space, 0, len(space), pool)
    _save(cells, folder)
    np.save(folder / "margin.npy", np.float64(frame.margin))
    for name in (*FRAME, *POOL):
        if name != "margin.npy":
            link(made / name, folder / name)
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
            "margin": round(frame.margin, 9),
            "complete_margin": round(complete_margin(threshold), 9),
            "margin_widened_for": left_out,
            "largest_cell": int(sizes.max(initial=0)),
            "largest_identical": int(groups.max(initial=0)),
            "visits": len(cells.row),
            "frame_rows": len(rows) if before is None else before.manifest.facts["frame_rows"],
            "frame_from": "trained" if before is None else _origin(before),
        },
    )  # fmt: skip


def _audit_again(
    job: Job, before: Artifact, made: Path, space: Space, cells: Cells, folder: Path
) -> audit.Audited:
    """Audit a pool whose frame is inherited: only pairs with a row that is new are searched.

    Args:
        job: of the stage.
        before: the earlier artifact.
        made: folder of the part that ``_prepare`` wrote.
        space: the vectors.
        cells: of the vectors.
        folder: of the new artifact, with the sketches where vectors are long.
    """
    threshold = threshold_of(job)[0]
    pool = np.flatnonzero(cells.home >= 0)
    to = turn_round(np.load(made / "of.npy"), len(np.load(before.local("home.npy"))),
                    cells.home >= 0)  # fmt: skip
    queries = pool[audit.choose_queries(np.load(made / "hashes.npy")[pool], job.seed)]
    new = np.load(made / "new.npy")
    known, rest = audit.carry_audit(space, read_audit(before), to, queries, new, threshold)
    sketches = np.empty((len(space), 0), dtype=np.int16)
    if (folder / "sketches.npy").exists():
        sketches = np.load(folder / "sketches.npy", mmap_mode="c")
    pairs = pairs_of(space, factors_of(space, sketches, threshold), rest, threshold)
    return audit.merge_audit(known, rest, *pairs, cells.home)


def read_audit(buckets: Artifact) -> audit.Audited:
    """The audited rows of a pool and all their pairs."""
    with np.load(buckets.local(AUDIT), allow_pickle=False) as data:
        return audit.Audited(data["asked"], data["low"], data["high"])


def _write_sketches(
    before: Artifact | None,
    of: Indices,
    pool: NDArray[np.bool_],
    new: Indices,
    folders: list[Path],
    path: Path,
) -> None:
    """The sketches of all rows, carried or of this run; zeros for rows that are not searched."""
    shape = (len(of), WIDTH)
    found = np.lib.format.open_memmap(path, "w+", np.int16, shape)
    if before is not None:
        carry_sketches(np.load(before.local("sketches.npy"), mmap_mode="r"), of, pool, found)
    first = 0
    for part in folders:
        some = np.load(part / "sketches.npy")
        found[new[first : first + len(some)]] = some
        first += len(some)
    found.flush()


def read_sketches(buckets: Artifact, rows: int) -> Sketches:
    """The sketches of all rows, mapped; [rows, 0] where vectors are compared as they are."""
    if "sketches.npy" not in file_digests(buckets):
        return np.empty((rows, 0), dtype=np.int16)
    found: Sketches = np.load(buckets.local("sketches.npy"), mmap_mode="c")
    return found


def _together(folders: list[Path], count: int) -> Cells:
    """The cells of all ranges."""
    homes, codes, first = [np.empty(0, np.int32)], [], 0
    for folder in folders:
        part = read_cells(folder)
        codes.append(visit_codes(part.row + first, part.cell))
        homes.append(part.home)
        first += len(part.home)
    return sort_cells(np.concatenate(homes), codes, count)


def _origin(before: Artifact) -> str:
    """Digest of the artifact that first had this frame."""
    source: Any = before.manifest.facts["frame_from"]
    return before.digest if source == "trained" else str(source)


STAGE = Stage(
    name="buckets",
    version=VERSION,
    kind="buckets",
    inputs=("embeddings", "pool", "calibration"),
    software=("faiss-cpu", "numpy", "torch"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
    section="curate",
    fields=("threshold",),
    follows=True,
)
