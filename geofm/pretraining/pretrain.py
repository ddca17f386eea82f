"""Stage ``pretrain``: a dataset in, a model out. One piece of work; it resumes by itself."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import UnknownReference, open_catalogue
from data_catalog.provenance.lineage import ancestor
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.tables import write_table
from geofm.config.recipe import EXECUTION, PretrainSettings
from geofm.embeddings.weight_inputs import (
    bands_of,
    find_weights,
    is_network,
    keep_file,
    own_weights,
    use_weights,
    weights_facts,
)
from geofm.embeddings.weights import WeightsMissing
from geofm.runtime.device import pick_device
from geofm.runtime.native import torch

if TYPE_CHECKING:  # these import torch
    from geofm.pretraining.data import Corpus
    from geofm.pretraining.loop import Sources, Trained


def resolve(job: Job) -> Job:
    """The job with the digests of the weights that training reads.

    Without distillation the teacher is no input: evaluation alone may look at it.
    """
    settings: PretrainSettings = job.settings
    fields = ["teacher"] if settings.alpha > 0 else []
    fields += ["student"] if settings.student_init == "pretrained" else []
    if settings.alpha == 0:
        job = replace(job, settings=settings.model_copy(update={"teacher": _unused(job)}))
    return use_weights(job, *fields)


def _unused(job: Job) -> str:
    """The teacher's setting where nothing is distilled: no path, and nothing is fetched for it."""
    named: PretrainSettings = job.settings
    base, _, after = named.teacher.partition("@")
    if named.teacher.startswith("random:") or (is_network(base) and not after):
        return named.teacher
    try:
        catalogue = open_catalogue(job.catalogue, job.store) if job.catalogue else None
        weights = find_weights(named.teacher, catalogue)
    except WeightsMissing:
        return base
    keep_file(job, weights)
    return weights.setting


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Train, and write weights, config, metrics and card.

    Raises:
        TooFewSamples, BadStudent, WeightsMissing, Diverged, Interrupted: see ``loop.train``.
    """
    from geofm.pretraining.data import never_drawn, open_corpus
    from geofm.pretraining.export.card import write_card
    from geofm.pretraining.export.model import describe, write_model
    from geofm.pretraining.launch import await_others, team_of, train_together
    from geofm.pretraining.loop import train
    from geofm.pretraining.teacher import features_once, load_teacher

    dataset = job.inputs["dataset"]
    await_others(job.scratch)
    corpus = open_corpus(dataset, job.settings.statistics)
    settings, sources = _sources(job, corpus)
    device = pick_device(job.device)
    team = team_of(job.how, device)
    teacher = taught = None
    features, asking = "live", 0.0
    if settings.alpha > 0 and settings.teacher_features == "once":
        teacher = load_teacher(settings, device, sources.teacher)
        started = time.perf_counter()
        taught, features = features_once(corpus, teacher, _embeddings(job), device, job.scratch)
        asking = time.perf_counter() - started
        teacher.encoder.model.cpu()  # the device is the student's from here on
        if device == "cuda":
            torch.cuda.empty_cache()
    if team.processes == 1:
        trained = train(
            corpus, settings, job.seed, device, job.scratch, None, team, taught, sources
        )
    else:
        trained = train_together(
            dataset, settings, job.seed, device, job.scratch, team, taught, sources
        )
    trained = replace(trained, teacher=trained.teacher or teacher)
    unseen = never_drawn(corpus, job.seed, settings.epochs, settings.batch)
    facts = {
        **_facts(trained, settings, sources),
        **({"teacher_features": features} if trained.teacher else {}),
        "bands": list(corpus.bands),
        "samples": len(corpus),
        "sources": dataset.manifest.facts.get("sources", []),
        # sums differ in their last bits with the number of threads
        "arithmetic": _arithmetic(device, team.processes),
    }
    terms = sorted({str(source["licence"]) for source in facts["sources"]})
    write_model(trained.module, describe(settings, corpus, terms), folder)
    write_table(trained.history, folder / "metrics.parquet")
    write_card(folder / "README.md", settings, dataset, facts, job.seed)
    return Sealed(
        counts={
            "rows_in": len(corpus),
            "rows_out": len(corpus) - unseen,
            "steps": len(trained.history),
            "images": len(trained.history) * settings.batch,
        },
        dropped={"never drawn": unseen} if unseen else {},
        facts=facts,
        # bit-equal only on a CPU with as many threads (facts: arithmetic): not promised
        deterministic=False,
        metrics={
            **trained.metrics,
            "teacher_seconds": trained.metrics["teacher_seconds"] + asking,
        },
    )


def _sources(job: Job, corpus: Corpus) -> tuple[PretrainSettings, Sources]:
    """The settings with timm names in place of resolved weights, and these weights."""
    from geofm.pretraining.loop import Sources
    from geofm.pretraining.student import as_timm_student

    settings: PretrainSettings = job.settings
    teacher = own_weights(job, "teacher") if settings.alpha > 0 else None
    if teacher is not None:
        settings = settings.model_copy(update={"teacher": teacher.network})
    if settings.student_init == "random":
        return settings, Sources(teacher)
    student = bands_of(own_weights(job, "student"), corpus.bands)
    return as_timm_student(settings, student), Sources(teacher, student)


def _embeddings(job: Job) -> Artifact | None:
    """The vectors that the dataset was curated by, where the catalogue knows them."""
    catalogue, dataset = open_catalogue(job.catalogue, job.store), job.inputs["dataset"]
    if not catalogue.knows(dataset.digest):
        return None
    try:
        found = ancestor(catalogue, dataset, "embeddings")
    except UnknownReference:
        return None
    return found if job.store.has(found) else None


def _arithmetic(device: str, processes: int) -> str:
    """What the last bits of a result depend on."""
    from geofm.pretraining.parallel import threads_each

    where = f"cpu, {threads_each(processes)} threads" if device == "cpu" else device
    return where if processes == 1 else f"{where}, in each of {processes} processes"


def _facts(trained: Trained, settings: PretrainSettings, sources: Sources) -> dict[str, Any]:
    backbone, teacher = trained.module.student.backbone, trained.teacher
    used = {"teacher": sources.teacher, "student": sources.student}
    weights = {role: weights_facts(found) for role, found in used.items() if found is not None}
    return {
        "student": settings.student.partition("@")[0],
        "student_init": settings.student_init,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "teacher": settings.teacher.partition("@")[0] if teacher else "",
        "teacher_weights_sha256": teacher.encoder.weights_sha256 if teacher else "",
        "weights": weights,
        "weights_licences": {role: found["licence"] for role, found in weights.items()},
        "teacher_width": teacher.width if teacher else 0,
        "alpha": settings.alpha,
        "mim_weight": settings.mim_weight,
        "distill_stage": settings.distill_stage,
        "loss": float(trained.history["loss"].iloc[-1]),
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
