"""The dataset artifact as batches: whichever thread reads them, they are the same.

Sample i of epoch e is cropped and masked by a generator seeded with (seed, e, i), and the order of
an epoch follows from (seed, e). So batch t of a run can be made without the ones before it, which
is all that an exact resume needs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, UsageError
from geofm.imagery.chips import chip_from_bytes
from geofm.imagery.radiometry import rgb_index, to_unit
from geofm.pretraining.augment import crop_weights, draw_window, sample_rng
from geofm.pretraining.masking import draw_mask
from geofm.settings import PretrainSettings

#: Set apart the generator of an epoch's order from those of its samples.
ORDER = 0x0DE5


class DamagedShard(CheckError):
    """A shard does not hold what its index says."""


class TooFewSamples(UsageError):
    """The dataset does not fill one batch."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Samples of a dataset: where each one's bytes are, and the statistics of all.

    ``mean`` and ``std`` are per band in unit space; ``scales`` is [N, bands].
    """

    digest: str
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: tuple[str, ...]
    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    scales: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Positions of the bands a teacher sees."""
        return rgb_index(self.bands)


@dataclass(frozen=True, eq=False)
class Batch:
    """Chips in unit space [B, bands, H, W], the weights that crop them, masks [B, g, g]."""

    images: NDArray[np.float32]
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    mask: NDArray[np.bool_]


def open_corpus(dataset: Artifact) -> Corpus:
    """Read the index of a dataset; its shards become local files, fetched once if remote."""
    index = dataset.table("index.parquet", ["key", "chip_id", "shard", "offset", "size"])
    index = index.sort_values("key", ignore_index=True)
    samples = dataset.table("samples.parquet", ["chip_id", "scale"]).set_index("chip_id")
    stats = dataset.json("stats.json")
    names = sorted(set(index["shard"]))
    number = {name: position for position, name in enumerate(names)}
    return Corpus(
        digest=dataset.digest,
        bands=tuple(stats["bands"]),
        mean=tuple(float(m) for m in stats["mean"]),
        # a band without any contrast would be divided by zero
        std=tuple(max(float(s), 1e-6) for s in stats["std"]),
        files=tuple(str(dataset.local(name)) for name in names),
        shards=index["shard"].map(number).to_numpy(dtype=np.int64),
        offsets=index["offset"].to_numpy(dtype=np.int64),
        sizes=index["size"].to_numpy(dtype=np.int64),
        scales=np.stack([np.asarray(s) for s in samples.loc[index["chip_id"], "scale"]]),
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


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch, samples, ORDER]))
    order: NDArray[np.int64] = rng.permutation(samples)
    order.flags.writeable = False
    return order


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


@contextmanager
def open_shards(corpus: Corpus) -> Iterator[tuple[int, ...]]:
    """File descriptors of all shards: reads by offset need no position, so threads share them."""
    with ExitStack() as stack:
        files = []
        for name in corpus.files:
            descriptor = os.open(name, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            files.append(descriptor)
        yield tuple(files)


def read_unit(corpus: Corpus, files: tuple[int, ...], sample: int) -> NDArray[np.float32]:
    """One sample [bands, H, W] in unit space.

    Raises:
        DamagedShard: the bytes at its place are not its pixels.
    """
    shard, size = int(corpus.shards[sample]), int(corpus.sizes[sample])
    data = os.pread(files[shard], size, int(corpus.offsets[sample]))
    try:
        pixels = chip_from_bytes(data)
    except ValueError as error:
        raise DamagedShard(
            f"{corpus.files[shard]} is damaged at byte {corpus.offsets[sample]} ({error}); run "
            f"`geofm verify {corpus.digest[:12]}` and pack it again"
        ) from error
    if pixels.ndim != 3 or len(pixels) != len(corpus.bands):
        raise DamagedShard(
            f"a sample at byte {corpus.offsets[sample]} of {corpus.files[shard]} has shape "
            f"{pixels.shape}, not {len(corpus.bands)} bands; pack the dataset again"
        )
    return to_unit(pixels, corpus.scales[sample].tolist())


def load_batch(
    corpus: Corpus, files: tuple[int, ...], settings: PretrainSettings, seed: int, step: int
) -> Batch:
    """Batch ``step`` of a run, ready for the device."""
    epoch, samples = batch_samples(corpus, seed, step, settings.batch)
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
    rows, columns = crop_weights(windows, settings.size_px, height, width)
    return Batch(images, rows, columns, np.stack(masks))


def batches(
    corpus: Corpus, settings: PretrainSettings, seed: int, first: int, last: int, threads: int
) -> Generator[Batch]:
    """Batches ``first`` to ``last`` - 1 in order, read ahead by ``threads`` threads."""
    with open_shards(corpus) as files, ThreadPoolExecutor(threads, "geofm-read") as pool:
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in range(first, last):
                ahead.append(pool.submit(load_batch, corpus, files, settings, seed, step))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
