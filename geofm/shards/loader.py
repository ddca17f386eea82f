"""Samples for training: any order a seed gives, resumed at any sample, by any number of readers.

    index = open_index(dataset)
    stream = SampleStream(index, seed=0, batch=64, transform=crop, collate=stack)
    for batch in stream.batches(workers=4):  # what is left of the epoch; then the next one
        ...
        torch.save(stream.state_dict(), ...)

Every sample is read where it lies, so an epoch's order is a whole random permutation, whatever
the layout of the shards, and memory holds only what is read ahead.
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

# The order of an epoch, and how far readers have come in it.
# An epoch's order is a permutation that follows from (seed, epoch). Its places 0, 1, 2, ...
# are dealt
# to the readers of all ranks like cards, so who reads how many of them plays no part, and what is
# left of an epoch can be dealt again to any other number of readers.

#: Set apart the generator of an epoch's order from those of its samples.
ORDER = 0x0DE5

Numbers = NDArray[np.integer[Any]]


class BadState(UsageError):
    """A loader's state does not belong to this dataset, seed or moment."""


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, samples: int) -> Numbers:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    rng = np.random.Generator(np.random.PCG64([seed, epoch, samples, ORDER]))
    order: Numbers = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
    rng.shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class EpochProgress:
    """What is left of an epoch: places from ``first`` on, without those in ``done``."""

    epoch: int = 0
    first: int = 0
    done: tuple[int, ...] = ()

    def of(self, order: Numbers) -> Numbers:
        """What nobody has read of an epoch's order; a view of it where that is one piece."""
        if not self.done:
            return order[self.first :]
        read = np.zeros(len(order), dtype=np.bool_)
        read[: self.first] = True
        read[list(self.done)] = True
        return order[~read]

    def places(self, samples: int) -> Numbers:
        """Places of the epoch's order that nobody has read, ascending."""
        return self.of(np.arange(samples))


def deal(left: Numbers, rank: int, world: int) -> Numbers:
    """What one of ``world`` readers is dealt of what is left: a view."""
    return left[rank::world]


def after(left: EpochProgress, samples: int, taken: Sequence[int]) -> EpochProgress:
    """What is left after reader r has read ``taken[r]`` of the places that were dealt to it.

    Raises:
        BadState: a reader has read more than it was dealt.
    """
    places = left.places(samples)
    read = np.zeros(len(places), dtype=np.bool_)
    for rank, count in enumerate(taken):
        mine = read[rank :: len(taken)]
        if not 0 <= count <= len(mine):
            raise BadState(
                f"reader {rank} of {len(taken)} says it has read {count} samples of {len(mine)}; "
                "load the state with the dataset, split and seed that it was saved with"
            )
        mine[:count] = True
    if read.all():
        return EpochProgress(left.epoch + 1)
    first = int(places[~read][0])
    done = sorted([*left.done, *places[read].tolist()])
    return EpochProgress(left.epoch, first, tuple(place for place in done if place > first))


def merge(states: Sequence[dict[str, Any]]) -> EpochProgress:
    """What is left of an epoch by the states of all its readers, or by one that speaks for all.

    One state means that every reader has read as many samples as this one, as with training in
    lockstep. The states of all readers are exact whatever each has read.

    Raises:
        BadState: the states are not those of all readers of one epoch.
    """
    latest = min(states, key=lambda state: int(state["epoch"]))
    world, samples = int(latest["world"]), int(latest["samples"])
    left = EpochProgress(int(latest["epoch"]), int(latest["first"]), tuple(latest["done"]))
    dealt = [len(deal(left.places(samples), rank, world)) for rank in range(world)]
    if len(states) == 1:
        count = int(latest["taken"])
        return after(left, samples, [min(count, most) for most in dealt])
    if sorted(int(state["rank"]) for state in states) != list(range(world)):
        raise BadState(f"{len(states)} states were given, but {world} readers have one each")
    taken = [0] * world
    for state in states:
        same = [state[name] for name in ("first", "done")] == [left.first, list(left.done)]
        if int(state["world"]) != world or not (same or state["epoch"] != left.epoch):
            raise BadState("the states were not saved by the readers of one and the same run")
        rank, ahead = int(state["rank"]), int(state["epoch"]) - left.epoch
        if ahead > 1 or (ahead == 1 and int(state["taken"])):
            raise BadState(
                f"reader {rank} is in epoch {state['epoch']} and another in {left.epoch}: save the "
                "states when all readers have finished the same epoch or are in the same one"
            )
        taken[rank] = dealt[rank] if ahead else int(state["taken"])
    return after(left, samples, taken)


#: Threads that fetch from an object store, where each read waits for the network.
REMOTE_THREADS = 16
#: In the place of a damaged sample.
SKIPPED = object()


#: What a reader hands over: a batch, how many samples it took from, and what was skipped.
Delivery = tuple[Any, int, tuple[str, ...]]


class SampleDataset(Dataset[Any]):
    """Samples by number, for torch's samplers.

    Args:
        index: which samples.
        transform: applied to each ``Sample``; its result is what the dataset gives.
        check: compare each sample's SHA-256 with the index (opened with ``digests``).
        decode: give pixels; else the ``.npy`` bytes.
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
        """One sample.

        Raises:
            DamagedShard: its bytes are not its pixels.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        sample = self.files.sample(number, 0, self.check, self.decode)
        return sample if self.transform is None else self.transform(sample)


@dataclass(frozen=True)
class Reading:
    """How samples become batches.

    Attributes:
        batch: samples in one.
        even: leave out the end of an epoch that does not give each rank as many whole batches.
        shuffled: in the epoch's random order, else in the order of the shards.
        skip_damaged: go on without damaged samples, which are counted; else the first one raises.
        ahead_mib: what is read ahead at most.
        threads: of one process that read ahead; None: 16 for an object store, else the kernel.
    """

    batch: int = 1
    even: bool = False
    shuffled: bool = True
    skip_damaged: bool = False
    ahead_mib: float = 64.0
    threads: int | None = None


class SampleStream(IterableDataset[Any]):
    """Batches of one rank, epoch after epoch, resumable at any sample.

    Its order is a function of (seed, epoch); rank r of w reads every w-th sample of it, in that
    order for any number of workers. Iterate with ``batches``.

    Args:
        index: which samples.
        seed: of the order.
        rank: which reader this is.
        world: of how many.
        transform: applied to each ``Sample`` in the worker that read it.
        collate: makes a batch from the iterator of what ``transform`` gives: a sample is read
            when it is asked for, so it can go straight into the batch's memory. None: ``list``.
        check: compare each sample's SHA-256 with the index (opened with ``digests``).
        decode: give pixels; else the ``.npy`` bytes.
        **reading: see ``Reading``.
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
            raise UsageError(f"rank {rank} is not one of 0 to {world - 1}")
        self.samples = SampleDataset(index, transform, check, decode)
        self.index, self.seed, self.rank, self.world = index, seed, rank, world
        self.collate, self.reading = collate, Reading(**reading)
        self.left, self.taken = EpochProgress(), 0
        #: Damaged samples that were left out, in words, since the stream was made.
        self.skipped: list[str] = []

    @property
    def epoch(self) -> int:
        """The epoch that is being read."""
        return self.left.epoch

    def __len__(self) -> int:
        """Batches of this rank that are left of the epoch."""
        return math.ceil(len(self._numbers()) / self.reading.batch)

    def _numbers(self) -> Numbers:
        """Samples of this rank that are left of the epoch, in order."""
        samples, size = len(self.index), self.reading.batch
        shuffled = self.reading.shuffled
        order = epoch_order(self.seed, self.epoch, samples) if shuffled else np.arange(samples)
        left = self.left.of(order)
        mine = deal(left, self.rank, self.world)
        if self.reading.even:
            mine = mine[: len(left) // (self.world * size) * size]
        return mine[self.taken :]

    def __iter__(self) -> Iterator[Delivery]:
        """This worker's deliveries; ``batches`` puts those of all workers together."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        numbers, size = self._numbers(), self.reading.batch
        if workers > 1:
            numbers = numbers[np.arange(len(numbers)) // size % workers == worker]
        skipped: list[str] = []
        finished = self._finished(numbers, skipped)
        collate, drop = self.collate, self.reading.skip_damaged
        if size == 1 and collate is None and not drop:  # nothing else is to be done for each
            yield from (([one], 1, ()) for one in finished)
            return
        full, rest = divmod(len(numbers), size)
        for count in chain(repeat(size, full), [rest] if rest else []):
            if drop:
                whole = [one for one in islice(finished, count) if one is not SKIPPED]
                batch = (collate(iter(whole)) if collate else whole) if whole else None
            elif collate is None:
                batch = list(islice(finished, count))
            else:
                coming = islice(finished, count)
                batch = collate(coming)
                deque(coming, maxlen=0)  # what it left
            if skipped:
                yield batch, count, tuple(skipped)
                skipped.clear()
            else:
                yield batch, count, ()

    def _finished(self, numbers: Numbers, skipped: list[str]) -> Iterator[Any]:
        """The samples one by one, each read when it is asked for; SKIPPED for a damaged one."""

        def damaged(damage: DamagedShard) -> Any:
            if not self.reading.skip_damaged:
                raise damage
            skipped.append(str(damage))
            return SKIPPED

        found, transform = self._found(numbers, damaged), self.samples.transform
        if transform is None:
            return found
        if not self.reading.skip_damaged:
            return map(transform, found)
        return (SKIPPED if one is SKIPPED else transform(one) for one in found)

    def batches(self, workers: int = 0, **options: Any) -> Iterator[Any]:
        """The batches that are left of the epoch; afterwards the stream is at the next one.

        A batch counts as read as soon as it is handed over.

        Args:
            workers: processes that read and transform; 0: this one.
            **options: of torch's ``DataLoader`` (prefetch_factor, pin_memory, ...).
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
        self.left, self.taken = EpochProgress(self.left.epoch + 1), 0

    def _found(self, numbers: Numbers, damaged: Callable[[DamagedShard], Any]) -> Iterator[Any]:
        """The samples as they are read, in order, read ahead within the bounds."""
        samples, reading = self.samples, self.reading
        how = self.left.epoch, samples.check, samples.decode
        largest = int(self.index.sizes.max())
        ahead = max(1, int(reading.ahead_mib * 2**20 / largest))
        threads = reading.threads
        if threads is None:
            threads = REMOTE_THREADS if samples.files.is_remote else 0
        if threads:
            return _by_threads(samples.files, numbers, damaged, how, threads, ahead)
        # what is read one after the other, the kernel sees by itself
        return samples.files.scan(numbers, damaged, *how, ahead if reading.shuffled else 0)

    def state_dict(self) -> dict[str, Any]:
        """How far this rank is: plain JSON."""
        return {
            "dataset": self.index.digest,
            "samples": len(self.index),
            "seed": self.seed,
            "epoch": self.left.epoch,
            "first": self.left.first,
            "done": list(self.left.done),
            "world": self.world,
            "rank": self.rank,
            "taken": self.taken,
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where a rank's state says, or where those of all ranks say, of any world size.

        Args:
            state: of one rank, when all were in lockstep; or a list with the state of each.

        Raises:
            BadState: it is of another dataset, split or seed, or not whole.
        """
        states = [dict(state)] if isinstance(state, Mapping) else [dict(one) for one in state]
        mine = self.state_dict()
        for name in ("dataset", "samples", "seed"):
            wrong = [one[name] for one in states if one[name] != mine[name]]
            if wrong:
                raise BadState(
                    f"the state is of {name} {wrong[0]}, this stream of {mine[name]}: open the "
                    "same dataset and split, with the same seed"
                )
        own = [s for s in states if (s["rank"], s["world"]) == (self.rank, self.world)]
        if own and len(states) == self.world:  # the same ranks go on, each with its own samples
            self.left = EpochProgress(
                int(own[0]["epoch"]), int(own[0]["first"]), tuple(own[0]["done"])
            )
            self.taken = int(own[0]["taken"])
            return
        self.left, self.taken = merge(states), 0


def _start_worker(parent: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Let a reading process end with its parent, then call the caller's own function."""
    # not by the kernel: the thread that started this process may end before the reading does
    end_with_parent(parent, kernel=False)
    if then is not None:
        then(worker)


def _by_threads(
    files: ShardFiles,
    numbers: Numbers,
    damaged: Callable[[DamagedShard], Any],
    how: tuple[int, bool, bool],
    threads: int,
    ahead: int,
) -> Iterator[Any]:
    """As ``ShardFiles.scan``, read by threads so many samples ahead; ``how``: as there."""

    def read(number: int) -> Sample | DamagedShard:
        try:
            return files.sample(number, *how)
        except DamagedShard as damage:  # told in its turn
            return damage

    with ThreadPoolExecutor(threads, "geofm-read") as pool:
        for found in map_ordered(pool, read, numbers.tolist(), ahead):
            yield damaged(found) if isinstance(found, DamagedShard) else found


def _require_digests(index: ShardIndex, check: bool) -> None:
    if check and index.sha256 is None:
        raise UsageError("open the index with digests=True to check samples")
