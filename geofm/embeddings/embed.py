"""Stage ``embed``: one vector per usable chip, by a frozen encoder.

plan    parts of the tars of chips, so that a refresh embeds only new tars
work    prepare the chips of a part as images and encode them in batches   (images.py, encoders.py)
seal    join the vectors in the order of ``chips.parquet``

Batches follow the order in the tar and one thread computes them, so the vectors are the same bits
for any number of workers. With a GPU, another thread reads and prepares the next batch meanwhile.
On CPUs each core works on a part of its own, and a second thread would only take turns with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_catalog.errors import RunError, UsageError, first_line
from data_catalog.hashing import canonical
from data_catalog.progress import advance
from data_catalog.stage import Job, Part, Sealed, Stage
from data_catalog.tables import write_sorted
from geofm.config.recipe import EmbedSettings
from geofm.embeddings.encoders import CPU_BATCH, Encoder, features, fuse_for_cpu, load_encoder
from geofm.embeddings.images import prepare_chip
from geofm.embeddings.weight_inputs import load_resolved, resolve_weights, weights_facts
from geofm.embeddings.weights import Weights, WeightsMismatch
from geofm.formats.npy import write_npy_rows
from geofm.runtime.native import torch
from geofm.runtime.parts import (
    ChipPart,
    ChipRef,
    chip_parts,
    covers,
    ok_chip_ids,
    part_chips,
    read_pixels,
    rows_of_parts,
)
from geofm.runtime.threads import keep_freed_memory, map_ordered, one_torch_thread

#: How chips become images; a fact of the artifact.
PREPROCESSING = (
    "unit RGB clipped to 0..1, bilinear antialiased resize, the encoder's mean and standard "
    "deviation; pooled features, not normalised"
)


def resolve(job: Job) -> Job:
    """Replace the encoder's name in the settings by the digest of its weights."""
    return resolve_weights(job, "encoder")


# plan


def plan(job: Job) -> list[Part]:
    """List parts of tars; the key of one covers the tar, its usable chips and the weights."""
    chips, weights = job.inputs["chips"], _encoder(job).weights_sha256
    return [
        job.part(asdict(part), [weights, *covers(chips, part.tar, refs)], rows=len(refs))
        for part, refs in chip_parts(chips)
    ]


def encoder_device(device: str) -> str:
    """Choose the CPU, unless a GPU is requested by name: devices differ in the last bits."""
    return "cuda" if device == "cuda" else "cpu"


def _encoder(job: Job) -> Encoder:
    """Load the encoder of a job."""
    device = encoder_device(job.device)
    return chip_encoder(load_resolved(job, "encoder"), _settings(job).size_px, device)


@lru_cache(maxsize=2)
def chip_encoder(name: str | Weights, size_px: int, device: str) -> Encoder:
    """Load an encoder as chips are embedded by it: on a CPU with fused batch norms.

    Args:
        name: resolved weights, or a name (``load_encoder``).
        size_px: edge of the input images.
        device: ``cpu`` or ``cuda``.
    """
    encoder = load_encoder(name, size_px=size_px)
    if device == "cpu":
        keep_freed_memory()
        return fuse_for_cpu(encoder)
    encoder.model.to(device)
    return encoder


# work


def work(job: Job, part: Part, folder: Path) -> None:
    """Embed a part: ``embeddings.npy`` (float16 [chips, width]), ``ids.json``, ``made.json``.

    Raises:
        RunError: The encoder gives numbers that float16 cannot hold.
    """
    chips, settings = job.inputs["chips"], _settings(job)
    of_tar = ChipPart(**part.payload)
    refs = part_chips(chips, of_tar)
    device = encoder_device(job.device)
    encoder = _encoder(job)
    pixels = read_pixels(chips, of_tar.tar, refs)
    size = min(settings.batch, CPU_BATCH) if device == "cpu" else settings.batch

    def prepare_batch(first: int) -> torch.Tensor:
        return _prepare_images(refs[first : first + size], pixels, encoder, settings.size_px)

    with (
        one_torch_thread(),
        # torch keeps a number of threads for each thread
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as reader,
    ):
        starts = range(0, len(refs), size)
        batches: Iterator[torch.Tensor] = map(prepare_batch, starts)
        if device == "cuda":
            batches = map_ordered(reader, prepare_batch, starts, lookahead=1)
        vectors = np.empty((len(refs), encoder.width), np.float16)
        for first, images in zip(starts, batches, strict=True):
            vectors[first : first + size] = _encode_batch(encoder, images, device)
            advance(len(images))
    if not np.isfinite(vectors).all():
        raise RunError(
            f"encoder {settings.encoder} gave values beyond float16 for chips of {of_tar.tar}; "
            "choose another encoder (embed.encoder)"
        )
    np.save(folder / "embeddings.npy", vectors)
    (folder / "ids.json").write_bytes(canonical([ref.chip_id for ref in refs]))
    (folder / "made.json").write_bytes(canonical({"device": device}))


def _prepare_images(
    refs: list[ChipRef], pixels: Iterator[NDArray[Any]], encoder: Encoder, size_px: int
) -> torch.Tensor:
    """Prepare the next chips as normalised images, shape (len(refs), 3, size_px, size_px)."""
    images = torch.empty((len(refs), 3, size_px, size_px), memory_format=torch.channels_last)
    for image, ref in zip(images, refs, strict=True):
        image.copy_(prepare_chip(next(pixels), ref.bands, ref.scale, encoder, size_px))
    return images


def _encode_batch(encoder: Encoder, images: torch.Tensor, device: str) -> NDArray[np.float16]:
    """Compute the vectors of images, shape (len(images), width)."""
    vectors = features(encoder, images.to(device))
    return np.asarray(vectors.float().cpu().numpy().astype(np.float16))


# seal


def seal(job: Job, folders: list[Path], folder: Path) -> Sealed:
    """Write ``embeddings.npy`` and ``ids.parquet`` in the order of ``chips.parquet``.

    Raises:
        RunError: The parts do not hold each chip once (a defect).
    """
    settings = _settings(job)
    encoder = _encoder(job)
    ids = ok_chip_ids(job.inputs["chips"])
    of_parts = rows_of_parts(
        ids,
        [pa.array(json.loads((part / "ids.json").read_bytes()), ids.type) for part in folders],
    )
    vectors = (np.load(part / "embeddings.npy") for part in folders)
    write_npy_rows(
        folder / "embeddings.npy",
        (len(ids), encoder.width),
        np.float16,
        zip(of_parts, vectors, strict=True),
    )
    write_sorted(pa.table({"chip_id": ids}), np.arange(len(ids)), folder / "ids.parquet")
    devices = {json.loads((part / "made.json").read_bytes())["device"] for part in folders}
    return Sealed(
        counts={"rows_in": len(ids), "rows_out": len(ids)},
        facts={
            "encoder": settings.encoder,
            "weights_sha256": encoder.weights_sha256,
            "weights": {"encoder": weights_facts(load_resolved(job, "encoder"))},
            "size_px": settings.size_px,
            "dim": encoder.width,
            "dtype": "float16",
            "preprocessing": PREPROCESSING,
        },
        deterministic="cuda" not in devices,
    )


def _settings(job: Job) -> EmbedSettings:
    """Return the job's settings with their type."""
    settings: EmbedSettings = job.settings
    return settings


def check_encoder(settings: EmbedSettings, weights: Weights) -> None:
    """Embed a blank image, to test an encoder before a run.

    Args:
        settings: section ``embed`` of the recipe.
        weights: resolved weights of the encoder.

    Raises:
        UsageError: The encoder does not take images of this size, or gives no usable vectors.
    """
    blank = torch.zeros(1, 3, settings.size_px, settings.size_px)
    try:
        encoder = chip_encoder(weights, settings.size_px, "cpu")
        vectors = features(encoder, blank.contiguous(memory_format=torch.channels_last))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UsageError(
            f"embed.encoder: {weights.network} cannot see images of embed.size_px "
            f"{settings.size_px} ({first_line(error)}); choose another size or encoder"
        ) from error
    if tuple(vectors.shape) != (1, encoder.width):
        raise UsageError(
            f"embed.encoder: {weights.network} gives vectors of {tuple(vectors.shape)[1:]}, not of "
            f"{encoder.width} numbers as timm states; choose another encoder"
        )
    if not torch.isfinite(vectors).all():
        raise WeightsMismatch(
            f"embed.encoder: weights of {weights.network} give vectors that are not finite; fetch "
            "the file again"
        )


STAGE = Stage(
    name="embed",
    version="3",
    kind="embeddings",
    inputs=("chips",),
    software=("torch", "timm", "numpy"),
    plan=plan,
    work=work,
    seal=seal,
    resolve=resolve,
    device=encoder_device,
)
