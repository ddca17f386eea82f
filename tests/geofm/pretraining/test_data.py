from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_catalog.artifact import Artifact
from geofm.config.recipe import PretrainSettings
from geofm.formats.npy import chip_from_bytes
from geofm.pretraining.data import (
    Corpus,
    TooFewSamples,
    batch_samples,
    count_never_drawn,
    load_batch,
    open_corpus,
    read_batches,
    read_unit_pixels,
    steps_per_epoch,
)
from geofm.raster.radiometry import to_unit
from geofm.shards.loader import epoch_order
from geofm.shards.reader import DamagedShard, ShardFiles
from tests.geofm.pretraining.conftest import SCALE, tiny_settings
from tests.geofm.shards.conftest import shards_open


def test_a_sample_is_its_tar_member_in_unit_space(dataset: Artifact, corpus: Corpus) -> None:
    index = dataset.table("index.parquet").sort_values("key", ignore_index=True)
    assert len(corpus) == len(index) == 22
    with ShardFiles(corpus.index) as files:
        for number, row in enumerate(index.itertuples()):
            data = dataset.read_range(row.shard, row.offset, row.size)
            expected = to_unit(chip_from_bytes(data), [SCALE] * 4)
            assert np.array_equal(read_unit_pixels(corpus, files, number), expected)


def test_an_epoch_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert np.array_equal(epoch_order(1, 2, 50), orders[-1])


def test_an_epoch_has_whole_batches_without_repeats(corpus: Corpus) -> None:
    assert steps_per_epoch(corpus, 4) == 5
    for epoch in range(3):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            found, samples = batch_samples(corpus, 0, step, 4)
            assert (found, len(samples)) == (epoch, 4)
            seen += samples
        assert len(set(seen)) == 20


def test_samples_that_no_epoch_reaches_are_counted(corpus: Corpus) -> None:
    assert count_never_drawn(corpus, 0, 1, 4) == 2
    assert count_never_drawn(corpus, 0, 1, 11) == 0
    assert count_never_drawn(corpus, 0, 30, 4) == 0


def test_batches_do_not_depend_on_threads_or_on_where_reading_starts(
    corpus: Corpus, tiny: PretrainSettings
) -> None:
    whole = list(read_batches(corpus, tiny, 3, 0, 8, threads=1))
    threaded = list(read_batches(corpus, tiny, 3, 0, 8, threads=5))
    late = list(read_batches(corpus, tiny, 3, 6, 8, threads=2))
    assert (len(whole), len(threaded), len(late)) == (8, 8, 2)
    for one, two in [*zip(whole, threaded, strict=True), *zip(whole[6:], late, strict=True)]:
        for field in ("images", "windows", "mask"):
            assert np.array_equal(getattr(one, field), getattr(two, field))
    assert whole[0].images.shape == (4, 4, 40, 40)
    assert (whole[0].mask.sum(axis=(1, 2)) == 10).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_very_same_batches(corpus: Corpus, processes: int) -> None:
    settings = tiny_settings()
    for step in (0, 7):
        with ShardFiles(corpus.index) as files:
            whole = load_batch(corpus, files, settings, 3, step)
            shares = [
                load_batch(corpus, files, settings, 3, step, rank, processes)
                for rank in range(processes)
            ]
        for name in ("samples", "images", "windows", "mask"):
            parts = [getattr(share, name) for share in shares]
            assert np.array_equal(np.concatenate(parts), getattr(whole, name)), name


def test_crops_change_from_epoch_to_epoch(corpus: Corpus) -> None:
    settings = tiny_settings(batch=22)
    with ShardFiles(corpus.index) as files:
        first, second = (load_batch(corpus, files, settings, 0, step) for step in (0, 1))
    assert not np.array_equal(first.windows, second.windows)
    assert len({mask.numpy().tobytes() for mask in first.mask}) > 15


def test_reading_stops_and_closes_when_the_caller_leaves(
    corpus: Corpus, tiny: PretrainSettings
) -> None:
    reading = read_batches(corpus, tiny, 0, 0, 10, threads=2)
    next(reading)
    assert shards_open(corpus.index) > 0
    reading.close()
    assert shards_open(corpus.index) == 0


def test_too_few_samples_name_the_batch_to_set(corpus: Corpus) -> None:
    with pytest.raises(TooFewSamples, match=r"22 samples.*pretrain\.batch 32.*at most 22"):
        steps_per_epoch(corpus, 32)


def test_a_damaged_shard_is_said_to_be_one(dataset: Artifact) -> None:
    corpus = open_corpus(dataset)
    for beside in (7, 10**9):
        moved = dataclasses.replace(corpus.index, offsets=corpus.index.offsets + beside)
        broken = dataclasses.replace(corpus, index=moved)
        with ShardFiles(broken.index) as files, pytest.raises(DamagedShard, match="geofm verify"):
            read_unit_pixels(broken, files, 0)
