"""Stage `evaluate`: a model and its dataset -> scores with intervals.

plan    open the tasks; a part per task and network           (tasks.py, models.py)
work    predict the test images of a task with one network    (runner.py)
seal    scores and paired differences with intervals          (scores.py)
        count test images that are training samples

The networks are the frozen teacher, the student before training, and the model. Users may change
the folder of a task between runs, so the stage reads it every time (``live``) and its parts are
keyed by the images' content. With the same images nothing is computed again.
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
from geofm.embeddings.weight_inputs import inherit_weights, load_inherited, weights_facts
from geofm.embeddings.weights import Weights, WeightsMissing
from geofm.evaluation.models import list_roles, load_evaluated_model, model_bands, role_key
from geofm.evaluation.tasks import (
    PLANET,
    SPLIT_SEED,
    LabelledImage,
    Task,
    TaskError,
    cap_images,
    open_task,
    task_digest,
)
from geofm.runtime.device import pick_device
from geofm.stages import built_in_task

#: Unreadable images that the manifest names; all are counted.
MOST_LISTED = 20


def resolve(job: Job) -> Job:
    """Add the model's teacher to the inputs, if it is a geofm model."""
    return inherit_weights(job, "model", "teacher")


def plan(job: Job) -> list[Part]:
    """Make a part for each task and network, the teacher first."""
    model, parts = job.inputs["model"], []
    teacher = _teacher_weights(job)
    roles = list_roles(model, teacher)
    for number, task in enumerate(open_tasks(job)):
        content = task_digest(task, _used_images(job, task))
        for role in roles:
            payload = {"task": number, "role": role, "content": content}
            parts.append(job.part(payload, [content, *role_key(model, role, teacher)]))
    return parts


def work(job: Job, part: Part, folder: Path) -> None:
    """Evaluate one network on one task; writes ``predictions.parquet`` and ``trial.json``."""
    from geofm.evaluation.runner import evaluate_on_task

    task = open_tasks(job)[int(part.payload["task"])]
    device = pick_device(job.device)
    role = part.payload["role"]
    teacher = _teacher_weights(job) if role == "teacher" else None
    model = load_evaluated_model(job.inputs["model"], role, device, teacher)
    images = _used_images(job, task)
    result = evaluate_on_task(task, images, model, _settings(job), job.seed)
    write_table(result.predictions, folder / "predictions.parquet")
    facts = {
        **result.facts,
        "device": device,
        "task": task.name,
        "classes": list(task.classes),
        "listed": len(task.images),
        "used": len(images),
        "content": part.payload["content"],
        "gsd_m": task.card.gsd_m,
        "grouped": bool(task.card.groups),
        "own_split": bool(task.card.split),
    }
    # The name and the fields of this file stay, because stores hold parts of earlier runs.
    (folder / "trial.json").write_bytes(canonical(facts))


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``scores.parquet`` and ``predictions.parquet``; the facts hold paired differences."""
    from geofm.evaluation.scores import paired_differences, score_table

    results = [json.loads((part / "trial.json").read_bytes()) for part in folders]
    predictions = _join_predictions(folders, results)
    labels = {result["who"]: result["label"] for result in results}
    resamples = _settings(job).resamples
    scores = score_table(predictions, labels, resamples, job.seed)
    write_table(scores, folder / "scores.parquet")
    write_table(predictions, folder / "predictions.parquet")
    training_pixels = _training_pixels(job)
    teacher = _teacher_weights(job) if "teacher" in labels else None
    tasks = [_task_facts(r, training_pixels) for r in results if r["who"] == "model"]
    listed = sum(task["listed"] for task in tasks)
    unreadable = sum(len(task["unreadable"]) for task in tasks)
    over_limit = sum(task["listed"] - task["used"] for task in tasks)
    dropped = {"unreadable": unreadable, "over_max_images": over_limit}
    return Sealed(
        counts={
            "rows_in": listed,
            "rows_out": listed - unreadable - over_limit,
            "scores": len(scores),
            "tasks": len(tasks),
        },
        dropped={reason: count for reason, count in dropped.items() if count},
        facts={
            "tasks": tasks,
            "subjects": [{"model": role, "label": labels[role]} for role in labels],
            "probes": [
                {"task": result["task"], "model": result["who"], "feature": feature, **probe}
                for result in results
                for feature, probe in result["probes"].items()
            ],
            "differences": paired_differences(predictions, resamples, job.seed),
            "features": "standardised with the train part's mean and deviation",
            "intervals": f"95 % percentile bootstrap over test images, {resamples} resamples; "
            "they do not cover the chance in training",
            "training_seeds": 1,
            "weights": {"teacher": weights_facts(teacher)} if teacher else {},
            "decontamination": job.inputs["dataset"].manifest.facts.get("decontamination"),
        },
        deterministic=all(result["device"] == "cpu" for result in results),
    )


def open_tasks(job: Job) -> list[Task]:
    """Open the tasks in the settings; the planet's task is generated once per user and cached.

    Raises:
        TaskError: A folder cannot be used, or two tasks have the same name.
    """
    bands = list(model_bands(job.inputs["model"])[0])
    tasks = []
    for name in _settings(job).tasks:
        if name == PLANET:
            # The planet generates those of the model's bands that it has.
            tasks.append(open_task(built_in_task(PLANET)(cache_folder() / "tasks", bands)))
        else:
            tasks.append(open_task(Path(name).expanduser()))
    check_unique_names([task.name for task in tasks])
    return tasks


def check_unique_names(names: list[str]) -> None:
    """Check that no two tasks have the same name.

    Raises:
        TaskError: Two have; the message names the task and the remedy.
    """
    if len(set(names)) < len(names):
        raise TaskError(
            f"evaluate.tasks: two tasks are called {max(names, key=names.count)!r}; give each "
            "folder its own `name` in task.json"
        )


def _settings(job: Job) -> EvaluateSettings:
    settings: EvaluateSettings = job.settings
    return settings


def _used_images(job: Job, task: Task) -> tuple[LabelledImage, ...]:
    """The images of a task within the limit ``max_images``."""
    return cap_images(task, _settings(job).max_images, SPLIT_SEED)


def _teacher_weights(job: Job) -> Weights | None:
    """Weights of the model's teacher; None if training did not use it and it cannot be loaded."""
    try:
        return load_inherited(job, "model", "teacher")
    except WeightsMissing:
        if float(job.inputs["model"].manifest.settings["alpha"]) > 0:
            raise
        return None


def _join_predictions(folders: list[Path], results: list[dict[str, Any]]) -> pd.DataFrame:
    """The predictions of all parts, with columns for model and task."""
    tables: list[pd.DataFrame] = []
    for folder, result in zip(folders, results, strict=True):
        table = pd.read_parquet(folder / "predictions.parquet")
        table.insert(0, "task", result["task"])
        table.insert(0, "model", result["who"])
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _training_pixels(job: Job) -> set[str]:
    """Pixel digests of all training samples."""
    samples = job.inputs["dataset"].table("samples.parquet")
    return set(samples["pixel_sha256"].astype(str)) if "pixel_sha256" in samples else set()


def _task_facts(result: dict[str, Any], training_pixels: set[str]) -> dict[str, Any]:
    """Facts of a task for the manifest, with the count of test images that are training samples."""
    internal = ("pixel_sha256", "test_ids", "who", "label", "probes", "device")
    test_pixels = [result["pixel_sha256"].get(image_id) for image_id in result["test_ids"]]
    return {
        **{name: value for name, value in result.items() if name not in internal},
        "unreadable": result["unreadable"][:MOST_LISTED],
        "leakage": {
            "compared": "sha256 of stored pixels, test images against training samples",
            "test_images": len(result["test_ids"]),
            "training_samples": len(training_pixels),
            "identical": sum(digest in training_pixels for digest in test_pixels),
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
