"""Stage ``pairs``: all pairs of chips whose embeddings reach the threshold, with a certificate.

plan    groups of neighbouring cells; one part if the previous run's pairs are known
work    search the pairs of a group (join.py), or carry the known pairs over and search only those
        of new vectors (incremental.py)
seal    look up the pairs of the audited sample (certificate.py); write the pairs by chip id

The cells of ``buckets`` cover every pair of the audited sample. So a missed pair is a defect of the
search, and the stage fails. A run that carries pairs over has the same result as a full search.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import GROUP_ROWS, write_table
from geofm.dedup.buckets import partition_identity, read_audit, read_cells, read_partition
from geofm.dedup.certificate import InDenseCell, certify, require_complete
from geofm.dedup.edges import Edges, merge_edges
from geofm.dedup.incremental import (
    carry_edges,
    could_be_dense,
    current_rows,
    join_new_rows,
    match_previous_rows,
)
from geofm.dedup.join import JoinedCells, join_cells
from geofm.dedup.partition import Cells, Partition
from geofm.embeddings.store import open_vectors
from geofm.embeddings.vectors import EmbeddingSpace
from geofm.runtime.parts import file_digests
from geofm.types import Floats, Indices

VERSION = "4"
#: Table of the pairs, and its columns.
PAIRS = "pairs.parquet"
PAIR_COLUMNS = pa.schema(
    [("left", pa.string()), ("right", pa.string()), ("similarity", pa.float64())]
)
#: Residents and visitors of the cells of one part, about.
PART_ROWS = 6_000_000
#: Share of new rows up to which the pairs of the other rows are carried over.
MOST_NEW = 0.25
#: Files of the inputs that the pairs depend on.
COVERED = ("centre.npy", "centroids.npy", "margin.npy", "home.npy", "visit_row.npy",
           "visit_begin.npy", "embeddings.npy")  # fmt: skip
#: Facts of the buckets that are repeated for the search.
FROM_BUCKETS = ("threshold_from", "cells", "margin", "complete_margin", "margin_widened_for",
                "frame_from", "largest_identical")  # fmt: skip


# plan


def plan(job: Job) -> list[Part]:
    """Divide the cells into groups with about as many members."""
    buckets = job.inputs["buckets"]
    files = {**file_digests(buckets), **file_digests(job.inputs["embeddings"])}
    covers = [*(files[name] for name in COVERED), search_threshold(job)]
    count = int(buckets.manifest.facts["cells"])
    carried = known_rows(job) is not None
    groups = [(0, count)] if carried else group_cells(read_cells(buckets), count)
    return [
        job.part(
            {"first": first, "last": last, "carried": carried},
            [*covers, first, last, carried],
        )
        for first, last in groups
    ]


def search_threshold(job: Job) -> float:
    """Return the similarity from which pairs are searched: the one that the cells were made for.

    It is at most the threshold of the pairs. A refresh finds the pairs between the two in the
    previous run, if the threshold has fallen.
    """
    return float(job.inputs["buckets"].manifest.facts["frame_threshold"])


def group_cells(cells: Cells, count: int) -> list[tuple[int, int]]:
    """Divide cells into ranges (first, last), each with about ``PART_ROWS`` members."""
    sizes = np.bincount(cells.home[cells.home >= 0], minlength=count)
    sizes = sizes + np.diff(cells.begin)
    group = (np.cumsum(sizes) - sizes) // PART_ROWS
    ends = np.flatnonzero(np.diff(group)) + 1
    return list(pairwise([0, *(int(end) for end in ends), count]))


@dataclass(frozen=True)
class KnownRows:
    """Rows whose pairs the previous run found.

    Attributes:
        previous: artifact of the previous run.
        current: current row of each previous row; -1 if it was withdrawn.
        new: current rows that the previous run did not search.
    """

    previous: Artifact
    current: Indices
    new: Indices


def known_rows(job: Job) -> KnownRows | None:
    """Find the rows that the previous run searched in the same cells.

    Returns:
        The rows; None if everything has to be searched: the partition differs, the search did not
        go as low, there are dense cells, or many rows are new.
    """
    previous, buckets = job.previous, job.inputs["buckets"]
    if previous is None or buckets.manifest.facts["cells"] < 2:
        return None
    facts = previous.manifest.facts
    if facts["dense_cells"] or facts["searched_from"] > search_threshold(job):
        return None
    old = job.store.artifact("buckets", previous.manifest.inputs["buckets"])
    if not job.store.has(old) or partition_identity(old) != partition_identity(buckets):
        return None
    old_home = np.load(old.local("home.npy"))
    searched = np.load(buckets.local("home.npy")) >= 0
    old_hashes, hashes = (np.load(artifact.local("hashes.npy")) for artifact in (old, buckets))
    previous_row = match_previous_rows(old_hashes, old_home, hashes)
    new = np.flatnonzero(searched & (previous_row < 0))
    if len(new) > MOST_NEW * searched.sum():
        return None
    return KnownRows(previous, current_rows(previous_row, len(old_home), searched), new)


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Search a group of cells: rows and exact similarities of the pairs, and the dense cells."""
    space, partition, cells = read_pool(job)
    threshold = search_threshold(job)
    known = known_rows(job) if part.payload["carried"] else None
    joined = None
    if known is not None:
        joined = _join_new_rows(space, partition, cells, known, threshold)
    if joined is None:
        numbers = range(part.payload["first"], part.payload["last"])
        joined = join_cells(space, partition, cells, numbers, threshold)
    np.savez(folder / "edges.npz", **vars(joined.edges), dense=np.array(joined.dense, np.int64))


def _join_new_rows(
    space: EmbeddingSpace,
    partition: Partition,
    cells: Cells,
    known: KnownRows,
    threshold: float,
) -> JoinedCells | None:
    """Find all pairs by searching only those of new rows; None if a cell may be dense."""
    with np.load(known.previous.local("rows.npz"), allow_pickle=False) as data:
        old = Edges(data["left"], data["right"], data["similarity"])
    old = old.select(old.similarity >= threshold)  # the previous search may have gone lower
    new_edges = join_new_rows(space, partition, cells, known.new, threshold)
    if new_edges is None:
        return None
    edges = merge_edges([carry_edges(old, known.current), new_edges])
    return None if could_be_dense(edges, cells.home) else JoinedCells(edges, [])


def read_pool(job: Job) -> tuple[EmbeddingSpace, Partition, Cells]:
    """Read the vectors, the partition and the cells of a job."""
    buckets = job.inputs["buckets"]
    partition = read_partition(buckets)
    space = EmbeddingSpace(open_vectors(job.inputs["embeddings"]), partition.centre)
    return space, partition, read_cells(buckets)


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write the pairs and the certificate.

    Writes ``pairs.parquet``, ``identical.parquet``, ``dense.parquet`` (members of dense cells), and
    ``rows.npz`` (all pairs that were searched, by row, for the next run).

    Raises:
        MissedPairs: The search missed a pair of the audited sample.
    """
    space, partition, cells = read_pool(job)
    parts = [_read_part(part) for part in folders]
    edges = merge_edges([part[0] for part in parts])
    dense = np.unique(np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)]))
    same = np.load(job.inputs["buckets"].local("same.npy"))
    audit = read_audit(job.inputs["buckets"])
    certificate = certify(audit, edges, len(space), _in_dense_cell(cells, dense))
    require_complete(certificate)
    ids = job.inputs["embeddings"].table("ids.parquet")["chip_id"].astype(str).to_numpy()
    threshold = float(job.inputs["buckets"].manifest.facts["threshold"])
    reached = edges.select(edges.similarity >= threshold)
    write_pairs(ids, reached, folder / PAIRS)
    np.savez(folder / "rows.npz", **vars(edges))
    copies = np.flatnonzero((same >= 0) & (same != np.arange(len(same))))
    identical = pd.DataFrame({"chip_id": ids[copies], "same_as": ids[same[copies]]})
    write_table(identical.sort_values("chip_id"), folder / "identical.parquet")
    write_table(_dense_members(ids, cells, dense), folder / "dense.parquet")
    facts = job.inputs["buckets"].manifest.facts
    return Sealed(
        counts={"rows_in": len(same), "rows_out": len(same), "pairs": len(reached)},
        facts={
            "threshold": threshold,
            "searched_from": search_threshold(job),
            "similarity": "cosine of embeddings minus the centre of buckets, float64",
            "certificate": {**certificate, "pairs_found": len(edges)},
            "method": "every pair" if partition.is_single else "cells",
            "dense_cells": len(dense),
            **{name: facts[name] for name in FROM_BUCKETS},
        },
    )


def _read_part(folder: Path) -> tuple[Edges, Indices]:
    """Read the edges and the dense cells of a part."""
    with np.load(folder / "edges.npz", allow_pickle=False) as data:
        return Edges(data["left"], data["right"], data["similarity"]), data["dense"]


def _in_dense_cell(cells: Cells, dense: Indices) -> InDenseCell:
    """Make a function that tells which pairs of rows lie in a dense cell.

    Both rows reside in the cell, or one resides there and the other visits it.
    """
    is_dense = np.zeros(int(cells.home.max(initial=0)) + 1, dtype=np.bool_)
    is_dense[dense] = True
    rows = len(cells.home)
    visited = cells.visited
    visits_dense = is_dense[visited]
    visits = np.unique(visited[visits_dense].astype(np.int64) * rows + cells.row[visits_dense])

    def in_dense_cell(left: Indices, right: Indices) -> NDArray[np.bool_]:
        result = np.zeros(len(left), dtype=np.bool_)
        for a, b in ((left, right), (right, left)):
            home = cells.home[a].astype(np.int64)
            is_member = (home == cells.home[b]) | np.isin(home * rows + b, visits)
            result |= is_dense[home] & is_member
        return result

    return in_dense_cell


def write_pairs(ids: NDArray[Any], edges: Edges, path: Path) -> None:
    """Write the pairs by chip id, the lower id left, sorted; one row group is in memory at a time.

    Args:
        ids: chip id of each row, shape (rows,).
        edges: pairs of rows.
        path: the file.
    """
    by_id = np.argsort(ids, kind="stable")
    rank = np.empty(len(ids), dtype=np.int64)
    rank[by_id] = np.arange(len(ids))
    low, high = rank[edges.left], rank[edges.right]
    low, high = np.minimum(low, high), np.maximum(low, high)
    order = np.lexsort((high, low))
    names = pa.array(ids[by_id], pa.string())
    with pq.ParquetWriter(path, PAIR_COLUMNS, compression="zstd") as file:
        for first in range(0, len(order), GROUP_ROWS):
            rows = order[first : first + GROUP_ROWS]
            columns = [names.take(pa.array(side[rows])) for side in (low, high)]
            table = pa.table([*columns, edges.similarity[rows]], schema=PAIR_COLUMNS)
            file.write_table(table, row_group_size=GROUP_ROWS)


def read_pairs(pairs: Path, row_of: pd.Index) -> tuple[Indices, Indices, Floats]:
    """Read a table of pairs of chips by row, one row group at a time.

    As Python texts, the ids of ten million pairs would take a gigabyte.

    Args:
        pairs: file with the columns left, right, similarity.
        row_of: chip ids by row.

    Returns:
        Row of the left and of the right chip, -1 if unknown, and similarity, each of shape
        (pairs,).
    """
    file = pq.ParquetFile(pairs)
    count = file.metadata.num_rows
    left, right, similarity = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count)
    done = 0
    for number in range(file.num_row_groups):
        group = file.read_row_group(number, PAIR_COLUMNS.names).to_pandas()
        part = slice(done, done + len(group))
        left[part], right[part] = (row_of.get_indexer(group[side]) for side in ("left", "right"))
        similarity[part] = group["similarity"]
        done += len(group)
    return left, right, similarity


def _dense_members(ids: NDArray[Any], cells: Cells, dense: Indices) -> pd.DataFrame:
    """List the chips of dense cells: cell, chip, and whether it resides there or visits."""
    tables = []
    for number in dense:
        for rows, resides in zip(cells.members(int(number)), (True, False), strict=True):
            columns = {"cell": int(number), "chip_id": ids[rows], "home": resides}
            tables.append(pd.DataFrame(columns))
    if not tables:
        columns = {"cell": np.empty(0, np.int64), "chip_id": ids[:0], "home": np.empty(0, np.bool_)}
        return pd.DataFrame(columns)
    by = ["cell", "home", "chip_id"]
    return pd.concat(tables).sort_values(by, ascending=[True, False, True])


# The artifact as the stage `curate` reads it.


@dataclass(frozen=True)
class PairSearch:
    """Result of the search.

    Attributes:
        partition: cells in which pairs were searched.
        cells: residents and visitors of each cell.
        dense: numbers of the cells whose pairs are not listed.
        threshold: least similarity of a pair.
    """

    partition: Partition
    cells: Cells
    dense: list[int]
    threshold: float


def read_pair_search(inputs: dict[str, Artifact]) -> PairSearch:
    """Read how the pairs of ``inputs["pairs"]`` were searched in the cells of ``buckets``."""
    pairs, buckets = inputs["pairs"], inputs["buckets"]
    dense = sorted({int(cell) for cell in pairs.table("dense.parquet")["cell"]})
    threshold = float(pairs.manifest.facts["threshold"])
    return PairSearch(read_partition(buckets), read_cells(buckets), dense, threshold)


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
