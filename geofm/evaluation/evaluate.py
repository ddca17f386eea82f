"""Stage ``evaluate``: scores with intervals for the frozen teacher, a random student, the model.

A part is one subject on one task. Tasks are folders that anybody may change between two runs, so
the stage looks at them every time (``live``) and keys its parts by their content; with the same
images nothing is computed again and the same artifact comes out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from data_catalog.artifact import cache_folder
from data_catalog.hashing import canonical
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_table
from geofm.config.recipe import EvaluateSettings
from geofm.embeddings.weight_inputs import inherit_weights, inherited_weights, weights_facts
from geofm.embeddings.weights import Weights, WeightsMissing
from geofm.evaluation.models import bands_of, covers, load_subject, subjects_of
from geofm.evaluation.runner import SPLIT_SEED, run_trial
from geofm.evaluation.scores import differences, score_rows
from geofm.evaluation.tasks import (
    PLANET,
    LabelledImage,
    Task,
    TaskError,
    cap_images,
    open_task,
    task_digest,
)
from geofm.runtime.device import pick_device
from geofm.stages import built_in_task

#: Unreadable images named in the manifest; all are counted.
MOST_LISTED = 20


def tasks_of(job: Job) -> list[Task]:
    """The tasks of the settings; the planet's own is drawn once per user and kept.

    Raises:
        TaskError: a folder cannot be used, or two tasks have the same name.
    """
    bands = list(bands_of(job.inputs["model"])[0])
    tasks = []
    for name in _settings(job).tasks:
        if name == PLANET:
            tasks.append(open_task(_planet(bands)))
        else:
            tasks.append(open_task(Path(name).expanduser()))
    refuse_twins([task.name for task in tasks])
    return tasks


def refuse_twins(names: list[str]) -> None:
    """Refuse two tasks of one name.

    Raises:
        TaskError: names the task and the remedy.
    """
    if len(set(names)) < len(names):
        raise TaskError(
            f"evaluate.tasks: two tasks are called {max(names, key=names.count)!r}; give each "
            "folder its own `name` in task.json"
        )


def _planet(bands: list[str]) -> Path:
    """The planet's own task on those of the model's bands that the planet has."""
    return built_in_task(PLANET)(cache_folder() / "tasks", bands)


def _settings(job: Job) -> EvaluateSettings:
    settings: EvaluateSettings = job.settings
    return settings


def _used(job: Job, task: Task) -> tuple[LabelledImage, ...]:
    return cap_images(task, _settings(job).max_images, SPLIT_SEED)


def resolve(job: Job) -> Job:
    """The job with the model's teacher among its inputs, if that is a geofm model."""
    return inherit_weights(job, "model", "teacher")


def _teacher(job: Job) -> Weights | None:
    """The weights of the model's teacher; None where it taught nothing and is not to be had."""
    try:
        return inherited_weights(job, "model", "teacher")
    except WeightsMissing:
        if float(job.inputs["model"].manifest.settings["alpha"]) > 0:
            raise
        return None


def plan(job: Job) -> list[Part]:
    """One part per task and subject, the teacher first."""
    model, parts = job.inputs["model"], []
    teacher = _teacher(job)
    subjects = subjects_of(model, teacher)
    for number, task in enumerate(tasks_of(job)):
        content = task_digest(task, _used(job, task))
        for who in subjects:
            parts.append(
                job.part(
                    {"task": number, "who": who, "content": content},
                    [content, *covers(model, who, teacher)],
                )
            )
    return parts


def work(job: Job, part: Part, folder: Path) -> None:
    """``predictions.parquet`` and ``trial.json`` of one subject on one task."""
    task = tasks_of(job)[int(part.payload["task"])]
    device = pick_device(job.device)
    who = part.payload["who"]
    teacher = _teacher(job) if who == "teacher" else None
    subject = load_subject(job.inputs["model"], who, device, teacher)
    used = _used(job, task)
    trial = run_trial(task, used, subject, _settings(job), job.seed)
    write_table(trial.predictions, folder / "predictions.parquet")
    facts = {
        **trial.facts,
        "device": device,
        "task": task.name,
        "classes": list(task.classes),
        "listed": len(task.images),
        "used": len(used),
        "content": part.payload["content"],
        "gsd_m": task.card.gsd_m,
        "grouped": bool(task.card.groups),
        "own_split": bool(task.card.split),
    }
    (folder / "trial.json").write_bytes(canonical(facts))


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """``scores.parquet`` and ``predictions.parquet``; paired differences go to the facts."""
    trials: list[dict[str, Any]] = []
    tables: list[pd.DataFrame] = []
    for part in folders:
        trial = json.loads((part / "trial.json").read_bytes())
        table = pd.read_parquet(part / "predictions.parquet")
        table.insert(0, "task", trial["task"])
        table.insert(0, "model", trial["who"])
        trials.append(trial)
        tables.append(table)
    predictions = pd.concat(tables, ignore_index=True)
    labels = {trial["who"]: trial["label"] for trial in trials}
    resamples = _settings(job).resamples
    scores = score_rows(predictions, labels, resamples, job.seed)
    write_table(scores, folder / "scores.parquet")
    write_table(predictions, folder / "predictions.parquet")
    seen = _training_pixels(job)
    teacher = _teacher(job) if "teacher" in labels else None
    tasks = [_task_facts(t, seen) for t in trials if t["who"] == "model"]
    listed = sum(t["listed"] for t in tasks)
    unreadable = sum(len(t["unreadable"]) for t in tasks)
    capped = sum(t["listed"] - t["used"] for t in tasks)
    dropped = {"unreadable": unreadable, "over_max_images": capped}
    return Sealed(
        counts={
            "rows_in": listed,
            "rows_out": listed - unreadable - capped,
            "scores": len(scores),
            "tasks": len(tasks),
        },
        dropped={reason: count for reason, count in dropped.items() if count},
        facts={
            "tasks": tasks,
            "subjects": [{"model": who, "label": labels[who]} for who in labels],
            "probes": [
                {"task": t["task"], "model": t["who"], "feature": f, **probe}
                for t in trials
                for f, probe in t["probes"].items()
            ],
            "differences": differences(predictions, resamples, job.seed),
            "features": "standardised with the train part's mean and deviation",
            "intervals": f"95 % percentile bootstrap over test images, {resamples} resamples; "
            "they do not cover the chance in training",
            "training_seeds": 1,
            "weights": {"teacher": weights_facts(teacher)} if teacher else {},
            "decontamination": job.inputs["dataset"].manifest.facts.get("decontamination"),
        },
        deterministic=all(t["device"] == "cpu" for t in trials),
    )


def _training_pixels(job: Job) -> set[str]:
    """Pixel digests of everything the model was trained on."""
    samples = job.inputs["dataset"].table("samples.parquet")
    return set(samples["pixel_sha256"].astype(str)) if "pixel_sha256" in samples else set()


def _task_facts(trial: dict[str, Any], seen: set[str]) -> dict[str, Any]:
    """What the manifest says of a task, with the count of test images that are training pixels."""
    hidden = ("pixel_sha256", "test_ids", "who", "label", "probes", "device")
    copies = [i for i in trial["test_ids"] if trial["pixel_sha256"].get(i) in seen]
    return {
        **{key: value for key, value in trial.items() if key not in hidden},
        "unreadable": trial["unreadable"][:MOST_LISTED],
        "leakage": {
            "compared": "sha256 of stored pixels, test images against training samples",
            "test_images": len(trial["test_ids"]),
            "training_samples": len(seen),
            "identical": len(copies),
        },
    }


STAGE = Stage(
    name="evaluate",
    version="1",
    kind="scores",
    inputs=("model", "dataset"),
    software=("torch", "timm", "numpy", "scikit-learn", "scipy", "pillow", "rasterio"),
    plan=plan,
    work=work,
    seal=seal,
    seeded=True,
    live=True,
    resolve=resolve,
    device=pick_device,
)
