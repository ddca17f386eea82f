"""Stage ``alike``: pixel duplicates, which are pairs of chips that show the same view.

plan    collect the candidates of the pool, and divide them into parts    (``_prepare``)
work    find pairs that may show the same view, and compare their thumbnails
                                                    (signature.py, ``compare_thumbnails``)
seal    join the pairs of all parts, and the known verdicts on some of them

A pair is compared only with evidence that it shows the same view. Either the two chips lie in near
cells of ``buckets`` (so their embeddings are near) and their spectral signatures agree: this finds
copies and views that overlap. Or their perceptual hashes agree: this finds copies of the same view
(haze, gain, half a pixel, turned, mirrored), however far their embeddings are. Evidence does not
decide: each of these pairs is aligned and compared by its thumbnails. The location of the chips
plays no part.

A chip without contrast shows nothing and is in no pair. Monotone chips, such as open water, have no
cell, because their embeddings are all alike: they are compared with each other.

The verdict on a pair depends on the pixels of its two chips alone. So a refresh collects evidence
anew, which is cheap, and compares only pairs that the previous run did not compare. The result is
that of a run without a previous one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter1d

from data_catalog.artifact import Artifact
from data_catalog.hashing import digest_of
from data_catalog.progress import advance, tick
from data_catalog.stage import Job, Part, Sealed, Stage, link, prepare_part
from data_catalog.tables import read_table, write_table
from geofm.dedup.buckets import read_partition
from geofm.dedup.describe import SIGNATURES, TABLE, THUMBNAILS
from geofm.dedup.edges import contains_codes, pair_codes
from geofm.dedup.perceptual_hash import (
    ORIENTATIONS,
    near_by_hash,
    orient,
)
from geofm.dedup.signature import (
    Signatures,
    best_agreeing,
    orientations_that_agree,
    signatures,
)
from geofm.runtime.parts import file_digests, ok_chips
from geofm.types import Bools, Floats, Floats32, Indices, Pairs

VERSION = "5"
#: Chips for which one part looks for agreeing signatures, about, and pairs of near hashes that it
#: compares.
PART_CHIPS, PART_PAIRS = 4096, 1 << 13
#: Pairs whose thumbnails are compared before progress is reported.
HELD_PAIRS = 1 << 12
#: Chips of a cell that are multiplied at once with those of the near cells.
ROWS = 512
#: Largest number of pairs that a chip proposes: those whose signatures agree best.
MOST_PROPOSED = 16
#: Rows with which a row is compared: a cell is compared with as many near cells as have these.
REACH_ROWS = 4096
#: A cell with more rows is not compared by signatures, which would take quadratic time.
MOST_IN_CELL = 50_000
#: Similarity from which two views are the same (chosen on scenes other than the benchmark's).
SAME_VIEW = 0.98
#: Least ground that two views share, as intersection over union.
LEAST_IOU = 0.58
#: Kinds of pixel duplicates, by number.
KINDS = ("same view", "turned", "overlap")
#: Columns of ``alike.parquet``.
COLUMNS = {"left": str, "right": str, "similarity": np.float64, "kind": str,
           "orientation": np.int64, "down_px": np.int64, "right_px": np.int64}  # fmt: skip
#: Files for the next run: the candidates, and all pairs that were compared.
CANDIDATES, COMPARED = "candidates.parquet", "compared.npz"


# plan


def plan(job: Job) -> list[Part]:
    """List the parts: ranges of chips whose signatures are compared, and of near hashes."""
    if not job.settings.pixel_duplicates:
        return []
    key = _preparation_key(job)
    prepared = read_candidates(prepare_part(job, key, lambda out: _prepare(job, out)))
    parts = []
    for kind, count, size in (
        ("chips", len(prepared.row), PART_CHIPS),
        ("hashes", len(prepared.hash_codes), PART_PAIRS),
    ):
        for first in range(0, count, size):
            last = min(first + size, count)
            payload = {"key": key, kind: [first, last]}
            parts.append(job.part(payload, [key, kind, first, last], rows=last - first))
    return parts


def _preparation_key(job: Job) -> str:
    """Compute the key of the part that ``_prepare`` writes."""
    descriptors, buckets = (file_digests(job.inputs[role]) for role in ("descriptors", "buckets"))
    covers = [
        descriptors,
        file_digests(job.inputs["pool"])["pool.parquet"],
        [buckets[name] for name in ("home.npy", "same.npy", "centroids.npy")],
        reach_of(job.inputs["buckets"]),
        None if job.previous is None else job.previous.digest,
    ]
    return digest_of({"candidates": VERSION, "covers": covers})


def reach_of(buckets: Artifact) -> int:
    """Return the number of near cells with which a cell is compared, itself included.

    It depends on the pool for which the cells were made, so it is the same for later runs.
    """
    facts = buckets.manifest.facts
    cells, rows = int(facts["cells"]), int(facts["frame_rows"])
    return min(cells, -(-REACH_ROWS * cells // max(rows, 1)))


# The candidates of a job, prepared once for all parts.


@dataclass(frozen=True)
class CandidateChips:
    """The chips that are compared, sorted by cell, and what is known of their pairs.

    A pair of chips at the positions a < b has the code a * n + b.

    Attributes:
        row: row of each chip in the files of the descriptors, shape (n,).
        rank: position of each chip in the order of the ids, shape (n,).
        cell: cell of each chip, shape (n,); monotone chips are in a cell of their own, the last.
        contrast: lowest and highest unit grey of each chip's thumbnail, shape (n, 2).
        reach: near cells of each cell, itself included, shape (cells, reach).
        hash_codes: codes of the pairs with near hashes, ascending.
        known_codes: codes of the pairs that the previous run compared, ascending.
    """

    row: Indices
    rank: Indices
    cell: NDArray[np.int32]
    contrast: Floats32
    reach: NDArray[np.int32]
    hash_codes: Indices
    known_codes: Indices

    @cached_property
    def begin(self) -> Indices:
        """Position of the first chip of each cell, and the number of chips, shape (cells + 1,)."""
        return np.searchsorted(self.cell, np.arange(len(self.reach) + 1)).astype(np.int64)

    @cached_property
    def crowded(self) -> Bools:
        """Whether each cell has too many chips to compare their signatures, shape (cells,)."""
        return np.asarray(np.diff(self.begin) > MOST_IN_CELL)

    @cached_property
    def near_cells(self) -> list[Indices]:
        """Of each cell, the cells with which it is compared: near to it, or it is near to them."""
        count = len(self.reach)
        near = np.zeros((count, count), np.bool_)
        near[np.arange(count)[:, None], self.reach] = True
        near |= near.T
        near &= ~(self.crowded[:, None] | self.crowded[None, :])
        return [np.flatnonzero(row) for row in near]

    def blocks(self, first: int, last: int) -> Iterator[tuple[Indices, Indices]]:
        """Yield blocks of chips of one cell, and the chips with which they are compared."""
        for cell in range(int(self.cell[first]), int(self.cell[last - 1]) + 1):
            begin, end = max(first, self.begin[cell]), min(last, self.begin[cell + 1])
            if begin >= end:
                continue
            ranges = [np.arange(self.begin[c], self.begin[c + 1]) for c in self.near_cells[cell]]
            others = np.concatenate([np.empty(0, np.int64), *ranges])
            for start in range(begin, end, ROWS):
                yield np.arange(start, min(start + ROWS, end)), others

    def codes(self, left: Indices, right: Indices) -> Indices:
        """Compute the codes of pairs of positions, ascending, each once."""
        return np.unique(pair_codes(left, right, len(self.row))[left != right])

    def pairs(self, codes: Indices) -> Pairs:
        """Return the positions of pairs; the chip with the lower id is left."""
        a, b = np.divmod(codes, max(len(self.row), 1))
        swapped = self.rank[a] > self.rank[b]
        return np.where(swapped, b, a), np.where(swapped, a, b)


def read_candidates(folder: Path) -> CandidateChips:
    """Read what ``_prepare`` wrote."""
    with np.load(folder / "candidates.npz", allow_pickle=False) as data:
        return CandidateChips(**data)


def _prepare(job: Job, out: Path) -> None:
    """Write the candidates, and what is known of their pairs from the previous run.

    ``candidates.npz``: see ``CandidateChips``. ``candidates.parquet``: chip id and digest of the
    pixels of each, in the same order. ``known.parquet``: the duplicates among the known pairs.
    """
    described = job.inputs["descriptors"].table(
        TABLE, ["chip_id", "hash", "thumbnail_low", "thumbnail_high"]
    )
    chips = ok_chips(job.inputs["chips"], ["chip_id", "pixel_sha256"])
    pool = job.inputs["pool"].table("pool.parquet", ["chip_id", "rule", "monotone"])
    pool = pool[pool["rule"] == ""]
    row = _positions(described["chip_id"], pool["chip_id"])
    cell = _cells(job.inputs["buckets"], row, pool["monotone"].to_numpy(np.bool_))
    hashes = described["hash"].to_numpy(np.uint64)
    rank = np.flatnonzero(hashes[row] != 0)  # the pool is sorted by id
    rank = rank[np.argsort(cell[rank], kind="stable")]
    row, cell = row[rank], cell[rank]
    low, high = (described[f"thumbnail_{end}"].to_numpy(np.float32) for end in ("low", "high"))
    names = pd.DataFrame(
        {
            "chip_id": described["chip_id"].to_numpy()[row],
            "pixel_sha256": chips["pixel_sha256"].to_numpy()[row],
        }
    )
    write_table(names, out / CANDIDATES)
    known_codes, duplicates = _known_pairs(job, names)
    write_table(duplicates, out / "known.parquet")
    near = near_by_hash(hashes[row])
    np.savez(
        out / "candidates.npz",
        row=row,
        rank=rank,
        cell=cell,
        contrast=np.stack([low[row], high[row]], axis=1),
        reach=_near_cells(job.inputs["buckets"]),
        hash_codes=pair_codes(*near, len(row)),
        known_codes=known_codes,
    )


def _positions(ids: pd.Series, wanted: pd.Series) -> Indices:
    """Find the position of each wanted chip id; -1 if it is missing."""
    return np.asarray(pd.Index(ids).get_indexer(pd.Index(wanted)), dtype=np.int64)


def _known_pairs(job: Job, names: pd.DataFrame) -> tuple[Indices, pd.DataFrame]:
    """Find the candidates' pairs that the previous run compared.

    Args:
        job: the job.
        names: chip id and digest of the pixels of each candidate.

    Returns:
        Codes of the pairs, ascending; the rows of the previous ``alike.parquet`` among them.
    """
    nothing = np.empty(0, np.int64), _empty_table()
    if job.previous is None:
        return nothing
    previous = job.previous.manifest
    old = job.store.artifact("descriptors", previous.inputs["descriptors"])
    if not previous.facts["compared"] or not job.store.has(old):
        return nothing
    if old.manifest.version != job.inputs["descriptors"].manifest.version:
        return nothing  # the thumbnails may differ
    old_names = read_table(job.previous.local(CANDIDATES))
    position = _positions(names["chip_id"], old_names["chip_id"])
    there = position >= 0
    pixels = names["pixel_sha256"].to_numpy()[position]
    position[~there | (pixels != old_names["pixel_sha256"].to_numpy())] = -1
    with np.load(job.previous.local(COMPARED), allow_pickle=False) as data:
        a, b = position[data["left"]], position[data["right"]]
    codes = np.unique(pair_codes(a, b, len(names))[np.minimum(a, b) >= 0])
    duplicates = read_table(job.previous.local("alike.parquet"))
    i, j = (_positions(names["chip_id"], duplicates[side]) for side in ("left", "right"))
    is_known = contains_codes(codes, pair_codes(i, j, len(names)))
    return codes, duplicates[(np.minimum(i, j) >= 0) & is_known]


def _cells(buckets: Artifact, row: Indices, monotone: Bools) -> NDArray[np.int32]:
    """Return the cell of each candidate; that of monotone ones follows the cells of ``buckets``."""
    home, same = (np.load(buckets.local(name), mmap_mode="r") for name in ("home.npy", "same.npy"))
    cell = np.full(len(row), int(buckets.manifest.facts["cells"]), dtype=np.int32)
    textured = row[~monotone]
    cell[~monotone] = home[same[textured]]  # of equal vectors, only the first has a home
    return cell


def _near_cells(buckets: Artifact) -> NDArray[np.int32]:
    """List the near cells of each cell, itself included, shape (cells + 1, reach)."""
    partition, reach = read_partition(buckets), reach_of(buckets)
    near = np.zeros((partition.count, 1), np.int64)
    if not partition.is_single:
        near = np.argsort(partition.distances, axis=1, kind="stable")[:, :reach]
    monotone = np.full((1, near.shape[1]), partition.count)
    return np.concatenate([near, monotone]).astype(np.int32)


def _empty_table() -> pd.DataFrame:
    """Return ``alike.parquet`` without rows."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Find the pairs that some chips propose, or take pairs of near hashes, and compare them.

    Writes ``pairs.npz``: codes of the proposed pairs, and the columns of the duplicates among those
    whose verdict is not known.
    """
    prepared = read_candidates(
        prepare_part(job, part.payload["key"], lambda out: _prepare(job, out))
    )
    descriptors = job.inputs["descriptors"]
    of_rows = load_signatures(descriptors)
    if "hashes" in part.payload:
        first, last = part.payload["hashes"]
        proposed = prepared.hash_codes[first:last]
    else:
        proposed = _propose(prepared, of_rows, *part.payload["chips"])
        proposed = proposed[~contains_codes(prepared.hash_codes, proposed)]
    new = proposed[~contains_codes(prepared.known_codes, proposed)]
    duplicates = find_pixel_duplicates(
        np.load(descriptors.local(THUMBNAILS), mmap_mode="r", allow_pickle=False),
        prepared.contrast,
        *prepared.pairs(new),
        rows=prepared.row,
        of_rows=of_rows,
    )
    np.savez(folder / "pairs.npz", proposed=proposed, **vars(duplicates))


def _propose(prepared: CandidateChips, of_rows: Signatures, first: int, last: int) -> Indices:
    """Find the pairs that a range of chips proposes; returns their codes."""
    codes = [np.empty(0, np.int64)]
    for own, others in prepared.blocks(first, last):
        i, j = best_agreeing(
            of_rows[prepared.row[own]],
            of_rows[prepared.row[others]],
            own[:, None] == others,
            prepared.rank[others],
            MOST_PROPOSED,
        )
        codes.append(prepared.codes(own[i], others[j]))
        advance(len(own))
    return np.unique(np.concatenate(codes))


def load_signatures(descriptors: Artifact) -> Signatures:
    """Map the signatures of all chips from their file."""
    of_rows: Signatures = np.load(descriptors.local(SIGNATURES), mmap_mode="r", allow_pickle=False)
    return of_rows


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write the pairs, and what the next run needs to know.

    ``alike.parquet``: chip ids (left below right), similarity, kind and alignment.
    ``candidates.parquet`` and ``compared.npz``: the chips and pairs that were compared.
    """
    if not job.settings.pixel_duplicates:
        table = _empty_table()
        write_table(table, folder / "alike.parquet")
        facts = {**_facts(table), "compared": 0}
        return Sealed(counts={"rows_in": 0, "rows_out": 0, "pairs": 0}, facts=facts)
    prepared_folder = prepare_part(job, _preparation_key(job), lambda out: _prepare(job, out))
    prepared = read_candidates(prepared_folder)
    link(prepared_folder / CANDIDATES, folder / CANDIDATES)
    ids = read_table(folder / CANDIDATES, ["chip_id"])["chip_id"].to_numpy()
    codes, tables = [np.empty(0, np.int64)], []
    for part in folders:
        with np.load(part / "pairs.npz", allow_pickle=False) as data:
            codes.append(data["proposed"])
            tables.append(_table_of(ids, data))
    proposed = np.unique(np.concatenate(codes))
    left, right = np.divmod(proposed, max(len(ids), 1))
    np.savez(folder / COMPARED, left=left, right=right)
    known = read_table(prepared_folder / "known.parquet")
    i, j = (_positions(pd.Series(ids), known[side]) for side in ("left", "right"))
    tables.append(known[contains_codes(proposed, pair_codes(i, j, len(ids)))])
    table = pd.concat([part for part in tables if len(part)] or [_empty_table()])
    # two chips may propose each other in two parts
    table = table.drop_duplicates(["left", "right"]).sort_values(["left", "right"])
    write_table(table.reset_index(drop=True), folder / "alike.parquet")
    return Sealed(
        counts={"rows_in": len(ids), "rows_out": len(ids), "pairs": len(table)},
        facts={
            **_facts(table),
            "compared": len(proposed),
            "reach_cells": prepared.reach.shape[1],
            "cells_by_hash_alone": np.flatnonzero(prepared.crowded).tolist(),
        },
    )


def _facts(table: pd.DataFrame) -> dict[str, Any]:
    """Return the facts about duplicates for the manifest."""
    return {
        "threshold": SAME_VIEW,
        "similarity": "correlation of band-passed thumbnails, aligned",
        "kinds": {kind: int((table["kind"] == kind).sum()) for kind in KINDS},
    }


def _table_of(ids: NDArray[Any], pairs: Any) -> pd.DataFrame:
    """List the duplicates of a part (``PixelDuplicates``) by chip id."""
    return pd.DataFrame(
        {
            "left": ids[pairs["left"]],
            "right": ids[pairs["right"]],
            "similarity": pairs["similarity"],
            "kind": np.array(KINDS, dtype=object)[pairs["kind"]],
            "orientation": pairs["orientation"].astype(np.int64),
            "down_px": pairs["shift"][:, 0].astype(np.int64),
            "right_px": pairs["shift"][:, 1].astype(np.int64),
        }
    )


# Comparison of two thumbnails. A pair is aligned by phase correlation (Kuglin and Hines 1975) in
# the orientations in which the signatures agree. Without a clear peak it is given up: that ends the
# comparison of nearly all pairs of unrelated views. Over the ground that both show, the left
# thumbnail is then fitted by least squares with the right one: with five neighbouring pixels and a
# constant, which absorb gain, haze, the rest of the shift and the blur of resampling. The
# similarity is the correlation of the left thumbnail with its fit. Thumbnails are band-passed
# first, without their finest grain, which aliases between odd shifts, and without coarse shading,
# in which all water and all haze are alike.
#
# Noise of the sensor lowers the correlation of two views of calm water, which have little other
# contrast. Such noise is white, so it shows in the finest grain too: where the correlation is not
# much too low, the grain of the difference tells how much of the difference is noise. Thumbnails of
# larger chips average most of the noise away, and have the rest of it in the grain only in part.

#: Standard deviations of the band-pass in thumbnail pixels.
FINE, COARSE = 1.0, 3.0
#: Least height of the peak of the phase correlation, at half the resolution; 1 for equal views.
LEAST_PEAK = 0.25
#: Similarity from which noise is measured, and its largest standard deviation that is no
#: difference, in unit grey (about 0.001 reflectance).
NOISY_VIEW, MOST_NOISE = 0.93, 0.003
#: Rim of the shared ground that is left out, because filters read beyond it.
RIM = 3
#: Least contrast of a comparable thumbnail (standard deviation of band-passed unit grey), as such
#: and as a share of one step of the thumbnail's bytes.
MIN_CONTRAST, MIN_STEPS = 3e-5, 0.25
#: Largest shift that is considered, as a share of the edge.
MAX_SHIFT = 0.3
#: Gains outside this range mean that one picture is no rendering of the other.
GAINS = (0.2, 5.0)
#: Pairs that are aligned at once, and pairs that are fitted at once.
COMPARED_PAIRS, FITTED_PAIRS = 1024, 256


@dataclass(frozen=True)
class PixelDuplicates:
    """Pairs of rows that show the same view, in the order of the candidates.

    Attributes:
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).
        similarity: 0..1, shape (pairs,).
        kind: number in ``KINDS``, shape (pairs,).
        orientation: orientation in which right matches left, shape (pairs,).
        shift: thumbnail pixels (down, right) from left to right, shape (pairs, 2).
    """

    left: Indices
    right: Indices
    similarity: Floats
    kind: NDArray[np.int8]
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.left)


def find_pixel_duplicates(
    thumbnails: NDArray[np.uint8],
    contrast: Floats32,
    left: Indices,
    right: Indices,
    *,
    rows: Indices | None = None,
    of_rows: Signatures | None = None,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
) -> PixelDuplicates:
    """Keep the candidate pairs that show the same view.

    Args:
        thumbnails: shape (m, 64, 64); may be mapped from a file.
        contrast: lowest and highest unit grey of each chip, shape (n, 2).
        left: chips of the candidate pairs, shape (pairs,).
        right: chips, shape (pairs,).
        rows: row of each chip's thumbnail, shape (n,); None if these are the chips' own numbers.
        of_rows: signature of each thumbnail, shape (m, ``WIDTH``); None: they are computed.
        threshold: least similarity.
        least_iou: least share of common ground.
    """
    parts: list[list[NDArray[Any]]] = []
    for first in range(0, max(len(left), 1), HELD_PAIRS):
        a, b = left[first : first + HELD_PAIRS], right[first : first + HELD_PAIRS]
        result = compare_thumbnails(thumbnails, contrast, a, b, rows, of_rows)
        same = (result.similarity >= threshold) & (result.iou >= least_iou)
        moved = np.abs(result.shift).max(axis=1) > 1
        kind = np.where(moved, 2, np.where(result.orientation > 0, 1, 0)).astype(np.int8)
        columns = (a, b, result.similarity, kind, result.orientation, result.shift)
        parts.append([column[same] for column in columns])
        tick("comparing thumbnails", min(first + HELD_PAIRS, len(left)), len(left), "pairs")
    return PixelDuplicates(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class PixelSimilarity:
    """Result of the comparison of pairs of thumbnails.

    Attributes:
        similarity: 0..1, shape (pairs,); 0 where a thumbnail has too little contrast.
        orientation: orientation in which right matches left, shape (pairs,).
        shift: thumbnail pixels (down, right) from left to right then, shape (pairs, 2).
        iou: ground that both show, as intersection over union, shape (pairs,).
    """

    similarity: Floats
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]
    iou: Floats


def compare_thumbnails(
    thumbnails: NDArray[np.uint8],
    contrast: Floats32,
    left: Indices,
    right: Indices,
    rows: Indices | None = None,
    of_rows: Signatures | None = None,
) -> PixelSimilarity:
    """Compare pairs of thumbnails.

    Args:
        thumbnails: shape (m, edge, edge); may be mapped from a file.
        contrast: unit grey of byte 0 and of byte 255 of each chip, shape (n, 2).
        left: chips, shape (pairs,).
        right: chips, shape (pairs,).
        rows: row of each chip's thumbnail, shape (n,); None if these are the chips' own numbers.
        of_rows: signature of each thumbnail, shape (m, ``WIDTH``); None: they are computed.
    """
    result = PixelSimilarity(
        similarity=np.zeros(len(left)),
        orientation=np.zeros(len(left), np.int8),
        shift=np.zeros((len(left), 2), np.int16),
        iou=np.zeros(len(left)),
    )
    for first in range(0, len(left), COMPARED_PAIRS):
        part = slice(first, first + COMPARED_PAIRS)
        chips, position = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        chip_rows = chips if rows is None else rows[chips]
        pictures, (low, high) = thumbnails[chip_rows], contrast[chips].T
        signed = signatures(pictures, high - low) if of_rows is None else of_rows[chip_rows]
        half = _band_pass(_unit_grey(pictures, high - low), halved=True)
        least = np.maximum(MIN_CONTRAST, MIN_STEPS * (high - low) / 255)
        a, b = position[: len(position) // 2], position[len(position) // 2 :]
        orientation, aligned = _find_orientations(half, signed, a, b)
        result.orientation[part] = orientation
        for begin in range(0, len(aligned), FITTED_PAIRS):
            pairs = aligned[begin : begin + FITTED_PAIRS]
            used, at = np.unique(np.concatenate([a[pairs], b[pairs]]), return_inverse=True)
            unit = _unit_grey(pictures[used], (high - low)[used])
            sides = at[: len(pairs)], at[len(pairs) :]
            block = _compare_aligned(unit, least[used], *sides, orientation[pairs])
            for name, values in block.items():
                getattr(result, name)[first + pairs] = values
    return result


@cache
def _filters(edge: int, halved: bool) -> tuple[Floats32, Floats32]:
    """Make the matrices, along one axis, that blur a picture finely, and finely and coarsely."""
    fine, coarse = (
        gaussian_filter1d(np.eye(edge), deviation, axis=0, mode="nearest")
        for deviation in (FINE, COARSE)
    )
    both = coarse @ fine
    if halved:
        fine, both = ((matrix[::2] + matrix[1::2]) / 2 for matrix in (fine, both))
    return np.asarray(fine, np.float32), np.asarray(both, np.float32)


def _unit_grey(thumbnails: NDArray[np.uint8], contrast: Floats32) -> Floats32:
    """Convert thumbnails, shape (n, edge, edge), to unit grey, less the lowest value of each.

    Args:
        thumbnails: shape (n, edge, edge).
        contrast: unit grey of byte 255 less that of byte 0, shape (n,).
    """
    unit = thumbnails.astype(np.float32)
    unit *= (contrast / 255).astype(np.float32)[:, None, None]
    return unit


def _band_pass(unit: Floats32, halved: bool = False) -> Floats32:
    """Remove grain and coarse shading from pictures, shape (n, edge, edge).

    The filters are products of matrices, which take a tenth of the time of filters by neighbours.

    Args:
        unit: shape (n, edge, edge).
        halved: whether to average 2 x 2 pixels of the result.
    """
    fine, both = _filters(unit.shape[-1], halved)
    return np.asarray(fine @ unit @ fine.T - both @ unit @ both.T)


def _grain(unit: Floats32) -> Floats32:
    """Keep what the band-pass removes as grain, shape (n, edge, edge)."""
    fine, _ = _filters(unit.shape[-1], False)
    return np.asarray(unit - fine @ unit @ fine.T)


@cache
def _shares_of_white_noise(edge: int) -> tuple[float, float]:
    """Return which shares of the variance of white noise the band-pass and the grain have."""
    dot = np.zeros((1, edge, edge), np.float32)
    dot[0, edge // 2, edge // 2] = 1
    return float((_band_pass(dot) ** 2).sum()), float((_grain(dot) ** 2).sum())


def _find_orientations(
    half: Floats32, of_chips: Signatures, left: Indices, right: Indices
) -> tuple[NDArray[np.int8], Indices]:
    """Find the orientation of each pair by phase correlation at half the resolution.

    Args:
        half: band-passed thumbnails at half the resolution, shape (n, edge / 2, edge / 2).
        of_chips: their signatures, shape (n, ``WIDTH``).
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).

    Returns:
        The orientation in which right matches left, shape (pairs,); the pairs with a clear peak.
    """
    spectra = _whitened_spectra(half)
    energy = np.sqrt(_energies(spectra))
    agreed = orientations_that_agree(of_chips[left], of_chips[right])
    highest = np.zeros(len(left), np.float32)
    orientation = np.zeros(len(left), np.int8)
    for number in ORIENTATIONS:
        pairs = np.flatnonzero(agreed[:, number])
        if not len(pairs):
            continue
        used, position = np.unique(right[pairs], return_inverse=True)
        oriented = spectra[used] if number == 0 else _whitened_spectra(orient(half[used], number))
        peak, _ = _correlation_peaks(spectra[left[pairs]], oriented[position], half.shape[-1])
        peak *= half[0].size / np.maximum(energy[left[pairs]] * energy[right[pairs]], 1e-30)
        better = peak > highest[pairs]
        highest[pairs[better]], orientation[pairs[better]] = peak[better], number
    return orientation, np.flatnonzero(highest >= LEAST_PEAK)


def _compare_aligned(
    unit: Floats32,
    least: Floats32,
    left: Indices,
    right: Indices,
    orientation: NDArray[np.int8],
) -> dict[str, NDArray[Any]]:
    """Compare pairs of thumbnails in a known orientation.

    Args:
        unit: thumbnails in unit grey, shape (n, edge, edge).
        least: least contrast of each thumbnail that can be compared, shape (n,).
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).
        orientation: orientation in which right matches left, shape (pairs,).

    Returns:
        ``similarity``, ``shift`` and ``iou`` as in ``PixelSimilarity``.
    """
    edge = unit.shape[-1]
    filtered = _band_pass(unit)
    view = _oriented(filtered[right], orientation)
    _, shift = _correlation_peaks(_whitened_spectra(filtered[left]), _whitened_spectra(view), edge)
    near = np.abs(shift).max(axis=1, initial=0) <= MAX_SHIFT * edge
    similarity = np.zeros(len(left))
    if near.any():
        fit = _fit(filtered[left[near]], view[near], shift[near])
        visible = (fit.left_contrast >= least[left[near]]) & (
            fit.right_contrast >= least[right[near]]
        )
        similarity[near] = np.where(visible, fit.correlation, 0)
    noisy = np.flatnonzero((similarity >= NOISY_VIEW) & (similarity < SAME_VIEW))
    if len(noisy):
        similarity[noisy] = _similarity_without_noise(
            unit[left[noisy]], _oriented(unit[right[noisy]], orientation[noisy]), shift[noisy]
        )
    # the true shift may be half a pixel less than the whole number
    common = np.prod(edge - np.maximum(np.abs(shift) - 0.5, 0), axis=1)
    iou = np.where(near, common / (2 * edge * edge - common), 0)
    return {"similarity": similarity, "shift": shift.astype(np.int16), "iou": iou}


def _oriented(pictures: Floats32, orientation: NDArray[np.int8]) -> Floats32:
    """Turn each picture, shape (n, edge, edge), into its orientation, shape (n,)."""
    view = np.empty_like(pictures)
    for number in ORIENTATIONS:
        chosen = orientation == number
        view[chosen] = orient(pictures[chosen], number)
    return view


def _similarity_without_noise(left: Floats32, right: Floats32, shift: Indices) -> Floats:
    """Compute the similarity of pictures in unit grey without the white noise of one of them.

    The picture with the noise is the one that is fitted: a fit with it would smooth it. It is not
    known which one that is, so both are tried, and the higher similarity counts.

    Args:
        left: pictures, shape (n, edge, edge).
        right: pictures in the orientation of left, shape (n, edge, edge).
        shift: pixels (down, right) from left to right, shape (n, 2).

    Returns:
        Correlation of the band-passed picture with its fit, shape (n,), where white noise of at
        most ``MOST_NOISE`` is not counted as a difference.
    """
    in_band, in_grain = _shares_of_white_noise(left.shape[-1])
    similarity = np.zeros(len(left))
    for fitted, by, moved in ((left, right, shift), (right, left, -shift)):
        fit = _fit(_band_pass(fitted), _band_pass(by), moved)
        moments = _moments(_grain(fitted), _grain(by), moved)
        weights = np.concatenate([np.ones((len(left), 1)), -fit.weights], axis=1)
        noise = np.einsum("ni,nij,nj->n", weights, moments, weights) / in_grain
        noise = np.minimum(noise, MOST_NOISE**2) * in_band
        variance = np.maximum(fit.left_contrast**2, 1e-30)
        different = (1 - fit.correlation**2) - noise / variance
        without = np.where(fit.correlation > 0, np.sqrt(1 - np.clip(different, 0, 1)), 0)
        similarity = np.maximum(similarity, without)
    return np.round(similarity, 6)


def _energies(spectra: NDArray[np.complex64]) -> Floats32:
    """Sum the squares of whole spectra, of which ``rfft2`` gives one half."""
    squares = np.abs(spectra) ** 2
    whole = 2 * squares.sum(axis=(1, 2))
    return np.asarray(whole - squares[:, :, [0, -1]].sum(axis=(1, 2)), dtype=np.float32)


def _whitened_spectra(pictures: NDArray[Any]) -> NDArray[np.complex64]:
    """Compute the spectra of windowed pictures, with about the same weight at every frequency."""
    edge = pictures.shape[-1]
    window = np.hanning(edge + 2)[1:-1].astype(np.float32)
    spectra = fft.rfft2(pictures * np.outer(window, window))
    size = np.abs(spectra)
    floor = 0.03 * size.mean(axis=(1, 2), keepdims=True) + 1e-12
    return np.asarray(spectra / np.sqrt(size * np.maximum(size, floor) + 1e-30), dtype=np.complex64)


def _correlation_peaks(
    left: NDArray[np.complex64], right: NDArray[np.complex64], edge: int
) -> tuple[Floats32, Indices]:
    """Find the height, shape (n,), and the shift, shape (n, 2), of the highest correlation."""
    surface = fft.irfft2(left * right.conj(), s=(edge, edge)).reshape(len(left), -1)
    peak = surface.argmax(axis=1) if len(left) else np.empty(0, np.int64)
    shift = np.stack([peak // edge, peak % edge], axis=1)
    return surface[np.arange(len(left)), peak], (shift + edge // 2) % edge - edge // 2


@dataclass(frozen=True)
class _Fits:
    """Fits of left pictures by right ones.

    Attributes:
        correlation: of left with its fit, shape (n,).
        weights: of the right pixels, shape (n, 5).
        left_contrast: standard deviation of left over the ground that both show, shape (n,).
        right_contrast: the same of right, shape (n,).
    """

    correlation: Floats
    weights: Floats
    left_contrast: Floats
    right_contrast: Floats


def _fit(left: Floats32, right: Floats32, shift: Indices) -> _Fits:
    """Fit left by right where they overlap, by least squares.

    With l the left pixels and R the right ones (five neighbours, means removed), the weights are
    w = (R'R + ridge)^-1 R'l, and the squared correlation of l with its fit is w'R'l / l'l.

    Args:
        left: pictures, shape (n, edge, edge).
        right: pictures in the orientation of left, shape (n, edge, edge).
        shift: pixels (down, right) from left to right, shape (n, 2).
    """
    moments = _moments(left, right, shift)
    variance, across, inner = moments[:, 0, 0], moments[:, 1:, 0], moments[:, 1:, 1:]
    scale = np.trace(inner, axis1=1, axis2=2) / inner.shape[-1]
    ridge = (1e-5 * scale + 1e-30)[:, None, None] * np.eye(inner.shape[-1])
    weights = np.linalg.solve(inner + ridge, across[:, :, None])[:, :, 0]
    explained = np.einsum("ni,ni->n", weights, across)
    gain = weights.sum(axis=1)
    share = np.clip(explained / np.maximum(variance, 1e-30), 0, 1)
    share[(gain < GAINS[0]) | (gain > GAINS[1])] = 0
    left_contrast, right_contrast = (
        np.sqrt(np.maximum(value, 0)) for value in (variance, inner[:, 0, 0])
    )
    return _Fits(np.round(np.sqrt(share), 6), weights, left_contrast, right_contrast)


def _moments(left: Floats32, right: Floats32, shift: Indices) -> Floats:
    """Compute the covariances of the left pixel and five right ones, shape (n, 6, 6).

    Args: as in ``_fit``. Pixels of the ground that both pictures show are used, less a rim.
    """
    edge = left.shape[-1]
    pixels = np.arange(-1, edge + 1)
    rows = np.clip(pixels - shift[:, :1], 0, edge - 1)
    cols = np.clip(pixels - shift[:, 1:], 0, edge - 1)
    moved = right[np.arange(len(right))[:, None, None], rows[:, :, None], cols[:, None, :]]
    inside = [
        (pixels[1:-1] >= np.maximum(by, 0) + RIM) & (pixels[1:-1] < edge + np.minimum(by, 0) - RIM)
        for by in (shift[:, :1], shift[:, 1:])
    ]
    weight = (inside[0][:, :, None] & inside[1][:, None, :]).astype(np.float32)
    views = [
        left,
        moved[:, 1:-1, 1:-1],
        moved[:, 2:, 1:-1],
        moved[:, :-2, 1:-1],
        moved[:, 1:-1, 2:],
        moved[:, 1:-1, :-2],
        np.ones_like(left),
    ]
    table = (np.stack(views, axis=1) * weight[:, None]).reshape(len(left), len(views), -1)
    sums = (table @ table.transpose(0, 2, 1)).astype(np.float64)
    counts = sums[:, -1, -1]
    means = sums[:, :-1, -1] / counts[:, None]
    products = sums[:, :-1, :-1] / counts[:, None, None]
    return np.asarray(products - means[:, :, None] * means[:, None, :])


STAGE = Stage(
    name="alike",
    version=VERSION,
    kind="alike",
    inputs=("chips", "descriptors", "pool", "buckets"),
    software=("numpy", "scipy"),
    plan=plan,
    work=work,
    seal=seal,
    section="curate",
    fields=("pixel_duplicates",),
    follows=True,
)
