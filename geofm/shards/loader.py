"""Samples for training, in a seeded order, resumable at any sample and by any number of readers.

    index = open_index(dataset)
    stream = SampleStream(index, seed=0, batch=64, transform=crop, collate=stack)
    for batch in stream.batches(workers=4):  # the rest of the epoch; then the next one
        ...
        torch.save(stream.state_dict(), ...)

Samples are read by offset, so the order of an epoch is a random permutation of all samples,
independent of the layout of the shards. Memory holds only the samples that are read ahead.

An epoch's order follows from (seed, epoch). Its positions 0, 1, 2, ... are distributed to the
readers of all ranks in turn, so the rest of an epoch can be distributed again to any other number
of readers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from data_catalog.errors import UsageError
from data_catalog.storage.process import end_with_parent
from geofm.runtime.threads import map_ordered
from geofm.shards.reader import DamagedShard, Sample, ShardFiles, ShardIndex

#: Word of the seed that separates the generator of an epoch's order from other generators.
ORDER = 0x0DE5

Numbers = NDArray[np.integer[Any]]


class BadState(UsageError):
    """A loader's state does not fit this dataset, seed or epoch."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, samples: int) -> Numbers:
    """Return the order of an epoch: a permutation that depends only on the arguments."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch, samples, ORDER]))
    order: Numbers = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
    rng.shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class EpochProgress:
    """Progress of all readers in an epoch.

    Attributes:
        epoch: Number of the epoch.
        first: First position of the epoch's order that was not read.
        done: Positions after ``first`` that were read.
    """

    epoch: int = 0
    first: int = 0
    done: tuple[int, ...] = ()

    def remaining(self, order: Numbers) -> Numbers:
        """Return the part of an epoch's order that was not read, as a view if it is one piece."""
        if not self.done:
            return order[self.first :]
        read = np.zeros(len(order), dtype=np.bool_)
        read[: self.first] = True
        read[list(self.done)] = True
        return order[~read]

    def positions(self, samples: int) -> Numbers:
        """Return the positions of the epoch's order that were not read, ascending."""
        return self.remaining(np.arange(samples))


def deal(remaining: Numbers, rank: int, world: int) -> Numbers:
    """Return the share of one of ``world`` readers, as a view."""
    return remaining[rank::world]


def advance(progress: EpochProgress, samples: int, taken: Sequence[int]) -> EpochProgress:
    """Return the progress after each reader has read some of its share.

    Args:
        progress: Progress before.
        samples: Number of samples of the split.
        taken: Number of samples that each reader has read since.

    Raises:
        BadState: A reader has read more than its share.
    """
    positions = progress.positions(samples)
    read = np.zeros(len(positions), dtype=np.bool_)
    for rank, count in enumerate(taken):
        share = read[rank :: len(taken)]
        if not 0 <= count <= len(share):
            raise BadState(
                f"the state of reader {rank} of {len(taken)} counts {count} samples, but its share "
                f"is {len(share)}; load the state with the dataset, split and seed that it was "
                "saved with"
            )
        share[:count] = True
    if read.all():
        return EpochProgress(progress.epoch + 1)
    first = int(positions[~read][0])
    done = sorted([*progress.done, *positions[read].tolist()])
    later = tuple(position for position in done if position > first)
    return EpochProgress(progress.epoch, first, later)


def merge_states(states: Sequence[dict[str, Any]]) -> EpochProgress:
    """Compute the progress in an epoch from the states of its readers.

    Args:
        states: The state of each reader; or a single state, if all readers have read the same
            number of samples, as in synchronous training.

    Raises:
        BadState: The states are not those of all readers of one epoch.
    """
    latest = min(states, key=lambda state: int(state["epoch"]))
    world, samples = int(latest["world"]), int(latest["samples"])
    progress = _progress_of(latest)
    shares = [len(deal(progress.positions(samples), rank, world)) for rank in range(world)]
    if len(states) == 1:
        count = int(latest["taken"])
        return advance(progress, samples, [min(count, share) for share in shares])
    if sorted(int(state["rank"]) for state in states) != list(range(world)):
        raise BadState(f"{len(states)} states were given, but {world} readers have one each")
    taken = [0] * world
    for state in states:
        same = [state[name] for name in ("first", "done")] == [progress.first, list(progress.done)]
        if int(state["world"]) != world or not (same or state["epoch"] != progress.epoch):
            raise BadState("the states were not saved by the readers of one and the same run")
        rank, ahead = int(state["rank"]), int(state["epoch"]) - progress.epoch
        if ahead > 1 or (ahead == 1 and int(state["taken"])):
            raise BadState(
                f"reader {rank} is in epoch {state['epoch']} and another in {progress.epoch}: "
                "save the states when all readers are in the same epoch, or have finished it"
            )
        taken[rank] = shares[rank] if ahead else int(state["taken"])
    return advance(progress, samples, taken)


def _progress_of(state: Mapping[str, Any]) -> EpochProgress:
    """Read the progress at the time when a state's readers began."""
    return EpochProgress(int(state["epoch"]), int(state["first"]), tuple(state["done"]))


#: Number of threads that read from an object store, where each read waits for the network.
REMOTE_THREADS = 16
#: Stands in the place of a damaged sample.
SKIPPED = object()
#: A batch, the number of samples that it used up, and messages on the skipped ones.
Delivery = tuple[Any, int, tuple[str, ...]]


class SampleDataset(Dataset[Any]):
    """Samples by number, for torch's samplers.

    Args:
        index: Index of the samples.
        transform: Function applied to each ``Sample``; None gives the sample itself.
        check: Compare the SHA-256 of each sample with the index (opened with ``digests``).
        decode: Give pixels; else the ``.npy`` bytes.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: Callable[[Sample], Any] | None = None,
        check: bool = False,
        decode: bool = True,
    ) -> None:
        self.index, self.transform = index, transform
        self.files = ShardFiles(index)
        _require_digests(index, check)
        self.check, self.decode = check, decode

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Any:
        """Read a sample.

        Raises:
            DamagedShard: The sample is damaged.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        sample = self.files.sample(number, 0, self.check, self.decode)
        return sample if self.transform is None else self.transform(sample)


@dataclass(frozen=True)
class Reading:
    """Settings of reading.

    Attributes:
        batch: Samples per batch.
        even: Drop the end of an epoch that does not give each rank the same number of full batches.
        shuffled: Read in the epoch's random order; else in the order of the shards.
        skip_damaged: Skip damaged samples and count them; else the first one raises an error.
        ahead_mib: Most MiB that are read ahead.
        threads: Threads of a process that read ahead; None: 16 for an object store, none for local
            files, which the kernel reads ahead.
    """

    batch: int = 1
    even: bool = False
    shuffled: bool = True
    skip_damaged: bool = False
    ahead_mib: float = 64.0
    threads: int | None = None


class SampleStream(IterableDataset[Any]):
    """Batches of one rank, epoch after epoch, resumable at any sample.

    Rank r of w reads every w-th sample of the epoch's order, in that order for any number of
    workers. Iterate with ``batches``.

    Args:
        index: Index of the samples.
        seed: Seed of the order.
        rank: Rank of this reader.
        world: Number of readers.
        transform: Function applied to each ``Sample`` in the worker that read it.
        collate: Function that makes a batch from an iterator of transformed samples; None makes a
            list. A sample is read when the iterator reaches it, so it can be copied straight into
            the memory of the batch.
        check: Compare the SHA-256 of each sample with the index (opened with ``digests``).
        decode: Give pixels; else the ``.npy`` bytes.
        **reading: Fields of ``Reading``.
    """

    def __init__(
        self,
        index: ShardIndex,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        transform: Callable[[Sample], Any] | None = None,
        collate: Callable[[Iterator[Any]], Any] | None = None,
        check: bool = False,
        decode: bool = True,
        **reading: Any,
    ) -> None:
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} is not between 0 and {world - 1}")
        self.samples = SampleDataset(index, transform, check, decode)
        self.index, self.seed, self.rank, self.world = index, seed, rank, world
        self.collate, self.reading = collate, Reading(**reading)
        self.progress, self.taken = EpochProgress(), 0
        #: Messages on damaged samples that were skipped since the stream was made.
        self.skipped: list[str] = []

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.progress.epoch

    def __len__(self) -> int:
        """Return the number of batches of this rank that remain in the epoch."""
        return math.ceil(len(self._numbers()) / self.reading.batch)

    def _numbers(self) -> Numbers:
        """Return the samples of this rank that remain in the epoch, in order."""
        samples, size = len(self.index), self.reading.batch
        shuffled = self.reading.shuffled
        order = epoch_order(self.seed, self.epoch, samples) if shuffled else np.arange(samples)
        remaining = self.progress.remaining(order)
        share = deal(remaining, self.rank, self.world)
        if self.reading.even:
            share = share[: len(remaining) // (self.world * size) * size]
        return share[self.taken :]

    def __iter__(self) -> Iterator[Delivery]:
        """Yield the batches of this worker; ``batches`` joins those of all workers."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        numbers, size = self._numbers(), self.reading.batch
        if workers > 1:
            numbers = numbers[np.arange(len(numbers)) // size % workers == worker]
        skipped: list[str] = []
        samples = self._transformed(numbers, skipped)
        collate, drop = self.collate, self.reading.skip_damaged
        if size == 1 and collate is None and not drop:
            yield from (([sample], 1, ()) for sample in samples)
            return
        full, rest = divmod(len(numbers), size)
        for count in chain(repeat(size, full), [rest] if rest else []):
            if drop:
                whole = [sample for sample in islice(samples, count) if sample is not SKIPPED]
                batch = (collate(iter(whole)) if collate else whole) if whole else None
            elif collate is None:
                batch = list(islice(samples, count))
            else:
                part = islice(samples, count)
                batch = collate(part)
                deque(part, maxlen=0)  # samples that collate did not use
            if skipped:
                yield batch, count, tuple(skipped)
                skipped.clear()
            else:
                yield batch, count, ()

    def _transformed(self, numbers: Numbers, skipped: list[str]) -> Iterator[Any]:
        """Yield transformed samples, each read when it is requested; SKIPPED if damaged."""

        def on_damage(damage: DamagedShard) -> Any:
            if not self.reading.skip_damaged:
                raise damage
            skipped.append(str(damage))
            return SKIPPED

        samples, transform = self._read(numbers, on_damage), self.samples.transform
        if transform is None:
            return samples
        if not self.reading.skip_damaged:
            return map(transform, samples)
        return (SKIPPED if sample is SKIPPED else transform(sample) for sample in samples)

    def batches(self, workers: int = 0, **options: Any) -> Iterator[Any]:
        """Yield the remaining batches of the epoch; then the stream is at the next epoch.

        A batch counts as read as soon as it is yielded.

        Args:
            workers: Number of processes that read and transform; 0 for this process.
            **options: Options of torch's ``DataLoader`` (prefetch_factor, pin_memory, ...).
        """
        source: Any = self
        if workers:
            start = partial(_start_worker, os.getpid(), options.pop("worker_init_fn", None))
            source = DataLoader(
                self, batch_size=None, num_workers=workers, worker_init_fn=start, **options
            )
        for batch, taken, skipped in source:
            self.taken += taken
            if skipped:
                self.skipped += skipped
            if batch is not None:
                yield batch
        self.progress, self.taken = EpochProgress(self.progress.epoch + 1), 0

    def _read(self, numbers: Numbers, on_damage: Callable[[DamagedShard], Any]) -> Iterator[Any]:
        """Yield samples in order, read ahead by threads or by the kernel."""
        samples, reading = self.samples, self.reading
        how = self.progress.epoch, samples.check, samples.decode
        largest = int(self.index.sizes.max())
        ahead = max(1, int(reading.ahead_mib * 2**20 / largest))
        threads = reading.threads
        if threads is None:
            threads = REMOTE_THREADS if samples.files.is_remote else 0
        if threads:
            return _read_by_threads(samples.files, numbers, on_damage, how, threads, ahead)
        # the kernel reads ahead by itself if samples are read in the order of the file
        return samples.files.scan(numbers, on_damage, *how, ahead if reading.shuffled else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank as JSON."""
        return {
            "dataset": self.index.digest,
            "samples": len(self.index),
            "seed": self.seed,
            "epoch": self.progress.epoch,
            "first": self.progress.first,
            "done": list(self.progress.done),
            "world": self.world,
            "rank": self.rank,
            "taken": self.taken,
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continue from saved states, whatever the number of ranks that saved them.

        Args:
            state: State of one rank, if all ranks were synchronous; or the states of all ranks.

        Raises:
            BadState: The state is of another dataset, split or seed, or states are missing.
        """
        states = [dict(state)] if isinstance(state, Mapping) else [dict(each) for each in state]
        own_state = self.state_dict()
        for name in ("dataset", "samples", "seed"):
            wrong = [each[name] for each in states if each[name] != own_state[name]]
            if wrong:
                raise BadState(
                    f"the state is of {name} {wrong[0]}, this stream of "
                    f"{own_state[name]}: open the same dataset and split, with the same seed"
                )
        own = [s for s in states if (s["rank"], s["world"]) == (self.rank, self.world)]
        if own and len(states) == self.world:  # each rank continues with its own samples
            self.progress = _progress_of(own[0])
            self.taken = int(own[0]["taken"])
            return
        self.progress, self.taken = merge_states(states), 0


def _start_worker(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Let a worker process end with its parent, then call the caller's own function."""
    # not by the kernel: the thread that started this process may end before the worker does
    end_with_parent(parent, kernel=False)
    if then is not None:
        then(worker)


def _read_by_threads(
    files: ShardFiles,
    numbers: Numbers,
    on_damage: Callable[[DamagedShard], Any],
    how: tuple[int, bool, bool],
    threads: int,
    ahead: int,
) -> Iterator[Any]:
    """Yield samples as ``ShardFiles.scan`` does; threads read ``ahead`` samples in advance."""

    def read(number: int) -> Sample | DamagedShard:
        try:
            return files.sample(number, *how)
        except DamagedShard as damage:  # reported when its turn comes
            return damage

    with ThreadPoolExecutor(threads, "geofm-read") as pool:
        for sample in map_ordered(pool, read, numbers.tolist(), ahead):
            yield on_damage(sample) if isinstance(sample, DamagedShard) else sample


def _require_digests(index: ShardIndex, check: bool) -> None:
    """Raise UsageError if samples are to be checked and the index has no digests."""
    if check and index.sha256 is None:
        raise UsageError("open the index with digests=True to check samples")
