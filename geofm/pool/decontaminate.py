"""Decontamination: drop chips that show the same ground or picture as an evaluation set.

A chip is dropped by the first of three rules that applies.

- *Footprint*: it lies within some metres of an area of the set, whatever its date.
- *Pixels*: its thumbnail matches that of an image of the set in one of 8 orientations, shifted or
  not (``dedup/alike.py``). Hashes and embeddings only propose which images to compare.
- *Embedding*: its cosine similarity to an image, in one of 8 orientations, reaches a threshold.

A set without footprints is checked by the last two rules alone, and the certificate says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.dedup.alike import SAME_VIEW, compare_thumbnails
from geofm.dedup.descriptors import THUMBNAIL, is_monotone, measure
from geofm.dedup.perceptual_hash import ORIENTATIONS, hash_thumbnails, match_hashes, orient
from geofm.embeddings.encoders import Encoder, encode
from geofm.embeddings.vectors import FLOAT32_ERROR, EmbeddingSpace
from geofm.pool.proximity import near_areas
from geofm.pool.registry import EvaluationSet, read_images, registry_sha256
from geofm.raster.radiometry import to_rgb
from geofm.raster.resample import resize_images
from geofm.runtime.native import torch
from geofm.runtime.threads import one_torch_thread
from geofm.types import Floats, Floats32, Indices

#: Distance in metres around an evaluation area that is kept clear. It covers the error of a chip's
#: geolocation, and neighbouring ground.
BUFFER_M = 1000.0
#: Cosine similarity (centred space) from which the embedding alone drops a chip.
EMBEDDING = 0.97
#: Cosine similarity from which pixels are compared, for at most ``NEAREST`` chips of each view.
PROPOSE, NEAREST = 0.3, 16
#: Views and chips in one matrix product, and pairs whose thumbnails are in memory at once.
VIEWS, CHIPS, COMPARED_PAIRS = 32, 8192, 1 << 14
#: Least ground shared with an evaluation image (intersection over union).
LEAST_IOU = 0.25
#: Columns with the unit grey of bytes 0 and 255 of a thumbnail.
GREY_RANGE = ["thumbnail_low", "thumbnail_high"]
#: The rules, in the order in which they apply.
RULES = ("eval_footprint", "eval_pixels", "eval_embedding")


@dataclass(frozen=True)
class EvaluationViews:
    """Square views of the images of evaluation sets, by view.

    Attributes:
        sets: name of each view's set.
        ids: id of each view's image.
        descriptors: columns thumbnail_low, thumbnail_high, hash.
        thumbnails: shape (n, 64, 64).
        vectors: embeddings in the 8 orientations, shape (n, 8, d); None without an encoder.
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
    """Result of the check.

    Attributes:
        rows: one row per dropped chip (``hit_rows``).
        certificate: sets, rules, thresholds and numbers of dropped chips; the stage ``evaluate``
            attaches it to its scores.
    """

    rows: pd.DataFrame
    certificate: dict[str, Any]


# Views of the images of evaluation sets.


def view_images(
    sets: Sequence[EvaluationSet],
    chip_px: int | None = None,
    encoder: Encoder | None = None,
    size_px: int = 128,
) -> EvaluationViews:
    """Describe the images of evaluation sets, and embed them if there is an encoder.

    Args:
        sets: evaluation sets.
        chip_px: edge of a chip, if images have the resolution of the chips: larger images are then
            checked window by window. None: an image is viewed in squares of its shorter edge.
        encoder: the encoder of the chips.
        size_px: input edge of the encoder.
    """
    names, ids, rows, thumbnails, vectors = [], [], [], [], []
    for evaluation in sets:
        for number, (image_id, pixels) in enumerate(read_images(evaluation)):
            bands = ["red", "green", "blue"][: len(pixels)]
            scale = [evaluation.scale] * len(pixels)
            for window in _windows(pixels, chip_px):
                row, thumbnail = measure(window, bands, scale)
                names.append(evaluation.name)
                ids.append(image_id)
                rows.append(row)
                thumbnails.append(thumbnail)
                if encoder is not None:
                    rgb = to_rgb(window, bands, scale)
                    vectors.append(_embed_orientations(encoder, rgb, size_px))
            tick(f"evaluation set {evaluation.name}", number + 1, len(evaluation.images))
    nothing = np.empty((0, THUMBNAIL, THUMBNAIL), np.uint8)
    stacked = np.stack(thumbnails) if thumbnails else nothing
    descriptors = pd.DataFrame(rows, columns=GREY_RANGE)
    descriptors["hash"] = hash_thumbnails(stacked)
    return EvaluationViews(names, ids, descriptors, stacked, np.stack(vectors) if vectors else None)


def _windows(pixels: NDArray[Any], chip_px: int | None) -> list[NDArray[Any]]:
    """Cut an image into squares that cover it, each overlapping the next by half or more."""
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


def _embed_orientations(encoder: Encoder, rgb: Floats32, size_px: int) -> NDArray[np.float16]:
    """Embed a picture, shape (3, height, width), in its orientations; returns shape (8, d)."""
    views = [torch.from_numpy(np.ascontiguousarray(orient(rgb, n))) for n in ORIENTATIONS]
    with one_torch_thread():
        images = resize_images(torch.stack(views), size_px)
        vectors = encode(encoder, images.contiguous(memory_format=torch.channels_last))
    return np.asarray(vectors.float().cpu().numpy().astype(np.float16))


# The check of a pool.


def decontaminate(
    areas: NDArray[np.object_],
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    space: EmbeddingSpace | None,
    sets: Sequence[EvaluationSet],
    views: EvaluationViews,
    *,
    buffer_m: float = BUFFER_M,
    embedding: float | None = EMBEDDING,
    same_view: float = SAME_VIEW,
) -> Decontamination:
    """Check each chip of a pool against each evaluation set.

    Args:
        areas: footprints of the chips, EPSG:4326, shape (n,); None where a chip has none.
        descriptors: columns hash, thumbnail_low, thumbnail_high, one row per chip.
        thumbnails: shape (n, 64, 64).
        space: embeddings of the chips; None without embeddings.
        sets: evaluation sets.
        views: views of their images (``view_images``).
        buffer_m: distance in metres around an area.
        embedding: cosine similarity from which the embedding alone drops a chip; None: never.
        same_view: least similarity of thumbnails.
    """
    hits = [_by_footprint(areas, sets, buffer_m)]
    near = _near_views(space, views, embedding)
    hits.append(_by_pixels(descriptors, thumbnails, views, near, same_view))
    if embedding is not None and near is not None:
        hits.append(_by_embedding(descriptors, views, near, embedding))
    rows = pd.concat(hits, ignore_index=True)
    # If a chip has several hits, the first rule counts, then the closest witness.
    rows["rank"] = rows["rule"].map({rule: rank for rank, rule in enumerate(RULES)})
    rows = rows.sort_values(
        ["row", "rank", "distance_m", "similarity", "set", "witness"],
        ascending=[True, True, True, False, True, True],
        kind="stable",
    )
    hits_by_set = rows.drop_duplicates(["row", "rule", "set"])
    dropped = rows.drop_duplicates("row").drop(columns="rank").reset_index(drop=True)
    dropped["row"] = dropped["row"].astype(np.int64)
    thresholds = {
        "buffer_m": buffer_m,
        "embedding": embedding,
        "same_view": same_view,
        "least_iou": LEAST_IOU,
        "orientations": len(ORIENTATIONS),
    }
    certificate = _certificate(
        len(areas), sets, views, near is not None, thresholds, dropped, hits_by_set
    )
    return Decontamination(dropped, certificate)


def _by_footprint(
    areas: NDArray[np.object_], sets: Sequence[EvaluationSet], buffer_m: float
) -> pd.DataFrame:
    """List the chips near an area of a set."""
    hits = [hit_rows()]
    for evaluation in sets:
        near = near_areas(areas, evaluation.areas, buffer_m)
        ids = [evaluation.area_ids[row] for row in near.right]
        reasons = [
            f"{distance:.0f} m from {area} of the evaluation set {evaluation.name} "
            f"(buffer {buffer_m:g} m)"
            for area, distance in zip(ids, near.distance_m, strict=True)
        ]
        names = [evaluation.name] * len(ids)
        hits.append(hit_rows(near.left, RULES[0], reasons, names, ids, distance_m=near.distance_m))
    return pd.concat(hits, ignore_index=True)


class _NearViews(NamedTuple):
    """Pairs of a chip and a view with near embeddings.

    Attributes:
        chip: row of the chip, shape (pairs,).
        view: number of the view, shape (pairs,).
        cosine: largest exact cosine over the orientations of the view, shape (pairs,).
    """

    chip: Indices
    view: Indices
    cosine: Floats


def _near_views(
    space: EmbeddingSpace | None, views: EvaluationViews, threshold: float | None
) -> _NearViews | None:
    """Find, for each view, the nearest chips that reach ``PROPOSE``, and all at the threshold.

    Returns:
        The pairs; None without embeddings.
    """
    if space is None or views.vectors is None or not len(space) or not len(views):
        return None
    parts = []
    for first in range(0, len(views), VIEWS):
        vectors = views.vectors[first : first + VIEWS].astype(np.float64) - space.centre
        vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-30)
        for number, chips in _propose_chips(space, vectors.astype(np.float32), threshold):
            cosine = (space.exact_units(chips) @ vectors[number].T).max(axis=1, initial=-1)
            parts.append((chips, np.full(len(chips), first + number), np.round(cosine, 9)))
        tick("evaluation images", min(first + VIEWS, len(views)), len(views))
    chip, view, cosine = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _NearViews(chip, view.astype(np.int64), cosine)


def _propose_chips(
    space: EmbeddingSpace, vectors: Floats32, threshold: float | None
) -> Iterator[tuple[int, Indices]]:
    """Yield, for each of some views, shape (m, 8, d), the chips to compare exactly."""
    certain = 2.0 if threshold is None else threshold - FLOAT32_ERROR
    rows: list[list[Indices]] = [[] for _ in vectors]
    values: list[list[Floats32]] = [[] for _ in vectors]
    for first in range(0, len(space), CHIPS):
        part = np.arange(first, min(first + CHIPS, len(space)))
        units = space.unit_block(first, first + len(part))
        cosines = (units @ vectors.reshape(-1, vectors.shape[2]).T).reshape(
            len(part), len(vectors), len(ORIENTATIONS)
        )
        best = cosines.max(axis=2)
        for number in range(len(vectors)):
            cosine = best[:, number]
            nearest = np.argsort(-cosine, kind="stable")[:NEAREST]
            near = np.union1d(
                nearest[cosine[nearest] >= PROPOSE], np.flatnonzero(cosine >= certain)
            )
            rows[number].append(part[near])
            values[number].append(cosine[near])
    for number in range(len(vectors)):
        chips, cosine = np.concatenate(rows[number]), np.concatenate(values[number])
        nearest = np.argsort(-cosine, kind="stable")[:NEAREST]
        near = np.union1d(nearest, np.flatnonzero(cosine >= certain)).astype(np.int64)
        yield number, chips[near]


def _by_pixels(
    descriptors: pd.DataFrame,
    thumbnails: NDArray[np.uint8],
    views: EvaluationViews,
    near: _NearViews | None,
    same_view: float,
) -> pd.DataFrame:
    """List the chips whose thumbnail matches that of a view."""
    chips, numbers = match_hashes(
        descriptors["hash"].to_numpy(np.uint64), views.descriptors["hash"].to_numpy(np.uint64)
    )
    if near is not None:
        chips, numbers = np.concatenate([chips, near.chip]), np.concatenate([numbers, near.view])
    count = max(len(views), 1)
    chips, numbers = np.divmod(np.unique(chips * count + numbers), count)
    same = np.zeros(len(chips), np.bool_)
    similarity = np.zeros(len(chips))
    for first in range(0, len(chips), COMPARED_PAIRS):
        part = slice(first, first + COMPARED_PAIRS)
        chip_rows, left = np.unique(chips[part], return_inverse=True)
        view_rows, right = np.unique(numbers[part], return_inverse=True)
        both = np.concatenate([thumbnails[chip_rows], views.thumbnails[view_rows]])
        grey = [
            descriptors[GREY_RANGE].iloc[chip_rows],
            views.descriptors[GREY_RANGE].iloc[view_rows],
        ]
        contrast = pd.concat(grey).to_numpy(np.float32)
        result = compare_thumbnails(both, contrast, left, len(chip_rows) + right)
        same[part] = (result.similarity >= same_view) & (result.iou >= LEAST_IOU)
        similarity[part] = result.similarity
    reason = (
        "shows what {image} of the evaluation set {name} shows "
        "(likeness {value:.4f}, from {least:g})"
    )
    return _hits_of_views(
        chips[same], numbers[same], similarity[same], views, RULES[1], reason, same_view
    )


def _by_embedding(
    descriptors: pd.DataFrame, views: EvaluationViews, near: _NearViews, threshold: float
) -> pd.DataFrame:
    """List the chips whose embedding is near that of a view.

    Monotone chips (water, sand) are left out: all have one embedding, which does not show a leak.
    """
    same = (near.cosine >= threshold) & ~is_monotone(descriptors)[near.chip]
    reason = (
        "cosine similarity {value:.4f} to {image} of the evaluation set {name} (from {least:g})"
    )
    return _hits_of_views(
        near.chip[same], near.view[same], near.cosine[same], views, RULES[2], reason, threshold
    )


def _hits_of_views(
    chips: Indices,
    numbers: Indices,
    similarity: Floats,
    views: EvaluationViews,
    rule: str,
    reason: str,
    least: float,
) -> pd.DataFrame:
    """List the hits of views.

    Args:
        chips: row of each chip, shape (hits,).
        numbers: number of each view, shape (hits,).
        similarity: similarity of the two, shape (hits,).
        views: all views.
        rule: the rule.
        reason: sentence with the fields image, name (of the set), value and least.
        least: threshold of the rule.
    """
    names, ids = [views.sets[n] for n in numbers], [views.ids[n] for n in numbers]
    reasons = [
        reason.format(image=image, name=name, value=value, least=least)
        for image, name, value in zip(ids, names, similarity, strict=True)
    ]
    return hit_rows(chips, rule, reasons, names, ids, similarity=similarity)


def hit_rows(
    rows: Any = (),
    rule: str = "",
    reasons: Any = (),
    sets: Any = (),
    witnesses: Any = (),
    distance_m: Any = np.nan,
    similarity: Any = np.nan,
) -> pd.DataFrame:
    """Make a table of chips that an evaluation set shows; empty without arguments.

    Columns: ``row`` (of the pool), ``rule``, ``reason``, ``set``, ``witness`` (id of the area or
    the image), ``distance_m``, ``similarity``.
    """
    count = len(rows)
    return pd.DataFrame(
        {
            "row": np.asarray(rows, np.int64),
            "rule": pd.Series([rule] * count, dtype=str),
            "reason": pd.Series(reasons, dtype=str),
            "set": pd.Series(sets, dtype=str),
            "witness": pd.Series(witnesses, dtype=str),
            "distance_m": np.broadcast_to(np.asarray(distance_m, np.float64), count),
            "similarity": np.broadcast_to(np.asarray(similarity, np.float64), count),
        }
    )


def _certificate(
    chips: int,
    sets: Sequence[EvaluationSet],
    views: EvaluationViews,
    embedded: bool,
    thresholds: dict[str, Any],
    dropped: pd.DataFrame,
    hits_by_set: pd.DataFrame,
) -> dict[str, Any]:
    """Describe the check: sets, rules, thresholds and numbers of dropped chips.

    Args:
        chips: number of chips.
        sets: evaluation sets.
        views: views of their images.
        embedded: whether embeddings were compared.
        thresholds: thresholds of the rules.
        dropped: one row per dropped chip.
        hits_by_set: one row per chip, rule and set.
    """
    checked = []
    for evaluation in sets:
        rules = ["footprint"] if len(evaluation.areas) else []
        rules += ["pixels", *(["embedding"] if embedded else [])] if evaluation.images else []
        hits = hits_by_set[hits_by_set["set"] == evaluation.name]
        checked.append(
            {
                "name": evaluation.name,
                "sha256": evaluation.sha256,
                "footprints": len(evaluation.areas),
                "images": len(evaluation.images),
                "views": views.sets.count(evaluation.name),
                "checked_by": rules,
                "hits": {rule: int((hits["rule"] == rule).sum()) for rule in RULES},
                "removed": int((dropped["set"] == evaluation.name).sum()),
            }
        )
    return {
        "registry_sha256": registry_sha256(list(sets)),
        "thresholds": thresholds,
        "chips_checked": chips,
        "chips_removed": len(dropped),
        "removed_by": {rule: int((dropped["rule"] == rule).sum()) for rule in RULES},
        "sets": checked,
    }
