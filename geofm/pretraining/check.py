"""Checks before a run: student and teacher are tried on a blank image.

An error that training would raise after hours of fetching and cutting is raised at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import torch

from data_catalog.errors import UsageError, first_line
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weight_inputs import select_input_bands
from geofm.embeddings.weights import Weights, WeightsMismatch
from geofm.pretraining.data import check_statistics
from geofm.pretraining.launch import choose_workers
from geofm.pretraining.loop import check_microbatches
from geofm.pretraining.masking import draw_mask
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.student import BadStudent, student_settings
from geofm.pretraining.teacher import load_teacher, teacher_features
from geofm.runtime.device import pick_device


def check_training(
    settings: PretrainSettings,
    bands: Sequence[str],
    compute: dict[str, Any],
    teacher: Weights | None,
    student: Weights | None,
) -> None:
    """Build student and teacher, and compute the loss of a blank image.

    Args:
        settings: The recipe's section ``pretrain``.
        bands: Bands of the dataset.
        compute: The recipe's section ``compute``.
        teacher: Resolved weights of the teacher; None without distillation.
        student: Resolved weights of the student; None for random initial weights.

    Raises:
        UsageError: A setting does not fit; the message names the field and the remedy.
    """
    check_statistics(settings.statistics, bands)
    workers = choose_workers(compute, pick_device(str(compute["device"])))
    if student is not None:
        student = select_input_bands(student, bands)
        settings = student_settings(settings, student)
    teacher_width, target = None, None
    if teacher is not None:
        teacher_width, target = _try_teacher(settings, teacher)
    try:
        module = build_pretrainer(settings, len(bands), 0, teacher_width, student).eval()
    except WeightsMismatch as error:
        raise WeightsMismatch(f"pretrain.student: {error}") from error
    check_microbatches(module, settings, workers.processes)
    grid = settings.size_px // settings.mask_patch_px
    mask = draw_mask(np.random.default_rng(0), grid, settings.mask_ratio)
    images = torch.zeros(1, len(bands), settings.size_px, settings.size_px)
    try:
        with torch.no_grad():
            module(images, torch.from_numpy(mask)[None], target)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise BadStudent(
            f"pretrain.student: {settings.student} cannot be trained on images of pretrain.size_px "
            f"{settings.size_px} ({first_line(error)}); choose another size or network"
        ) from error
    if student is not None and not all(torch.isfinite(p).all() for p in module.parameters()):
        raise WeightsMismatch(
            f"pretrain.student: weights of {settings.student} are not finite; fetch the file again"
        )


def _try_teacher(settings: PretrainSettings, weights: Weights) -> tuple[int, torch.Tensor]:
    """Channels C of the teacher's feature, and the feature (1, C) of a blank image."""
    try:
        teacher = load_teacher(settings.model_copy(update={"compile": False}), "cpu", weights)
        feature = teacher_features(teacher, torch.zeros(1, 3, teacher.size_px, teacher.size_px))
    except WeightsMismatch as error:
        raise WeightsMismatch(f"pretrain.teacher: {error}") from error
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UsageError(
            f"pretrain.teacher: {weights.network} cannot see images of pretrain.teacher_size_px "
            f"{settings.teacher_size_px} ({first_line(error)}); choose another size or teacher"
        ) from error
    if tuple(feature.shape) != (1, teacher.width):
        raise UsageError(
            f"pretrain.teacher: {weights.network} gives features of {tuple(feature.shape)[1:]}, "
            f"not of {teacher.width} channels as timm states; choose another teacher"
        )
    if not torch.isfinite(feature).all():
        raise WeightsMismatch(
            f"pretrain.teacher: weights of {weights.network} give features that are not finite; "
            "fetch the file again"
        )
    return teacher.width, feature
