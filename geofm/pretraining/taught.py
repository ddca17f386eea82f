"""The teacher's features of a whole corpus, computed once instead of in every epoch.

A student that is distilled for many epochs asks its frozen teacher about every chip many times.
Here the teacher sees each *whole* chip once: N forward passes instead of N times the epochs, or
none at all where curation has embedded the chips with the very same network. The price is that the
student's random crop is then taught the feature of the chip around it; ``crop_scale: 1,1`` makes
the crop the chip. ``benchmarks/learning.py`` measures both.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.canonical import digest_of
from data_catalog.errors import UsageError
from data_catalog.progress import tick
from geofm.curation.vectors import load_vectors
from geofm.encoders import resize
from geofm.pretraining.backbone import family
from geofm.pretraining.checkpoint import whole_file
from geofm.pretraining.data import Corpus, read_unit
from geofm.pretraining.teacher import Teacher, teach
from geofm.shards.reader import ShardFiles

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
