"""Chips that show what an evaluation set shows: by place, by pixels, by embedding.

A chip goes for the first of three rules that it fails. *Footprint*: it lies within some metres of
an area of the set, whatever its date. *Pixels*: its thumbnail matches that of an image of the set
in one of 8 orientations, shifted or not (``likeness``); hashes and embeddings only propose which to
compare. *Embedding*: its cosine to an image, in one of 8 orientations, reaches a threshold of its
own. Sets without footprints are checked by the last two alone, and the certificate says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.dedup.alike import SAME_VIEW, compare, hash_matches
from geofm.dedup.descriptors import is_monotone, measure
from geofm.dedup.perceptual_hash import hash_thumbnails, turn
from geofm.embeddings.encoders import Encoder, encode, resize
from geofm.embeddings.vectors import MARGIN, Space
from geofm.pool.proximity import near_areas
from geofm.pool.registry import EvaluationSet, read_images, registry_sha256
from geofm.raster.radiometry import to_rgb
from geofm.runtime.native import torch
from geofm.runtime.threads import one_torch_thread
from geofm.types import Floats, Indices

#: Metres around an evaluation footprint that stay clear: a chip's geolocation, and its neighbours.
BUFFER_M = 1000.0
#: Cosine (centred space) from which an embedding alone removes a chip; ``PROPOSE`` is where pixels
#: are compared, for at most ``NEAREST`` chips of each view.
EMBEDDING, PROPOSE, NEAREST = 0.97, 0.3, 16
#: Views and chips whose products are held at once.
VIEWS, CHIPS = 32, 8192
#: Pairs whose thumbnails are held at once; the columns that say what their bytes stand for.
COMPARED, ENDS = 1 << 14, ["thumbnail_low", "thumbnail_high"]
#: Least ground shared with an evaluation image (intersection over union).
LEAST_IOU = 0.25
RULES = ("eval_footprint", "eval_pixels", "eval_embedding")


@dataclass(frozen=True)
class EvaluationViews:
    """Square views of the images of evaluation sets, row by row.

    ``vectors`` [n, 8, d] are embeddings in the 8 orientations; None where none were made.
    """

    sets: list[str]
    ids: list[str]
    descriptors: pd.DataFrame
    thumbnails: NDArray[np.uint8]
    vectors: NDArray[np.float16] | None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Decontamination:
    """What goes, and the certificate that evaluation attaches to its scores.

    ``rows``: one per chip that goes, by row of the pool: ``row, rule, reason, set, witness``
    (area or image id), ``distance_m``, ``similarity``.
    """

    rows: pd.DataFrame
    certificate: dict[str, Any]


def view_images(
    sets: Sequence[EvaluationSet], chip_px: int | None = None, encoder: Encoder | None = None,
    size_px: int = 128,
) -> EvaluationViews:  # fmt: skip
    """Describe the images of the sets (and embed them, given the encoder of the chips).

    Args:
        sets: the registry.
        chip_px: edge of a chip where images have the chips' resolution: larger images are then
            checked window by window. None: an image is seen whole, in squares of its shorter edge.
        encoder: as ``embed`` uses it.
        size_px: the encoder's input edge.
    """
    names, ids, rows, thumbnails, vectors = [], [], [], [], []
    for one in sets:
        for number, (image_id, pixels) in enumerate(read_images(one)):
            bands = ["red", "green", "blue"][: len(pixels)]
            scale = [one.scale] * len(pixels)
            for window in _windows(pixels, chip_px):
                row, thumbnail = measure(window, bands, scale)
                names.append(one.name)
                ids.append(image_id)
                rows.append(row)
                thumbnails.append(thumbnail)
                if encoder is not None:
                    vectors.append(_eight(encoder, to_rgb(window, bands, scale), size_px))
            tick(f"evaluation set {one.name}", number + 1, len(one.images))
    small = np.stack(thumbnails) if thumbnails else np.empty((0, 64, 64), np.uint8)
    table = pd.DataFrame(rows, columns=ENDS)
    table["hash"] = hash_thumbnails(small)
    return EvaluationViews(names, ids, table, small, np.stack(vectors) if vectors else None)


def _windows(pixels: NDArray[Any], chip_px: int | None) -> list[NDArray[Any]]:
    """Squares that cover an image, each half over the next; an edge of half a chip counts."""
    height, width = pixels.shape[1:]
    edge = min(height, width, chip_px or max(height, width))

    def starts(length: int) -> list[int]:
        count = int(np.ceil((length - edge) / (edge / 2))) + 1
        return sorted({round(n * (length - edge) / max(count - 1, 1)) for n in range(count)})

    return [
        np.ascontiguousarray(pixels[:, top : top + edge, left : left + edge])
        for top in starts(height)
        for left in starts(width)
    ]


def _eight(encoder: Encoder, rgb: NDArray[np.float32], size_px: int) -> NDArray[np.float16]:
    """Embeddings [8, d] of a picture in its orientations."""
    views = [torch.from_numpy(np.ascontiguousarray(turn(rgb, which))) for which in range(8)]
    with one_torch_thread():
        images = resize(torch.stack(views), size_px)
        vectors = encode(encoder, images.contiguous(memory_format=torch.channels_last))
    return np.asarray(vectors.float().cpu().numpy().astype(np.float16))


def decontaminate(
    areas: NDArray[np.object_],
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    space: Space | None,
    sets: Sequence[EvaluationSet],
    views: EvaluationViews,
    *,
    buffer_m: float = BUFFER_M,
    embedding: float | None = EMBEDDING,
    same_view: float = SAME_VIEW,
) -> Decontamination:
    """Check every chip of a pool against every evaluation set.

    Args:
        areas: footprints of the chips, EPSG:4326 (None where a chip has none).
        descriptors: columns hash, thumbnail_low, thumbnail_high.
        thumbnails: uint8 [n, 64, 64].
        space: the embeddings of the chips, or None.
        sets: the registry.
        views: its images, see ``view_images``.
        buffer_m: metres around an area.
        embedding: cosine from which an embedding alone decides; None: never.
        same_view: least likeness of thumbnails.
    """
    found = [_by_footprint(areas, sets, buffer_m)]
    near = _near_views(space, views, embedding)
    found.append(_by_pixels(descriptors, thumbnails, views, near, same_view))
    if embedding is not None and near is not None:
        found.append(_by_embedding(descriptors, views, near, embedding))
    rows = pd.concat(found, ignore_index=True)
    # the rule that comes first, then the closest witness
    rows["rank"] = rows["rule"].map({rule: rank for rank, rule in enumerate(RULES)})
    rows = rows.sort_values(
        ["row", "rank", "distance_m", "similarity", "set", "witness"],
        ascending=[True, True, True, False, True, True], kind="stable",
    )  # fmt: skip
    hits = rows.drop_duplicates(["row", "rule", "set"])
    first = rows.drop_duplicates("row").drop(columns="rank").reset_index(drop=True)
    first["row"] = first["row"].astype(np.int64)
    thresholds = {
        "buffer_m": buffer_m, "embedding": embedding, "same_view": same_view,
        "least_iou": LEAST_IOU, "orientations": 8,
    }  # fmt: skip
    return Decontamination(
        first, _certificate(areas, sets, views, near is not None, thresholds, first, hits)
    )


def _by_footprint(
    areas: NDArray[np.object_], sets: Sequence[EvaluationSet], buffer_m: float
) -> pd.DataFrame:
    found = []
    for one in sets:
        near = near_areas(areas, one.areas, buffer_m)
        ids = [one.area_ids[row] for row in near.right]
        reasons = [
            f"{distance:.0f} m from {area} of the evaluation set {one.name} (buffer {buffer_m:g} m)"
            for area, distance in zip(ids, near.distance_m, strict=True)
        ]
        found.append(_rows(near.left, RULES[0], reasons, [one.name] * len(ids), ids,
                           near.distance_m, np.full(len(ids), np.nan)))  # fmt: skip
    return pd.concat(found, ignore_index=True) if found else _rows(*[[]] * 7)


def _near_views(
    space: Space | None, views: EvaluationViews, threshold: float | None
) -> tuple[Indices, Indices, Floats] | None:
    """Chips near to views by embedding: chip, view, largest exact cosine over the orientations.

    Of each view the ``NEAREST`` that reach ``PROPOSE``, and all that reach the threshold.
    """
    if space is None or views.vectors is None or not len(space) or not len(views):
        return None
    found = []
    for first in range(0, len(views), VIEWS):
        asked = views.vectors[first : first + VIEWS].astype(np.float64) - space.centre
        asked /= np.maximum(np.linalg.norm(asked, axis=2, keepdims=True), 1e-30)
        for view, chips in _proposed(space, asked.astype(np.float32), threshold):
            exact = (space.exact(chips) @ asked[view].T).max(axis=1, initial=-1)
            found.append((chips, np.full(len(chips), first + view), np.round(exact, 9)))
        tick("evaluation images", min(first + VIEWS, len(views)), len(views))
    chips, which, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    return chips, which.astype(np.int64), cosines


def _proposed(
    space: Space, asked: NDArray[np.float32], threshold: float | None
) -> Iterator[tuple[int, Indices]]:
    """For each of some views [m, 8, d] the rows whose exact cosine is worth knowing."""
    sure = 2.0 if threshold is None else threshold - MARGIN
    rows: list[list[Indices]] = [[] for _ in asked]
    values: list[list[NDArray[np.float32]]] = [[] for _ in asked]
    for first in range(0, len(space), CHIPS):
        part = np.arange(first, min(first + CHIPS, len(space)))
        units = space.block(first, first + len(part))
        cosines = (units @ asked.reshape(-1, asked.shape[2]).T).reshape(len(part), len(asked), 8)
        best = cosines.max(axis=2)
        for view in range(len(asked)):
            mine = best[:, view]
            few = np.argsort(-mine, kind="stable")[:NEAREST]
            near = np.union1d(few[mine[few] >= PROPOSE], np.flatnonzero(mine >= sure))
            rows[view].append(part[near])
            values[view].append(mine[near])
    for view in range(len(asked)):
        chips, cosine = np.concatenate(rows[view]), np.concatenate(values[view])
        few = np.argsort(-cosine, kind="stable")[:NEAREST]
        yield view, chips[np.union1d(few, np.flatnonzero(cosine >= sure)).astype(np.int64)]


def _by_pixels(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    views: EvaluationViews,
    near: tuple[Indices, Indices, Floats] | None,
    same_view: float,
) -> pd.DataFrame:
    chips, which = hash_matches(
        descriptors["hash"].to_numpy(np.uint64), views.descriptors["hash"].to_numpy(np.uint64)
    )
    if near is not None:
        chips, which = np.concatenate([chips, near[0]]), np.concatenate([which, near[1]])
    codes = np.unique(chips * max(len(views), 1) + which)
    chips, which = codes // max(len(views), 1), codes % max(len(views), 1)
    same = np.zeros(len(chips), np.bool_)
    likeness = np.zeros(len(chips))
    for first in range(0, len(chips), COMPARED):
        part = slice(first, first + COMPARED)
        rows, left = np.unique(chips[part], return_inverse=True)
        seen, right = np.unique(which[part], return_inverse=True)
        both = np.concatenate([thumbnails[rows], views.thumbnails[seen]])
        tables = pd.concat([descriptors[ENDS].iloc[rows], views.descriptors[ENDS].iloc[seen]])
        low, high = tables.to_numpy(np.float32).T
        like = compare(both, low, high, left, len(rows) + right)
        same[part] = (like.similarity >= same_view) & (like.iou >= LEAST_IOU)
        likeness[part] = like.similarity
    chips, which, similarity = chips[same], which[same], likeness[same]
    reasons = [
        f"shows what {views.ids[view]} of the evaluation set {views.sets[view]} shows "
        f"(likeness {value:.4f}, from {same_view:g})"
        for view, value in zip(which, similarity, strict=True)
    ]
    return _of_views(chips, which, views, RULES[1], reasons, similarity)


def _by_embedding(
    descriptors: pd.DataFrame,
    views: EvaluationViews,
    near: tuple[Indices, Indices, Floats],
    threshold: float,
) -> pd.DataFrame:
    # all monotone pictures (water, sand) have one embedding, which says nothing about a leak
    same = (near[2] >= threshold) & ~is_monotone(descriptors)[near[0]]
    chips, which, cosine = near[0][same], near[1][same], near[2][same]
    reasons = [
        f"cosine similarity {value:.4f} to {views.ids[view]} of the evaluation set "
        f"{views.sets[view]} (from {threshold:g})"
        for view, value in zip(which, cosine, strict=True)
    ]
    return _of_views(chips, which, views, RULES[2], reasons, cosine)


def _of_views(
    chips: Indices, which: Indices, views: EvaluationViews, rule: str, reasons: list[str],
    similarity: Floats,
) -> pd.DataFrame:  # fmt: skip
    names, ids = [views.sets[view] for view in which], [views.ids[view] for view in which]
    return _rows(chips, rule, reasons, names, ids, np.full(len(ids), np.nan), similarity)


def _rows(
    row: Any, rule: Any, reason: Any, name: Any, witness: Any, distance: Any, similarity: Any
) -> pd.DataFrame:
    return pd.DataFrame({
        "row": np.asarray(row, np.int64), "rule": rule if isinstance(rule, str) else "",
        "reason": pd.Series(reason, dtype=str), "set": pd.Series(name, dtype=str),
        "witness": pd.Series(witness, dtype=str),
        "distance_m": np.asarray(distance, np.float64),
        "similarity": np.asarray(similarity, np.float64),
    })  # fmt: skip


def _certificate(
    areas: NDArray[np.object_],
    sets: Sequence[EvaluationSet],
    views: EvaluationViews,
    embedded: bool,
    thresholds: dict[str, Any],
    first: pd.DataFrame,
    hits: pd.DataFrame,
) -> dict[str, Any]:
    """What was checked against what, how, and what went."""
    checked = []
    for one in sets:
        by = ["footprint"] if len(one.areas) else []
        by += ["pixels", *(["embedding"] if embedded else [])] if one.images else []
        mine = hits[hits["set"] == one.name]
        checked.append({
            "name": one.name, "sha256": one.sha256, "footprints": len(one.areas),
            "images": len(one.images), "views": views.sets.count(one.name), "checked_by": by,
            "hits": {rule: int((mine["rule"] == rule).sum()) for rule in RULES},
            "removed": int((first["set"] == one.name).sum()),
        })  # fmt: skip
    return {
        "registry_sha256": registry_sha256(list(sets)),
        "thresholds": thresholds,
        "chips_checked": len(areas),
        "chips_removed": len(first),
        "removed_by": {rule: int((first["rule"] == rule).sum()) for rule in RULES},
        "sets": checked,
    }
