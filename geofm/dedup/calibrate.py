"""Stage ``calibrate``: the similarity from which two chips are duplicates, by collection.

plan    parts of the tars that hold sampled chips
work    embed renderings of the sampled chips            (``renderings``)
seal    measure the similarity of pairs whose truth is known   (known_pairs.py),
        and choose a threshold for each collection       (``choose_threshold``)

The truth is known of these pairs. Duplicates: a chip and its own renderings (half a pixel aside,
another gain, haze), through the real encoder, and chips of two scenes of one day whose footprints
nearly coincide. Not duplicates: other dates of one cell, and chips more than 100 km apart. The
threshold is the lowest whose precision is high enough at the lower bound of its confidence
interval. Reprocessed scenes are dropped before the download, and are not used here. Monotone chips
are left out: their embeddings are all equal, and pixels decide about them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.errors import RunError
from data_catalog.hashing import canonical
from data_catalog.progress import advance
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.config.recipe import CalibrateSettings
from geofm.dedup.certificate import recall_bound
from geofm.dedup.describe import load_described
from geofm.dedup.descriptors import is_monotone
from geofm.dedup.known_pairs import far_pairs, other_dates, overlapping
from geofm.embeddings.embed import chip_encoder
from geofm.embeddings.encoders import features
from geofm.embeddings.images import prepare_chip
from geofm.embeddings.store import load_vectors
from geofm.embeddings.vectors import EmbeddingSpace, make_space
from geofm.embeddings.weight_inputs import inherit_weights, load_inherited
from geofm.runtime.native import torch
from geofm.runtime.parts import (
    ChipPart,
    ChipRef,
    chip_parts,
    covers,
    ok_chips,
    part_chips,
    read_pixels,
)
from geofm.runtime.threads import one_torch_thread

#: Renderings of a chip, in the order of ``renderings``.
RENDERINGS = ("half_pixel", "gain", "haze")
#: Classes of pairs that are duplicates, and of pairs that are not.
DUPLICATE, DIFFERENT = (*RENDERINGS, "overlap"), ("other_date", "far")
#: Confidence of the lower bound of the precision, one-sided.
CONFIDENCE = 0.95
#: Thresholds that are tried.
GRID = np.round(np.arange(0.5, 1.0001, 0.005), 3)
#: Gain of a rendering (or 2 - GAIN), share of haze, and reflectance of its airlight, which is a
#: little brighter than most land, also as a byte.
GAIN, HAZE, AIRLIGHT, AIRLIGHT_BYTE = 1.1, 0.08, 0.16, 136.0
#: Files of the artifact.
PAIRS, CURVE = "known_pairs.parquet", "curve.parquet"
CHIP_COLUMNS = ["chip_id", "collection", "item_id", "cell", "datetime", "geometry"]
PAIR_COLUMNS = ["collection", "class", "chip_id", "other_id", "similarity"]
CURVE_COLUMNS = ["class", "threshold", "precision", "precision_bound", "recall"]


def resolve(job: Job) -> Job:
    """Add the encoder of the embeddings to the job's inputs, if it is a geofm model."""
    return inherit_weights(job, "embeddings", "encoder")


# plan


def plan(job: Job) -> list[Part]:
    """List the parts of tars that hold sampled chips."""
    chips, facts = job.inputs["chips"], job.inputs["embeddings"].manifest.facts
    sampled = _sampled_ids(job)
    encoder = [facts["weights_sha256"], facts["encoder"], facts["size_px"]]
    parts = []
    for part, refs in chip_parts(chips):
        sampled_refs = [ref for ref in refs if ref.chip_id in sampled]
        if sampled_refs:
            content = [encoder, covers(chips, part.tar, sampled_refs)]
            payload = {"part": asdict(part), "chips": [ref.chip_id for ref in sampled_refs]}
            parts.append(job.part(payload, content, ["sample"], rows=len(sampled_refs)))
    return parts


def _sampled_ids(job: Job) -> set[str]:
    """Choose ``sample`` chips of each collection, in an order that depends only on their ids."""
    settings: CalibrateSettings = job.settings
    table = ok_chips(job.inputs["chips"], ["chip_id", "collection"])
    table["order"] = [hashlib.sha256(f"sample {i}".encode()).hexdigest() for i in table["chip_id"]]
    table = table.sort_values("order")
    return set(table.groupby("collection").head(settings.sample)["chip_id"].astype(str))


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Embed the renderings of the sampled chips of a part: float16 [chips, renderings, d].

    Raises:
        RunError: The encoder's weights are not those of the embeddings.
    """
    chips, of_tar = job.inputs["chips"], ChipPart(**part.payload["part"])
    facts = job.inputs["embeddings"].manifest.facts
    sampled = set(part.payload["chips"])
    refs = [ref for ref in part_chips(chips, of_tar) if ref.chip_id in sampled]
    size_px = int(facts["size_px"])
    encoder = chip_encoder(load_inherited(job, "embeddings", "encoder"), size_px, "cpu")
    if encoder.weights_sha256 != facts["weights_sha256"]:
        raise RunError(
            f"the encoder {facts['encoder']} has other weights than those of the embeddings; "
            "embed the chips again"
        )
    vectors = []
    for ref, pixels in zip(refs, read_pixels(chips, of_tar.tar, refs), strict=True):
        views = [
            prepare_chip(view, ref.bands, ref.scale, encoder, size_px)
            for view in renderings(pixels, ref)
        ]
        images = torch.stack(views).contiguous(memory_format=torch.channels_last)
        with one_torch_thread():
            vectors.append(features(encoder, images).float().numpy().astype(np.float16))
        advance(1)
    np.save(folder / "renderings.npy", np.stack(vectors))
    (folder / "ids.json").write_bytes(canonical([ref.chip_id for ref in refs]))


def renderings(pixels: NDArray[Any], ref: ChipRef) -> list[NDArray[Any]]:
    """Render a chip half a pixel aside, with another gain, and with haze.

    Returns:
        Pixels in the order of ``RENDERINGS``, with the shape and type of ``pixels``.
    """
    values = pixels.astype(np.float32)
    padded = np.pad(values, ((0, 0), (0, 1), (0, 1)), mode="edge")
    half = (padded[:, :-1, :-1] + padded[:, 1:, :-1] + padded[:, :-1, 1:] + padded[:, 1:, 1:]) / 4
    is_byte = pixels.dtype == np.uint8
    airlight = [AIRLIGHT_BYTE if is_byte else AIRLIGHT / scale for scale in ref.scale]
    light = np.array(airlight, np.float32)[:, None, None]
    haze = (1 - HAZE) * values + HAZE * light
    is_odd = int(ref.chip_id[-1:] or "0", 36) % 2
    gain = values * (GAIN if is_odd else 2 - GAIN)
    whole = pixels.dtype.kind == "u"
    limit = np.iinfo(pixels.dtype).max if whole else np.inf
    return [
        np.clip(np.rint(view) if whole else view, 0, limit).astype(pixels.dtype)
        for view in (half, gain, haze)
    ]


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``known_pairs.parquet``, ``curve.parquet``, and a threshold for each collection."""
    settings: CalibrateSettings = job.settings
    table = ok_chips(job.inputs["chips"], CHIP_COLUMNS)
    ids = table["chip_id"].astype(str).tolist()
    collections = table["collection"].astype(str)
    table["monotone"] = is_monotone(load_described(job.inputs["descriptors"], ids))
    space = make_space(load_vectors(job.inputs["embeddings"], ids))
    known = _measure_known_pairs(table, space, folders, settings)
    thresholds: dict[str, dict[str, Any]] = {}
    curves = [pd.DataFrame(columns=["collection", *CURVE_COLUMNS])]
    for name in sorted(set(collections)):
        pairs = known[known["collection"] == name]
        curve = precision_curve(pairs)
        thresholds[name] = choose_threshold(curve, pairs, settings)
        left_out = int(table["monotone"][collections == name].sum())
        thresholds[name]["monotone_left_out"] = left_out
        curve.insert(0, "collection", name)
        curves.append(curve)
    write_table(known, folder / PAIRS)
    write_table(pd.concat(curves[1:] or curves, ignore_index=True), folder / CURVE)
    facts = job.inputs["embeddings"].manifest.facts
    values = [float(result["threshold"]) for result in thresholds.values()]
    return Sealed(
        counts={"rows_in": len(known), "rows_out": len(known)},
        facts={
            # the largest threshold is strict enough for pairs of any two collections
            "threshold": max(values, default=settings.default),
            "thresholds": thresholds,
            "encoder": facts["encoder"],
            "weights_sha256": facts["weights_sha256"],
            "similarity": "cosine of embeddings minus the mean of the pool, float64",
            "confidence": CONFIDENCE,
        },
    )


def _measure_known_pairs(
    table: pd.DataFrame, space: EmbeddingSpace, folders: list[Path], settings: CalibrateSettings
) -> pd.DataFrame:
    """List pairs with their class and similarity; a rendering's pair names its chip twice.

    Args:
        table: usable chips, in the order of the space.
        space: space of their embeddings.
        folders: folders of the parts, with the vectors of the renderings.
        settings: limits of the number of pairs.
    """
    ids = table["chip_id"].astype(str).tolist()
    collections = table["collection"].astype(str).tolist()
    monotone = table["monotone"].to_numpy(np.bool_)
    row_of = {chip_id: row for row, chip_id in enumerate(ids)}
    pairs: list[tuple[str, str, str, str, float]] = []
    for folder in folders:
        part_ids = json.loads((folder / "ids.json").read_bytes())
        for chip_id, views in zip(part_ids, np.load(folder / "renderings.npy"), strict=True):
            row = row_of[chip_id]
            if monotone[row]:
                continue
            unit = space.exact_units(np.array([row]))[0]
            centred = views.astype(np.float64) - space.centre
            centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-30)
            for name, value in zip(RENDERINGS, centred @ unit, strict=True):
                pairs.append((collections[row], name, chip_id, chip_id, round(float(value), 9)))
    textured = np.flatnonzero(~monotone).astype(np.int64)
    chips = table.iloc[textured]
    for name, (a, b) in (
        ("overlap", overlapping(chips, settings.most_pairs)),
        ("other_date", other_dates(chips, settings.most_pairs)),
        ("far", far_pairs(chips, settings.most_pairs)),
    ):
        left, right = textured[a], textured[b]
        for i, j, value in zip(left, right, space.similarity(left, right), strict=True):
            pairs.append((collections[i], name, ids[i], ids[j], round(float(value), 9)))
    known = pd.DataFrame(pairs, columns=PAIR_COLUMNS)
    return known.sort_values(PAIR_COLUMNS[:4], ignore_index=True)


def precision_curve(known: pd.DataFrame) -> pd.DataFrame:
    """Compute precision, its lower bound and recall by threshold.

    Returns:
        Rows of class ``all`` with these, and rows of each class of pairs with the share of its
        pairs at or above the threshold as ``recall``.
    """
    classes, values = known["class"].to_numpy(), known["similarity"].to_numpy(np.float64)
    duplicate = np.isin(classes, DUPLICATE)
    rows: list[tuple[str, float, float, float, float]] = []
    for threshold in GRID:
        above = values >= threshold
        true, false = int((above & duplicate).sum()), int((above & ~duplicate).sum())
        bound = recall_bound(true, true + false, CONFIDENCE)
        rows.append(
            (
                "all",
                threshold,
                true / (true + false) if true + false else np.nan,
                np.nan if bound is None else bound,
                _share(above, duplicate),
            )
        )
        for name in (*DUPLICATE, *DIFFERENT):
            rows.append((name, threshold, np.nan, np.nan, _share(above, classes == name)))
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def _share(above: NDArray[np.bool_], members: NDArray[np.bool_]) -> float:
    """Compute the share of members that are above; NaN without members."""
    return float(above[members].mean()) if members.any() else np.nan


def choose_threshold(
    curve: pd.DataFrame, known: pd.DataFrame, settings: CalibrateSettings
) -> dict[str, Any]:
    """Choose the lowest threshold from which on the bound of the precision is high enough.

    Args:
        curve: result of ``precision_curve``.
        known: pairs of the collection.
        settings: required precision and number of pairs; default threshold.

    Returns:
        ``threshold``, ``source`` (calibrated or default), ``reason``, and the numbers of pairs.
    """
    duplicate = known["class"].isin(DUPLICATE)
    counts = {str(name): int(count) for name, count in known["class"].value_counts().items()}
    numbers: dict[str, Any] = {
        "positives": int(duplicate.sum()),
        "negatives": int((~duplicate).sum()),
        "pairs": dict(sorted(counts.items())),
    }
    whole = curve[curve["class"] == "all"].reset_index(drop=True)
    good = (whole["precision_bound"] >= settings.min_precision).to_numpy(np.bool_)
    bad = (whole["precision"] < settings.min_precision).to_numpy(np.bool_)
    # no larger threshold may have a precision below the required one
    after_last_bad = int(np.flatnonzero(bad)[-1]) + 1 if bad.any() else 0
    candidates = np.flatnonzero(good & (np.arange(len(good)) >= after_last_bad))
    too_few = min(numbers["positives"], numbers["negatives"]) < settings.least_pairs
    if too_few or not len(candidates):
        why = (
            f"fewer than {settings.least_pairs} known pairs of a kind"
            if too_few
            else f"no threshold has a precision of {settings.min_precision:g} for sure"
        )
        return {"threshold": settings.default, "source": "default", "reason": why, **numbers}
    row = whole.iloc[int(candidates[0])]
    return {
        "threshold": float(row["threshold"]),
        "source": "calibrated",
        "reason": f"the lowest with a precision of {settings.min_precision:g} for sure",
        "precision": round(float(row["precision"]), 6),
        "precision_lower_bound": round(float(row["precision_bound"]), 6),
        "recall": round(float(row["recall"]), 6),
        **numbers,
    }


STAGE = Stage(
    name="calibrate",
    version="3",
    kind="calibration",
    inputs=("chips", "descriptors", "embeddings"),
    software=("numpy", "scipy", "shapely", "torch", "timm"),
    plan=plan,
    work=work,
    seal=seal,
    resolve=resolve,
)
