"""Stage ``calibrate``: from which similarity two chips of this encoder and sensor are duplicates.

Pairs whose truth is known without looking: *alike* are a sample of chips and their own renderings
(half a pixel aside, another gain, haze), through the real encoder, and chips of two scenes of one
day whose footprints nearly coincide; *unlike* are other dates of one cell and places more than
100 km apart. The threshold is the lowest whose precision is high enough at the lower bound of its
confidence interval. Reprocessed scenes would be alike as well, but they are dropped before any
download. Monotone chips are left out: their embeddings are all one, and pixels decide about them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.errors import RunError
from data_catalog.hashing import canonical
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.config.recipe import CalibrateSettings
from geofm.dedup.certificate import recall_bound
from geofm.dedup.describe import load_described
from geofm.dedup.descriptors import is_monotone
from geofm.dedup.known_pairs import far_pairs, other_dates, overlapping
from geofm.embeddings.embed import chip_encoder
from geofm.embeddings.encoders import features
from geofm.embeddings.images import picture
from geofm.embeddings.store import load_vectors
from geofm.embeddings.vectors import Space, make_space
from geofm.embeddings.weight_inputs import inherit_weights, load_inherited
from geofm.runtime.native import torch
from geofm.runtime.parts import ChipRef, chips_by_part, covers, ok_chips, read_pixels
from geofm.runtime.threads import one_torch_thread

#: What is done to a chip, in this order; and the classes that are alike and unlike.
RENDERINGS = ("half_pixel", "gain", "haze")
ALIKE, UNLIKE = (*RENDERINGS, "overlap"), ("other_date", "far")
#: Confidence of the lower bound of precision, one-sided.
CONFIDENCE = 0.95
GRID = np.round(np.arange(0.5, 1.0001, 0.005), 3)
PAIRS, CURVE = "known_pairs.parquet", "curve.parquet"
COLUMNS = ["chip_id", "collection", "item_id", "cell", "datetime", "geometry"]


def resolve(job: Job) -> Job:
    """The job with the encoder of the embeddings among its inputs, if that is a geofm model."""
    return inherit_weights(job, "embeddings", "encoder")


def plan(job: Job) -> list[Part]:
    """One part per tar that holds a chip of the sample."""
    chips, facts = job.inputs["chips"], job.inputs["embeddings"].manifest.facts
    sampled = _sample(job)
    parts = []
    for part, refs in chips_by_part(chips).items():
        mine = [ref for ref in refs if ref.chip_id in sampled]
        if mine:
            how = [facts["weights_sha256"], facts["encoder"], facts["size_px"]]
            parts.append(job.part({"part": part}, [how, covers(chips, part, mine)], ["sample"]))
    return parts


def _sample(job: Job) -> set[str]:
    """``sample`` chips of each collection, in an order that nothing but their ids decides."""
    settings: CalibrateSettings = job.settings
    table = ok_chips(job.inputs["chips"], ["chip_id", "collection"])
    table["order"] = [hashlib.sha256(f"sample {i}".encode()).hexdigest() for i in table["chip_id"]]
    table = table.sort_values("order")
    return set(table.groupby("collection").head(settings.sample)["chip_id"].astype(str))


def work(job: Job, part: Part, folder: Path) -> None:
    """Embed the renderings of the sampled chips of a tar: float16 [chips, renderings, d]."""
    chips, name = job.inputs["chips"], part.payload["part"]
    facts = job.inputs["embeddings"].manifest.facts
    sampled = _sample(job)
    refs = [ref for ref in chips_by_part(chips)[name] if ref.chip_id in sampled]
    size_px = int(facts["size_px"])
    encoder = chip_encoder(load_inherited(job, "embeddings", "encoder"), size_px, "cpu")
    if encoder.weights_sha256 != facts["weights_sha256"]:
        raise RunError(
            f"the encoder {facts['encoder']} has other weights than those of the embeddings; "
            "embed the chips again"
        )
    vectors = []
    for ref, pixels in zip(refs, read_pixels(chips, name, refs), strict=True):
        views = [
            picture(view, ref.bands, ref.scale, encoder, size_px)
            for view in renderings(pixels, ref)
        ]
        images = torch.stack(views).contiguous(memory_format=torch.channels_last)
        with one_torch_thread():
            vectors.append(features(encoder, images).float().numpy().astype(np.float16))
    np.save(folder / "renderings.npy", np.stack(vectors))
    (folder / "ids.json").write_bytes(canonical([ref.chip_id for ref in refs]))


def renderings(pixels: NDArray[Any], ref: ChipRef) -> list[NDArray[Any]]:
    """The chip again, in the order of ``RENDERINGS``; same shape and dtype."""
    values = pixels.astype(np.float32)
    wide = np.pad(values, ((0, 0), (0, 1), (0, 1)), mode="edge")
    half = (wide[:, :-1, :-1] + wide[:, 1:, :-1] + wide[:, :-1, 1:] + wide[:, 1:, 1:]) / 4
    eight = pixels.dtype == np.uint8
    # airlight of reflectance 0.16, a little brighter than most land
    light = np.array([136.0 if eight else 0.16 / scale for scale in ref.scale], np.float32)
    haze = 0.92 * values + 0.08 * light[:, None, None]
    gain = values * (1.1 if int(ref.chip_id[-1:] or "0", 36) % 2 else 0.9)
    limit = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else np.inf
    rounded = [np.clip(np.rint(view) if limit < np.inf else view, 0, limit)
               for view in (half, gain, haze)]  # fmt: skip
    return [view.astype(pixels.dtype) for view in rounded]


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``known_pairs.parquet``, ``curve.parquet``, and a threshold for each collection."""
    settings: CalibrateSettings = job.settings
    table = ok_chips(job.inputs["chips"], COLUMNS)
    ids = table["chip_id"].astype(str).tolist()
    described = load_described(job.inputs["descriptors"], ids)
    table["plain"] = is_monotone(described)
    space = make_space(load_vectors(job.inputs["embeddings"], ids))
    known = _known(table, space, folders, settings)
    found: dict[str, dict[str, Any]] = {}
    curves = []
    for name in sorted(set(table["collection"].astype(str))):
        mine = known[known["collection"] == name]
        curve = curve_of(mine)
        found[name] = choose(curve, mine, settings)
        found[name]["monotone_left_out"] = int(
            table["plain"][table["collection"].astype(str) == name].sum()
        )
        curve.insert(0, "collection", name)
        curves.append(curve)
    write_table(known, folder / PAIRS)
    columns = ["collection", "class", "threshold", "precision", "precision_bound", "recall"]
    write_table(
        pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=columns),
        folder / CURVE,
    )
    facts = job.inputs["embeddings"].manifest.facts
    best = max((one["threshold"] for one in found.values()), default=settings.default)
    return Sealed(
        counts={"rows_in": len(known), "rows_out": len(known)},
        facts={
            # pairs may be of two collections: the stricter of their thresholds holds for all
            "threshold": best,
            "thresholds": found,
            "encoder": facts["encoder"],
            "weights_sha256": facts["weights_sha256"],
            "similarity": "cosine of embeddings minus the mean of the pool, float64",
            "confidence": CONFIDENCE,
        },
    )


def _known(
    table: pd.DataFrame, space: Space, folders: list[Path], settings: CalibrateSettings
) -> pd.DataFrame:
    """Pairs with their class and similarity; renderings name the same chip twice."""
    ids = table["chip_id"].astype(str).tolist()
    row_of = {chip_id: row for row, chip_id in enumerate(ids)}
    textured = np.flatnonzero(~table["plain"].to_numpy(np.bool_)).astype(np.int64)
    rows: list[tuple[str, str, str, str, float]] = []
    collections = table["collection"].astype(str).tolist()
    for folder in folders:
        names = json.loads((folder / "ids.json").read_bytes())
        for chip_id, views in zip(names, np.load(folder / "renderings.npy"), strict=True):
            row = row_of[chip_id]
            if table["plain"].iat[row]:
                continue
            own = space.exact(np.array([row]))[0]
            moved = views.astype(np.float64) - space.centre
            moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-30)
            for name, value in zip(RENDERINGS, moved @ own, strict=True):
                rows.append((collections[row], name, chip_id, chip_id, round(float(value), 9)))
    some = table.iloc[textured]
    for name, pairs in (
        ("overlap", overlapping(some, settings.most_pairs)),
        ("other_date", other_dates(some, settings.most_pairs)),
        ("far", far_pairs(some, settings.most_pairs)),
    ):
        left, right = textured[pairs[0]], textured[pairs[1]]
        for a, b, value in zip(left, right, space.similarity(left, right), strict=True):
            rows.append((collections[a], name, ids[a], ids[b], round(float(value), 9)))
    columns = ["collection", "class", "chip_id", "other_id", "similarity"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:4], ignore_index=True)


def curve_of(known: pd.DataFrame) -> pd.DataFrame:
    """Precision, its bound and recall by threshold: rows of class ``all``.

    Rows of each other class give the share of its pairs at or above the threshold as ``recall``.
    """
    classes, values = known["class"].to_numpy(), known["similarity"].to_numpy(np.float64)
    alike = np.isin(classes, ALIKE)
    rows = []
    for threshold in GRID:
        above = values >= threshold
        true, false = int((above & alike).sum()), int((above & ~alike).sum())
        bound = recall_bound(true, true + false, CONFIDENCE)
        rows.append(("all", threshold, true / (true + false) if true + false else np.nan,
                     np.nan if bound is None else bound, _share(above, alike)))  # fmt: skip
        for name in (*ALIKE, *UNLIKE):
            rows.append((name, threshold, np.nan, np.nan, _share(above, classes == name)))
    return pd.DataFrame(
        rows, columns=["class", "threshold", "precision", "precision_bound", "recall"]
    )


def _share(above: NDArray[np.bool_], mine: NDArray[np.bool_]) -> float:
    return float(above[mine].mean()) if mine.any() else np.nan


def choose(curve: pd.DataFrame, known: pd.DataFrame, settings: CalibrateSettings) -> dict[str, Any]:
    """The lowest threshold from which on the bound of precision is high enough, and why."""
    alike = known["class"].isin(ALIKE)
    counts = {str(name): int(count) for name, count in known["class"].value_counts().items()}
    about: dict[str, Any] = {
        "positives": int(alike.sum()), "negatives": int((~alike).sum()),
        "pairs": dict(sorted(counts.items())),
    }  # fmt: skip
    whole = curve[curve["class"] == "all"].reset_index(drop=True)
    good = (whole["precision_bound"] >= settings.min_precision).to_numpy(np.bool_)
    bad = (whole["precision"] < settings.min_precision).to_numpy(np.bool_)
    # nothing above the threshold may fall below the precision asked for
    last_bad = int(np.flatnonzero(bad)[-1]) + 1 if bad.any() else 0
    candidates = np.flatnonzero(good & (np.arange(len(good)) >= last_bad))
    few = min(about["positives"], about["negatives"]) < settings.least_pairs
    if few or not len(candidates):
        why = (
            f"fewer than {settings.least_pairs} known pairs of a kind"
            if few
            else f"no threshold has a precision of {settings.min_precision:g} for sure"
        )
        return {"threshold": settings.default, "source": "default", "reason": why, **about}
    row = whole.iloc[int(candidates[0])]
    return {
        "threshold": float(row["threshold"]), "source": "calibrated",
        "reason": f"the lowest with a precision of {settings.min_precision:g} for sure",
        "precision": round(float(row["precision"]), 6),
        "precision_lower_bound": round(float(row["precision_bound"]), 6),
        "recall": round(float(row["recall"]), 6), **about,
    }  # fmt: skip


STAGE = Stage(
    name="calibrate",
    version="2",
    kind="calibration",
    inputs=("chips", "descriptors", "embeddings"),
    software=("numpy", "scipy", "shapely", "torch", "timm"),
    plan=plan,
    work=work,
    seal=seal,
    resolve=resolve,
)
