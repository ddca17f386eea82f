"""Stage ``buckets``: the cells in which near duplicates are searched, and an audited sample.

plan    hash the vectors, collapse equal ones, and make the partition: train it on a sample, or
        inherit that of the previous run                     (identical.py, partition.py)
work    assign a range of new vectors to cells               (partition.py)
seal    join the ranges with the cells of known vectors      (incremental.py);
        compare a random sample with the whole pool          (certificate.py);
        widen the margin if the cells do not cover a pair of the sample

The pool of this stage are the candidates of the stage ``pool`` that are not monotone: all water has
one embedding, so pixels decide about it (stage ``alike``).

A partition is inherited if the same stage ran before with the same settings and seed, on a pool of
similar size and for a threshold that is not higher: what covers the pairs of a threshold covers
those of a higher one. (A calibrated threshold moves a step up or down when chips are added.) Known
vectors then keep their cells, and the stage ``pairs`` searches only new ones.
The manifest names the run from which the partition comes (``frame_from``). Another seed, or an
empty catalogue, gives a new partition.

The margin of a partition is estimated from a sample, so it can be too small. If the cells leave out
a pair of the audited sample, the complete margin is used and all rows are assigned again. The
wider margin is part of the partition, so later runs inherit it.
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
from data_catalog.stage import Job, Part, Sealed, Stage, link, prepare_part
from geofm.config.recipe import CurateSettings
from geofm.dedup.certificate import Audit, audit_sample, choose_sample
from geofm.dedup.identical import collapse_vectors, hash_vectors
from geofm.dedup.incremental import carry_audit, carry_cells, current_rows, match_previous_rows
from geofm.dedup.partition import (
    Cells,
    Partition,
    assign_cells,
    complete_margin,
    empty_cells,
    is_covered,
    is_small,
    sort_visits,
    train_partition,
    visit_keys,
)
from geofm.embeddings.store import open_vectors, rows_of
from geofm.embeddings.vectors import EmbeddingSpace, make_space, take_rows
from geofm.runtime.parts import file_digests
from geofm.types import Indices

log = logging.getLogger("geofm.buckets")

VERSION = "5"
#: Rows of a part.
PART_ROWS = 250_000
#: Similarity by which the search goes below a calibrated threshold, and by which the threshold may
#: lie above that of an inherited partition.
SLACK, MOST_ABOVE = 0.02, 0.08
#: A partition is inherited while the pool is between 1 / GROWTH and GROWTH times its first pool.
GROWTH = 2.0
#: Files of the partition, of the cells, of facts about the pool, and of the audited sample.
PARTITION_FILES = ("centre.npy", "centroids.npy", "margin.npy")
CELL_FILES = ("home.npy", "visit_row.npy", "visit_begin.npy")
POOL_FILES = ("hashes.npy", "same.npy")
AUDIT_FILE = "audit.npz"


# plan


def plan(job: Job) -> list[Part]:
    """Prepare the partition; the parts are ranges of new rows, none for a small pool."""
    rows = searched_rows(job)
    key = _preparation_key(job, rows)
    prepared_folder = prepare_part(job, key, lambda out: _prepare(job, rows, out))
    if read_partition(prepared_folder).is_single:
        return []
    count = len(np.load(prepared_folder / "new.npy", mmap_mode="r"))
    parts = []
    for first in range(0, count, PART_ROWS):
        last = min(first + PART_ROWS, count)
        payload = {"frame": key, "first": first, "last": last}
        parts.append(job.part(payload, [key, first, last], rows=last - first))
    return parts


def searched_rows(job: Job) -> Indices:
    """Return the rows of the embeddings that are searched, ascending.

    These are the candidates without the monotone ones.
    """
    pool = job.inputs["pool"].table("pool.parquet", ["chip_id", "rule", "monotone"])
    is_searched = (pool["rule"] == "") & ~pool["monotone"].astype(bool)
    ids = pool.loc[is_searched, "chip_id"].astype(str).tolist()
    return np.sort(rows_of(job.inputs["embeddings"], ids))


def threshold_of(job: Job) -> tuple[float, str]:
    """Return the least similarity of any pair, and the name of its source."""
    thresholds = thresholds_of(job.settings, job.inputs["calibration"])
    source = "curate.threshold" if job.settings.threshold is not None else "calibration"
    return min(thresholds.values(), default=1.0), source


def search_threshold(job: Job, previous: Artifact | None, rows: int) -> float:
    """Return the similarity from which pairs are searched.

    A calibrated threshold changes a little with each refresh. So the search goes a little below it,
    and the next refreshes find most pairs there already. A configured threshold does not change.

    Args:
        job: job of the stage.
        previous: artifact whose partition is inherited; its threshold is kept.
        rows: size of the pool; a small one is searched whole each time.
    """
    if previous is not None:
        return float(previous.manifest.facts["frame_threshold"])
    threshold, _ = threshold_of(job)
    if job.settings.threshold is not None or is_small(rows):
        return threshold
    return round(max(threshold - SLACK, 0.0), 3)


def thresholds_of(settings: CurateSettings, calibration: Artifact) -> dict[str, float]:
    """Return the similarity from which chips are duplicates, by collection.

    A pair of two collections has to reach the larger of both.
    """
    calibrated = calibration.manifest.facts["thresholds"]
    configured = settings.threshold
    return {
        str(name): float(result["threshold"] if configured is None else configured)
        for name, result in calibrated.items()
    }


def _preparation_key(job: Job, rows: Indices) -> str:
    """Compute the key of the part that ``_prepare`` writes."""
    pool = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    previous = inheritable(job, len(rows))
    return digest_of(
        {
            "frame": VERSION,
            "covers": [file_digests(job.inputs["embeddings"])["embeddings.npy"], pool],
            "threshold": search_threshold(job, previous, len(rows)),
            "seed": job.seed,
            # of.npy and new.npy are about the rows of this very artifact
            "inherited": None if previous is None else previous.digest,
        }
    )


def inheritable(job: Job, rows: int) -> Artifact | None:
    """Return the previous artifact if its partition serves a pool of ``rows`` rows."""
    previous = job.previous
    if previous is None or is_small(rows):
        return None
    facts = previous.manifest.facts
    first_rows = int(facts["frame_rows"])
    width = open_vectors(job.inputs["embeddings"]).shape[1]
    above = threshold_of(job)[0] - facts["frame_threshold"]
    serves = 0 <= above <= MOST_ABOVE and facts["width"] == width
    fits = facts["cells"] > 1 and first_rows / GROWTH <= rows <= first_rows * GROWTH
    return previous if serves and fits else None


def partition_identity(buckets: Artifact) -> list[str]:
    """Return the digests of a partition's files: two partitions are equal if these are."""
    digests = file_digests(buckets)
    return [digests[name] for name in PARTITION_FILES]


def _prepare(job: Job, rows: Indices, out: Path) -> None:
    """Write the partition, and what the parts need to know of the pool.

    ``hashes.npy``: hash of each vector. ``same.npy``: for each searched row the first row with the
    same vector, -1 for other rows. ``of.npy``: row in the previous pool, -1 if new. ``new.npy``:
    rows to assign.
    """
    stored = open_vectors(job.inputs["embeddings"])
    hashes = hash_vectors(stored)
    same = np.full(len(stored), -1, dtype=np.int64)
    if len(rows) == len(stored):
        same[:] = collapse_vectors(stored, hashes)
    else:
        same[rows] = rows[collapse_vectors(stored[rows], hashes[rows])]
    pool = np.flatnonzero(same == np.arange(len(same)))
    previous = inheritable(job, len(rows))
    previous_row = np.full(len(stored), -1, dtype=np.int64)
    if previous is not None:
        old_hashes, old_home = (np.load(previous.local(n)) for n in ("hashes.npy", "home.npy"))
        previous_row = match_previous_rows(old_hashes, old_home, hashes)
    np.save(out / "hashes.npy", hashes)
    np.save(out / "same.npy", same)
    np.save(out / "of.npy", previous_row)
    np.save(out / "new.npy", pool[previous_row[pool] < 0])
    if previous is not None:
        for name in PARTITION_FILES:
            link(previous.local(name), out / name)
        return
    space = make_space(stored, pool)
    partition = train_partition(space, search_threshold(job, None, len(rows)), job.seed, pool)
    np.save(out / "centre.npy", partition.centre)
    np.save(out / "centroids.npy", partition.centroids)
    np.save(out / "margin.npy", np.float64(partition.margin))


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Assign a range of the new rows to cells, numbered from the first of the range."""
    prepared_folder = _fetch_preparation(job, part.payload["frame"])
    rows = np.load(prepared_folder / "new.npy")[part.payload["first"] : part.payload["last"]]
    partition = read_partition(prepared_folder)
    vectors = take_rows(open_vectors(job.inputs["embeddings"]), rows)
    space = EmbeddingSpace(vectors, partition.centre)
    _save_cells(assign_cells(partition, space, 0, len(space)), folder)


def _fetch_preparation(job: Job, key: str) -> Path:
    """Return the folder that ``_prepare`` wrote."""
    folder = job.store.fetch_part(key)
    if folder is None:
        raise RunError(f"part {key} of buckets was damaged and has been removed; run again")
    return folder


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write the partition, the cells of all rows, and the audited sample.

    The margin is widened if the cells do not cover a pair of the sample.
    """
    rows = searched_rows(job)
    prepared_folder = _fetch_preparation(job, _preparation_key(job, rows))
    threshold, source = threshold_of(job)
    partition, same = read_partition(prepared_folder), np.load(prepared_folder / "same.npy")
    pool = same == np.arange(len(same))
    previous = inheritable(job, len(rows))
    cells = _all_cells(prepared_folder, folders, partition, pool, previous)
    space = EmbeddingSpace(open_vectors(job.inputs["embeddings"]), partition.centre)
    audit = _audit(job, prepared_folder, space, cells, previous, len(rows))
    np.savez(folder / AUDIT_FILE, asked=audit.sample, low=audit.low, high=audit.high)
    covered = is_covered(partition, space, cells.home, audit.low, audit.high)
    frame_threshold = search_threshold(job, previous, len(rows))
    left_out = int((~covered).sum())
    if left_out:
        partition = replace(partition, margin=complete_margin(frame_threshold))
        log.info(
            "buckets: the estimated margin leaves out %d of %d pairs of the audited sample; the "
            "complete margin %.4f is used",
            left_out,
            len(audit.low),
            partition.margin,
        )
        cells = assign_cells(partition, space, 0, len(space), pool)
    _save_cells(cells, folder)
    np.save(folder / "margin.npy", np.float64(partition.margin))
    for name in (*PARTITION_FILES, *POOL_FILES):
        if name != "margin.npy":
            link(prepared_folder / name, folder / name)
    cell_sizes = np.bincount(cells.home[pool], minlength=partition.count)
    copies = np.bincount(same[same >= 0]) if len(rows) else np.zeros(1, dtype=np.int64)
    return Sealed(
        counts={"rows_in": len(same), "rows_out": int(pool.sum())},
        dropped={
            "identical": int(len(rows) - pool.sum()),
            "not_compared": len(same) - len(rows),
        },
        facts={
            "threshold": threshold,
            "threshold_from": source,
            "frame_threshold": frame_threshold,
            "width": len(partition.centre),
            "cells": partition.count,
            "margin": round(partition.margin, 9),
            "complete_margin": round(complete_margin(frame_threshold), 9),
            "margin_widened_for": left_out,
            "largest_cell": int(cell_sizes.max(initial=0)),
            "largest_identical": int(copies.max(initial=0)),
            "visits": len(cells.row),
            "frame_rows": len(rows) if previous is None else previous.manifest.facts["frame_rows"],
            "frame_from": "trained" if previous is None else _trained_by(previous),
        },
    )


def _all_cells(
    prepared_folder: Path,
    folders: list[Path],
    partition: Partition,
    pool: NDArray[np.bool_],
    previous: Artifact | None,
) -> Cells:
    """Join the cells of all ranges with those of the rows that the previous run assigned."""
    if partition.is_single:
        return replace(empty_cells(0, 1), home=np.where(pool, 0, -1).astype(np.int32))
    homes, keys, first = [np.empty(0, np.int32)], [], 0
    for folder in folders:
        part = read_cells(folder)
        keys.append(visit_keys(part.row + first, part.visited))
        homes.append(part.home)
        first += len(part.home)
    new_cells = sort_visits(np.concatenate(homes), keys, partition.count)
    new = np.load(prepared_folder / "new.npy")
    old = empty_cells(0, partition.count) if previous is None else read_cells(previous)
    current = current_rows(np.load(prepared_folder / "of.npy"), len(old.home), pool)
    return carry_cells(old, current, new, new_cells, len(pool))


def _audit(
    job: Job,
    prepared_folder: Path,
    space: EmbeddingSpace,
    cells: Cells,
    previous: Artifact | None,
    rows: int,
) -> Audit:
    """Audit a random sample of the pool; the pairs of rows audited before are known."""
    threshold = search_threshold(job, previous, rows)
    hashes = np.load(prepared_folder / "hashes.npy")
    pool = np.flatnonzero(cells.home >= 0)
    if previous is None:
        return audit_sample(space, hashes, pool, threshold, job.seed)
    old_rows = len(np.load(previous.local("home.npy"), mmap_mode="r"))
    current = current_rows(np.load(prepared_folder / "of.npy"), old_rows, cells.home >= 0)
    sample = pool[choose_sample(hashes[pool], job.seed)]
    new = np.load(prepared_folder / "new.npy")
    return carry_audit(space, read_audit(previous), current, sample, new, cells.home, threshold)


def _trained_by(previous: Artifact) -> str:
    """Return the digest of the artifact for which an inherited partition was trained."""
    source: Any = previous.manifest.facts["frame_from"]
    return previous.digest if source == "trained" else str(source)


# Files of the artifact; the stages `pairs` and `curate` read them.


def read_partition(source: Artifact | Path) -> Partition:
    """Read a partition from an artifact or a folder."""
    centre, centroids, margin = _load_arrays(source, PARTITION_FILES)
    return Partition(centre, centroids, float(margin))


def read_cells(source: Artifact | Path) -> Cells:
    """Read homes and visits from an artifact or a folder."""
    return Cells(*_load_arrays(source, CELL_FILES))


def read_audit(buckets: Artifact) -> Audit:
    """Read the audited sample of a pool, and its pairs."""
    with np.load(buckets.local(AUDIT_FILE), allow_pickle=False) as data:
        return Audit(data["asked"], data["low"], data["high"])


def _load_arrays(source: Artifact | Path, names: tuple[str, ...]) -> list[NDArray[Any]]:
    """Load ``.npy`` files of an artifact or a folder."""
    files = [source.local(n) if isinstance(source, Artifact) else source / n for n in names]
    return [np.load(file) for file in files]


def _save_cells(cells: Cells, folder: Path) -> None:
    """Write homes and visits."""
    arrays: tuple[NDArray[Any], ...] = (cells.home, cells.row, cells.begin)
    for name, array in zip(CELL_FILES, arrays, strict=True):
        np.save(folder / name, array)


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
