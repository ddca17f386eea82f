"""Several processes for one run: torchrun starts them, this process listens and takes the result.

``train_together`` writes the task into the run's folder and starts ``torch.distributed.run`` in a
process group of its own. Each process runs this module's ``main``; process 0 tells how far it is
on its standard output, a line of JSON each, and all keep their state in the checkpoint. When the
process that started them has ended, they write the checkpoint and end; a run that takes over waits
for that (``await_others``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
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
from data_catalog.progress import listen, tick
from data_catalog.storage.lock import lock_file
from data_catalog.storage.process import end_with_parent, following, is_gone, process_mark
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.checkpoint import NAME, load, progress_of
from geofm.pretraining.data import open_corpus, steps_per_epoch
from geofm.pretraining.loop import (
    BY_NAME,
    Interrupted,
    Sources,
    Team,
    Trained,
    history_of,
    identity_of,
    sigterm,
    train,
)
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.parallel import threads_each
from geofm.pretraining.teacher import who_teaches

TASK, FAILURE, RESULT, TAUGHT, LOG = "task.json", "failure.json", "result.json", "taught.npy", "log"
#: Lock that the processes of a team hold together.
TEAM = "team.lock"
#: Seconds that processes have to keep their state after SIGTERM.
GRACE_S = 120
#: How a Python error ends in the log; torch puts the process before it.
ERROR = re.compile(r"(?:\[rank\d+\]: )?([\w.]*Error: .*)")


class TogetherFailed(RunError):
    """Processes that trained together ended without a result."""


def team_of(how: dict[str, Any], device: str) -> Team:
    """The processes that ``compute`` asks for: one per GPU, or one, when it does not say.

    Raises:
        UsageError: more processes than GPUs.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    processes = int(how.get("processes") or 0) or max(1, gpus)
    if device == "cuda" and processes > gpus:
        raise UsageError(
            f"compute.processes is {processes}, but there are {gpus} GPUs here; lower it"
        )
    return Team(processes, how.get("parallel", "ddp"), tuple(how.get("trackers", ())))


def train_together(
    dataset: Artifact,
    settings: PretrainSettings,
    seed: int,
    device: str,
    folder: Path,
    team: Team,
    taught: NDArray[np.float32] | None = None,
    sources: Sources = BY_NAME,
) -> Trained:
    """As ``loop.train``, by ``team.processes`` processes of this machine.

    Raises:
        TogetherFailed: a process died; names the log.
        Interrupted: SIGTERM came; the state is kept.
        UsageError, RunError: what ``loop.train`` raises, with its message.
    """
    for stale in (FAILURE, RESULT, TAUGHT):
        (folder / stale).unlink(missing_ok=True)
    if taught is not None:
        np.save(folder / TAUGHT, taught)
    threads = threads_each(team.processes)
    task = {
        "dataset": dataset.url,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "device": device,
        "threads": threads,
        "team": asdict(team),
        "sources": asdict(sources),
        "parent": process_mark(),
    }
    (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
    options = ["--standalone", "--shutdown-timeout", str(GRACE_S)]
    options += ["--nproc-per-node", str(team.processes), "-m", __name__, str(folder)]
    command = following("torch.distributed.run", *options, grace_s=GRACE_S + 30)
    with sigterm() as stopped, (folder / LOG).open("wb") as errors:
        code = _run(command, threads, errors, stopped)
    if code or not (folder / RESULT).exists():
        raise _failure(folder, stopped())
    return _result(dataset, settings, seed, taught, folder, sources)


def await_others(folder: Path) -> None:
    """Wait until the training processes of a killed run have written their checkpoint and ended."""
    with lock_file(folder / TEAM, f"the checkpoint of a killed run in {folder}"):
        pass


def _run(command: list[str], threads: int, errors: Any, stopped: Callable[[], bool]) -> int:
    """Start, pass progress on, and never leave a process behind."""
    process = subprocess.Popen(  # noqa: S603  our own module
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )
    lines: Queue[str] = Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    asked = False
    try:
        while process.poll() is None or not lines.empty():
            if stopped() and not asked:
                process.terminate()  # torchrun hands it on
                asked = True
            with suppress(Empty):
                told = json.loads(lines.get(timeout=1.0))
                tick(told["what"], told["done"], told["total"], told["note"])
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(GRACE_S + 30)  # by then torchrun has killed what did not end


def _read_lines(process: subprocess.Popen[str], lines: Queue[str]) -> None:
    """Progress as it comes; whoever waits for a line can look at other things meanwhile."""
    if process.stdout is not None:
        for line in process.stdout:
            if line.startswith("{"):
                lines.put(line)


def _failure(folder: Path, stopped: bool) -> GeofmError:
    """What went wrong, in the words of the process where it did."""
    place = folder / FAILURE
    if place.exists():
        told = json.loads(place.read_text(encoding="utf-8"))
        kinds: dict[str, type[GeofmError]] = {"usage": UsageError, "stopped": Interrupted}
        return kinds.get(told["kind"], RunError)(told["message"])
    if stopped:
        kept = "the last checkpoint is kept" if (folder / NAME).exists() else "nothing is kept yet"
        return Interrupted(f"stopped by SIGTERM, {kept}; start the same run again")
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [found[1] for line in lines if (found := ERROR.match(line))]
    # a process that dies takes the connection of the others with it
    own = [text for text in said if "ChildFailed" not in text and "peer" not in text]
    last = next(iter(own or said), "no message")
    return TogetherFailed(
        f"a training process ended without a result ({last.strip()}); its log is {folder / LOG}. "
        "Start the same run again: it goes on from the last checkpoint"
    )


def _result(
    dataset: Artifact,
    settings: PretrainSettings,
    seed: int,
    taught: NDArray[np.float32] | None,
    folder: Path,
    sources: Sources,
) -> Trained:
    """The finished run, from its last checkpoint."""
    corpus = open_corpus(dataset, settings.statistics)
    told = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    content = load(folder, identity_of(corpus, settings, seed))
    if content is None:
        raise TogetherFailed(f"the last checkpoint in {folder} is gone; start the same run again")
    teacher, width = who_teaches(settings, "cpu", taught, sources.teacher)
    module = build_pretrainer(settings, len(corpus.bands), seed, width, sources.student)
    module.load_state_dict(content["module"])
    module.load_state_dict(content.get("mean", {}), strict=False)
    history = history_of(progress_of(content), steps_per_epoch(corpus, settings.batch))
    return Trained(module.eval(), teacher, history, told)


def main(place: str) -> int:
    """Run one of the training processes; returns its exit code."""
    folder = Path(place)
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    team = Team(**{**task["team"], "trackers": tuple(task["team"]["trackers"])})
    first = int(os.environ["RANK"]) == 0
    end_with_parent(grace_s=GRACE_S)  # the parent is torchrun, which ends with its own
    with lock_file(folder / TEAM, f"the checkpoint in {folder}", shared=True):
        if is_gone(task["parent"]):  # another run may be here already
            return 1
        return _train_as_one(folder, task, team, first)


def _train_as_one(folder: Path, task: dict[str, Any], team: Team, first: bool) -> int:
    """Train as one process of a team; returns the exit code."""
    given = {who: w and Weights(**{**w, "channels": tuple(w["channels"])})
             for who, w in task["sources"].items()}  # fmt: skip
    taught = np.load(folder / TAUGHT) if (folder / TAUGHT).exists() else None

    def tell(what: str, done: int, total: int, note: str) -> None:
        with suppress(BrokenPipeError):  # the parent has ended, and so will this process
            print(
                json.dumps({"what": what, "done": done, "total": total, "note": note}), flush=True
            )

    settings = PretrainSettings.model_validate(task["settings"])
    try:
        with listen(tell):
            trained = train(
                open_corpus(Artifact(task["dataset"]), settings.statistics),
                settings,
                task["seed"],
                task["device"],
                folder,
                task["threads"],
                team,
                taught,
                Sources(**given),
            )
    except GeofmError as error:
        kind = "stopped" if isinstance(error, Interrupted) else "run"
        kind = "usage" if isinstance(error, UsageError) else kind
        (folder / FAILURE).write_text(json.dumps({"kind": kind, "message": str(error)}))
        return 1
    if first:
        (folder / RESULT).write_text(json.dumps(trained.metrics), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
