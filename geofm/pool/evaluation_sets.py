"""Evaluation sets in the stage ``pool``: their images as parts, and the check of all chips."""

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
from geofm.pool.decontaminate import (
    Decontamination,
    EvaluationViews,
    decontaminate,
    hit_rows,
    view_images,
)
from geofm.pool.registry import EvaluationSet, load_registry, registry_sha256


def identity(settings: CurateSettings) -> str | None:
    """Return the digest of the content of all evaluation sets; None without evaluation sets."""
    sets = registered_sets(settings)
    return registry_sha256(sets) if sets else None


def registered_sets(settings: CurateSettings) -> list[EvaluationSet]:
    """Load the evaluation sets of ``curate.evaluation_sets``; none if it is empty."""
    return load_registry(settings.evaluation_sets) if settings.evaluation_sets else []


def resolve(job: Job) -> Job:
    """Add the encoder of the embeddings to the job's inputs, if images are embedded."""
    embeds = bool(job.settings.evaluation_sets)
    return inherit_weights(job, "embeddings", "encoder") if embeds else job


def plan(job: Job) -> list[Part]:
    """List one part per set with images; its key covers them, the chips' edge and the encoder."""
    embeddings = job.inputs["embeddings"].manifest
    edge = int(job.inputs["chips"].manifest.settings.get("size_px", 0))
    encoder = [edge, embeddings.facts.get("weights_sha256"), embeddings.settings]
    return [
        job.part(
            {"set": evaluation.name, "sha256": evaluation.sha256, "edge": edge},
            [evaluation.sha256, *encoder],
            (),
        )
        for evaluation in registered_sets(job.settings)
        if evaluation.images
    ]


def work(job: Job, part: Part, folder: Path) -> None:
    """Describe and embed the images of one set.

    Raises:
        RunError: The set has changed since it was planned.
    """
    name = part.payload["set"]
    sets = {evaluation.name: evaluation for evaluation in registered_sets(job.settings)}
    if name not in sets or sets[name].sha256 != part.payload["sha256"]:
        raise RunError(f"the evaluation set {name} changed while it was read; run again")
    settings = job.inputs["embeddings"].manifest.settings
    weights = load_inherited(job, "embeddings", "encoder")
    encoder = chip_encoder(weights, settings["size_px"], encoder_device(job.device))
    views = view_images([sets[name]], part.payload["edge"] or None, encoder, settings["size_px"])
    write_table(views.descriptors.assign(id=views.ids), folder / "views.parquet")
    np.save(folder / "thumbnails.npy", views.thumbnails)
    if views.vectors is not None:
        np.save(folder / "vectors.npy", views.vectors)


def check(job: Job, folders: list[Path], chips: pd.DataFrame) -> Decontamination:
    """Check each chip of a table (chip_id, geometry) against each registered set."""
    settings: CurateSettings = job.settings
    sets = registered_sets(settings)
    if not sets:
        return Decontamination(hit_rows(), {"sets": [], "chips_checked": len(chips)})
    ids = chips["chip_id"].astype(str).tolist()
    descriptors, thumbnails = load_descriptors(job.inputs["descriptors"], ids)
    return decontaminate(
        np.asarray(chips["geometry"].to_numpy(), dtype=object),
        descriptors,
        thumbnails,
        make_space(load_vectors(job.inputs["embeddings"], ids)),
        sets,
        _join_views(sets, folders),
        buffer_m=settings.evaluation_buffer_m,
        embedding=settings.evaluation_similarity,
    )


def _join_views(sets: list[EvaluationSet], folders: list[Path]) -> EvaluationViews:
    """Join the parts of all sets with images."""
    names, tables, thumbnails, vectors = [], [], [], []
    with_images = [evaluation for evaluation in sets if evaluation.images]
    for evaluation, folder in zip(with_images, folders, strict=True):
        table = read_table(folder / "views.parquet")
        names += [evaluation.name] * len(table)
        tables.append(table)
        thumbnails.append(np.load(folder / "thumbnails.npy"))
        if (folder / "vectors.npy").exists():
            vectors.append(np.load(folder / "vectors.npy"))
    if not tables:
        return view_images([])
    joined = pd.concat(tables, ignore_index=True)
    return EvaluationViews(
        sets=names,
        ids=joined.pop("id").astype(str).tolist(),
        descriptors=joined,
        thumbnails=np.concatenate(thumbnails),
        vectors=np.concatenate(vectors) if vectors else None,
    )
