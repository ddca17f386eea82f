"""Checks of evaluation tasks before a run begins: what would fail after hours fails at once."""

from __future__ import annotations

from collections.abc import Sequence

from geofm.config.recipe import EvaluateSettings
from geofm.evaluation.evaluate import refuse_twins
from geofm.evaluation.images import ImageUnreadable, read_image
from geofm.evaluation.runner import SPLIT_SEED
from geofm.evaluation.tasks import (
    PLANET,
    LabelledImage,
    Task,
    TaskError,
    cap_images,
    open_folders,
    split_images,
)

#: Readable images that a class needs: one for each side of the split.
LEAST = 2


def check_tasks(settings: EvaluateSettings) -> None:
    """Open every task folder, split it, and decode two images of each class.

    The planet's own task is drawn when it is needed.

    Raises:
        TaskError: a folder cannot be used, two tasks have one name, or a class has no two images
            that can be read.
    """
    tasks = open_folders(settings.tasks)
    refuse_twins([task.name for task in tasks] + [PLANET] * settings.tasks.count(PLANET))
    for task in tasks:
        used = cap_images(task, settings.max_images, SPLIT_SEED)
        split_images(task, used, settings.test_share, SPLIT_SEED)
        for label, name in enumerate(task.classes):
            _check_class(task, name, [image for image in used if image.label == label])


def _check_class(task: Task, name: str, images: Sequence[LabelledImage]) -> None:
    """Decode images of a class until there are enough."""
    readable, first = 0, ""
    for image in images:
        try:
            read_image(image.path, task.card)
        except ImageUnreadable as error:
            first = first or str(error)
        else:
            readable += 1
        if readable == LEAST:
            return
    raise TaskError(
        f"evaluate.tasks: of the {len(images)} images of class {name!r} of task {task.name} only "
        f"{readable} can be read ({first}); write them as 8-bit PNG or JPEG, or as uint8 or uint16 "
        "TIFF, or remove the class"
    )
