"""Stage ``alike``: pixel duplicates, which are pairs of chips that show the same view.

plan    propose candidate pairs, once for all parts: near hashes (``near_by_hash``) and near
        embeddings (``near_by_embedding``); a part is a range of candidates
work    compare the thumbnails of each candidate pair            (``compare_thumbnails``)
seal    join the pairs of all parts

A hash finds copies of the same view (haze, gain, half a pixel, turned, mirrored). The nearest
neighbours of an embedding also find views that overlap. Neither decides: each candidate pair is
aligned and compared by its thumbnails. The location of the chips plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from data_catalog.hashing import digest_of
from data_catalog.progress import tick
from data_catalog.stage import Job, Part, Sealed, Stage, prepare_part
from data_catalog.tables import read_table, write_table
from geofm.dedup.describe import load_described, load_descriptors
from geofm.dedup.perceptual_hash import (
    ORIENTATIONS,
    PixelHashes,
    hamming_distance,
    hash_orientations,
    orient,
)
from geofm.embeddings.neighbours import nearest_neighbours
from geofm.embeddings.store import load_vectors
from geofm.embeddings.vectors import EmbeddingSpace, make_space
from geofm.runtime.parts import file_digests
from geofm.types import Floats, Floats32, Indices

VERSION = "1"
#: Candidate pairs of one part, and pairs whose thumbnails are held in memory at once.
PART_PAIRS, HELD_PAIRS = 500_000, 1 << 14
#: Similarity from which two views are the same (chosen on scenes other than the benchmark's).
SAME_VIEW = 0.98
#: Least ground that two views share, as intersection over union.
LEAST_IOU = 0.58
#: Bits in which the hashes of a candidate pair may differ.
BITS = 12
#: Nearest neighbours by embedding that are candidates, and the least similarity of each.
NEIGHBOURS, NEIGHBOUR_SIMILARITY = 32, 0.3
#: Kinds of pixel duplicates, by number.
KINDS = ("same view", "turned", "overlap")
#: Columns of ``alike.parquet``.
COLUMNS = ("left", "right", "similarity", "kind", "orientation", "down_px", "right_px")

Pairs = tuple[Indices, Indices]


# plan


def plan(job: Job) -> list[Part]:
    """Divide the candidate pairs into ranges."""
    if not _candidate_ids(job):
        return []
    key = _proposal_key(job)
    pairs = np.load(prepare_part(job, key, lambda out: _propose(job, out)) / "candidates.npy")
    starts = range(0, len(pairs), PART_PAIRS)
    return [job.part({"key": key, "first": first}, [key, first, PART_PAIRS]) for first in starts]


def _candidate_ids(job: Job) -> list[str]:
    """Return the candidates of the pool; none if pixel duplicates are switched off."""
    if not job.settings.pixel_duplicates:
        return []
    pool = job.inputs["pool"].table("pool.parquet", ["chip_id", "rule"])
    return [str(chip_id) for chip_id in pool.loc[pool["rule"] == "", "chip_id"]]


def _proposal_key(job: Job) -> str:
    """Compute the key of the part with the candidate pairs."""
    descriptors, embeddings = (
        file_digests(job.inputs[role]) for role in ("descriptors", "embeddings")
    )
    pool = file_digests(job.inputs["pool"])["pool.parquet"]
    covers = [descriptors, embeddings["embeddings.npy"], pool, job.settings.pixel_duplicates]
    return digest_of({"candidate pairs": VERSION, "covers": covers})


def _propose(job: Job, folder: Path) -> None:
    """Write ``candidates.npy``: pairs of positions in ``_candidate_ids``, shape (pairs, 2)."""
    ids = _candidate_ids(job)
    space = make_space(load_vectors(job.inputs["embeddings"], ids))
    descriptors = load_described(job.inputs["descriptors"], ids)
    left, right = propose_pairs(descriptors, near_by_embedding(space, NEIGHBOURS))
    np.save(folder / "candidates.npy", np.stack([left, right], axis=1))


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Compare a range of candidate pairs; write the duplicates to ``alike.parquet``."""
    proposals = prepare_part(job, part.payload["key"], lambda out: _propose(job, out))
    first = part.payload["first"]
    candidates = np.load(proposals / "candidates.npy", mmap_mode="r")
    pairs = np.asarray(candidates[first : first + PART_PAIRS])
    ids = _candidate_ids(job)
    rows, position = np.unique(pairs, return_inverse=True)
    part_ids = [ids[row] for row in rows]
    descriptors, thumbnails = load_descriptors(job.inputs["descriptors"], part_ids)
    position = position.reshape(pairs.shape)
    duplicates = find_pixel_duplicates(descriptors, thumbnails, position[:, 0], position[:, 1])
    table = pd.DataFrame(
        {
            "left": [part_ids[row] for row in duplicates.left],
            "right": [part_ids[row] for row in duplicates.right],
            "similarity": duplicates.similarity,
            "kind": [KINDS[kind] for kind in duplicates.kind],
            "orientation": duplicates.orientation.astype(np.int64),
            "down_px": duplicates.shift[:, 0].astype(np.int64),
            "right_px": duplicates.shift[:, 1].astype(np.int64),
        }
    )
    write_table(table, folder / "alike.parquet")


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``alike.parquet``: chip ids (left below right), similarity, kind and alignment."""
    tables = [read_table(part / "alike.parquet") for part in folders]
    if tables:
        table = pd.concat(tables)
    else:
        table = pd.DataFrame(columns=COLUMNS).astype({"similarity": np.float64})
    table = table.sort_values(["left", "right"], ignore_index=True)
    write_table(table, folder / "alike.parquet")
    compared = len(_candidate_ids(job))
    return Sealed(
        counts={"rows_in": compared, "rows_out": compared, "pairs": len(table)},
        facts={
            "threshold": SAME_VIEW,
            "similarity": "correlation of band-passed thumbnails, aligned",
            "kinds": {kind: int((table["kind"] == kind).sum()) for kind in KINDS},
        },
    )


# Candidates by hash. Multi-index hashing (Norouzi et al. 2012): two hashes that differ in fewer
# bits than there are slices agree in at least one slice, so only chips that share a slice are
# compared. Slices are so long that a bucket stays small, which keeps the time near linear.

#: Largest number of chips of one slice that are all compared with each other. In a larger bucket a
#: chip is compared with its neighbours in the order of the hashes.
BUCKET = 64
#: Hashes whose slices are looked up at once.
QUERIES = 1 << 16
#: Shortest and longest slice in bits.
SLICE_BITS = (8, 21)


def propose_pairs(descriptors: pd.DataFrame, near: Pairs, bits: int = BITS) -> Pairs:
    """Propose candidate pairs by hash, and add given ones.

    Args:
        descriptors: column ``hash``, one row per chip.
        near: further pairs of rows, for example ``near_by_embedding``.
        bits: number of bits in which the hashes of a pair may differ.

    Returns:
        Lower and higher row of each pair, sorted, each of shape (pairs,).
    """
    by_hash = near_by_hash(descriptors["hash"].to_numpy(np.uint64), bits)
    left, right = (np.concatenate(side) for side in zip(by_hash, near, strict=True))
    return _unique_pairs(left, right, len(descriptors))


def near_by_hash(hashes: PixelHashes, bits: int = BITS) -> Pairs:
    """Find pairs of rows whose hashes differ in at most ``bits`` bits in some orientation.

    All pairs that differ in fewer bits than there are slices are found, and most of the others. A
    row with hash 0 (no contrast) is in no pair.
    """
    return _unique_pairs(*match_hashes(hashes, hashes, bits, same_list=True), len(hashes))


def match_hashes(
    base: PixelHashes, queries: PixelHashes, bits: int = BITS, *, same_list: bool = False
) -> Pairs:
    """Find the near pairs between two lists of hashes.

    Args:
        base: hashes, shape (n,).
        queries: hashes, shape (m,); those of all orientations are looked up.
        bits: number of bits in which the hashes of a pair may differ.
        same_list: whether both lists are the same; then each pair is (higher row, lower row).

    Returns:
        Row of ``base`` and row of ``queries``, each of shape (pairs,); each pair once.
    """
    base_rows, query_rows = (np.flatnonzero(part != 0).astype(np.int64) for part in (base, queries))
    base, queries = base[base_rows], queries[query_rows]
    length = slice_bits(len(base))
    codes: list[Indices] = []
    for begin in range(0, 64 - length + 1, length):
        for query, row in _pairs_with_slice(base, queries, begin, length):
            wanted = query < row if same_list else np.ones(len(query), np.bool_)
            codes.append(_near_codes(base, queries, row[wanted], query[wanted], bits))
    pairs = np.unique(np.concatenate(codes)) if codes else base_rows[:0]
    count = max(len(queries), 1)
    return base_rows[pairs // count], query_rows[pairs % count]


def slice_bits(count: int) -> int:
    """Choose the length of a slice, so that a bucket holds about one of ``count`` hashes."""
    return int(np.clip(np.ceil(np.log2(max(count, 2))), *SLICE_BITS))


def _pairs_with_slice(
    base: PixelHashes, queries: PixelHashes, begin: int, length: int
) -> Iterator[Pairs]:
    """Yield pairs (query, row of base) that agree in the slice ``begin``, in some orientation."""
    shift, mask = np.uint64(begin), np.uint64((1 << length) - 1)
    keys = (base >> shift) & mask
    order = np.lexsort((base, keys)).astype(np.int64)
    sorted_keys, sorted_hashes = keys[order], base[order]
    for first in range(0, len(queries), QUERIES):
        oriented = hash_orientations(queries[first : first + QUERIES])
        slices = (oriented >> shift) & mask
        for orientation in ORIENTATIONS:
            wanted = slices[:, orientation]
            start = np.searchsorted(sorted_keys, wanted, "left")
            end = np.searchsorted(sorted_keys, wanted, "right")
            crowded = end - start > BUCKET
            if crowded.any():
                start[crowded], end[crowded] = _nearest_in_bucket(
                    sorted_hashes, oriented[crowded, orientation], start[crowded], end[crowded]
                )
            sizes = end - start
            query = first + np.repeat(np.arange(len(wanted)), sizes)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield query, order[np.repeat(start, sizes) + offsets]


def _nearest_in_bucket(
    sorted_hashes: PixelHashes, hashes: PixelHashes, start: Indices, end: Indices
) -> Pairs:
    """Choose the ``BUCKET`` rows of each large bucket whose hashes are nearest in their order.

    Hashes are sorted within a bucket; the loop is a binary search in all buckets at once.
    """
    low, high = start.copy(), end.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        less = (low < high) & (sorted_hashes[np.minimum(middle, len(sorted_hashes) - 1)] < hashes)
        low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
        high = np.maximum(high, low)
    begin = np.clip(low - BUCKET // 2, start, end - BUCKET)
    return begin, begin + BUCKET


def _near_codes(
    base: PixelHashes, queries: PixelHashes, row: Indices, query: Indices, bits: int
) -> Indices:
    """Return the codes ``row * len(queries) + query`` of pairs near in one of the orientations."""
    codes = [row[:0]]
    for first in range(0, len(query), QUERIES):
        a, b = query[first : first + QUERIES], row[first : first + QUERIES]
        unique, position = np.unique(a, return_inverse=True)
        oriented = hash_orientations(queries[unique])[position]
        near = hamming_distance(oriented, base[b][:, None]).min(axis=1) <= bits
        codes.append(b[near] * len(queries) + a[near])
    return np.unique(np.concatenate(codes))


def near_by_embedding(
    space: EmbeddingSpace, count: int = 16, least: float = NEIGHBOUR_SIMILARITY
) -> Pairs:
    """Find pairs of rows that are at least this similar, each among the ``count`` nearest."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for rows, near, similarity in nearest_neighbours(space, np.arange(len(space)), count):
        used = (near >= 0) & (similarity >= least)
        left = np.broadcast_to(rows[:, None], near.shape)[used]
        parts.append(_unique_pairs(left, near[used], len(space)))
    left, right = (np.concatenate(side) for side in zip(*parts, strict=True))
    return _unique_pairs(left, right, len(space))


def _unique_pairs(left: Indices, right: Indices, rows: int) -> Pairs:
    """Sort pairs, each once and with the lower row left."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    codes = np.unique((low * rows + high)[low < high])
    return codes // max(rows, 1), codes % max(rows, 1)


# Comparison of two thumbnails. A pair is aligned by phase correlation (Kuglin and Hines 1975) in
# each of the 8 orientations. Over the ground that both show, the left thumbnail is then fitted by
# least squares with the right one: with five neighbouring pixels and a constant, which absorb gain,
# haze, the rest of the shift and the blur of resampling. The similarity is the correlation of the
# left thumbnail with its fit. Thumbnails are band-passed first, without their finest grain, which
# aliases between odd shifts, and without coarse shading, in which all water and all haze are alike.

#: Standard deviations of the band-pass in thumbnail pixels.
FINE, COARSE = 1.0, 3.0
#: Rim of the shared ground that is left out, because filters read beyond it.
RIM = 3
#: Least contrast of a comparable thumbnail (standard deviation of band-passed unit grey), as such
#: and as a share of one step of the thumbnail's bytes.
MIN_CONTRAST, MIN_STEPS = 3e-5, 0.25
#: Largest shift that is considered, as a share of the edge.
MAX_SHIFT = 0.3
#: Gains outside this range mean that one picture is no rendering of the other.
GAINS = (0.2, 5.0)
#: Pairs that are compared at once.
COMPARED_PAIRS = 512


@dataclass(frozen=True)
class PixelDuplicates:
    """Pairs of rows ``left < right`` that show the same view, sorted by (left, right).

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
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    left: Indices,
    right: Indices,
    *,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
) -> PixelDuplicates:
    """Keep the candidate pairs that show the same view.

    Args:
        descriptors: columns thumbnail_low and thumbnail_high, one row per chip.
        thumbnails: shape (n, 64, 64); may be mapped from a file.
        left: rows of the candidate pairs, shape (pairs,).
        right: rows, shape (pairs,).
        threshold: least similarity.
        least_iou: least share of common ground.
    """
    low, high = (descriptors[f"thumbnail_{end}"].to_numpy(np.float32) for end in ("low", "high"))
    parts: list[list[NDArray[Any]]] = []
    for first in range(0, max(len(left), 1), HELD_PAIRS):
        a, b = left[first : first + HELD_PAIRS], right[first : first + HELD_PAIRS]
        result = compare_thumbnails(thumbnails, low, high, a, b)
        same = (result.similarity >= threshold) & (result.iou >= least_iou)
        moved = np.abs(result.shift).max(axis=1) > 1
        kind = np.where(moved, 2, np.where(result.orientation > 0, 1, 0)).astype(np.int8)
        columns = (a, b, result.similarity, kind, result.orientation, result.shift)
        parts.append([column[same] for column in columns])
        tick("alike", min(first + HELD_PAIRS, len(left)), len(left))
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
    thumbnails: NDArray[np.uint8], low: Floats32, high: Floats32, left: Indices, right: Indices
) -> PixelSimilarity:
    """Compare pairs of thumbnails.

    Args:
        thumbnails: shape (n, edge, edge); may be mapped from a file.
        low: unit grey of byte 0 of each thumbnail, shape (n,).
        high: unit grey of byte 255, shape (n,).
        left: rows, shape (pairs,); pairs sorted by it are read once.
        right: rows, shape (pairs,).
    """
    result = PixelSimilarity(
        similarity=np.zeros(len(left)),
        orientation=np.zeros(len(left), np.int8),
        shift=np.zeros((len(left), 2), np.int16),
        iou=np.zeros(len(left)),
    )
    for first in range(0, len(left), COMPARED_PAIRS):
        part = slice(first, first + COMPARED_PAIRS)
        rows, position = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        filtered = band_pass(thumbnails[rows], low[rows], high[rows])
        least = np.maximum(MIN_CONTRAST, MIN_STEPS * (high[rows] - low[rows]) / 255)
        count = len(left[part])
        block = _compare_filtered(filtered, least, position[:count], position[count:])
        for name, values in vars(block).items():
            getattr(result, name)[part] = values
    return result


def band_pass(thumbnails: NDArray[np.uint8], low: Floats32, high: Floats32) -> Floats32:
    """Convert thumbnails, shape (n, edge, edge), to unit grey without grain and coarse shading."""
    unit = thumbnails.astype(np.float32)
    unit *= ((high - low) / 255).astype(np.float32)[:, None, None]
    smooth = gaussian_filter(unit, (0, FINE, FINE), mode="nearest")
    return np.asarray(smooth - gaussian_filter(smooth, (0, COARSE, COARSE), mode="nearest"))


def _compare_filtered(
    filtered: Floats32, least: Floats32, left: Indices, right: Indices
) -> PixelSimilarity:
    """Compare pairs of band-passed thumbnails.

    Args:
        filtered: shape (n, edge, edge).
        least: least contrast of each thumbnail that can be compared, shape (n,).
        left: rows, shape (pairs,).
        right: rows, shape (pairs,).
    """
    edge = filtered.shape[-1]
    # the orientation is found at half the resolution, the shift at the full one
    half = filtered.reshape(len(filtered), edge // 2, 2, -1, 2).mean(axis=(2, 4))
    spectra = _whitened_spectra(half)
    highest = np.full(len(left), -np.inf)
    orientation = np.zeros(len(left), np.int8)
    for number in ORIENTATIONS:
        oriented = spectra if number == 0 else _whitened_spectra(orient(half, number))
        peak, _ = _correlation_peaks(spectra[left], oriented[right], half.shape[-1])
        better = peak > highest
        highest[better], orientation[better] = peak[better], number
    view = np.empty((len(right), edge, edge), np.float32)
    for number in ORIENTATIONS:
        chosen = orientation == number
        view[chosen] = orient(filtered[right[chosen]], number)
    _, shift = _correlation_peaks(_whitened_spectra(filtered)[left], _whitened_spectra(view), edge)
    near = np.abs(shift).max(axis=1, initial=0) <= MAX_SHIFT * edge
    similarity = np.zeros(len(left))
    if near.any():
        correlation, left_contrast, right_contrast = _fit(
            filtered[left[near]], view[near], shift[near]
        )
        visible = (left_contrast >= least[left[near]]) & (right_contrast >= least[right[near]])
        similarity[near] = np.where(visible, correlation, 0)
    # the true shift may be half a pixel less than the whole number
    common = np.prod(edge - np.maximum(np.abs(shift) - 0.5, 0), axis=1)
    iou = np.where(near, common / (2 * edge * edge - common), 0)
    return PixelSimilarity(similarity, orientation, shift.astype(np.int16), iou)


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


def _fit(left: Floats32, right: Floats32, shift: Indices) -> tuple[Floats, Floats, Floats]:
    """Fit left by right where they overlap, by least squares.

    With l the left pixels and R the right ones (five neighbours, means removed), the weights are
    w = (R'R + ridge)^-1 R'l, and the squared correlation of l with its fit is w'R'l / l'l.

    Args:
        left: pictures, shape (n, edge, edge).
        right: pictures in the orientation of left, shape (n, edge, edge).
        shift: pixels (down, right) from left to right, shape (n, 2).

    Returns:
        The correlation, and the contrast of left and of right, each of shape (n,).
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
    moments = sums[:, :-1, :-1] / counts[:, None, None] - means[:, :, None] * means[:, None, :]
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
    return np.round(np.sqrt(share), 6), left_contrast, right_contrast


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
