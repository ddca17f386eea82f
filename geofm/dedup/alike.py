"""Stage ``alike``: pairs of candidates that show the same view, by their thumbnails.

Candidate pairs come from hashes and from the neighbours of the embedding (``alike.py``); a part is
a range of them, each decided by an exact comparison of the two thumbnails.
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
from data_catalog.stage import Job, Part, Sealed, Stage, prepared
from data_catalog.tables import read_table, write_table
from geofm.dedup.describe import load_described, load_descriptors
from geofm.dedup.exact_pairs import Edges
from geofm.dedup.perceptual_hash import Hashes, hamming, turn, variants
from geofm.embeddings.neighbours import neighbours
from geofm.embeddings.store import load_vectors
from geofm.embeddings.vectors import Space, make_space
from geofm.runtime.parts import file_digests
from geofm.types import Floats32, Indices

# How alike two thumbnails are once one is turned, shifted, and brought to the other's brightness.
# A pair is aligned by phase correlation (Kuglin & Hines 1975) in each of the 8 orientations. Then
# left is fitted by right over the ground they share, by least squares: five neighbouring
# pixels and a
# constant, which absorb gain, haze, what is left of the shift and the blur of resampling. The
# similarity is the correlation of left with its fit. Thumbnails are band-passed before: without
# their fine grain, which aliases between odd shifts, and without the coarse shading, in which all
# water and all haze are alike.


#: Standard deviations of the band-pass, in thumbnail pixels.
FINE, COARSE = 1.0, 3.0
#: Rim of the shared ground that is left out: filters see beyond it.
RIM = 3
#: Contrast (standard deviation of band-passed unit grey) below which nothing can be told: at all,
#: and as a share of what one step of a thumbnail's bytes stands for.
MIN_CONTRAST, MIN_STEPS = 3e-5, 0.25
#: Largest shift in thumbnail pixels that is considered, by the edge; pairs compared at once.
MAX_SHIFT, PAIRS = 0.3, 512
#: Gains beyond which one picture is no rendering of the other.
GAINS = (0.2, 5.0)


@dataclass(frozen=True)
class Likeness:
    """What is found per pair.

    Attributes:
        similarity: 0..1; 0 where nothing can be told.
        orientation: in which right matches left, see ``hashing.turn``.
        shift: [n, 2] thumbnail pixels (down, right) by which right then lies off left.
        iou: the ground they share, intersection over union.
    """

    similarity: NDArray[np.float64]
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]
    iou: NDArray[np.float64]


def band_pass(thumbnails: NDArray[np.uint8], low: Floats32, high: Floats32) -> Floats32:
    """Unit grey of thumbnails [n, edge, edge] without fine grain and coarse shading."""
    unit = thumbnails.astype(np.float32)
    unit *= ((high - low) / 255).astype(np.float32)[:, None, None]
    smooth = gaussian_filter(unit, (0, FINE, FINE), mode="nearest")
    return np.asarray(smooth - gaussian_filter(smooth, (0, COARSE, COARSE), mode="nearest"))


def compare(
    thumbnails: NDArray[np.uint8], low: Floats32, high: Floats32, left: Indices, right: Indices
) -> Likeness:
    """Compare pairs of rows.

    Args:
        thumbnails: uint8 [n, edge, edge] (may be a memory map).
        low: unit grey of byte 0, one per thumbnail.
        high: unit grey of byte 255.
        left: rows; pairs that come sorted by it are read once.
        right: rows.
    """
    found = Likeness(
        np.zeros(len(left)), np.zeros(len(left), np.int8), np.zeros((len(left), 2), np.int16),
        np.zeros(len(left)),
    )  # fmt: skip
    for first in range(0, len(left), PAIRS):
        part = slice(first, first + PAIRS)
        rows, of = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        passed = band_pass(thumbnails[rows], low[rows], high[rows])
        count = len(left[part])
        least = np.maximum(MIN_CONTRAST, MIN_STEPS * (high[rows] - low[rows]) / 255)
        one = _compare(passed, least, of[:count], of[count:])
        found.similarity[part], found.orientation[part] = one.similarity, one.orientation
        found.shift[part], found.iou[part] = one.shift, one.iou
    return found


def _compare(passed: Floats32, least: Floats32, left: Indices, right: Indices) -> Likeness:
    """Compare pairs of band-passed thumbnails, whose contrasts are to be ``least`` or more."""
    half = passed.reshape(len(passed), passed.shape[1] // 2, 2, -1, 2).mean(axis=(2, 4))
    spectra = _spectra(half)
    best = np.full(len(left), -np.inf)
    orientation = np.zeros(len(left), np.int8)
    for which in range(8):
        turned = spectra if which == 0 else _spectra(turn(half, which))
        peak, _ = _peaks(spectra[left], turned[right], half.shape[-1])
        better = peak > best
        best[better], orientation[better] = peak[better], which
    view = np.empty((len(right), *passed.shape[1:]), np.float32)
    for which in range(8):
        mine = orientation == which
        view[mine] = turn(passed[right[mine]], which)
    _, shift = _peaks(_spectra(passed)[left], _spectra(view), passed.shape[-1])
    edge = passed.shape[-1]
    near = np.abs(shift).max(axis=1, initial=0) <= MAX_SHIFT * edge
    similarity = np.zeros(len(left))
    if near.any():
        share, own, other = _fit(passed[left[near]], view[near], shift[near])
        seen = (own >= least[left[near]]) & (other >= least[right[near]])
        similarity[near] = np.where(seen, share, 0)
    # the true shift may be half a pixel less than the whole one
    common = np.prod(edge - np.maximum(np.abs(shift) - 0.5, 0), axis=1)
    iou = np.where(near, common / (2 * edge * edge - common), 0)
    return Likeness(similarity, orientation, shift.astype(np.int16), iou)


def _spectra(pictures: NDArray[Any]) -> NDArray[np.complex64]:
    """Spectra of windowed pictures, every frequency of the same weight."""
    edge = pictures.shape[-1]
    window = np.hanning(edge + 2)[1:-1].astype(np.float32)
    spectra = fft.rfft2(pictures * np.outer(window, window))
    size = np.abs(spectra)
    floor = 0.03 * size.mean(axis=(1, 2), keepdims=True) + 1e-12
    return np.asarray(spectra / np.sqrt(size * np.maximum(size, floor) + 1e-30), dtype=np.complex64)


def _peaks(
    left: NDArray[np.complex64], right: NDArray[np.complex64], edge: int
) -> tuple[Floats32, Indices]:
    """Height and place [n, 2] of the highest correlation: by how much right lies off left."""
    surface = fft.irfft2(left * right.conj(), s=(edge, edge)).reshape(len(left), -1)
    at = surface.argmax(axis=1) if len(left) else np.empty(0, np.int64)
    shift = np.stack([at // edge, at % edge], axis=1)
    return surface[np.arange(len(left)), at], (shift + edge // 2) % edge - edge // 2


def _fit(
    left: Floats32, right: Floats32, shift: Indices
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Correlation of left with its best fit by right, and the contrast of each, where they meet."""
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
    views = [left, moved[:, 1:-1, 1:-1], moved[:, 2:, 1:-1], moved[:, :-2, 1:-1],
             moved[:, 1:-1, 2:], moved[:, 1:-1, :-2], np.ones_like(left)]  # fmt: skip
    table = (np.stack(views, axis=1) * weight[:, None]).reshape(len(left), len(views), -1)
    sums = (table @ table.transpose(0, 2, 1)).astype(np.float64)
    counts = sums[:, -1, -1]
    means = sums[:, :-1, -1] / counts[:, None]
    moments = sums[:, :-1, :-1] / counts[:, None, None] - means[:, :, None] * means[:, None, :]
    own, across, inner = moments[:, 0, 0], moments[:, 1:, 0], moments[:, 1:, 1:]
    size = np.trace(inner, axis1=1, axis2=2) / inner.shape[-1]
    ridge = (1e-5 * size + 1e-30)[:, None, None] * np.eye(inner.shape[-1])
    taps = np.linalg.solve(inner + ridge, across[:, :, None])[:, :, 0]
    explained = np.einsum("ni,ni->n", taps, across)
    gain = taps.sum(axis=1)
    share = np.clip(explained / np.maximum(own, 1e-30), 0, 1)
    share[(gain < GAINS[0]) | (gain > GAINS[1])] = 0
    contrasts = [np.sqrt(np.maximum(size, 0)) for size in (own, inner[:, 0, 0])]
    return np.round(np.sqrt(share), 6), contrasts[0], contrasts[1]


# Near duplicates by what chips look like: candidates from hashes and embeddings, then a check.
# A hash finds copies of the same view (haze, gain, half a pixel, turned, mirrored); an embedding's
# nearest neighbours also find views that overlap. Neither decides: every candidate pair is aligned
# and compared by its thumbnails (``likeness``). Where chips lie plays no part.
# Multi-index hashing (Norouzi et al. 2012): two hashes that differ in fewer bits than there are
# slices agree in at least one slice, so only chips that share a slice are compared. Slices are as
# long as the pool needs for a bucket to stay small, which keeps the work near linear.

#: Similarity from which two views are one (chosen on scenes other than those of the benchmark).
SAME_VIEW = 0.98
#: Least shared ground (intersection over union), and bits in which hashes of a pair may differ.
LEAST_IOU, BITS = 0.58, 12
#: Neighbours by embedding that each chip is compared with.
NEIGHBOURS = 32
#: Most chips of one slice that are all compared with each other; of more, neighbours in the order
#: of their hashes are.
BUCKET = 64
#: Hashes whose slices are looked up at once.
QUERIES = 1 << 16
KINDS = ("same view", "turned", "overlap")


@dataclass(frozen=True)
class Alike:
    """Pairs of rows ``left < right`` that show the same, sorted by (left, right).

    ``similarity`` 0..1, ``kind`` an index into ``KINDS``, ``orientation`` and ``shift`` [n, 2]
    (thumbnail pixels) of right to left, ``compared`` the number of candidate pairs.
    """

    left: Indices
    right: Indices
    similarity: NDArray[np.float64]
    kind: NDArray[np.int8]
    orientation: NDArray[np.int8]
    shift: NDArray[np.int16]
    compared: int

    def __len__(self) -> int:
        return len(self.left)

    def edges(self) -> Edges:
        """As the edges of the leader rule."""
        return Edges(self.left, self.right, self.similarity)


def find_alike(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    near: tuple[Indices, Indices] | None = None,
    *,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
    bits: int = BITS,
) -> Alike:
    """Every candidate pair that shows the same view, turned or shifted or not.

    Args:
        descriptors: columns hash, thumbnail_low, thumbnail_high; constant chips among them match
            nothing.
        thumbnails: uint8 [n, 64, 64], row by row (may be a memory map).
        near: candidate pairs besides those of the hashes, e.g. ``near_by_embedding``.
        threshold: least similarity.
        least_iou: least share of common ground.
        bits: most bits in which hashes of candidates differ.
    """
    left, right = propose(descriptors, near, bits)
    return decide_alike(
        descriptors, thumbnails, left, right, threshold=threshold, least_iou=least_iou
    )


def propose(
    descriptors: pd.DataFrame, near: tuple[Indices, Indices] | None = None, bits: int = BITS
) -> tuple[Indices, Indices]:
    """Candidate pairs (lower row, higher row), sorted; arguments as ``find_alike``."""
    left, right = near_by_hash(descriptors["hash"].to_numpy(np.uint64), bits)
    if near is not None:
        left, right = np.concatenate([left, near[0]]), np.concatenate([right, near[1]])
    return _unique(left, right, len(descriptors))


def decide_alike(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    left: Indices,
    right: Indices,
    *,
    threshold: float = SAME_VIEW,
    least_iou: float = LEAST_IOU,
) -> Alike:
    """Which of some candidate pairs show the same view; arguments as ``find_alike``."""
    low, high = (descriptors[f"thumbnail_{end}"].to_numpy(np.float32) for end in ("low", "high"))
    found: list[list[NDArray[Any]]] = []
    step = 1 << 14
    for first in range(0, max(len(left), 1), step):
        mine, other = left[first : first + step], right[first : first + step]
        like = compare(thumbnails, low, high, mine, other)
        same = (like.similarity >= threshold) & (like.iou >= least_iou)
        moved = np.abs(like.shift).max(axis=1) > 1
        kind = np.where(moved, 2, np.where(like.orientation > 0, 1, 0)).astype(np.int8)
        columns = (mine, other, like.similarity, kind, like.orientation, like.shift)
        found.append([column[same] for column in columns])
        tick("alike", min(first + step, len(left)), len(left))
    joined = [np.concatenate(column) for column in zip(*found, strict=True)]
    return Alike(
        joined[0], joined[1], joined[2], joined[3], joined[4], joined[5], compared=len(left)
    )


def near_by_hash(hashes: Hashes, bits: int = BITS) -> tuple[Indices, Indices]:
    """Pairs of rows whose hashes differ in at most ``bits`` bits in some orientation.

    All pairs that differ in fewer bits than there are slices, most of the others. Rows with hash
    0 (no contrast) are in no pair.
    """
    return _unique(*hash_matches(hashes, hashes, bits, itself=True), len(hashes))


def hash_matches(
    base: Hashes, queries: Hashes, bits: int = BITS, *, itself: bool = False
) -> tuple[Indices, Indices]:
    """The same between two lists: (row of ``base``, row of ``queries``), once each.

    With ``itself`` the two are one list, and pairs are (higher row, lower row).
    """
    rows, asking = (np.flatnonzero(some != 0).astype(np.int64) for some in (base, queries))
    some, asked = base[rows], queries[asking]
    length = slice_bits(len(rows))
    codes: list[Indices] = []
    for begin in range(0, 64 - length + 1, length):
        for query, given in _share_slice(some, asked, begin, length):
            keep = query < given if itself else np.ones(len(query), np.bool_)
            codes.append(_close(some, asked, given[keep], query[keep], bits))
    pairs = np.unique(np.concatenate(codes)) if codes else rows[:0]
    return rows[pairs // max(len(asked), 1)], asking[pairs % max(len(asked), 1)]


def slice_bits(count: int) -> int:
    """Length of a slice: a bucket holds about one hash; at least 8 bits, at most 21."""
    return int(np.clip(np.ceil(np.log2(max(count, 2))), 8, 21))


def _share_slice(
    base: Hashes, queries: Hashes, begin: int, length: int
) -> Iterator[tuple[Indices, Indices]]:
    """Pairs that agree in a slice: (query, in some orientation; row of base)."""
    shift, mask = np.uint64(begin), np.uint64((1 << length) - 1)
    keys = (base >> shift) & mask
    order = np.lexsort((base, keys)).astype(np.int64)
    sorted_keys, ordered = keys[order], base[order]
    for first in range(0, len(queries), QUERIES):
        views = variants(queries[first : first + QUERIES])
        slices = (views >> shift) & mask
        for which in range(8):
            wanted = slices[:, which]
            start = np.searchsorted(sorted_keys, wanted, "left")
            end = np.searchsorted(sorted_keys, wanted, "right")
            crowded = end - start > BUCKET
            if crowded.any():
                start[crowded], end[crowded] = _window(
                    ordered, views[crowded, which], start[crowded], end[crowded]
                )
            sizes = end - start
            query = first + np.repeat(np.arange(len(wanted)), sizes)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield query, order[np.repeat(start, sizes) + offsets]


def _window(
    ordered: Hashes, views: Hashes, start: Indices, end: Indices
) -> tuple[Indices, Indices]:
    """Of large buckets, the ``BUCKET`` rows whose hashes are nearest in order."""
    # within a bucket the hashes are sorted: a bisection of all buckets at once
    low, high = start.copy(), end.copy()
    while np.any(low < high):
        middle = (low + high) // 2
        less = (low < high) & (ordered[np.minimum(middle, len(ordered) - 1)] < views)
        low, high = np.where(less, middle + 1, low), np.where(less, high, np.minimum(middle, high))
        high = np.maximum(high, low)
    begin = np.clip(low - BUCKET // 2, start, end - BUCKET)
    return begin, begin + BUCKET


def _close(base: Hashes, queries: Hashes, given: Indices, query: Indices, bits: int) -> Indices:
    """Codes given·queries + query of the pairs that are near in one of the orientations."""
    found = [given[:0]]
    for first in range(0, len(query), QUERIES):
        a, b = query[first : first + QUERIES], given[first : first + QUERIES]
        unique, of = np.unique(a, return_inverse=True)
        distance = hamming(variants(queries[unique])[of], base[b][:, None]).min(axis=1)
        near = distance <= bits
        found.append(b[near] * len(queries) + a[near])
    return np.unique(np.concatenate(found))


def near_by_embedding(space: Space, count: int = 16, least: float = 0.3) -> tuple[Indices, Indices]:
    """Pairs of rows at least so similar of which one is among the other's ``count`` nearest."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for rows, near, similarity in neighbours(space, np.arange(len(space)), count):
        here = (near >= 0) & (similarity >= least)
        left = np.broadcast_to(rows[:, None], near.shape)[here]
        found.append(_unique(left, near[here], len(space)))
    left, right = (np.concatenate(side) for side in zip(*found, strict=True))
    return _unique(left, right, len(space))


def _unique(left: Indices, right: Indices, rows: int) -> tuple[Indices, Indices]:
    """Pairs once, left below right, sorted."""
    low, high = np.minimum(left, right), np.maximum(left, right)
    codes = np.unique((low * rows + high)[low < high])
    return codes // max(rows, 1), codes % max(rows, 1)


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
