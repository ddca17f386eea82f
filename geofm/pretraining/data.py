"""Batches of a dataset artifact, the same for any number of reading threads and processes.

Sample i of epoch e is cropped and masked with a random generator seeded by (seed, e, i), and the
order of an epoch follows from (seed, e). So the batch of any step can be made without those before
it, and an exact resume needs no other state.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from data_catalog.artifact import Artifact
from data_catalog.errors import UsageError
from geofm.config.recipe import PretrainSettings
from geofm.pretraining.augment import draw_crop, sample_rng
from geofm.pretraining.masking import draw_mask
from geofm.raster.radiometry import rgb_index, to_unit
from geofm.runtime.threads import map_ordered
from geofm.shards.loader import epoch_order
from geofm.shards.reader import DamagedShard, ShardFiles, ShardIndex, open_index


class TooFewSamples(UsageError):
    """The dataset has fewer samples than a batch."""


class NotRgb(UsageError):
    """ImageNet statistics were requested for other bands than red, green and blue."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """The training samples of a dataset.

    Attributes:
        index: Position of each sample's bytes in the shards, in the order of the keys.
        bands: Names of the bands.
        mean: Mean per band in unit space.
        std: Standard deviation per band in unit space.
        scales: Unit-space scale per sample and band, shape (N, bands).
    """

    index: ShardIndex
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scales: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """Digest of the dataset."""
        return self.index.digest

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Positions of the bands that a teacher sees."""
        return rgb_index(self.bands)


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole chips of a step, with the crop and the mask of each.

    Attributes:
        samples: Number of each sample in the corpus, shape (B,).
        images: Chips in unit space, padded to one size, shape (B, bands, H, W).
        windows: Crop of each chip (see ``CropWindow``), int64, shape (B, 5).
        mask: Patch mask of each crop, bool, shape (B, g, g), True where hidden.
    """

    samples: NDArray[np.int64]
    images: Tensor
    windows: Tensor
    mask: Tensor

    def pinned(self) -> Batch:
        """Copy the tensors to page-locked memory, which a GPU can read while it computes."""
        tensors = (self.images, self.windows, self.mask)
        return Batch(self.samples, *(tensor.pin_memory() for tensor in tensors))


def open_corpus(dataset: Artifact, statistics: str = "dataset") -> Corpus:
    """Read the index of a dataset's training split; remote shards are downloaded once.

    Args:
        dataset: An artifact of the stage ``pack``.
        statistics: Origin of the mean and standard deviation: ``dataset`` or ``imagenet``.

    Raises:
        NotRgb: ImageNet statistics are requested for other bands.
    """
    index = open_index(dataset, fetch=True)
    keys = index.keys.to_numpy(zero_copy_only=False)
    # Samples are numbered in the order of their keys, whatever their position in the shards is.
    index = index.take(np.argsort(keys, kind="stable"))
    samples = dataset.table("samples.parquet", ["chip_id", "scale"]).set_index("chip_id")
    stats = dataset.json("stats.json")
    check_statistics(statistics, stats["bands"])
    if statistics == "imagenet":
        stats = {**stats, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Corpus(
        index=index,
        bands=tuple(stats["bands"]),
        mean=tuple(float(m) for m in stats["mean"]),
        # A band without contrast has a standard deviation of 0, and pixels are divided by it.
        std=tuple(max(float(s), 1e-6) for s in stats["std"]),
        scales=np.stack([np.asarray(s) for s in samples.loc[index.keys.to_pylist(), "scale"]]),
    )


def check_statistics(statistics: str, bands: Sequence[str]) -> None:
    """Check that ImageNet statistics are requested for red, green and blue only.

    Raises:
        NotRgb: The dataset has other bands; the message names the field and the remedy.
    """
    if statistics == "imagenet" and list(bands) != ["red", "green", "blue"]:
        raise NotRgb(
            f"pretrain.statistics is imagenet, but the dataset has {', '.join(bands)}; set it to "
            "dataset, or cut.bands=red,green,blue"
        )


def steps_per_epoch(corpus: Corpus, batch: int) -> int:
    """Number of whole batches in an epoch; the remaining samples are not used in it.

    Raises:
        TooFewSamples: The dataset does not fill one batch.
    """
    if len(corpus) < batch:
        raise TooFewSamples(
            f"the dataset has {len(corpus)} samples, fewer than pretrain.batch {batch}; set "
            f"pretrain.batch to at most {len(corpus)}, or curate less strictly"
        )
    return len(corpus) // batch


def batch_samples(corpus: Corpus, seed: int, step: int, batch: int) -> tuple[int, list[int]]:
    """Epoch of a step, and the numbers of the samples in its batch."""
    epoch, position = divmod(step, steps_per_epoch(corpus, batch))
    order = epoch_order(seed, epoch, len(corpus))
    return epoch, [int(i) for i in order[position * batch : (position + 1) * batch]]


def count_never_drawn(corpus: Corpus, seed: int, epochs: int, batch: int) -> int:
    """Count the samples that are in no batch of any epoch."""
    missing = np.ones(len(corpus), dtype=np.bool_)
    used = steps_per_epoch(corpus, batch) * batch
    for epoch in range(epochs):
        missing[epoch_order(seed, epoch, len(corpus))[:used]] = False
        if not missing.any():
            break
    return int(missing.sum())


def read_unit_pixels(corpus: Corpus, files: ShardFiles, sample: int) -> NDArray[np.float32]:
    """Read one sample in unit space, shape (bands, H, W).

    Raises:
        DamagedShard: The bytes are not the sample's pixels.
    """
    pixels = files.pixels(sample)
    if pixels.ndim != 3 or len(pixels) != len(corpus.bands):
        raise DamagedShard(
            f"{corpus.index.describe(sample)} has shape {pixels.shape}, not {len(corpus.bands)} "
            "bands; pack the dataset again"
        )
    return to_unit(pixels, corpus.scales[sample].tolist())


def load_batch(
    corpus: Corpus,
    files: ShardFiles,
    settings: PretrainSettings,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Read one process's share of the batch of a step.

    The whole batch does not depend on the number of processes.

    Args:
        corpus: The dataset.
        files: Open shards of the corpus.
        settings: The recipe's section ``pretrain``.
        seed: Seed of the run.
        step: Step of the run, from 0.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """
    epoch, samples = batch_samples(corpus, seed, step, settings.batch)
    first, end = (number * settings.batch // world_size for number in (rank, rank + 1))
    samples = samples[first:end]
    chips = [read_unit_pixels(corpus, files, sample) for sample in samples]
    height, width = (max(chip.shape[axis] for chip in chips) for axis in (1, 2))
    images = np.zeros((len(samples), len(corpus.bands), height, width), dtype=np.float32)
    windows, masks = [], []
    grid = settings.size_px // settings.mask_patch_px
    for row, (sample, chip) in enumerate(zip(samples, chips, strict=True)):
        images[row, :, : chip.shape[1], : chip.shape[2]] = chip
        rng = sample_rng(seed, epoch, sample)
        windows.append(draw_crop(rng, chip.shape[1], chip.shape[2], settings.crop_scale))
        masks.append(draw_mask(rng, grid, settings.mask_ratio))
    return Batch(
        np.array(samples, dtype=np.int64),
        torch.from_numpy(images),
        torch.tensor(windows, dtype=torch.int64),
        torch.from_numpy(np.stack(masks)),
    )


def read_batches(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    first: int,
    end: int,
    threads: int,
    rank: int = 0,
    world_size: int = 1,
    pin: bool = False,
) -> Generator[Batch]:
    """Yield the batches of the steps ``first`` to ``end`` - 1 in order, read ahead by threads.

    Args:
        corpus: The dataset.
        settings: The recipe's section ``pretrain``.
        seed: Seed of the run.
        first: First step.
        end: Step after the last one.
        threads: Number of reading threads, and of batches read ahead.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        pin: Whether to put batches into page-locked memory, for a GPU.
    """

    def read(step: int) -> Batch:
        batch = load_batch(corpus, files, settings, seed, step, rank, world_size)
        return batch.pinned() if pin else batch

    with ShardFiles(corpus.index) as files, ThreadPoolExecutor(threads, "geofm-read") as pool:
        yield from map_ordered(pool, read, range(first, end), threads)
