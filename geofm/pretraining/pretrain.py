"""Stage `pretrain`: a dataset -> a model.

plan    none: training is one piece of work, and its checkpoints make it resumable
seal    read the dataset                                   (data.py)
        load the teacher, and cache its features if set    (teacher.py)
        train                                              (loop.py; several processes: launch.py)
        write weights, config and card                     (export/)

``resolve`` replaces names of weights in the settings by digests, before the stage is looked up.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import UnknownReference, open_catalogue
from data_catalog.provenance.licences import source_licences
from data_catalog.provenance.lineage import ancestor
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.config.recipe import EXECUTION, PretrainSettings
from geofm.embeddings.weight_inputs import (
    find_weights,
    is_network,
    load_resolved,
    resolve_weights,
    select_input_bands,
    store_weights_file,
    weights_facts,
)
from geofm.embeddings.weights import WeightsMissing
from geofm.runtime.device import pick_device
from geofm.runtime.native import torch

if TYPE_CHECKING:  # modules that import torch; the functions below import them when they run
    from geofm.pretraining.data import Corpus
    from geofm.pretraining.loop import ResolvedWeights, TrainingResult
    from geofm.pretraining.teacher import Features, Teacher


def resolve(job: Job) -> Job:
    """Replace the names of weights in the settings by digests, and add models as inputs.

    Without distillation the teacher is no input of training; only evaluation may load it.
    """
    settings: PretrainSettings = job.settings
    fields = ["teacher"] if settings.alpha > 0 else []
    fields += ["student"] if settings.student_init == "pretrained" else []
    if settings.alpha == 0:
        teacher = _unused_teacher(job)
        job = replace(job, settings=settings.model_copy(update={"teacher": teacher}))
    return resolve_weights(job, *fields)


def _unused_teacher(job: Job) -> str:
    """Setting of a teacher that training does not load: without a path, and not downloaded."""
    settings: PretrainSettings = job.settings
    name, _, version = settings.teacher.partition("@")
    if settings.teacher.startswith("random:") or (is_network(name) and not version):
        return settings.teacher
    try:
        catalogue = open_catalogue(job.catalogue, job.store) if job.catalogue else None
        weights = find_weights(settings.teacher, catalogue)
    except WeightsMissing:
        return name
    store_weights_file(job, weights)
    return weights.setting


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Train, and write weights, config, metrics and card.

    Raises:
        TooFewSamples, BadStudent, WeightsMissing, Diverged, Interrupted: See ``loop.train``.
    """
    from geofm.pretraining.data import count_never_drawn, open_corpus
    from geofm.pretraining.export.card import write_model_card
    from geofm.pretraining.export.model import model_config, write_model
    from geofm.pretraining.launch import choose_workers, train_in_workers, wait_for_workers
    from geofm.pretraining.loop import train
    from geofm.pretraining.teacher import load_teacher

    dataset = job.inputs["dataset"]
    wait_for_workers(job.scratch)
    corpus = open_corpus(dataset, job.settings.statistics)
    settings, weights = _load_weights(job, corpus)
    device = pick_device(job.device)
    workers = choose_workers(job.how, device)
    teacher, features = None, None
    features_origin, caching_seconds = "live", 0.0
    if settings.alpha > 0 and settings.teacher_features == "once":
        teacher = load_teacher(settings, device, weights.teacher)
        started = time.perf_counter()
        features, features_origin = _cache_features(job, corpus, teacher, device)
        caching_seconds = time.perf_counter() - started
    if workers.processes == 1:
        result = train(
            corpus, settings, job.seed, device, job.scratch, None, workers, features, weights
        )
    else:
        result = train_in_workers(
            dataset, settings, job.seed, device, job.scratch, workers, features, weights
        )
    result = replace(result, teacher=result.teacher or teacher)
    never_drawn = count_never_drawn(corpus, job.seed, settings.epochs, settings.batch)
    facts = {
        **_model_facts(result, settings, weights),
        **({"teacher_features": features_origin} if result.teacher else {}),
        "bands": list(corpus.bands),
        "samples": len(corpus),
        "sources": dataset.manifest.facts.get("sources", []),
        # The last bits of sums depend on the device and the number of threads.
        "arithmetic": _arithmetic(device, workers.processes),
    }
    licences = source_licences(facts)
    write_model(result.module, model_config(settings, corpus, licences), folder)
    write_table(result.history, folder / "metrics.parquet")
    write_model_card(folder / "README.md", settings, dataset, facts, job.seed)
    teacher_seconds = result.metrics["teacher_seconds"] + caching_seconds
    return Sealed(
        counts={
            "rows_in": len(corpus),
            "rows_out": len(corpus) - never_drawn,
            "steps": len(result.history),
            "images": len(result.history) * settings.batch,
        },
        dropped={"never drawn": never_drawn} if never_drawn else {},
        facts=facts,
        # Only a CPU with as many threads (facts: arithmetic) repeats the bits.
        deterministic=False,
        metrics={**result.metrics, "teacher_seconds": teacher_seconds},
    )


def _load_weights(job: Job, corpus: Corpus) -> tuple[PretrainSettings, ResolvedWeights]:
    """Settings with timm names in place of resolved weights, and the weights."""
    from geofm.pretraining.loop import ResolvedWeights
    from geofm.pretraining.student import student_settings

    settings: PretrainSettings = job.settings
    teacher = load_resolved(job, "teacher") if settings.alpha > 0 else None
    if teacher is not None:
        settings = settings.model_copy(update={"teacher": teacher.network})
    if settings.student_init == "random":
        return settings, ResolvedWeights(teacher)
    student = select_input_bands(load_resolved(job, "student"), corpus.bands)
    return student_settings(settings, student), ResolvedWeights(teacher, student)


def _cache_features(
    job: Job, corpus: Corpus, teacher: Teacher, device: str
) -> tuple[Features, str]:
    """Cache the teacher's features, then move the teacher off the device."""
    from geofm.pretraining.teacher import cache_features

    cached = cache_features(corpus, teacher, _find_embeddings(job), device, job.scratch)
    teacher.encoder.model.cpu()
    if device == "cuda":
        torch.cuda.empty_cache()
    return cached


def _find_embeddings(job: Job) -> Artifact | None:
    """The vectors that the dataset was curated with, if the catalogue and the store have them."""
    catalogue, dataset = open_catalogue(job.catalogue, job.store), job.inputs["dataset"]
    if not catalogue.knows(dataset.digest):
        return None
    try:
        embeddings = ancestor(catalogue, dataset, "embeddings")
    except UnknownReference:
        return None
    return embeddings if job.store.has(embeddings) else None


def _arithmetic(device: str, processes: int) -> str:
    """Device, threads and processes, on which the last bits of the weights depend."""
    from geofm.pretraining.parallel import threads_per_process

    hardware = f"cpu, {threads_per_process(processes)} threads" if device == "cpu" else device
    return hardware if processes == 1 else f"{hardware}, in each of {processes} processes"


def _model_facts(
    result: TrainingResult, settings: PretrainSettings, weights: ResolvedWeights
) -> dict[str, Any]:
    """Facts of the manifest about student, teacher and objective."""
    backbone, teacher = result.module.student.backbone, result.teacher
    roles = {"teacher": weights.teacher, "student": weights.student}
    files = {role: weights_facts(file) for role, file in roles.items() if file is not None}
    return {
        "student": settings.student.partition("@")[0],
        "student_init": settings.student_init,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "teacher": settings.teacher.partition("@")[0] if teacher else "",
        "teacher_weights_sha256": teacher.encoder.weights_sha256 if teacher else "",
        "weights": files,
        "weights_licences": {role: facts["licence"] for role, facts in files.items()},
        "teacher_width": teacher.width if teacher else 0,
        "alpha": settings.alpha,
        "mim_weight": settings.mim_weight,
        "distill_stage": settings.distill_stage,
        "loss": float(result.history["loss"].iloc[-1]),
    }


STAGE = Stage(
    name="pretrain",
    version="2",
    kind="model",
    inputs=("dataset",),
    software=("torch", "timm", "numpy", "safetensors", "lightning-fabric"),
    plan=no_parts,
    work=no_work,
    seal=seal,
    seeded=True,
    exclusive=True,
    fields=tuple(name for name in PretrainSettings.model_fields if name not in EXECUTION),
    resolve=resolve,
    device=pick_device,
)
