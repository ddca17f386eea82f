"""Evaluation sets in the stage ``pool``: their images as parts, chips checked against them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_catalog.errors import RunError
from data_catalog.stage import Job, Part
from data_catalog.tables import read_table, write_table
from geofm.config.recipe import CurateSettings
from geofm.dedup.describe import load_descriptors
from geofm.embeddings.embed import chip_encoder, encoder_device
from geofm.embeddings.store import load_vectors
from geofm.embeddings.vectors import make_space
from geofm.embeddings.weight_inputs import inherit_weights, load_inherited
from geofm.pool.decontaminate import Decontamination, EvaluationViews, decontaminate, view_images
from geofm.pool.registry import EvaluationSet, load_registry, registry_sha256

NOTHING = pd.DataFrame(
    {"row": np.empty(0, np.int64), "rule": "", "reason": "", "set": "", "witness": "",
     "similarity": np.empty(0)}
)  # fmt: skip


def registered(settings: CurateSettings) -> list[EvaluationSet]:
    """The evaluation sets of ``curate.evaluation_sets``; none where it is empty."""
    return load_registry(settings.evaluation_sets) if settings.evaluation_sets else []


def identity(settings: CurateSettings) -> str | None:
    """Digest of all that chips are checked against."""
    sets = registered(settings)
    return registry_sha256(sets) if sets else None


def resolve(job: Job) -> Job:
    """The job with the encoder of the embeddings among its inputs, where images are embedded."""
    embeds = bool(job.settings.evaluation_sets)
    return inherit_weights(job, "embeddings", "encoder") if embeds else job


def plan(job: Job) -> list[Part]:
    """One part per set with images; its key covers them, the chips' edge and the encoder."""
    embeddings = job.inputs["embeddings"].manifest
    edge = int(job.inputs["chips"].manifest.settings.get("size_px", 0))
    how = [edge, embeddings.facts.get("weights_sha256"), embeddings.settings]
    return [
        job.part({"set": one.name, "sha256": one.sha256, "edge": edge}, [one.sha256, *how], ())
        for one in registered(job.settings)
        if one.images
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe and embed the images of one set.

    Raises:
        RunError: when the set is not what was planned for.
    """
    sets = {one.name: one for one in registered(job.settings)}
    one = sets.get(part.payload["set"])
    if one is None or one.sha256 != part.payload["sha256"]:
        raise RunError(
            f"the evaluation set {part.payload['set']} changed while it was read; run again"
        )
    settings = job.inputs["embeddings"].manifest.settings
    weights = load_inherited(job, "embeddings", "encoder")
    encoder = chip_encoder(weights, settings["size_px"], encoder_device(job.device))
    views = view_images([one], part.payload["edge"] or None, encoder, settings["size_px"])
    table = views.descriptors.assign(id=views.ids)
    write_table(table, folder / "views.parquet")
    np.save(folder / "thumbnails.npy", views.thumbnails)
    if views.vectors is not None:
        np.save(folder / "vectors.npy", views.vectors)


def _views(sets: list[EvaluationSet], folders: list[Path]) -> EvaluationViews:
    """The parts of all sets in one."""
    names, tables, thumbnails, vectors = [], [], [], []
    for one, folder in zip([s for s in sets if s.images], folders, strict=True):
        table = read_table(folder / "views.parquet")
        names += [one.name] * len(table)
        tables.append(table)
        thumbnails.append(np.load(folder / "thumbnails.npy"))
        if (folder / "vectors.npy").exists():
            vectors.append(np.load(folder / "vectors.npy"))
    if not tables:
        return view_images([])
    joined = pd.concat(tables, ignore_index=True)
    return EvaluationViews(
        names, joined.pop("id").astype(str).tolist(), joined, np.concatenate(thumbnails),
        np.concatenate(vectors) if vectors else None,
    )  # fmt: skip


def check(job: Job, folders: list[Path], chips: pd.DataFrame) -> Decontamination:
    """Check every chip of a table (chip_id, geometry) against every registered set."""
    settings: CurateSettings = job.settings
    sets = registered(settings)
    if not sets:
        return Decontamination(NOTHING, {"sets": [], "chips_checked": len(chips)})
    ids = chips["chip_id"].astype(str).tolist()
    descriptors, thumbnails = load_descriptors(job.inputs["descriptors"], ids)
    space = make_space(load_vectors(job.inputs["embeddings"], ids))
    areas = np.asarray(chips["geometry"].to_numpy(), dtype=object)
    return decontaminate(
        areas, descriptors, thumbnails, space, sets, _views(sets, folders),
        buffer_m=settings.evaluation_buffer_m, embedding=settings.evaluation_similarity,
    )  # fmt: skip
