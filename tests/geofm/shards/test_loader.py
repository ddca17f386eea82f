from __future__ import annotations

import itertools
import json
import os
import pickle
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data_catalog.errors import UsageError
from data_catalog.store import open_store
from geofm.config.recipe import PackSettings
from geofm.formats.npy import chip_from_bytes
from geofm.shards.loader import (
    BadState,
    EpochProgress,
    SampleDataset,
    SampleStream,
    advance,
    deal,
    epoch_order,
    merge_states,
)
from geofm.shards.pack import STAGE
from geofm.shards.reader import DamagedShard, NoSuchSplit, ShardFiles, open_index
from tests.geofm.shards.conftest import make_inputs, shards_open, some_chips

EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "40"))


def read(stream: SampleStream, batches: int | None = None, workers: int = 0) -> list[str]:
    """Keys of the next batches, in order."""
    found = itertools.islice(stream.batches(workers=workers), batches)
    return [sample.key for batch in found for sample in batch]


def test_samples_are_what_was_packed(pack):
    chips = some_chips(9)
    by_id = {chip.chip_id(n): chip.pixels for n, chip in enumerate(chips)}
    dataset = pack(chips)
    samples = SampleDataset(open_index(dataset, digests=True), check=True)
    assert {s.key for s in samples} == set(by_id)
    for sample in samples:
        assert np.array_equal(sample.pixels, by_id[sample.key])
    assert samples[-1].key == samples[8].key
    with pytest.raises(IndexError):
        samples[9]
    raw = SampleDataset(open_index(dataset), decode=False)[3]
    assert np.array_equal(chip_from_bytes(raw.pixels), by_id[raw.key])


def test_torchs_loader_reads_the_dataset_by_its_own_sampler(pack):
    index = open_index(pack(some_chips(10)))
    samples = SampleDataset(index, transform=lambda s: torch.tensor(s.pixels.astype(np.int32)))
    loaded = list(DataLoader(samples, batch_size=4, shuffle=True, num_workers=2))
    assert [len(batch) for batch in loaded] == [4, 4, 2]
    total = sum(int(batch.sum()) for batch in loaded)
    assert total == sum(int(samples[n].sum()) for n in range(10))


def test_an_order_follows_from_seed_and_epoch_alone(pack):
    index = open_index(pack(some_chips(20)))
    keys = index.keys.to_pylist()
    for epoch in (0, 1):
        expected = [keys[n] for n in epoch_order(5, epoch, 20)]
        for workers, batch in ((0, 1), (0, 7), (2, 3)):
            stream = SampleStream(index, seed=5, batch=batch)
            for _ in range(epoch):
                read(stream)
            assert read(stream, workers=workers) == expected
    assert read(SampleStream(index, seed=6)) != read(SampleStream(index, seed=5))
    # what was begun with an earlier version goes on in the same order
    assert epoch_order(3, 1, 10).tolist() == [7, 3, 6, 0, 9, 4, 2, 1, 8, 5]
    assert read(SampleStream(index, shuffled=False, batch=3)) == keys
    stream = SampleStream(index, seed=5, batch=3, transform=lambda sample: sample.key.upper())
    told = [key for batch in stream.batches() for key in batch]
    assert told == [keys[n].upper() for n in epoch_order(5, 0, 20)]
    again = pickle.loads(pickle.dumps(SampleStream(index, seed=5)))  # as workers that are spawned
    assert read(again) == [keys[n] for n in epoch_order(5, 0, 20)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_a_ranks_order(pack, workers):
    index = open_index(pack(some_chips(23)))
    alone = SampleStream(index, seed=1, rank=1, world=2, batch=4)
    shared = SampleStream(index, seed=1, rank=1, world=2, batch=4)
    first, again = read(alone), read(shared, workers=workers)
    assert (first, alone.epoch) == (again, shared.epoch)
    assert len(first) == 11


def test_resuming_with_workers_and_in_the_next_epoch(pack):
    index = open_index(pack(some_chips(23)))
    whole = SampleStream(index, seed=1, batch=4)
    expected = [read(whole), read(whole)]
    stopped = SampleStream(index, seed=1, batch=4)
    seen = read(stopped, 2, workers=2)
    state = json.loads(json.dumps(stopped.state_dict()))
    again = SampleStream(index, seed=1, batch=4)
    again.load_state_dict(state)
    assert len(again) == 4
    assert seen + read(again, workers=3) == expected[0]
    assert (again.epoch, read(again)) == (1, expected[1])


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data(), samples=st.integers(1, 60), seed=st.integers(0, 3))
def test_any_stops_and_any_worlds_read_every_sample_once(data, samples, seed):
    """Ranks stop after any sample, each after another, and go on with another world size."""
    order = epoch_order(seed, 0, samples)
    left, seen = EpochProgress(), []
    for _ in range(data.draw(st.integers(0, 4), "stops")):
        world = data.draw(st.integers(1, 5), "world")
        dealt = [deal(left.positions(samples), rank, world) for rank in range(world)]
        taken = [data.draw(st.integers(0, len(places)), "taken") for places in dealt]
        for places, count in zip(dealt, taken, strict=True):
            seen += [int(n) for n in order[places[:count]]]
        states = [
            {"epoch": left.epoch, "first": left.first, "done": list(left.done), "world": world,
             "rank": rank, "taken": count, "samples": samples}
            for rank, count in enumerate(taken)
        ]  # fmt: skip
        left = advance(left, samples, taken)
        if world > 1:
            assert merge_states(states[::-1]) == left
        if left.epoch:
            break
    if not left.epoch:
        seen += [int(n) for n in order[left.positions(samples)]]
    assert sorted(seen) == list(range(samples))


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data(), batch=st.integers(1, 4), world=st.integers(1, 4))
def test_streams_stopped_anywhere_are_exact(resumable, data, batch, world):
    """The multiset of an epoch is exact for any new world; for the same one, so is the order."""
    index, expected = resumable
    ranks = [SampleStream(index, 2, rank, world, batch=batch) for rank in range(world)]
    whole = [read(SampleStream(index, 2, rank, world, batch=batch)) for rank in range(world)]
    stops = [data.draw(st.integers(0, -(-len(keys) // batch))) for keys in whole]
    seen = [read(stream, stop) for stream, stop in zip(ranks, stops, strict=True)]
    states = [stream.state_dict() for stream in ranks]

    same = [SampleStream(index, 2, rank, world, batch=batch) for rank in range(world)]
    for rank, stream in enumerate(same):
        stream.load_state_dict(states)
        if not stream.epoch:
            assert seen[rank] + read(stream) == whole[rank]

    new_world = data.draw(st.integers(1, 4), "new world")
    if new_world != world:
        rest = []
        for rank in range(new_world):
            stream = SampleStream(index, 2, rank, new_world, batch=data.draw(st.integers(1, 4)))
            stream.load_state_dict(states if world > 1 else states[0])
            if not stream.epoch:
                rest += read(stream)
        assert Counter([*itertools.chain(*seen), *rest]) == Counter(expected)


@pytest.fixture(scope="module")
def resumable(tmp_path_factory):
    """An index of 17 samples, and their keys."""
    from data_catalog.catalogue import open_catalogue
    from data_catalog.run import run_stage

    folder = tmp_path_factory.mktemp("resumable")
    store = open_store(folder / "store")
    inputs = make_inputs(store, some_chips(17))
    settings = PackSettings(shard_mib=0.06, name="small")
    catalogue = open_catalogue(f"sqlite:///{folder}/c.db", store)
    dataset = run_stage(STAGE, store, catalogue, inputs, settings)
    index = open_index(dataset)
    return index, index.keys.to_pylist()


def test_what_is_left_of_an_epoch_is_a_view_of_its_order():
    order = epoch_order(0, 0, 100)
    assert np.shares_memory(deal(EpochProgress(first=7).remaining(order), 1, 3), order)
    assert EpochProgress(first=2, done=(4,)).remaining(order).tolist() == [*order[2:4], *order[5:]]


def test_one_state_speaks_for_ranks_in_lockstep(resumable):
    index, expected = resumable
    ranks = [SampleStream(index, 0, rank, 3, batch=2) for rank in range(3)]
    seen = [key for stream in ranks for key in read(stream, 2)]
    rest = []
    for rank in range(2):
        stream = SampleStream(index, 0, rank, 2)
        stream.load_state_dict(ranks[1].state_dict())
        rest += read(stream)
    assert Counter(seen + rest) == Counter(expected)


def test_states_that_do_not_belong_are_refused(resumable):
    index, _ = resumable
    state = SampleStream(index, 0).state_dict()
    with pytest.raises(BadState, match="seed 0, this stream of 1"):
        SampleStream(index, 1).load_state_dict(state)
    with pytest.raises(BadState, match="samples 17, this stream of 5"):
        SampleStream(index.take(np.arange(5)), 0).load_state_dict(state)
    pair = [SampleStream(index, 0, rank, 3).state_dict() for rank in (0, 1)]
    with pytest.raises(BadState, match="3 readers have one each"):
        SampleStream(index, 0).load_state_dict(pair)
    with pytest.raises(BadState, match="counts 99 samples, but its share is 17"):
        advance(EpochProgress(), 17, [99])
    other = [{**pair[0], "first": 2}, pair[1], {**pair[1], "rank": 2}]
    with pytest.raises(BadState, match="one and the same run"):
        SampleStream(index, 0).load_state_dict(other)
    with pytest.raises(UsageError, match="rank 2"):
        SampleStream(index, rank=2, world=2)


def test_even_epochs_have_as_many_batches_for_each_rank(resumable):
    index, _ = resumable
    ranks = [SampleStream(index, 0, rank, 2, batch=3, even=True) for rank in range(2)]
    assert [len(stream) for stream in ranks] == [2, 2]
    seen = [key for stream in ranks for key in read(stream)]
    assert len(set(seen)) == len(seen) == 12
    assert [stream.epoch for stream in ranks] == [1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_filled_while_its_samples_are_read(resumable, workers):
    index, _ = resumable

    def fill(samples):
        batch = torch.zeros(4, 3, 32, 32)
        for place, sample in enumerate(samples):
            batch[place] = torch.from_numpy(sample.pixels.astype(np.float32))
            if place == 2:
                break  # the fourth is left, and counts as read
        return batch

    expected = [s for batch in SampleStream(index, 1, batch=4).batches() for s in batch]
    stream = SampleStream(index, 1, batch=4, collate=fill)
    batches = list(stream.batches(workers=workers))
    assert len(batches) == 5
    for number, batch in enumerate(batches):
        found = [torch.from_numpy(s.pixels.astype(np.float32)) for s in expected[4 * number :][:3]]
        assert torch.equal(batch[: len(found)], torch.stack(found))
    assert (stream.epoch, stream.taken) == (1, 0)


def damage(dataset, number: int, how: str) -> str:
    """Damage a sample on the disk; returns its key."""
    index = open_index(dataset)
    path = Path(index.files[index.shards[number]])
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[int(index.offsets[number] + index.sizes[number]) - 5] ^= 4
    elif how == "cut":
        del data[int(index.offsets[number]) + 100 :]
    path.unlink() if how == "missing" else path.write_bytes(data)
    return index.keys[number].as_py()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["bit", "cut", "missing"])
def test_damaged_samples_are_found_skipped_and_counted(pack, how, workers):
    dataset = pack(some_chips(20))
    key = damage(dataset, 6, how)
    index = open_index(dataset, digests=True)
    gone = {index.keys[n].as_py() for n in range(20) if index.shards[n] == index.shards[6]}
    stream = SampleStream(index, batch=3, check=True)
    with pytest.raises(DamagedShard, match=r"geofm verify [0-9a-f]{12}"):
        read(stream, workers=workers)
    stream = SampleStream(index, batch=3, check=True, skip_damaged=True, ahead_mib=0.02)
    found = read(stream, workers=workers)
    assert len(found) + len(stream.skipped) == 20
    assert key not in found
    assert any(f"sample {key} at byte" in problem for problem in stream.skipped)
    assert set(index.keys.to_pylist()) - set(found) <= gone
    if how == "bit":
        assert len(stream.skipped) == 1
        assert "SHA-256" in stream.skipped[0]
        assert key in read(SampleStream(index, batch=3))  # nobody asked to check
    assert stream.epoch == 1


def test_a_short_read_is_damage_even_unchecked(pack):
    dataset = pack(some_chips(20))
    damage(dataset, 6, "cut")
    with pytest.raises(DamagedShard, match="the file ends before"):
        read(SampleStream(open_index(dataset)))
    index = open_index(dataset)
    beside = replace(index, offsets=index.offsets + 3)
    with pytest.raises(DamagedShard, match="byte"):
        read(SampleStream(beside))


def test_splits_are_read_apart(pack):
    chips = some_chips(40)
    for number, chip in enumerate(chips):
        chip.x = 500_000.0 + 10_000 * (number // 2)
    dataset = pack(chips, holdout=0.3)
    train, held = (open_index(dataset, split) for split in ("train", "holdout"))
    assert len(train) + len(held) == len(open_index(dataset, "all")) == 40
    assert not set(train.keys.to_pylist()) & set(held.keys.to_pylist())
    with pytest.raises(NoSuchSplit, match=r"pack\.holdout"):
        open_index(pack(chips), "holdout")


def test_threads_read_ahead_and_close_what_they_opened(resumable):
    index, _ = resumable
    expected = read(SampleStream(index, 3))
    assert read(SampleStream(index, 3, threads=4, ahead_mib=0.02)) == expected
    with ShardFiles(index) as files:
        files.read(0)
        assert shards_open(index) == 1
    assert shards_open(index) == 0
    with pytest.raises(UsageError, match="digests=True"):
        SampleStream(index, check=True)


def test_what_a_thread_has_open_goes_with_it(resumable, monkeypatch):
    index, _ = resumable
    monkeypatch.setattr("geofm.shards.reader.OPEN_FILES", (8, 8))
    with ShardFiles(index) as files:
        for _ in range(5):
            thread = threading.Thread(target=files.read, args=(0,))
            thread.start()
            thread.join()
        assert shards_open(index) == 0
        for number in range(len(index)):  # so that all may be open that are allowed
            files.read(number)
        assert shards_open(index) == min(8, len(index.files))
    assert shards_open(index) == 0


@pytest.mark.parametrize("shuffled", [True, False])
def test_more_shards_than_may_be_open_at_once(resumable, monkeypatch, shuffled):
    index, _ = resumable
    assert len(index.files) > 2
    expected = read(SampleStream(index, 3, shuffled=shuffled))
    monkeypatch.setattr("geofm.shards.reader.OPEN_FILES", (1, 1))
    stream = SampleStream(index, 3, shuffled=shuffled, ahead_mib=0.02)
    found = []
    for batch in stream.batches():
        found.append(batch[0].key)
        stream.samples[len(found) % 17]  # others read through the same files
        assert shards_open(index) <= 4
    assert found == expected


def test_the_loader_reads_ranges_from_s3(s3: str, catalogue):
    from data_catalog.run import run_stage

    store = open_store(f"{s3}/loader")
    inputs = make_inputs(store, some_chips(12))
    dataset = run_stage(STAGE, store, catalogue, inputs, PackSettings(shard_mib=0.06, name="far"))
    index = open_index(dataset, digests=True)
    assert index.files[0].startswith("s3://")
    fetched = open_index(dataset, fetch=True)
    expected = read(SampleStream(fetched, 4, batch=5))
    for workers in (0, 2):
        stream = SampleStream(index, 4, batch=5, check=True)
        assert read(stream, workers=workers) == expected
    pixels = {s.key: s.pixels for s in SampleDataset(fetched)}
    for sample in SampleDataset(index, check=True):
        assert np.array_equal(sample.pixels, pixels[sample.key])
