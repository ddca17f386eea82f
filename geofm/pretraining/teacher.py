"""The frozen teacher, and a cache of its features for a whole dataset.

``teacher_features`` computes the distillation target of a batch: the teacher sees the same crops as
the student, unmasked, in red, green and blue.

A student that is distilled for many epochs shows its teacher every chip many times.
``cache_features`` shows it each whole chip once instead: N forward passes instead of N times the
epochs, or none if curation has embedded the chips with the same network. The cost is accuracy: the
student's random crop is then compared with the feature of the whole chip. With ``crop_scale: 1,1``
both are the same. ``benchmarks/learning.py`` measures the effect.
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
from data_catalog.storage.atomic import atomic_file
from geofm.config.recipe import PretrainSettings
from geofm.embeddings.encoders import Encoder, load_encoder, normalise
from geofm.embeddings.store import load_vectors
from geofm.embeddings.weights import Weights
from geofm.pretraining.backbone import (
    PAPER_POOLING,
    Pooling,
    forward_stages,
    network_family,
    stage_width,
)
from geofm.pretraining.data import Corpus, read_unit_pixels
from geofm.raster.resample import resize_images
from geofm.shards.reader import ShardFiles

log = logging.getLogger("geofm.pretraining")

#: Samples per file of cached features; a crash costs at most this many.
SAMPLES_PER_FILE = 4096
#: Chips per forward pass. Fixed, because the last bits of a sum may depend on it.
CHIPS_PER_PASS = {"cpu": 16, "cuda": 256}

Features = NDArray[np.float32]


class FeaturesMismatch(UsageError):
    """Embeddings were made by another network, or hold another feature than the one distilled."""


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder and the stage whose pooled feature is the distillation target.

    Attributes:
        encoder: The network with its own normalisation.
        stage: Stage L of the paper, from 1.
        size_px: Edge of the images that the network sees.
        width: Channels C of the feature.
        pooling: How the tokens of the stage become one feature.
        forward: ``forward_stages``, or its compiled form.
    """

    encoder: Encoder
    stage: int
    size_px: int
    width: int
    pooling: Pooling = PAPER_POOLING
    forward: Callable[..., tuple[Tensor, Tensor | None]] = forward_stages


def choose_teacher(
    settings: PretrainSettings,
    device: str | torch.device,
    cached_features: Features | None,
    weights: Weights | None = None,
) -> tuple[Teacher | None, int | None]:
    """Load the teacher that a run needs.

    Returns:
        The teacher, or None if its features are cached or nothing is distilled; and the channels of
        the feature, or None if nothing is distilled.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch, NoSuchStage: See ``load_teacher``.
    """
    if cached_features is not None:
        return None, cached_features.shape[1]
    if settings.alpha == 0:
        return None, None
    teacher = load_teacher(settings, device, weights)
    return teacher, teacher.width


def load_teacher(
    settings: PretrainSettings, device: str | torch.device, weights: Weights | None = None
) -> Teacher:
    """Load the frozen teacher onto a device.

    Args:
        settings: The recipe's section ``pretrain``; ``load_encoder`` documents the names.
        device: Device of the teacher.
        weights: Resolved weights; None: resolve the name in the settings.

    Raises:
        UnknownEncoder, WeightsMissing, WeightsMismatch: See ``load_encoder``.
        NoSuchStage: The network has fewer stages.
    """
    size = settings.teacher_size_px
    encoder = load_encoder(weights or settings.teacher, size_px=size)
    # Convolutions run a third faster on channels-last tensors.
    model = encoder.model.to(device).to(memory_format=torch.channels_last)
    if (settings.teacher_precision or settings.precision) == "bf16":
        # A frozen network needs no copy of its weights in float32.
        model = model.to(torch.bfloat16)
    stage = settings.teacher_stage or settings.distill_stage
    teacher = make_teacher(replace(encoder, model=model), stage, size)
    teacher = replace(teacher, pooling=Pooling(settings.distill_pool, settings.distill_norm))
    if settings.compile:
        model.compile(dynamic=False)
        teacher = replace(teacher, forward=torch.compile(forward_stages, dynamic=False))
    return teacher


def make_teacher(encoder: Encoder, stage: int, size_px: int | None = None) -> Teacher:
    """Make a teacher of a loaded encoder.

    Args:
        encoder: A frozen encoder.
        stage: Stage of a Swin or Hiera, or quarter of a ViT's depth. Networks without stages give
            their pooled feature and ignore it.
        size_px: Edge of the input; default, and if the network takes no other: the encoder's own.

    Raises:
        NoSuchStage: The network has fewer stages.
    """
    has_stages = network_family(encoder.model) != "maps"
    width = stage_width(encoder.model, stage) if has_stages else encoder.width
    edge = size_px if size_px and encoder.any_size else encoder.size_px
    return Teacher(encoder, stage, edge, width)


@torch.no_grad()
def teacher_features(teacher: Teacher, rgb: Tensor) -> Tensor:
    """Compute the distillation target f_T of images.

    The teacher computes in the precision of its own weights, whatever the student's precision is.

    Args:
        teacher: The frozen teacher.
        rgb: Images in unit space 0 to 1, shape (B, 3, H, W); resized to the teacher's input.

    Returns:
        Pooled tokens of the teacher's stage, shape (B, C). Networks without stages give their own
        pooled feature.

    Source: GFM paper, section 4.
    """
    model = teacher.encoder.model
    images = normalise(teacher.encoder, resize_for_teacher(rgb.float(), teacher.size_px))
    images = images.to(next(model.parameters()).dtype)
    with torch.autocast(rgb.device.type, enabled=False):
        if network_family(model) != "maps":
            tokens, _ = teacher.forward(model, images, teacher.stage, with_final=False)
            return teacher.pooling(tokens)
        features: Tensor = model(images.contiguous(memory_format=torch.channels_last))
    if teacher.pooling.norm:
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features


def resize_for_teacher(rgb: Tensor, size_px: int) -> Tensor:
    """Resize images (B, 3, H, W) to (B, 3, size_px, size_px), as the paper's code does.

    Enlarging aligns the corner pixels (``align_corners``); reducing is antialiased.
    """
    if rgb.shape[-1] >= size_px:
        return resize_images(rgb, size_px)
    return nn.functional.interpolate(
        rgb, size=(size_px, size_px), mode="bilinear", align_corners=True
    )


def cache_features(
    corpus: Corpus, teacher: Teacher, embeddings: Artifact | None, device: str, folder: Path
) -> tuple[Features, str]:
    """Get the teacher's feature of every sample, from curation's vectors if they are the same.

    Args:
        corpus: The dataset.
        teacher: Teacher on the device.
        embeddings: Artifact of the stage ``embed`` that the dataset was curated with, if known.
        device: ``cpu`` or ``cuda``.
        folder: Folder of the run; keeps computed features.

    Returns:
        Features, shape (N, C), and their origin in words, for the manifest.
    """
    reason = "no embeddings are known"
    if embeddings is not None:
        try:
            features = features_from_embeddings(corpus, teacher, embeddings)
        except FeaturesMismatch as error:
            reason = str(error)
        else:
            return features, "the embeddings of curation"
    log.info("pretrain: the teacher encodes every chip once (%s)", reason)
    return encode_corpus(corpus, teacher, device, folder), "one pass over whole chips"


def encode_corpus(corpus: Corpus, teacher: Teacher, device: str, folder: Path) -> Features:
    """Compute the teacher's feature of every whole chip.

    Features are kept in files of ``SAMPLES_PER_FILE`` samples, each written atomically, so a
    restart computes only missing files.

    Args:
        corpus: The dataset.
        teacher: Teacher on the device.
        device: ``cpu`` or ``cuda``.
        folder: Folder of the run.

    Returns:
        Features in the order of the corpus, float32, shape (N, C).

    Raises:
        DamagedShard: The bytes of a sample are not its pixels.
    """
    cache = folder / f"teacher-features-{_cache_key(corpus, teacher, device)}"
    cache.mkdir(parents=True, exist_ok=True)
    blocks = []
    with ShardFiles(corpus.index) as files:
        for first in range(0, len(corpus), SAMPLES_PER_FILE):
            path = cache / f"{first // SAMPLES_PER_FILE:05d}.npy"
            if not path.exists():
                samples = range(first, min(first + SAMPLES_PER_FILE, len(corpus)))
                features = _encode_samples(corpus, files, teacher, device, samples)
                with atomic_file(path, sync=True, lock=True) as file:
                    np.save(file, features)
            blocks.append(np.load(path, allow_pickle=False))
    return np.concatenate(blocks)


def _cache_key(corpus: Corpus, teacher: Teacher, device: str) -> str:
    """Digest of everything that the features depend on."""
    network = teacher.encoder.weights_sha256, teacher.stage, teacher.size_px, teacher.pooling
    return digest_of([*network, corpus.digest, device])[:16]


def _encode_samples(
    corpus: Corpus, files: ShardFiles, teacher: Teacher, device: str, samples: range
) -> Features:
    """Features of some samples, shape (len(samples), C)."""
    features = np.empty((len(samples), teacher.width), dtype=np.float32)
    rgb = list(corpus.rgb)
    for first in range(0, len(samples), CHIPS_PER_PASS[device]):
        batch = samples[first : first + CHIPS_PER_PASS[device]]
        chips = [
            torch.from_numpy(read_unit_pixels(corpus, files, sample)[rgb]).clamp(0, 1)
            for sample in batch
        ]
        # Chips may differ in size, so each is resized by itself.
        images = torch.cat([resize_images(chip[None], teacher.size_px) for chip in chips])
        encoded = teacher_features(teacher, images.to(device))
        features[first : first + len(batch)] = encoded.float().cpu().numpy()
        tick("teacher", batch[-1] + 1, len(corpus), "features of whole chips")
    return features


def features_from_embeddings(corpus: Corpus, teacher: Teacher, embeddings: Artifact) -> Features:
    """Read the teacher's features from curation's vectors (stored as float16).

    Args:
        corpus: A dataset made from the embedded chips.
        teacher: Teacher whose weights, input edge and feature the vectors must match.
        embeddings: An artifact of the stage ``embed``.

    Returns:
        Features in the order of the corpus, float32, shape (N, C).

    Raises:
        FeaturesMismatch: The vectors come from another network, another input edge, or hold another
            feature.
        RunError: A chip of the corpus has no vector.
    """
    facts, encoder = embeddings.manifest.facts, teacher.encoder
    subject = f"embeddings {embeddings.digest[:12]}"
    if facts["weights_sha256"] != encoder.weights_sha256:
        raise FeaturesMismatch(
            f"{subject} were made by {facts['encoder']}, but pretrain.teacher is {encoder.name}; "
            "set embed.encoder and pretrain.teacher to the same network"
        )
    if facts["size_px"] != teacher.size_px:
        raise FeaturesMismatch(
            f"{subject} were made at {facts['size_px']} px, but the teacher sees "
            f"{teacher.size_px}; set embed.size_px and pretrain.teacher_size_px to the same edge"
        )
    if network_family(encoder.model) != "maps":
        raise FeaturesMismatch(
            f"{subject} hold the final pooled feature of {encoder.name}, but stage {teacher.stage} "
            "of a network with stages is distilled (pretrain.distill_stage)"
        )
    keys = [str(key) for key in corpus.index.keys.to_pylist()]
    return load_vectors(embeddings, keys).astype(np.float32)
