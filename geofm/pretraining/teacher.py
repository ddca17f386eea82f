"""The teacher's features of a whole corpus, computed once instead of in every epoch.

A student that is distilled for many epochs asks its frozen teacher about every chip many times.
Here the teacher sees each *whole* chip once: N forward passes instead of N times the epochs, or
none at all where curation has embedded the chips with the very same network. The price is that the
student's random crop is then taught the feature of the chip around it; ``crop_scale: 1,1`` makes
the crop the chip. ``benchmarks/learning.py`` measures both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from data_catalog.hashing import digest_of
from data_catalog.progress import tick
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import Encoder, load_encoder, normalise, resize
from geofm.embeddings.store import load_vectors
from geofm.embeddings.weights import Weights
from geofm.pretraining.backbone import PAPERS_POOLING, Pooling, family, stage_width, walk
from geofm.pretraining.checkpoint import whole_file
from geofm.pretraining.data import Corpus, read_unit
from geofm.shards.reader import ShardFiles

# The frozen teacher: the same crop, unmasked, its red, green and blue alone.


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder and the stage whose pooled feature is taught; ``width`` is its channels."""

    encoder: Encoder
    stage: int
    size_px: int
    width: int
    pooling: Pooling = PAPERS_POOLING
    walk: Callable[..., tuple[Tensor, Tensor | None]] = walk


def as_teacher(encoder: Encoder, stage: int, size_px: int | None = None) -> Teacher:
    """A teacher of an encoder that is already loaded.

    Args:
        encoder: any frozen encoder.
        stage: stage of a Swin or Hiera, quarter of a ViT's depth; other networks give their
            pooled features whatever it says.
        size_px: input edge; the encoder's own when not given or when it takes no other.

    Raises:
        NoSuchStage: the network has fewer stages.
    """
    staged = family(encoder.model) != "maps"
    width = stage_width(encoder.model, stage) if staged else encoder.width
    edge = size_px if size_px and encoder.any_size else encoder.size_px
    return Teacher(encoder, stage, edge, width)


def load_teacher(
    settings: PretrainSettings, device: str | torch.device, weights: Weights | None = None
) -> Teacher:
    """Load the frozen teacher onto a device.

    ``geofm.embeddings.encoders.load_encoder`` documents the names.

    Args:
        settings: the recipe's section.
        device: where the teacher runs.
        weights: the teacher's weights, if they are resolved already.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: as ``load_encoder``.
        NoSuchStage: the network has fewer stages.
    """
    size = settings.teacher_size_px
    encoder = load_encoder(weights or settings.teacher, size_px=size)
    # Convolutions run a third faster when channels lie side by side.
    half = (settings.teacher_precision or settings.precision) == "bf16"
    model = encoder.model.to(device).to(memory_format=torch.channels_last)
    if half:  # it never learns: no full weights need to be kept beside
        model = model.to(torch.bfloat16)
    stage = settings.teacher_stage or settings.distill_stage
    teacher = as_teacher(replace(encoder, model=model), stage, size)
    teacher = replace(teacher, pooling=Pooling(settings.distill_pool, settings.distill_norm))
    if settings.compile:
        model.compile(dynamic=False)
        teacher = replace(teacher, walk=torch.compile(walk, dynamic=False))
    return teacher


def who_teaches(
    settings: PretrainSettings,
    device: str | torch.device,
    taught: NDArray[np.float32] | None,
    weights: Weights | None = None,
) -> tuple[Teacher | None, int | None]:
    """The teacher to ask, and the channels of what is taught; None where there is none of it.

    Nobody is asked where the features ``taught`` [N, C] are known beforehand.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch, NoSuchStage: as ``load_teacher``.
    """
    if taught is not None:
        return None, taught.shape[1]
    if settings.alpha == 0:
        return None, None
    teacher = load_teacher(settings, device, weights)
    return teacher, teacher.width


@torch.no_grad()
def teach(teacher: Teacher, rgb: Tensor) -> Tensor:
    """Pooled feature [B, C] of the taught stage for RGB [B, 3, H, W] in 0..1.

    In the arithmetic of the teacher's own weights, whatever the student's is. Networks without
    stages give the feature they pool themselves.
    """
    model = teacher.encoder.model
    images = normalise(teacher.encoder, enlarge(rgb.float(), teacher.size_px))
    images = images.to(next(model.parameters()).dtype)
    with torch.autocast(rgb.device.type, enabled=False):
        if family(model) != "maps":
            tapped, _ = teacher.walk(model, images, teacher.stage, whole=False)
            return teacher.pooling(tapped)
        features: Tensor = model(images.contiguous(memory_format=torch.channels_last))
    if teacher.pooling.norm:
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features


def enlarge(rgb: Tensor, size_px: int) -> Tensor:
    """RGB at the teacher's size: corners on corners when larger, as the paper's code has it."""
    if rgb.shape[-1] >= size_px:
        return resize(rgb, size_px)
    return nn.functional.interpolate(
        rgb, size=(size_px, size_px), mode="bilinear", align_corners=True
    )


log = logging.getLogger("geofm.pretraining")

#: Samples of a file: what a crash can cost.
BLOCK = 4096
#: Chips per forward pass; fixed, because sums may differ in their last bits with it.
BATCH = {"cpu": 16, "cuda": 256}

Features = NDArray[np.float32]


class NotTheTeacher(UsageError):
    """Embeddings were not made by the teacher, or are not the feature that it teaches."""


def features_once(
    corpus: Corpus, teacher: Teacher, embeddings: Artifact | None, device: str, folder: Path
) -> tuple[Features, str]:
    """Curation's vectors where they are the teacher's features, else a pass of its own.

    Returns:
        The features [N, C], and where they came from, in words.
    """
    why = "no embeddings are known"
    if embeddings is not None:
        try:
            return from_embeddings(corpus, teacher, embeddings), "the embeddings of curation"
        except NotTheTeacher as error:
            why = str(error)
    log.info("pretrain: the teacher sees every chip once (%s)", why)
    return teach_corpus(corpus, teacher, device, folder), "one pass over whole chips"


def teach_corpus(corpus: Corpus, teacher: Teacher, device: str, folder: Path) -> Features:
    """The teacher's pooled feature of every whole chip, float32 [N, C], in the corpus' order.

    What was computed is kept in ``folder``, in files of ``BLOCK`` samples that are whole or
    absent, so that a restart computes only what is missing.

    Args:
        corpus: the dataset.
        teacher: on ``device`` already.
        device: ``cpu`` or ``cuda``.
        folder: of the run.

    Raises:
        DamagedShard: a sample's bytes are not its pixels.
    """
    place = folder / f"taught-{_key(corpus, teacher, device)}"
    place.mkdir(parents=True, exist_ok=True)
    blocks = []
    with ShardFiles(corpus.index) as files:
        for first in range(0, len(corpus), BLOCK):
            file = place / f"{first // BLOCK:05d}.npy"
            if not file.exists():
                numbers = range(first, min(first + BLOCK, len(corpus)))
                found = _block(corpus, files, teacher, device, numbers)
                with whole_file(file) as out:
                    np.save(out, found)
            blocks.append(np.load(file, allow_pickle=False))
    return np.concatenate(blocks)


def _key(corpus: Corpus, teacher: Teacher, device: str) -> str:
    """What the features depend on."""
    made = teacher.encoder.weights_sha256, teacher.stage, teacher.size_px, teacher.pooling
    facts = [*made, corpus.digest, device]
    return digest_of(facts)[:16]


def _block(
    corpus: Corpus, files: ShardFiles, teacher: Teacher, device: str, numbers: range
) -> Features:
    """Features of some samples [len(numbers), C]."""
    found = np.empty((len(numbers), teacher.width), dtype=np.float32)
    rgb = list(corpus.rgb)
    for first in range(0, len(numbers), BATCH[device]):
        some = numbers[first : first + BATCH[device]]
        chips = [torch.from_numpy(read_unit(corpus, files, n)[rgb]).clamp(0, 1) for n in some]
        # chips may differ in size
        images = torch.cat([resize(chip[None], teacher.size_px) for chip in chips])
        found[first : first + len(some)] = teach(teacher, images.to(device)).float().cpu().numpy()
        tick("teacher", some[-1] + 1, len(corpus), "features of whole chips")
    return found


def from_embeddings(corpus: Corpus, teacher: Teacher, embeddings: Artifact) -> Features:
    """The same from curation's vectors, which are float16: no forward pass at all.

    Args:
        corpus: a dataset made from the chips that were embedded.
        teacher: says which weights, input edge and feature are wanted.
        embeddings: an artifact of the stage ``embed``.

    Raises:
        NotTheTeacher: another network, another input edge, or not the feature that is taught.
        RunError: a chip of the corpus has no vector.
    """
    facts, encoder = embeddings.manifest.facts, teacher.encoder
    made = f"embeddings {embeddings.digest[:12]}"
    if facts["weights_sha256"] != encoder.weights_sha256:
        raise NotTheTeacher(
            f"{made} were made by {facts['encoder']}, but pretrain.teacher is {encoder.name}; set "
            "embed.encoder and pretrain.teacher to the same network"
        )
    if facts["size_px"] != teacher.size_px:
        raise NotTheTeacher(
            f"{made} were made at {facts['size_px']} px, but the teacher sees {teacher.size_px}; "
            "set embed.size_px and pretrain.teacher_size_px to the same edge"
        )
    if family(encoder.model) != "maps":
        raise NotTheTeacher(
            f"{made} hold the final pooled feature of {encoder.name}, but a network with stages "
            f"teaches that of stage {teacher.stage} (pretrain.distill_stage): ask it yourself"
        )
    keys = [str(key) for key in corpus.index.keys.to_pylist()]
    return load_vectors(embeddings, keys).astype(np.float32)
