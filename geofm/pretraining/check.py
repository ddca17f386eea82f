"""Checks of training before a run begins: student and teacher are tried on a blank image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import torch

from data_catalog.errors import UsageError
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weight_inputs import bands_of
from geofm.embeddings.weights import Weights, WeightsMismatch
from geofm.pretraining.data import check_statistics
from geofm.pretraining.launch import team_of
from geofm.pretraining.loop import check_pieces
from geofm.pretraining.masking import draw_mask
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.student import BadStudent, as_timm_student
from geofm.pretraining.teacher import load_teacher, teach
from geofm.runtime.device import pick_device


def check_training(
    settings: PretrainSettings,
    bands: Sequence[str],
    compute: dict[str, Any],
    teacher: Weights | None,
    student: Weights | None,
) -> None:
    """Build student and teacher, and compute the loss of one blank image.

    Args:
        settings: the recipe's section.
        bands: of the dataset.
        compute: the recipe's section ``compute``.
        teacher: resolved weights; None without distillation.
        student: resolved weights; None for a random student.

    Raises:
        UsageError: names the field and the remedy.
    """
    check_statistics(settings.statistics, bands)
    team = team_of(compute, pick_device(str(compute["device"])))
    if student is not None:
        student = bands_of(student, bands)
        settings = as_timm_student(settings, student)
    width, taught = None, None
    if teacher is not None:
        width, taught = _teach(settings, teacher)
    try:
        module = build_pretrainer(settings, len(bands), 0, width, student).eval()
    except WeightsMismatch as error:
        raise WeightsMismatch(f"pretrain.student: {error}") from error
    check_pieces(module, settings, team.processes)
    grid = settings.size_px // settings.mask_patch_px
    mask = draw_mask(np.random.default_rng(0), grid, settings.mask_ratio)
    images = torch.zeros(1, len(bands), settings.size_px, settings.size_px)
    try:
        with torch.no_grad():
            module(images, torch.from_numpy(mask)[None], taught)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise BadStudent(
            f"pretrain.student: {settings.student} cannot be trained on images of pretrain.size_px "
            f"{settings.size_px} ({_first_line(error)}); choose another size or network"
        ) from error
    if student is not None and not all(torch.isfinite(p).all() for p in module.parameters()):
        raise WeightsMismatch(
            f"pretrain.student: weights of {settings.student} are not finite; fetch the file again"
        )


def _teach(settings: PretrainSettings, weights: Weights) -> tuple[int, torch.Tensor]:
    """Width of the teacher's feature, and that of a blank image."""
    try:
        teacher = load_teacher(settings.model_copy(update={"compile": False}), "cpu", weights)
        taught = teach(teacher, torch.zeros(1, 3, teacher.size_px, teacher.size_px))
    except WeightsMismatch as error:
        raise WeightsMismatch(f"pretrain.teacher: {error}") from error
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UsageError(
            f"pretrain.teacher: {weights.network} cannot see images of pretrain.teacher_size_px "
            f"{settings.teacher_size_px} ({_first_line(error)}); choose another size or teacher"
        ) from error
    if tuple(taught.shape) != (1, teacher.width):
        raise UsageError(
            f"pretrain.teacher: {weights.network} gives features of {tuple(taught.shape)[1:]}, not "
            f"of {teacher.width} channels as timm states; choose another teacher"
        )
    if not torch.isfinite(taught).all():
        raise WeightsMismatch(
            f"pretrain.teacher: weights of {weights.network} give features that are not finite; "
            "fetch the file again"
        )
    return teacher.width, taught


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
