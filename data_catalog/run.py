"""Running a stage: look it up, plan, work on what is missing, seal, record.

The pieces are separate so that a scheduler can map the middle one; ``run_stage`` strings them
together in one process. Nothing here knows what a stage does.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.crew import count_others, work_together
from data_catalog.database.items import note_items, postponed_items
from data_catalog.database.schema import RunRow
from data_catalog.errors import RunError
from data_catalog.hashing import canonical
from data_catalog.manifest import Manifest, software_versions
from data_catalog.progress import tick
from data_catalog.stage import Job, Part, Stage
from data_catalog.storage.process import cores
from data_catalog.store import Store, linked, list_files

log = logging.getLogger("geofm.run")
#: What ``next`` says of work that has no further step.
DONE = object()


def make_job(
    stage: Stage,
    store: Store,
    inputs: dict[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
    catalogue: str = "",
) -> Job:
    """A stage's job with the inputs that the stage names, and those that its settings name."""
    job = Job(
        stage=stage.name,
        version=stage.version,
        seeded=stage.seeded,
        store=store,
        inputs={role: inputs[role] for role in stage.inputs},
        settings=settings,
        seed=seed if stage.seeded else 0,
        device=device,
        catalogue=catalogue,
        fields=stage.fields,
        reads=None if stage.reads is None else stage.reads(settings),
        exclusive=stage.exclusive,
    )
    return job if stage.resolve is None else stage.resolve(job)


def find(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """Find the artifact that this very job made before, if it is still in the store.

    An artifact that lacks items (``facts["retry"]``) is served only while none of them is due to
    be asked again; else the job runs once more.
    """
    if stage.live:
        return None
    here = catalogue.at(job.store)
    artifact = here.last_made(job.key) or here.find(job.key)
    if artifact is None or not job.store.has(artifact):
        return None
    if not artifact.manifest.facts.get("retry"):
        return artifact
    states = stage.states(job, artifact) if stage.states else {}
    waiting = {(*key, state.item_sha256) for key, state in states.items() if state.asked_again}
    return artifact if waiting and waiting <= job.postponed.keys() else None


@contextmanager
def attempt(
    stage: Stage, job: Job, catalogue: Catalogue, wait: bool = True
) -> Iterator[tuple[RunRow, Artifact | None, Callable[[], None]]]:
    """Record a run of a job while the block runs; of an exclusive stage, keep other processes out.

    A process that had to wait finds what the other one made, or goes on where that one ended.

    Args:
        stage: The job's stage.
        job: What is run.
        catalogue: Keeps the record and the lease.
        wait: Wait while another process runs the same job.

    Yields:
        The run record, the artifact if the job was done before, and a function to call before the
        result is recorded: it raises LeaseLost if another process has taken over the job.

    Raises:
        LeaseHeld, Locked: Another process runs the job and ``wait`` is False.
    """
    found, confirm = find(stage, job, catalogue), _nothing
    with ExitStack() as held:
        if found is None and stage.exclusive:
            # the lease excludes the machines that share the catalogue; the lock those processes of
            # this machine that use another catalogue, or have lost the lease and don't know it yet
            name = f"{stage.name} job {job.key[:32]}"
            confirm = held.enter_context(catalogue.lease(name, wait, verb="run")).confirm
            held.enter_context(job.store.lock_scratch(job.key, wait))
            found = find(stage, job, catalogue)
        yield held.enter_context(catalogue.run(stage.name, job.key)), found, confirm


def _nothing() -> None:
    """Confirm nothing: the stage is not exclusive."""


def with_previous(stage: Stage, job: Job, catalogue: Catalogue) -> Job:
    """Give a job what earlier runs left: the last result, and the items not to be asked yet.

    The last result is that of a live or following stage, if it is still in the store.
    """
    if stage.states is not None:
        job = replace(job, postponed=postponed_items(catalogue, job.record))
    here = catalogue.at(job.store)
    before = here.last_made(job.key) if stage.live else None
    if stage.follows:
        before = _last_like(stage, job, here)
    return job if before is None or not job.store.has(before) else replace(job, previous=before)


def _last_like(stage: Stage, job: Job, catalogue: Catalogue) -> Artifact | None:
    """The last result of a following stage: by its settings and seed, on any inputs.

    A stage that tells the state of items follows only a run over the same search.
    """
    settings = job.identity["settings"]
    names = settings.keys() if stage.follows_fields is None else stage.follows_fields
    wanted = {name: settings[name] for name in names}
    searched = {role: artifact.manifest.settings for role, artifact in job.inputs.items()}
    for artifact, made in catalogue.results_of(stage.name):
        if [made["version"], made["seed"]] != [stage.version, job.seed]:
            continue
        own = made["settings"]
        if (own if stage.follows_fields is None else {n: own.get(n) for n in names}) != wanted:
            continue
        parents = {role: catalogue.manifest(digest) for role, digest in made["inputs"].items()}
        if stage.states is None or searched == {
            role: parent.settings for role, parent in parents.items() if parent is not None
        }:
            return artifact
    return None


def note_states(
    stage: Stage, job: Job, artifact: Artifact, catalogue: Catalogue, made: bool
) -> None:
    """Enter the state of each item into the catalogue, if the stage tells it.

    A run that ``made`` the artifact asked for the items that wait, except the postponed ones.
    """
    if stage.states is not None:
        states = stage.states(job, artifact)
        note_items(catalogue, job.record, states, made, job.postponed)


def plan_parts(stage: Stage, job: Job) -> list[Part]:
    """Plan a job's parts, and keep the plan in the store where the workers read it."""
    parts = stage.plan(job)
    plan = canonical([{"key": p.key, "payload": p.payload} for p in parts])
    job.store.write_whole(job.store.plan_file(job.key), plan)
    return parts


def read_plan(job: Job) -> list[Part]:
    """The parts that were planned for a job."""
    plan = json.loads(job.store.plan_file(job.key).read_bytes())
    return [Part(p["key"], p["payload"]) for p in plan]


def work_parts(stage: Stage, job: Job, parts: list[Part]) -> int:
    """Compute those of the parts that are not there yet; returns how many that were."""
    missing = deque(part for part in parts if not job.store.has_part(part.key))
    count = len(missing)
    work, most = partial(_work_on, stage, job, missing), min(stage.at_once, count)
    if most < 2:
        work()
    else:
        work_together(work, missing.clear, cores() // job.how.get("workers", 1) or 1, most)
    return count


def _work_on(stage: Stage, job: Job, missing: deque[Part]) -> None:
    """Take parts until none is missing: each goes a step further whenever one is begun.

    So a part whose work has three steps does its last while the answers to the second of the next
    part, and to the first of the one after that, are on their way. Towards the end none is begun
    ahead that another thread would be free for.
    """
    begun: deque[Generator[None]] = deque()
    try:
        while True:
            if not begun or len(missing) > 2 * count_others():
                with suppress(IndexError):  # another thread took the last one
                    begun.appendleft(_steps(stage, job, missing.popleft()))
            if not begun:
                return
            for work in list(begun):  # what came last asks first
                if next(work, DONE) is DONE:
                    begun.remove(work)
    finally:
        for work in begun:
            work.close()


def _steps(stage: Stage, job: Job, part: Part) -> Generator[None]:
    """The steps of a part's work; it is published with the last."""
    with job.store.staging() as out:
        yield from stage.work(job, part, out) or ()
        job.store.publish_part(part.key, out)


def _whole_part(stage: Stage, job: Job, part: Part) -> Path:
    """A part's folder with every file as it was published, worked on again where it is not."""
    for _ in range(2):
        work_parts(stage, job, [part])
        folder = job.store.fetch_part(part.key)
        if folder is not None:
            return folder
    raise RunError(f"part {part.key} of {stage.name} is damaged again after it was worked on anew")


def seal(stage: Stage, job: Job, parts: list[Part]) -> tuple[Artifact, dict[str, Any]]:
    """Write, hash and publish the artifact; returns it with the run's metrics."""
    folders = [_whole_part(stage, job, part) for part in parts]
    known = linked(folders)
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


def gpus_held(stage: Stage, job: Job) -> int:
    """GPUs that a stage's work keeps busy on this machine: 1 where it runs on one, else 0."""
    return int(stage.device is not None and stage.device(job.device) == "cuda")


#: Measures a block: ``meter(name, keep)`` gives a dictionary that is filled at the block's end, and
#: hands what was spent so far to ``keep`` now and then.
Meter = Callable[[str, Callable[[dict[str, Any]], None]], AbstractContextManager[dict[str, Any]]]


@contextmanager
def unmeasured(name: str, keep: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """A meter of seconds alone."""
    spent: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        yield spent
    finally:
        spent["seconds"] = time.perf_counter() - started
        keep(dict(spent))


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, MiB.

    On Linux by its own memory map: ``ru_maxrss`` starts with what the process that started this
    one held.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_stage(
    stage: Stage,
    store: Store,
    catalogue: Catalogue,
    inputs: dict[str, Artifact],
    settings: Any,
    seed: int = 0,
    device: str = "auto",
    meter: Meter = unmeasured,
) -> Artifact:
    """Run one stage in this process: from the catalogue, or part by part."""
    job = make_job(stage, store, inputs, settings, seed, device, catalogue.url)
    job = with_previous(stage, job, catalogue)
    with attempt(stage, job, catalogue) as (run, found, confirm):
        if found is None:
            started = time.process_time()
            with meter(stage.name, partial(catalogue.keep, run)) as spent:
                parts = plan_parts(stage, job)
                spent.update(parts=len(parts), parts_worked=0)
                for number, part in enumerate(parts):
                    spent["parts_worked"] += work_parts(stage, job, [part])
                    tick(stage.name, number + 1, len(parts))
                artifact, metrics = seal(stage, job, parts)
            confirm()
            catalogue.record(artifact, job.key)
            held = {"gpu_seconds": spent["seconds"] * gpus_held(stage, job)}
            process = {"cpu_seconds": time.process_time() - started, "peak_mib": peak_memory_mib()}
            run.metrics = {**spent, **held, **metrics, **process}
        else:
            artifact, run.metrics = found, {"cached": True}
        note_states(stage, job, artifact, catalogue, found is None)
        run.artifact = artifact.digest
    log.info("%s: %s %s", stage.name, stage.kind, artifact.digest[:12])
    return artifact
