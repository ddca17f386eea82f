"""The dataset artifact as batches: whichever thread reads them, they are the same.

Sample i of epoch e is cropped and masked by a generator seeded with (seed, e, i), and the order of
an epoch follows from (seed, e). So batch t of a run can be made without the ones before it, which
is all that an exact resume needs.
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
from geofm.pretraining.augment import draw_window, sample_rng
from geofm.pretraining.masking import draw_mask
from geofm.raster.radiometry import rgb_index, to_unit
from geofm.runtime.threads import in_order
from geofm.shards.loader import epoch_order
from geofm.shards.reader import DamagedShard, ShardFiles, ShardIndex, open_index


class TooFewSamples(UsageError):
    """The dataset does not fill one batch."""


class NotRgb(UsageError):
    """Statistics of red, green and blue for a dataset of other bands."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples to train on: where each one's bytes are, and the statistics of all.

    ``mean`` and ``std`` are per band in unit space; ``scales`` is [N, bands].
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
        """Positions of the bands a teacher sees."""
        return rgb_index(self.bands)


@dataclass(frozen=True, eq=False)
class Batch:
    """Chips in unit space [B, bands, H, W], windows [B, 5] to crop, masks [B, g, g] bool.

    ``samples`` are their numbers in the corpus, [B].
    """

    samples: NDArray[np.int64]
    images: Tensor
    windows: Tensor
    mask: Tensor

    def pinned(self) -> Batch:
        """In memory that a GPU copies from while it computes."""
        pictures = (self.images, self.windows, self.mask)
        return Batch(self.samples, *(tensor.pin_memory() for tensor in pictures))


def open_corpus(dataset: Artifact, statistics: str = "dataset") -> Corpus:
    """Read the index of a dataset's training split; remote shards are fetched once, whole.

    Args:
        dataset: an artifact of the stage ``pack``.
        statistics: ``dataset`` or ``imagenet``: what pixels will be normalised by.

    Raises:
        NotRgb: ImageNet's statistics for other bands.
    """
    index = open_index(dataset, fetch=True)
    keys = index.keys.to_numpy(zero_copy_only=False)
    index = index.take(np.argsort(keys, kind="stable"))  # a sample's number is not its place
    samples = dataset.table("samples.parquet", ["chip_id", "scale"]).set_index("chip_id")
    stats = dataset.json("stats.json")
    check_statistics(statistics, stats["bands"])
    if statistics == "imagenet":
        stats = {**stats, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Corpus(
        index=index,
        bands=tuple(stats["bands"]),
        mean=tuple(float(m) for m in stats["mean"]),
        # a band without any contrast would be divided by zero
        std=tuple(max(float(s), 1e-6) for s in stats["std"]),
        scales=np.stack([np.asarray(s) for s in samples.loc[index.keys.to_pylist(), "scale"]]),
    )


def check_statistics(statistics: str, bands: Sequence[str]) -> None:
    """Refuse ImageNet's statistics for other bands than red, green and blue.

    Raises:
        NotRgb: names the field and the remedy.
    """
    if statistics == "imagenet" and list(bands) != ["red", "green", "blue"]:
        raise NotRgb(
            f"pretrain.statistics is imagenet, but the dataset has {', '.join(bands)}; set it to "
            "dataset, or cut.bands=red,green,blue"
        )


def steps_per_epoch(corpus: Corpus, batch: int) -> int:
    """Whole batches in an epoch; the rest of the samples waits for the next one.

    Raises:
        TooFewSamples: not even one.
    """
    if len(corpus) < batch:
        raise TooFewSamples(
            f"the dataset has {len(corpus)} samples, fewer than pretrain.batch {batch}; set "
            f"pretrain.batch to at most {len(corpus)}, or curate less strictly"
        )
    return len(corpus) // batch


def batch_samples(corpus: Corpus, seed: int, step: int, batch: int) -> tuple[int, list[int]]:
    """Epoch of a step, and the samples of its batch."""
    epoch, position = divmod(step, steps_per_epoch(corpus, batch))
    order = epoch_order(seed, epoch, len(corpus))
    return epoch, [int(i) for i in order[position * batch : (position + 1) * batch]]


def never_drawn(corpus: Corpus, seed: int, epochs: int, batch: int) -> int:
    """How many samples no epoch gets to (each drops those that fill no batch)."""
    missing = np.ones(len(corpus), dtype=np.bool_)
    used = steps_per_epoch(corpus, batch) * batch
    for epoch in range(epochs):
        missing[epoch_order(seed, epoch, len(corpus))[:used]] = False
        if not missing.any():
            break
    return int(missing.sum())


def read_unit(corpus: Corpus, files: ShardFiles, sample: int) -> NDArray[np.float32]:
    """One sample [bands, H, W] in unit space.

    Raises:
        DamagedShard: the bytes at its place are not its pixels.
    """
    pixels = files.pixels(sample)
    if pixels.ndim != 3 or len(pixels) != len(corpus.bands):
        raise DamagedShard(
            f"{corpus.index.says(sample)} has shape {pixels.shape}, not {len(corpus.bands)} bands; "
            "pack the dataset again"
        )
    return to_unit(pixels, corpus.scales[sample].tolist())


def load_batch(
    corpus: Corpus,
    files: ShardFiles,
    settings: PretrainSettings,
    seed: int,
    step: int,
    share: tuple[int, int] = (0, 1),
) -> Batch:
    """Batch ``step`` of a run, ready for the device; of process ``share[0]`` of ``share[1]``.

    The whole batch does not depend on how many processes share it.
    """
    epoch, samples = batch_samples(corpus, seed, step, settings.batch)
    rank, world = share
    samples = samples[rank * settings.batch // world : (rank + 1) * settings.batch // world]
    pictures = [read_unit(corpus, files, sample) for sample in samples]
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    images = np.zeros((len(samples), len(corpus.bands), height, width), dtype=np.float32)
    windows, masks = [], []
    grid = settings.size_px // settings.mask_patch_px
    for place, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
        images[place, :, : picture.shape[1], : picture.shape[2]] = picture
        rng = sample_rng(seed, epoch, sample)
        windows.append(draw_window(rng, picture.shape[1], picture.shape[2], settings.crop_scale))
        masks.append(draw_mask(rng, grid, settings.mask_ratio))
    return Batch(
        np.array(samples, dtype=np.int64),
        torch.from_numpy(images),
        torch.tensor(windows, dtype=torch.int64),
        torch.from_numpy(np.stack(masks)),
    )


def batches(
    corpus: Corpus,
    settings: PretrainSettings,
    seed: int,
    first: int,
    last: int,
    threads: int,
    share: tuple[int, int] = (0, 1),
    pin: bool = False,
) -> Generator[Batch]:
    """Batches ``first`` to ``last`` - 1 in order, read ahead by ``threads`` threads.

    ``pin``: in page-locked memory, for a GPU.
    """

    def read(step: int) -> Batch:
        batch = load_batch(corpus, files, settings, seed, step, share)
        return batch.pinned() if pin else batch

    with ShardFiles(corpus.index) as files, ThreadPoolExecutor(threads, "geofm-read") as pool:
        yield from in_order(pool, read, range(first, last), threads)
