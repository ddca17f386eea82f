"""One network on one task: encode all images, split them, fit both probes, predict the test part.

All predictions are kept, not only their mean. So differences between networks are paired image by
image, and wrong predictions can be inspected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_catalog.progress import tick
from geofm.config.recipe import EvaluateSettings
from geofm.evaluation.images import (
    ImageUnreadable,
    centre_square,
    missing_bands,
    read_task_image,
    select_bands,
)
from geofm.evaluation.models import EvaluatedModel
from geofm.evaluation.probes import Ints, knn_predict, linear_probe
from geofm.evaluation.tasks import SPLIT_SEED, LabelledImage, Task, TaskError, split_images
from geofm.runtime.native import torch
from geofm.runtime.threads import one_torch_thread


@dataclass
class EncodedTask:
    """Features of the readable images of a task.

    Attributes:
        images: The readable images, in order.
        features: Features by name, shape (images, D).
        unreadable: Ids of the other images.
        filled: Bands that the task lacks.
        pixel_sha256: Digest of the stored pixels by image id.
    """

    images: list[LabelledImage]
    features: dict[str, NDArray[np.float32]]
    unreadable: list[str]
    filled: set[str]
    pixel_sha256: dict[str, str]


@dataclass
class TaskResult:
    """Result of one network on one task.

    Attributes:
        predictions: Columns image_id, feature, protocol, truth, predicted.
        facts: JSON facts about network, images and probes.
    """

    predictions: pd.DataFrame
    facts: dict[str, Any]


def evaluate_on_task(
    task: Task,
    images: Sequence[LabelledImage],
    model: EvaluatedModel,
    settings: EvaluateSettings,
    seed: int,
) -> TaskResult:
    """Encode, split, fit the probes and predict.

    Args:
        task: The task.
        images: The images of the task to use, sorted by id.
        model: The network.
        settings: Number of neighbours, test share, batch size.
        seed: Seed of the folds in the probe's cross-validation.

    Raises:
        TaskError: No image can be read, or a class is missing on a side of the split.
    """
    encoded = encode_task(task, images, model, settings.batch)
    sides = np.array(split_images(task, encoded.images, settings.test_share, SPLIT_SEED))
    train, test = np.flatnonzero(sides == "train"), np.flatnonzero(sides == "test")
    truth: Ints = np.array([image.label for image in encoded.images], dtype=np.int64)
    test_ids = [encoded.images[i].id for i in test]
    tables, probes = [], {}
    for name, rows in encoded.features.items():
        nearest = knn_predict(rows[train], truth[train], rows[test], settings.knn)
        linear = linear_probe(rows[train], truth[train], rows[test], seed)
        probes[name] = {"c": linear.c, "converged": linear.converged, "width": int(rows.shape[1])}
        predictions = {f"knn{settings.knn}": nearest, "linear": linear.predicted}
        for protocol, predicted in predictions.items():
            tables.append(
                pd.DataFrame(
                    {
                        "image_id": test_ids,
                        "feature": name,
                        "protocol": protocol,
                        "truth": truth[test],
                        "predicted": predicted,
                    }
                )
            )
    facts = {
        "who": model.role,
        "label": model.label,
        "bands": list(model.bands),
        "filled_bands": sorted(encoded.filled),
        "size_px": model.size_px,
        "unreadable": sorted(encoded.unreadable),
        "train": len(train),
        "test": len(test),
        "probes": probes,
        "pixel_sha256": dict(sorted(encoded.pixel_sha256.items())),
        "test_ids": test_ids,
    }
    return TaskResult(pd.concat(tables, ignore_index=True), facts)


def encode_task(
    task: Task, images: Sequence[LabelledImage], model: EvaluatedModel, batch: int
) -> EncodedTask:
    """Compute the features of a task's images in order; unreadable images are listed.

    Raises:
        TaskError: No image can be read.
    """
    encoded = EncodedTask([], {}, [], set(), {})
    rows: dict[str, list[NDArray[np.float32]]] = {}
    done = 0
    with one_torch_thread():
        for chunk in _batches(images, batch):
            inputs = []
            for image in chunk:
                prepared = _read_input(task, image, model, encoded)
                if prepared is not None:
                    inputs.append(prepared)
            if inputs:
                features = model.extract(torch.stack(inputs))
                for name in sorted(features):
                    rows.setdefault(name, []).append(features[name].float().cpu().numpy())
            done += len(chunk)
            tick("evaluate", done, len(images), f"{task.name}, {model.role}")
    if not encoded.images:
        raise TaskError(
            f"evaluate.tasks: none of the {len(images)} images of task {task.name} can be read; "
            "write them as 8-bit PNG or JPEG, or as uint8 or uint16 TIFF"
        )
    encoded.features = {name: np.concatenate(parts) for name, parts in rows.items()}
    return encoded


def _batches(images: Sequence[LabelledImage], batch: int) -> Iterator[Sequence[LabelledImage]]:
    for first in range(0, len(images), batch):
        yield images[first : first + batch]


def _read_input(
    task: Task, image: LabelledImage, model: EvaluatedModel, encoded: EncodedTask
) -> torch.Tensor | None:
    """Read an image as the network's input; an unreadable image is noted and gives None."""
    try:
        picture = read_task_image(image.path, task.card)
    except ImageUnreadable:
        encoded.unreadable.append(image.id)
        return None
    encoded.images.append(image)
    encoded.pixel_sha256[image.id] = picture.pixel_sha256
    encoded.filled.update(missing_bands(picture.bands, model.bands))
    unit = select_bands(picture.unit, picture.bands, model.bands, model.fill)
    return centre_square(unit, model.size_px)
