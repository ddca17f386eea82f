"""Running a stage: look it up, plan, work on what is missing, seal, record.

The pieces are separate so that a scheduler can map the middle one; ``run_stage`` strings them
together in one process. Nothing here knows what a stage does.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.canonical import canonical
from data_catalog.catalogue import Catalogue
from data_catalog.manifest import Manifest, software_versions
from data_catalog.progress import tick
from data_catalog.stage import Job, Part, Stage
from data_catalog.store import Store, list_files

log = logging.getLogger("geofm.run")


def make_job(
    stage: Stage,
    store: Store,
    inputs: dict[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
    catalogue: str = "",
) -> Job:
    """A stage's job with exactly the inputs that the stage names."""
    return Job(
        stage=stage.name,
        version=stage.version,
        seeded=stage.seeded,
        store=store,
        inputs={role: inputs[role] for role in stage.inputs},
        settings=settings,
        seed=seed if stage.seeded else 0,
        device=device,
        catalogue=catalogue,
    )


def find(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """The artifact that this very job made before, if it is still in the store."""
    if stage.live:
        return None
    artifact = catalogue.find(job.key)
    return artifact if artifact is not None and job.store.has(artifact) else None


def plan_parts(stage: Stage, job: Job) -> list[Part]:
    """The parts of a job, kept in the store: a resumed job and its workers read the same plan."""
    kept = job.store.plan_file(job.key)
    if not stage.live and kept.exists():
        return read_plan(job)
    parts = stage.plan(job)
    plan = canonical([{"key": p.key, "payload": p.payload} for p in parts])
    job.store.write_whole(kept, plan)
    return parts


def read_plan(job: Job) -> list[Part]:
    """The parts that were planned for a job."""
    plan = json.loads(job.store.plan_file(job.key).read_bytes())
    return [Part(p["key"], p["payload"]) for p in plan]


def work_parts(stage: Stage, job: Job, parts: list[Part]) -> int:
    """Compute those of the parts that are not there yet; returns how many that were."""
    computed = 0
    for part in parts:
        if job.store.has_part(part.key):
            continue
        with job.store.staging() as folder:
            out = folder / "part"
            out.mkdir()
            stage.work(job, part, out)
            job.store.publish_part(part.key, out)
        computed += 1
    return computed


def seal(stage: Stage, job: Job, parts: list[Part]) -> tuple[Artifact, dict[str, Any]]:
    """Write, hash and publish the artifact; returns it with the run's metrics."""
    folders = [job.store.fetch_part(part.key) for part in parts]
    with job.store.staging() as folder:
        out = folder / "artifact"
        out.mkdir()
        sealed = stage.seal(job, folders, out)
        manifest = Manifest(
            kind=stage.kind,
            stage=stage.name,
            version=stage.version,
            inputs={role: artifact.digest for role, artifact in job.inputs.items()},
            settings=job.identity["settings"],
            seed=job.seed,
            software=software_versions(stage.software),
            counts=sealed.counts,
            dropped=dict(sorted(sealed.dropped.items())),
            facts=sealed.facts,
            deterministic=sealed.deterministic,
            files=list_files(out),
        )
        artifact = job.store.publish(out, manifest)
    return artifact, sealed.metrics


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_stage(
    stage: Stage,
    store: Store,
    catalogue: Catalogue,
    inputs: dict[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
) -> Artifact:
    """Run one stage in this process: from the catalogue, or part by part."""
    job = make_job(stage, store, inputs, settings, seed, device, catalogue.url)
    with catalogue.run(stage.name, job.key) as run:
        artifact = find(stage, job, catalogue)
        if artifact is None:
            started = time.process_time()
            parts = plan_parts(stage, job)
            for number, part in enumerate(parts):
                work_parts(stage, job, [part])
                tick(stage.name, number + 1, len(parts))
            artifact, metrics = seal(stage, job, parts)
            catalogue.record(artifact, job.key)
            metrics = {**metrics, "cpu_seconds": time.process_time() - started}
            run.metrics = {**metrics, "peak_mib": peak_memory_mib()}
        else:
            run.metrics = {"cached": True}
        run.artifact = artifact.digest
    log.info("%s: %s %s", stage.name, stage.kind, artifact.digest[:12])
    return artifact
