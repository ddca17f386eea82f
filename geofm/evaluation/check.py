"""Checks of evaluation tasks before a run, so that an unusable task is reported at once."""

from __future__ import annotations

from collections.abc import Sequence

from geofm.config.recipe import EvaluateSettings
from geofm.evaluation.evaluate import check_unique_names
from geofm.evaluation.images import ImageUnreadable, read_task_image
from geofm.evaluation.tasks import (
    PLANET,
    SPLIT_SEED,
    LabelledImage,
    Task,
    TaskError,
    cap_images,
    open_task_folders,
    split_images,
)

#: Readable images that a class needs: one for each side of the split.
MIN_READABLE = 2


def check_tasks(settings: EvaluateSettings) -> None:
    """Open every task folder, split it, and decode two images of each class.

    The built-in task of the planet is generated later and not checked.

    Raises:
        TaskError: A folder cannot be used, two tasks have the same name, or a class has fewer than
            two readable images.
    """
    tasks = open_task_folders(settings.tasks)
    check_unique_names([task.name for task in tasks] + [PLANET] * settings.tasks.count(PLANET))
    for task in tasks:
        used = cap_images(task, settings.max_images, SPLIT_SEED)
        split_images(task, used, settings.test_share, SPLIT_SEED)
        for label, name in enumerate(task.classes):
            _check_class(task, name, [image for image in used if image.label == label])


def _check_class(task: Task, name: str, images: Sequence[LabelledImage]) -> None:
    """Decode images of a class until enough are readable.

    Raises:
        TaskError: Too few images of the class are readable.
    """
    readable, first_error = 0, ""
    for image in images:
        try:
            read_task_image(image.path, task.card)
        except ImageUnreadable as error:
            first_error = first_error or str(error)
        else:
            readable += 1
        if readable == MIN_READABLE:
            return
    raise TaskError(
        f"evaluate.tasks: of the {len(images)} images of class {name!r} of task {task.name} only "
        f"{readable} can be read ({first_error}); write them as 8-bit PNG or JPEG, or as uint8 or "
        "uint16 TIFF, or remove the class"
    )
