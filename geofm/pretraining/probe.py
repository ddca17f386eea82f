"""A probe of training: a few steps on synthetic batches, to forecast the time of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss  # noqa: F401  before torch: both bring an OpenMP
import numpy as np
import pyarrow as pa
import torch

from geofm.config.recipe import PretrainSettings
from geofm.embeddings.weights import Weights
from geofm.pretraining.augment import draw_crop, sample_rng
from geofm.pretraining.data import Batch, Corpus
from geofm.pretraining.launch import choose_workers
from geofm.pretraining.masking import draw_mask
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.optimiser import make_schedule
from geofm.pretraining.parallel import make_fabric, reproducible_torch, threads_per_process
from geofm.pretraining.step import OutOfMemory, TrainingStep
from geofm.pretraining.teacher import Teacher, choose_teacher, teacher_features
from geofm.runtime.device import pick_device
from geofm.shards.reader import ShardIndex

#: Steps of a probe, and the time (seconds) after which it ends with fewer.
STEPS, LIMIT_S = 20, 15.0
#: Images of a step on a CPU, where the time per image hardly depends on their number.
CPU_BATCH = 16


@dataclass(frozen=True)
class TrainingProbe:
    """What a probe measured.

    Attributes:
        steps: Steps that were timed.
        images_per_second: Speed of all processes together, without reading of samples.
        teacher_images_per_second: Speed of the teacher where it sees each sample once, before
            training; None if it sees each crop, or if there is none.
        parameters: Number of parameters that are trained.
    """

    steps: int
    images_per_second: float
    teacher_images_per_second: float | None
    parameters: int


def probe_training(
    settings: PretrainSettings,
    bands: Sequence[str],
    compute: dict[str, Any],
    chip_px: int,
    teacher: Weights | None,
) -> TrainingProbe:
    """Time training steps of a recipe on synthetic batches.

    The student has random weights, and nothing is compiled. Of several processes one is measured,
    with its share of the batch; the others are assumed to be as fast.

    Args:
        settings: The recipe's section ``pretrain``, with a network of timm as the student.
        bands: Bands of the dataset.
        compute: The recipe's section ``compute``.
        chip_px: Edge of a chip (pixels).
        teacher: Resolved weights of the teacher; None without distillation.

    Raises:
        OutOfMemory: The memory of the device is too small; the message names the remedy.
        UsageError: Student or teacher cannot be built.
    """
    device = pick_device(str(compute["device"]))
    processes = choose_workers(compute, device).processes
    share = settings.batch // processes
    images = share if device == "cuda" else min(share, CPU_BATCH)
    changes = {"batch": images, "compile": False, "student_init": "random"}
    settings = settings.model_copy(update=changes)
    with reproducible_torch(device, 0, threads_per_process(processes)):
        fabric = make_fabric(device, settings.precision, 1, "ddp")
        network, width = choose_teacher(settings, fabric.device, None, teacher)
        module = build_pretrainer(settings, len(bands), 0, width, None).to(fabric.device)
        teaching, cached = None, None
        if network is not None and settings.teacher_features == "once":
            teaching = _time_teacher(network, images, fabric.device)
            cached, network = np.ones((images, network.width), np.float32), None
        trainer = TrainingStep(
            fabric, module, network, cached, blank_corpus(bands), settings,
            make_schedule(settings, STEPS), 0,
        )  # fmt: skip
        steps, seconds = _time_steps(trainer, random_batch(settings, len(bands), chip_px))
    return TrainingProbe(
        steps=steps,
        images_per_second=processes * steps * images / seconds,
        teacher_images_per_second=teaching,
        parameters=sum(p.numel() for p in module.parameters()),
    )


def _time_steps(trainer: TrainingStep, batch: Batch) -> tuple[int, float]:
    """Take one step to warm up, then up to ``STEPS``; returns their number and seconds."""
    trainer.run(0, batch).cpu()
    started = time.perf_counter()
    for step in range(STEPS):
        # reading the losses makes a GPU finish the step
        trainer.run(step, batch).cpu()
        seconds = time.perf_counter() - started
        if seconds > LIMIT_S:
            break
    return step + 1, seconds


def _time_teacher(teacher: Teacher, images: int, device: torch.device) -> float:
    """Return the images per second of a teacher."""
    rgb = torch.rand(images, 3, teacher.size_px, teacher.size_px, device=device)
    with torch.no_grad():
        teacher_features(teacher, rgb).cpu()
        started = time.perf_counter()
        teacher_features(teacher, rgb).cpu()
    return images / max(time.perf_counter() - started, 1e-9)


def blank_corpus(bands: Sequence[str]) -> Corpus:
    """Return a dataset without samples, whose bands have mean 0.5 and deviation 0.25."""
    none = np.zeros(0, dtype=np.int64)
    index = ShardIndex("", (), pa.array([], pa.string()), none.astype(np.int32), none, none)
    count = len(bands)
    scales = np.ones((0, count))
    return Corpus(index, tuple(bands), (0.5,) * count, (0.25,) * count, scales)


def random_batch(settings: PretrainSettings, bands: int, chip_px: int) -> Batch:
    """Return a batch of noise, with the crops and masks of the settings."""
    rng = sample_rng(0, 0, 0)
    shape = settings.batch, bands, chip_px, chip_px
    grid = settings.size_px // settings.mask_patch_px
    windows = [draw_crop(rng, chip_px, chip_px, settings.crop_scale) for _ in range(shape[0])]
    masks = [draw_mask(rng, grid, settings.mask_ratio) for _ in range(shape[0])]
    return Batch(
        np.arange(shape[0], dtype=np.int64),
        torch.from_numpy(rng.random(shape, dtype=np.float32)),
        torch.tensor(windows, dtype=torch.int64),
        torch.from_numpy(np.stack(masks)),
    )


__all__ = ["OutOfMemory", "TrainingProbe", "probe_training"]
