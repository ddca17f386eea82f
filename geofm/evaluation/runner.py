"""One subject on one task: features of every image, both protocols, predictions of the test part.

Predictions are kept, not only their mean: differences between models are then paired image by
image, and a wrong one can be looked at.
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
    missing_bands,
    on_bands,
    read_image,
    resize_square,
)
from geofm.evaluation.models import Subject
from geofm.evaluation.probes import Ints, knn_predict, linear_probe
from geofm.evaluation.tasks import LabelledImage, Task, TaskError, split_images
from geofm.runtime.native import torch
from geofm.runtime.threads import one_torch_thread

#: The split does not follow the run's seed: models trained from other seeds must meet the same
#: test images, or their difference would be the split's.
SPLIT_SEED = 0


@dataclass
class Encoded:
    """Features [images, D] by name of the images that could be read, and what was found out."""

    images: list[LabelledImage]
    features: dict[str, NDArray[np.float32]]
    unreadable: list[str]
    filled: set[str]
    pixel_sha256: dict[str, str]


@dataclass
class Trial:
    """``predictions``: image_id, feature, protocol, truth, predicted. ``facts`` is JSON."""

    predictions: pd.DataFrame
    facts: dict[str, Any]


def encode_task(
    task: Task, images: Sequence[LabelledImage], subject: Subject, batch: int
) -> Encoded:
    """Features of a task's images, in their order; unreadable ones are left out and listed."""
    encoded = Encoded([], {}, [], set(), {})
    rows: dict[str, list[NDArray[np.float32]]] = {}
    done = 0
    with one_torch_thread():
        for chunk in _batches(images, batch):
            pictures = []
            for image in chunk:
                picture = _picture(task, image, subject, encoded)
                if picture is not None:
                    pictures.append(picture)
            if pictures:
                found = subject.extract(torch.stack(pictures))
                for name in sorted(found):
                    rows.setdefault(name, []).append(found[name].float().cpu().numpy())
            done += len(chunk)
            tick("evaluate", done, len(images), f"{task.name}, {subject.who}")
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


def _picture(
    task: Task, image: LabelledImage, subject: Subject, encoded: Encoded
) -> torch.Tensor | None:
    """One image as the subject wants it; None, and a note, when it cannot be read."""
    try:
        read = read_image(image.path, task.card)
    except ImageUnreadable:
        encoded.unreadable.append(image.id)
        return None
    encoded.images.append(image)
    encoded.pixel_sha256[image.id] = read.pixel_sha256
    encoded.filled.update(missing_bands(read.bands, subject.bands))
    return resize_square(
        on_bands(read.unit, read.bands, subject.bands, subject.fill), subject.size_px
    )


def run_trial(
    task: Task,
    images: Sequence[LabelledImage],
    subject: Subject,
    settings: EvaluateSettings,
    seed: int,
) -> Trial:
    """Encode, split, fit and predict.

    Args:
        task: where the images and their labels come from.
        images: those of the task that are used, sorted by id.
        subject: what turns them into features.
        settings: neighbours, test share, batch.
        seed: of the probe's cross-validation folds.

    Raises:
        TaskError: no image can be read, or a class has none left on one side of the split.
    """
    encoded = encode_task(task, images, subject, settings.batch)
    sides = np.array(split_images(task, encoded.images, settings.test_share, SPLIT_SEED))
    train, test = np.flatnonzero(sides == "train"), np.flatnonzero(sides == "test")
    truth: Ints = np.array([image.label for image in encoded.images], dtype=np.int64)
    ids = [encoded.images[i].id for i in test]
    frames, probes = [], {}
    for name, rows in encoded.features.items():
        near = knn_predict(rows[train], truth[train], rows[test], settings.knn)
        probe = linear_probe(rows[train], truth[train], rows[test], seed)
        probes[name] = {"c": probe.c, "converged": probe.converged, "width": int(rows.shape[1])}
        for protocol, predicted in ((f"knn{settings.knn}", near), ("linear", probe.predicted)):
            frames.append(
                pd.DataFrame(
                    {
                        "image_id": ids,
                        "feature": name,
                        "protocol": protocol,
                        "truth": truth[test],
                        "predicted": predicted,
                    }
                )
            )
    facts = {
        "who": subject.who,
        "label": subject.label,
        "bands": list(subject.bands),
        "filled_bands": sorted(encoded.filled),
        "size_px": subject.size_px,
        "unreadable": sorted(encoded.unreadable),
        "train": len(train),
        "test": len(test),
        "probes": probes,
        "pixel_sha256": dict(sorted(encoded.pixel_sha256.items())),
        "test_ids": ids,
    }
    return Trial(pd.concat(frames, ignore_index=True), facts)
