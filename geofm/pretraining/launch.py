"""Training in several processes: torchrun starts them, this process reports and takes the result.

``train_in_workers`` writes the task to the run's folder and starts ``torch.distributed.run``. Each
worker process runs ``main`` of this module. Process 0 prints its progress, one JSON line per
report; all workers keep their state in the checkpoint. If the process that started them ends, they
write the checkpoint and end too; a run that takes over waits for that (``wait_for_workers``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import GeofmError, RunError, UsageError
from data_catalog.progress import listen, report_values, tick, watch
from data_catalog.storage.lock import lock_file
from data_catalog.storage.process import child_command, end_with_parent, is_gone, process_mark
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.checkpoint import CHECKPOINT_FILE, load_checkpoint, read_progress
from geofm.pretraining.data import open_corpus, steps_per_epoch
from geofm.pretraining.loop import (
    UNRESOLVED,
    Interrupted,
    ResolvedWeights,
    TrainingResult,
    WorkerGroup,
    catch_sigterm,
    history_table,
    run_identity,
    train,
)
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.parallel import threads_per_process
from geofm.pretraining.teacher import choose_teacher

#: Files in the folder of a run.
TASK, FAILURE, RESULT = "task.json", "failure.json", "result.json"
FEATURES, LOG = "teacher-features.npy", "log"
#: Lock that all workers of a run share.
WORKERS_LOCK = "workers.lock"
#: Seconds that workers have after SIGTERM to write their checkpoint.
GRACE_S = 120
#: Last line of a Python error in the log; torch puts the rank of the process before it.
ERROR_LINE = re.compile(r"(?:\[rank\d+\]: )?([\w.]*Error: .*)")


class WorkersFailed(RunError):
    """The worker processes ended without a result."""


def choose_workers(how: dict[str, Any], device: str) -> WorkerGroup:
    """The processes that the section ``compute`` requests; default: one per GPU.

    Raises:
        UsageError: More processes than GPUs are requested.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    processes = int(how.get("processes") or 0) or max(1, gpus)
    if device == "cuda" and processes > gpus:
        raise UsageError(
            f"compute.processes is {processes}, but there are {gpus} GPUs here; lower it"
        )
    return WorkerGroup(processes, how.get("parallel", "ddp"), tuple(how.get("trackers", ())))


def train_in_workers(
    dataset: Artifact,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    workers: WorkerGroup,
    cached_features: NDArray[np.float32] | None = None,
    weights: ResolvedWeights = UNRESOLVED,
) -> TrainingResult:
    """Train in several processes of this machine; the arguments are those of ``loop.train``.

    Raises:
        WorkersFailed: A process died; the message names the log.
        Interrupted: SIGTERM arrived; the checkpoint is kept.
        UsageError, RunError: The error of a worker's ``loop.train``, with its message.
    """
    for stale in (FAILURE, RESULT, FEATURES):
        (folder / stale).unlink(missing_ok=True)
    if cached_features is not None:
        np.save(folder / FEATURES, cached_features)
    threads = threads_per_process(workers.processes)
    task = {
        "dataset": dataset.url,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "device": device,
        "threads": threads,
        "workers": asdict(workers),
        "weights": asdict(weights),
        "parent": process_mark(),
    }
    (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
    options = ["--standalone", "--shutdown-timeout", str(GRACE_S)]
    options += ["--nproc-per-node", str(workers.processes), "-m", __name__, str(folder)]
    command = child_command("torch.distributed.run", *options, grace_s=GRACE_S + 30)
    with catch_sigterm() as stop_requested, (folder / LOG).open("wb") as log:
        code = _run_workers(command, threads, log, stop_requested)
    if code or not (folder / RESULT).exists():
        raise _worker_error(folder, stop_requested())
    return _read_result(dataset, settings, seed, cached_features, folder, weights)


def wait_for_workers(folder: Path) -> None:
    """Wait until the workers of a killed run have written their checkpoint and ended."""
    with lock_file(folder / WORKERS_LOCK, f"the checkpoint of a killed run in {folder}"):
        pass


def _run_workers(
    command: list[str], threads: int, log: Any, stop_requested: Callable[[], bool]
) -> int:
    """Run torchrun, forward its progress, and leave no process behind; returns the exit code."""
    process = subprocess.Popen(  # noqa: S603  our own module
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )
    lines: Queue[str] = Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    terminated = False
    try:
        while process.poll() is None or not lines.empty():
            if stop_requested() and not terminated:
                process.terminate()  # torchrun forwards the signal to the workers
                terminated = True
            with suppress(Empty):
                report = json.loads(lines.get(timeout=1.0))
                if "values" in report:
                    report_values(report["what"], report["step"], report["values"])
                else:
                    tick(report["what"], report["done"], report["total"], report["note"])
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(GRACE_S + 30)  # torchrun kills workers that have not ended by then


def _read_lines(process: subprocess.Popen[str], lines: Queue[str]) -> None:
    """Put the progress lines of a process into a queue, so that its reader never blocks."""
    if process.stdout is not None:
        for line in process.stdout:
            if line.startswith("{"):
                lines.put(line)


def _worker_error(folder: Path, stop_requested: bool) -> GeofmError:
    """The error that a worker has written, or the first one in the log."""
    path = folder / FAILURE
    if path.exists():
        failure = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, type[GeofmError]] = {"usage": UsageError, "stopped": Interrupted}
        return kinds.get(failure["kind"], RunError)(failure["message"])
    if stop_requested:
        exists = (folder / CHECKPOINT_FILE).exists()
        state = "the last checkpoint is kept" if exists else "nothing is kept yet"
        return Interrupted(f"stopped by SIGTERM, {state}; start the same run again")
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [match[1] for line in lines if (match := ERROR_LINE.match(line))]
    # If one process dies, the others report that they lost their connection to it.
    causes = [text for text in errors if "ChildFailed" not in text and "peer" not in text]
    cause = next(iter(causes or errors), "no message")
    return WorkersFailed(
        f"a training process ended without a result ({cause.strip()}); its log is {folder / LOG}. "
        "Start the same run again: it goes on from the last checkpoint"
    )


def _read_result(
    dataset: Artifact,
    settings: PretrainSettings,
    seed: int,
    cached_features: NDArray[np.float32] | None,
    folder: Path,
    weights: ResolvedWeights,
) -> TrainingResult:
    """Rebuild the trained model from the last checkpoint."""
    corpus = open_corpus(dataset, settings.statistics)
    metrics = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    checkpoint = load_checkpoint(folder, run_identity(corpus, settings, seed))
    if checkpoint is None:
        raise WorkersFailed(f"the last checkpoint in {folder} is gone; start the same run again")
    teacher, teacher_width = choose_teacher(settings, "cpu", cached_features, weights.teacher)
    module = build_pretrainer(settings, len(corpus.bands), seed, teacher_width, weights.student)
    module.load_state_dict(checkpoint["module"])
    module.load_state_dict(checkpoint.get("mean", {}), strict=False)
    progress = read_progress(checkpoint)
    history = history_table(progress, steps_per_epoch(corpus, settings.batch))
    return TrainingResult(module.eval(), teacher, history, metrics)


def main(run_folder: str) -> int:
    """Run a worker process; returns its exit code."""
    folder = Path(run_folder)
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    end_with_parent(grace_s=GRACE_S)  # the parent is torchrun, which ends with its own parent
    with lock_file(folder / WORKERS_LOCK, f"the checkpoint in {folder}", shared=True):
        if is_gone(task["parent"]):  # another run may have taken over
            return 1
        return _train_as_worker(folder, task)


def _train_as_worker(folder: Path, task: dict[str, Any]) -> int:
    """Train as one of several processes, and write the result or the error to the folder."""
    group = task["workers"]
    workers = WorkerGroup(group["processes"], group["parallel"], tuple(group["trackers"]))
    weights = ResolvedWeights(**{role: _weights_from(w) for role, w in task["weights"].items()})
    features = np.load(folder / FEATURES) if (folder / FEATURES).exists() else None

    def send(**report: Any) -> None:
        with suppress(BrokenPipeError):  # the parent has ended, and this process will end too
            print(json.dumps(report), flush=True)

    def report(what: str, done: int, total: int, note: str) -> None:
        send(what=what, done=done, total=total, note=note)

    def report_step(what: str, step: int, values: Mapping[str, float]) -> None:
        if int(os.environ["RANK"]) == 0:  # every process knows the mean over all of them
            send(what=what, step=step, values=dict(values))

    settings = PretrainSettings.model_validate(task["settings"])
    try:
        with listen(report), watch(report_step):
            result = train(
                open_corpus(Artifact(task["dataset"]), settings.statistics),
                settings,
                task["seed"],
                task["device"],
                folder,
                task["threads"],
                workers,
                features,
                weights,
            )
    except GeofmError as error:
        kind = "stopped" if isinstance(error, Interrupted) else "run"
        kind = "usage" if isinstance(error, UsageError) else kind
        (folder / FAILURE).write_text(json.dumps({"kind": kind, "message": str(error)}))
        return 1
    if int(os.environ["RANK"]) == 0:
        (folder / RESULT).write_text(json.dumps(result.metrics), encoding="utf-8")
    return 0


def _weights_from(fields: dict[str, Any] | None) -> Weights | None:
    """Weights from the fields in a task file."""
    if fields is None:
        return None
    return Weights(**{**fields, "channels": tuple(fields["channels"])})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
