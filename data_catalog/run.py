"""The orchestrator: run one stage and record the run in the catalogue.

run_stage    make the job from inputs and settings, and run it
run_job      take the artifact from the catalogue if the job was done before; else
               plan_parts    list the parts of the job
               mapper        work on the missing parts, in this process or on other workers
               seal          write, hash and publish the artifact

This module does not know what a stage does, which stages there are, or where parts are computed:
the caller passes a ``PartMapper``. The command line uses ``map_in_process``, the Prefect flows
submit tasks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.items import note_items, postponed_items
from data_catalog.database.part_costs import note_parts, reused_costs
from data_catalog.database.schema import RunRow
from data_catalog.errors import RunError
from data_catalog.hashing import canonical
from data_catalog.manifest import Manifest, software_versions
from data_catalog.progress import report_stage, say, tick
from data_catalog.stage import Job, Part, Stage
from data_catalog.storage.process import (
    one_blas_thread,
    peak_memory_mib,
    return_freed_memory,
)
from data_catalog.store import Store, list_files, part_files_by_inode

log = logging.getLogger("geofm.run")

#: Parts that are looked up at once in an object store.
LOOKUPS = 16


class PartProgress(NamedTuple):
    """Progress that a mapper reports: parts that are there now, and how many it computed."""

    finished: int
    computed: int


#: ``mapper(stage, job, parts)`` computes the parts that are not in the store and reports progress
#: as it goes; the ``finished`` of all reports add up to ``len(parts)``.
PartMapper = Callable[[Stage, Job, list[Part]], Iterable[PartProgress]]

#: ``meter(name, keep)`` measures a block: it gives a dictionary that is complete at the end of the
#: block (``seconds``, perhaps energy), and passes the figures so far to ``keep`` from time to time.
StageMeter = Callable[
    [str, Callable[[dict[str, Any]], None]], AbstractContextManager[dict[str, Any]]
]


@dataclass(frozen=True)
class JobResult:
    """The artifact of a job, and the metrics of the run.

    Attributes:
        metrics: times, memory, parts and the metrics of the stage; ``cached`` is True if the
            artifact was in the catalogue before.
    """

    artifact: Artifact
    metrics: dict[str, Any]


def map_in_process(stage: Stage, job: Job, parts: list[Part]) -> Iterator[PartProgress]:
    """Work on the missing parts in this process, part by part: the default mapper."""
    for part in parts:
        yield PartProgress(1, work_parts(stage, job, [part]))


@contextmanager
def measure_seconds(name: str, keep: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """Measure the seconds of a block and nothing else: the default meter."""
    spent: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        yield spent
    finally:
        spent["seconds"] = time.perf_counter() - started
        keep(dict(spent))


def run_stage(
    stage: Stage,
    store: Store,
    catalogue: Catalogue,
    inputs: Mapping[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
    meter: StageMeter = measure_seconds,
    mapper: PartMapper = map_in_process,
) -> Artifact:
    """Run a stage on inputs and settings, and return its artifact.

    Args:
        stage: The stage.
        store: Store for the artifact and its parts.
        catalogue: Record of the run.
        inputs: Artifacts by role; those that the stage does not name are ignored.
        settings: The stage's section of the recipe.
        seed: Seed, used by stages that draw random numbers.
        device: ``cpu``, ``cuda`` or ``auto``.
        meter: Measures the work, e.g. its energy.
        mapper: Works on the missing parts.
    """
    job = make_job(stage, store, inputs, settings, seed, device, catalogue.url)
    return run_job(stage, job, catalogue, mapper, meter).artifact


def run_job(
    stage: Stage,
    job: Job,
    catalogue: Catalogue,
    mapper: PartMapper = map_in_process,
    meter: StageMeter = measure_seconds,
    wait: bool = True,
) -> JobResult:
    """Run a job, unless the catalogue has its artifact, and record the run.

    Args:
        stage: The job's stage.
        job: The job, as ``make_job`` returns it.
        catalogue: Record of the run; it also keeps the lease of an exclusive stage.
        mapper: Works on the missing parts.
        meter: Measures the work.
        wait: Wait while another process runs the same job of an exclusive stage.

    Raises:
        LeaseHeld, Locked: Another process runs the job and ``wait`` is False.
        LeaseLost: Another process has taken over the job; nothing was recorded.
    """
    job = with_previous(stage, job, catalogue)
    with attempt(stage, job, catalogue, wait) as (run, existing, confirm):
        if existing is None:
            artifact, run.metrics = _compute(
                stage, job, catalogue, mapper, meter, partial(catalogue.keep, run)
            )
            if catalogue.knows(artifact.digest):
                # a live stage found the outside world unchanged
                run.metrics = {"cached": True, **run.metrics}
            confirm()
            catalogue.record(artifact, job.key)
        else:
            artifact, run.metrics = existing, {"cached": True}
        note_states(stage, job, artifact, catalogue, existing is None)
        run.artifact = artifact.digest
    if run.metrics.get("cached"):
        say(stage.name, 1, 1, "unchanged" if existing is None else "found in the catalogue")
    log.info("%s: %s %s", stage.name, stage.kind, artifact.digest[:12])
    return JobResult(artifact, run.metrics)


def _compute(
    stage: Stage,
    job: Job,
    catalogue: Catalogue,
    mapper: PartMapper,
    meter: StageMeter,
    keep: Callable[[dict[str, Any]], None],
) -> tuple[Artifact, dict[str, Any]]:
    """Plan, map and seal a job; returns the artifact and the metrics of the run."""
    parts: list[Part] = []
    found: set[str] = set()
    spent: dict[str, Any] = {}
    mapped_seconds = 0.0
    try:
        with meter(stage.name, keep) as spent, report_stage(stage.name, stage.unit) as progress:
            parts = plan_parts(stage, job)
            found = finished_parts(job, parts)
            spent.update(parts=len(parts), parts_worked=0)
            progress.begin([(part.key, part.rows) for part in parts], found, job.store.has_part)
            finished, started = 0, time.perf_counter()
            try:
                for done in mapper(stage, job, parts):
                    finished += done.finished
                    spent["parts_worked"] += done.computed
                    tick(stage.name, finished, len(parts) + 1, "parts")
            finally:
                mapped_seconds = time.perf_counter() - started
            progress.seal()
            artifact, reported = seal(stage, job, parts)
    finally:  # parts of a failed run are used by the next one
        _note_part_costs(stage, job, catalogue, parts, found, spent, mapped_seconds)
        return_freed_memory()
    metrics = {
        "gpu_seconds": spent["seconds"] * gpus_held(stage, job),
        "workers": job.how.get("workers", 1),
        "peak_mib": peak_memory_mib(),
    }
    if found:
        metrics["reused"] = reused_costs(catalogue, job.key, sorted(found))
    return artifact, {**spent, **metrics, **reported}


def finished_parts(job: Job, parts: Sequence[Part]) -> set[str]:
    """Return the keys of the parts that are in the store."""
    keys = list({part.key for part in parts})
    if job.store.is_local:
        return {key for key in keys if job.store.has_part(key)}
    with ThreadPoolExecutor(LOOKUPS, thread_name_prefix="geofm-lookup") as pool:
        found = pool.map(job.store.has_part, keys)
        return {key for key, is_there in zip(keys, found, strict=True) if is_there}


def _note_part_costs(
    stage: Stage,
    job: Job,
    catalogue: Catalogue,
    parts: Sequence[Part],
    found: set[str],
    spent: Mapping[str, Any],
    mapped_seconds: float,
) -> None:
    """Record the cost of the parts that this run computed, for later runs that use them."""
    if not spent.get("parts_worked") or not spent.get("seconds"):
        return
    there = finished_parts(job, [part for part in parts if part.key not in found])
    computed = [part for part in parts if part.key in there]
    share = min(1.0, mapped_seconds / spent["seconds"])
    costs = {name: spent[name] * share if name in spent else None for name in ("kwh", "kg_co2e")}
    costs |= {"seconds": mapped_seconds, "gpu_seconds": mapped_seconds * gpus_held(stage, job)}
    note_parts(catalogue, job.key, computed, costs)


def make_job(
    stage: Stage,
    store: Store,
    inputs: Mapping[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
    catalogue: str = "",
    how: Mapping[str, Any] | None = None,
) -> Job:
    """Make a stage's job from the inputs that the stage names, and those that its settings name.

    Args:
        stage: The stage.
        store: Store for the artifact and its parts.
        inputs: Artifacts by role; those that the stage does not name are ignored.
        settings: The stage's section of the recipe.
        seed: Seed, used by stages that draw random numbers.
        device: ``cpu``, ``cuda`` or ``auto``.
        catalogue: Address of the catalogue, for stages that read the record.
        how: Number of workers and the like, as JSON; never part of the key.
    """
    job = Job(
        stage=stage.name,
        version=stage.version,
        seeded=stage.seeded,
        store=store,
        inputs={role: inputs[role] for role in stage.inputs},
        settings=settings,
        seed=seed if stage.seeded else 0,
        device=device,
        how=dict(how or {}),
        catalogue=catalogue,
        fields=stage.fields,
        reads=None if stage.reads is None else stage.reads(settings),
        exclusive=stage.exclusive,
    )
    return job if stage.resolve is None else stage.resolve(job)


def with_previous(stage: Stage, job: Job, catalogue: Catalogue) -> Job:
    """Give a job the results of earlier runs: the previous artifact, and the postponed items.

    A previous artifact is given to stages that are ``live`` or that ``follow`` their last run, if
    it is still in the store.
    """
    if stage.states is not None:
        job = replace(job, postponed=postponed_items(catalogue, job.record))
    catalogue = catalogue.at(job.store)
    previous = catalogue.last_made(job.key) if stage.live else None
    if stage.follows:
        previous = _last_followed(stage, job, catalogue)
    if previous is None or not job.store.has(previous):
        return job
    return replace(job, previous=previous)


def _last_followed(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """Find the last result of a stage that follows: same settings and seed, any inputs.

    A stage that reports item states follows only a run over the same search.
    """
    settings = job.identity["settings"]
    names = settings.keys() if stage.follows_fields is None else stage.follows_fields
    wanted = {name: settings[name] for name in names}
    searches = {role: artifact.manifest.settings for role, artifact in job.inputs.items()}
    for artifact, manifest in catalogue.results_of(stage.name):
        if [manifest["version"], manifest["seed"]] != [stage.version, job.seed]:
            continue
        own = manifest["settings"]
        if stage.follows_fields is not None:
            own = {name: own.get(name) for name in names}
        if own != wanted:
            continue
        parents = {role: catalogue.manifest(digest) for role, digest in manifest["inputs"].items()}
        if stage.states is None or searches == {
            role: parent.settings for role, parent in parents.items() if parent is not None
        }:
            return artifact
    return None


@contextmanager
def attempt(
    stage: Stage, job: Job, catalogue: Catalogue, wait: bool = True
) -> Iterator[tuple[RunRow, Artifact | None, Callable[[], None]]]:
    """Record a run of a job while the block runs; keep other processes out of an exclusive stage.

    A process that has waited uses the artifact of the other process, or continues its work.

    Yields:
        The run record, the artifact if the job was done before, and a function to call before the
        result is recorded: it raises LeaseLost if another process has taken over the job.

    Raises:
        LeaseHeld, Locked: Another process runs the job and ``wait`` is False.
    """
    artifact, confirm = find(stage, job, catalogue), _confirm_nothing
    with ExitStack() as stack:
        if artifact is None and stage.exclusive:
            # The lease excludes machines that share the catalogue. The lock excludes processes of
            # this machine that use another catalogue, or have lost the lease without noticing.
            name = f"{stage.name} job {job.key[:32]}"
            confirm = stack.enter_context(catalogue.lease(name, wait, verb="run")).confirm
            stack.enter_context(job.store.lock_scratch(job.key, wait))
            artifact = find(stage, job, catalogue)
        yield stack.enter_context(catalogue.run(stage.name, job.key)), artifact, confirm


def _confirm_nothing() -> None:
    """Do nothing: the stage is not exclusive."""


def find(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """Find the artifact of an earlier run of this job, if it is still in the store.

    An artifact that lacks items (``facts["retry"]``) counts only while none of them is due for
    another attempt; otherwise the job runs again. A live stage always runs.
    """
    if stage.live:
        return None
    catalogue_here = catalogue.at(job.store)
    artifact = catalogue_here.last_made(job.key) or catalogue_here.find(job.key)
    if artifact is None or not job.store.has(artifact):
        return None
    if not artifact.manifest.facts.get("retry"):
        return artifact
    states = stage.states(job, artifact) if stage.states else {}
    waiting = {(*key, state.item_sha256) for key, state in states.items() if state.is_retried}
    return artifact if waiting and waiting <= job.postponed.keys() else None


def plan_parts(stage: Stage, job: Job) -> list[Part]:
    """Plan a job's parts, and keep the plan in the store, where workers read it."""
    parts = stage.plan(job)
    plan = canonical([{"key": p.key, "payload": p.payload, "rows": p.rows} for p in parts])
    job.store.write_whole(job.store.plan_file(job.key), plan)
    return parts


def read_plan(job: Job) -> list[Part]:
    """Read the parts that were planned for a job."""
    plan = json.loads(job.store.plan_file(job.key).read_bytes())
    return [Part(p["key"], p["payload"], p["rows"]) for p in plan]


def work_parts(stage: Stage, job: Job, parts: list[Part]) -> int:
    """Compute the missing parts, ``stage.at_once`` of them at a time.

    Workers share the cores of a machine, so BLAS computes with one thread meanwhile.

    Returns:
        Number of parts computed.

    Raises:
        Exception: The first exception of the stage's work; parts that have not started are not
            computed.
    """
    missing = [part for part in parts if not job.store.has_part(part.key)]
    threads = min(stage.at_once, len(missing))
    with one_blas_thread(), ExitStack() as stack:
        if threads < 2:
            for part in missing:
                _work_on_part(stage, job, part)
            return len(missing)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="geofm-part")
        stack.callback(pool.shutdown, cancel_futures=True)  # also when a user interrupts
        # each thread in a context of its own, which knows the stage whose progress it reports
        calls = [
            pool.submit(copy_context().run, _work_on_part, stage, job, part) for part in missing
        ]
        for call in as_completed(calls):
            call.result()
    return len(missing)


def _work_on_part(stage: Stage, job: Job, part: Part) -> None:
    """Compute one part and publish it."""
    with job.store.staging() as out:
        stage.work(job, part, out)
        job.store.publish_part(part.key, out)


def seal(stage: Stage, job: Job, parts: list[Part]) -> tuple[Artifact, dict[str, Any]]:
    """Write, hash and publish the artifact; returns it with the metrics that the stage reports."""
    folders = [_whole_part(stage, job, part) for part in parts]
    known = part_files_by_inode(folders)
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
            files=list_files(out, known),
        )
        artifact = job.store.publish(out, manifest, known)
    return artifact, sealed.metrics


def _whole_part(stage: Stage, job: Job, part: Part) -> Path:
    """Return a part's folder with every file as published; a damaged part is computed again."""
    for _ in range(2):
        work_parts(stage, job, [part])
        folder = job.store.fetch_part(part.key)
        if folder is not None:
            return folder
    raise RunError(
        f"part {part.key} of stage {stage.name} was computed again and is damaged again; check the "
        f"disk or object store of {job.store.url}"
    )


def note_states(
    stage: Stage, job: Job, artifact: Artifact, catalogue: Catalogue, computed: bool
) -> None:
    """Enter the state of each item into the catalogue, if the stage reports states.

    A run that ``computed`` the artifact tried to read the items that wait, except postponed ones.
    """
    if stage.states is not None:
        states = stage.states(job, artifact)
        note_items(catalogue, job.record, states, computed, job.postponed)


def gpus_held(stage: Stage, job: Job) -> int:
    """Count the GPUs that a stage's work keeps busy on this machine: 1 if it runs on a GPU."""
    return int(stage.device is not None and stage.device(job.device) == "cuda")
