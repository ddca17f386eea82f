"""Stage ``pairs``: all searched pairs of chips at or above the threshold, with a certificate.

The certificate holds the pairs that were found against the audit of ``buckets``. The cells cover
every pair of the audit, so a pair that is missed is a defect of the search, and the stage fails.

A part is a group of cells. A run that follows another over the same frame takes over its pairs
and searches only what is new (``incremental.py``): the pairs, and so the decisions, are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.dedup import certificate as audit
from geofm.dedup.buckets import frame_identity, read_audit, read_cells, read_frame, read_sketches
from geofm.dedup.edges import Edges, join_edges
from geofm.dedup.incremental import carry_edges, could_be_dense, match_rows, turn_round
from geofm.dedup.join import join_cells
from geofm.dedup.newcomers import factors_of, join_new
from geofm.dedup.partition import Cells, Frame
from geofm.dedup.sketch import Sketches
from geofm.embeddings.store import open_vectors
from geofm.embeddings.vectors import Space
from geofm.runtime.parts import file_digests
from geofm.types import Indices

VERSION = "3"
#: Homes and visits of the cells of one part, about.
PART_ROWS = 6_000_000
#: Share of new rows up to which they are searched against the pairs that are known.
MOST_NEW = 0.25
#: Files that pairs depend on.
COVERED = ("centre.npy", "centroids.npy", "margin.npy", "home.npy", "visit_row.npy",
           "visit_begin.npy", "embeddings.npy")  # fmt: skip
#: Facts of the buckets that are the search's as well.
FROM_BUCKETS = ("threshold_from", "cells", "margin", "complete_margin", "margin_widened_for",
                "frame_from", "largest_identical")  # fmt: skip


def threshold_of(job: Job) -> float:
    """The least similarity of any pair: that which the cells were made for."""
    return float(job.inputs["buckets"].manifest.facts["threshold"])


def plan(job: Job) -> list[Part]:
    """Groups of neighbouring cells with about as many rows; one part where only new ones join."""
    buckets = job.inputs["buckets"]
    cells = read_cells(buckets)
    files = {**file_digests(buckets), **file_digests(job.inputs["embeddings"])}
    covers = [files[name] for name in COVERED] + [threshold_of(job)]
    count = int(buckets.manifest.facts["cells"])
    carried = known_rows(job) is not None
    groups = [(0, count)] if carried else group_cells(cells, count)
    return [
        job.part(
            {"first": first, "last": last, "carried": carried},
            [*covers, first, last, carried],
        )
        for first, last in groups
    ]


def group_cells(cells: Cells, count: int) -> list[tuple[int, int]]:
    """Ranges of cells, each with about ``PART_ROWS`` homes and visits."""
    loads = np.bincount(cells.home[cells.home >= 0], minlength=count)
    loads = loads + np.diff(cells.begin)
    part = (np.cumsum(loads) - loads) // PART_ROWS
    ends = np.flatnonzero(np.diff(part)) + 1
    edges = [0, *(int(end) for end in ends), count]
    return list(pairwise(edges))


def work(job: Job, part: Part, folder: Path) -> None:
    """Search a group of cells: rows and exact similarities of its pairs."""
    space, frame, cells = read_pool(job)
    threshold = threshold_of(job)
    first, last = part.payload["first"], part.payload["last"]
    carried = carry(job) if part.payload["carried"] else None
    if carried is not None:
        sketches = read_sketches(job.inputs["buckets"], len(space))
        edges = _join_new(space, frame, cells, sketches, carried, threshold)
        if edges is not None:
            np.savez(folder / "edges.npz", **vars(edges), dense=np.empty(0, np.int64))
            return
    found = join_cells(space, frame, cells, range(first, last), threshold)
    np.savez(folder / "edges.npz", **vars(found.edges), dense=np.array(found.dense, np.int64))


def _join_new(
    space: Space,
    frame: Frame,
    cells: Cells,
    sketches: Sketches,
    carried: Carried,
    threshold: float,
) -> Edges | None:
    """Find all edges by searching only those of new rows; None if a cell may be dense."""
    edges = carried.edges
    if len(carried.new):
        factors = factors_of(space, sketches, threshold)
        found = join_new(space, frame, cells, threshold, carried.new, factors)
        if found is None:
            return None
        edges = join_edges([edges, found])
    return None if could_be_dense(edges, cells.home) else edges


@dataclass(frozen=True)
class Carried:
    """Edges that an earlier search over the same frame found, by current rows; the new rows."""

    edges: Edges
    new: Indices


@dataclass(frozen=True)
class KnownRows:
    """Which rows the last run knew: ``to`` by row of then (-1: gone), ``new`` those of now."""

    before: Artifact
    to: Indices
    new: Indices


def known_rows(job: Job) -> KnownRows | None:
    """The rows that are taken over from the last run; None where everything is searched."""
    before, buckets = job.previous, job.inputs["buckets"]
    if before is None or buckets.manifest.facts["cells"] < 2:
        return None
    old = job.store.artifact("buckets", before.manifest.inputs["buckets"])
    facts = before.manifest.facts
    if facts["dense_cells"] or facts["threshold"] != threshold_of(job):
        return None
    if not job.store.has(old) or frame_identity(old) != frame_identity(buckets):
        return None
    searched = np.load(buckets.local("home.npy")) >= 0
    home = np.load(old.local("home.npy"))
    hashes = np.load(buckets.local("hashes.npy"))
    of = match_rows(np.load(old.local("hashes.npy")), home, hashes)
    new = np.flatnonzero(searched & (of < 0))
    if len(new) > MOST_NEW * searched.sum():
        return None
    return KnownRows(before, turn_round(of, len(home), searched), new)


def carry(job: Job) -> Carried | None:
    """What is taken over from the last run; None where everything is searched."""
    known = known_rows(job)
    if known is None:
        return None
    with np.load(known.before.local("rows.npz"), allow_pickle=False) as data:
        edges = Edges(data["left"], data["right"], data["similarity"])
    return Carried(carry_edges(edges, known.to), known.new)


def read_pool(job: Job) -> tuple[Space, Frame, Cells]:
    """The pool of a job: vectors, frame, cells."""
    buckets = job.inputs["buckets"]
    frame = read_frame(buckets)
    return Space(open_vectors(job.inputs["embeddings"]), frame.centre), frame, read_cells(buckets)


def read_edges(folder: Path) -> tuple[Edges, Indices]:
    """Edges and dense cells of a part."""
    with np.load(folder / "edges.npz", allow_pickle=False) as data:
        return Edges(data["left"], data["right"], data["similarity"]), data["dense"]


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``pairs.parquet``, ``identical.parquet``, ``dense.parquet``, and the certificate.

    ``rows.npz`` has the pairs by row, for the run that follows.

    Raises:
        MissedPairs: the search did not find a pair that the audit found.
    """
    space, frame, cells = read_pool(job)
    parts = [read_edges(part) for part in folders]
    edges = join_edges([part[0] for part in parts])
    dense = np.unique(np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)]))
    same = np.load(job.inputs["buckets"].local("same.npy"))
    threshold = threshold_of(job)
    audited = read_audit(job.inputs["buckets"])
    certificate = audit.certify(audited, edges, len(space), in_dense(cells, dense))
    audit.require_complete(certificate)
    ids = job.inputs["embeddings"].table("ids.parquet")["chip_id"].astype(str).to_numpy()
    write_table(_named(ids, edges), folder / "pairs.parquet")
    np.savez(folder / "rows.npz", **vars(edges))
    copies = np.flatnonzero((same >= 0) & (same != np.arange(len(same))))
    identical = pd.DataFrame({"chip_id": ids[copies], "same_as": ids[same[copies]]})
    write_table(identical.sort_values("chip_id"), folder / "identical.parquet")
    write_table(_members(ids, cells, dense), folder / "dense.parquet")
    facts = job.inputs["buckets"].manifest.facts
    return Sealed(
        counts={"rows_in": len(same), "rows_out": len(same), "pairs": len(edges)},
        facts={
            "threshold": threshold,
            "similarity": "cosine of embeddings minus the centre of buckets, float64",
            "certificate": {**certificate, "pairs_found": len(edges)},
            "method": "every pair" if frame.whole else "cells",
            "dense_cells": len(dense),
            **{name: facts[name] for name in FROM_BUCKETS},
        },
    )


@dataclass(frozen=True)
class Pairs:
    """The artifact as it is read: pairs by chip id, frame and cells, numbers of dense cells."""

    table: pd.DataFrame
    frame: Frame
    cells: Cells
    dense: list[int]
    threshold: float


def read_pairs(inputs: dict[str, Artifact]) -> Pairs:
    """The pairs of ``inputs["pairs"]``, searched in the cells of ``inputs["buckets"]``."""
    pairs, buckets = inputs["pairs"], inputs["buckets"]
    dense = sorted({int(cell) for cell in pairs.table("dense.parquet")["cell"]})
    return Pairs(
        pairs.table("pairs.parquet"),
        read_frame(buckets),
        read_cells(buckets),
        dense,
        float(pairs.manifest.facts["threshold"]),
    )


def in_dense(cells: Cells, dense: Indices) -> audit.Covered:
    """Tells which pairs lie in dense cells: at home there both, or one at home and one visiting."""
    count = int(cells.home.max(initial=0)) + 1
    flags = np.zeros(count, dtype=np.bool_)
    flags[dense] = True
    there = flags[cells.cell]
    width = len(cells.home)
    visits = np.unique(cells.cell[there].astype(np.int64) * width + cells.row[there])

    def covered(low: Indices, high: Indices) -> NDArray[np.bool_]:
        found = np.zeros(len(low), dtype=np.bool_)
        for a, b in ((low, high), (high, low)):
            home = cells.home[a].astype(np.int64)
            with_b = (home == cells.home[b]) | np.isin(home * width + b, visits)
            found |= flags[home] & with_b
        return found

    return covered


def _named(ids: NDArray[Any], edges: Edges) -> pd.DataFrame:
    """Pairs by chip id, the lower id left, sorted."""
    a, b = ids[edges.left], ids[edges.right]
    swap = a > b
    frame = pd.DataFrame(
        {"left": np.where(swap, b, a), "right": np.where(swap, a, b),
         "similarity": edges.similarity}
    )  # fmt: skip
    return frame.sort_values(["left", "right"], ignore_index=True)


def _members(ids: NDArray[Any], cells: Cells, dense: Indices) -> pd.DataFrame:
    """Chips of dense cells: cell, chip, and whether it is at home there or visits."""
    rows = []
    for number in dense:
        homes, visitors = cells.members(int(number))
        rows.append(pd.DataFrame({"cell": int(number), "chip_id": ids[homes], "home": True}))
        rows.append(pd.DataFrame({"cell": int(number), "chip_id": ids[visitors], "home": False}))
    if not rows:
        return pd.DataFrame({"cell": np.empty(0, np.int64), "chip_id": ids[:0],
                             "home": np.empty(0, np.bool_)})  # fmt: skip
    return pd.concat(rows).sort_values(["cell", "home", "chip_id"], ascending=[True, False, True])


STAGE = Stage(
    name="pairs",
    version=VERSION,
    kind="pairs",
    inputs=("embeddings", "buckets"),
    software=("faiss-cpu", "numpy", "scipy", "torch"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
    section="curate",
    fields=(),
    follows=True,
)
