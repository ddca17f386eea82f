"""Samples by number: where their bytes are, and reading them from local or S3 tars."""

from __future__ import annotations

import hashlib
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from data_catalog.artifact import Artifact
from data_catalog.errors import CheckError, UsageError
from data_catalog.storage.reach import is_away, out_of_reach, read_range
from geofm.formats.npy import HEAD, chip_from_bytes
from geofm.shards.index import INDEX, find_outside, release_memory

#: Tars held open: a quarter of what this process may open, within these limits.
OPEN_FILES = (64, 4096)
#: A tar that was replaced by a link is not followed, by a pipe not waited for.
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
#: Samples whose places become Python numbers at a time.
SCAN = 256


class DamagedShard(CheckError):
    """A shard does not hold what its index says."""


class NoSuchSplit(UsageError):
    """The dataset has no samples in this split."""


class Sample(NamedTuple):
    """One sample: its number in the index, the epoch, its key (chip id) and pixels.

    ``pixels`` is [bands, height, width], read-only, or the ``.npy`` bytes where not decoded.
    """

    number: int
    epoch: int
    key: str
    pixels: NDArray[Any] | bytes


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where each sample's pixels are. A sample's number is its row here.

    Attributes:
        digest: of the dataset.
        files: local paths or addresses of the shards.
        keys: of the samples (chip ids).
        shards: number of each sample's file.
        offsets: of the ``.npy`` in its file, bytes.
        sizes: of the ``.npy``, bytes.
        sha256: of the ``.npy``, 32 bytes each; None when it was not asked for.
    """

    digest: str
    files: tuple[str, ...]
    keys: pa.Array
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sha256: NDArray[np.void] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, numbers: NDArray[np.integer[Any]]) -> ShardIndex:
        """The same with these samples only, in this order."""
        return replace(
            self,
            keys=self.keys.take(pa.array(numbers)),
            shards=self.shards[numbers],
            offsets=self.offsets[numbers],
            sizes=self.sizes[numbers],
            sha256=None if self.sha256 is None else self.sha256[numbers],
        )

    def says(self, number: int) -> str:
        """Which sample this is and where, for people."""
        file = self.files[int(self.shards[number])]
        return f"sample {self.keys[number].as_py()} at byte {self.offsets[number]} of {file}"


def open_index(
    dataset: Artifact, split: str = "train", digests: bool = False, fetch: bool = False
) -> ShardIndex:
    """The index of one split of a dataset, in the order of the shards.

    Args:
        dataset: an artifact of kind ``dataset``, local or on an object store.
        split: ``train``, ``holdout``, or ``all``.
        digests: read the SHA-256 of the samples as well, to check them.
        fetch: copy remote shards to the local cache first, whole, instead of reading ranges.

    Raises:
        NoSuchSplit: no sample is in it.
        DamagedShard: the index is no index, or names other shards or bytes than there are.
        CheckError: it is missing, or a link or special file.
        OutOfReach: it could not be read.
    """
    try:
        return _read_index(dataset, split, digests, fetch)
    except FileNotFoundError as error:
        raise _damaged_index(dataset, "it is missing") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged_index(dataset, str(error).splitlines()[0]) from error
    except OSError as error:
        if is_away(error):
            raise out_of_reach(dataset.path(INDEX), error) from error
        raise _damaged_index(dataset, str(error)) from error


def _read_index(dataset: Artifact, split: str, digests: bool, fetch: bool) -> ShardIndex:
    """As ``open_index``, with the errors of Arrow."""
    file = pq.ParquetFile(dataset.local(INDEX), buffer_size=2**20)
    by_split = split != "all" and "split" in file.schema_arrow.names
    if split not in ("train", "all") and not by_split:
        raise NoSuchSplit(f"dataset {dataset.digest[:12]} has no splits")
    columns = ["key", "shard", "offset", "size"]
    columns += [name for name, wanted in (("split", by_split), ("sha256", digests)) if wanted]
    most = file.metadata.num_rows
    shards = np.empty(most, np.int32)
    offsets, sizes = np.empty(most, np.int64), np.empty(most, np.int64)
    sha256 = np.empty(most if digests else 0, np.dtype("V32"))
    # of all keys, joined as they come: joined at the end, they would be there twice for a moment
    text, ends = bytearray(), np.zeros(most + 1, np.int64)
    numbers: dict[str, int] = {}
    count = 0
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns, use_threads=False)
        if lacking := [name for name in columns if rows[name].null_count]:
            raise ValueError(f"column {lacking[0]} has no value in some rows")
        if by_split:
            rows = rows.filter(pc.equal(rows["split"], split))
        here = slice(count, count + len(rows))
        count += len(rows)
        keys = rows["key"].combine_chunks().cast(pa.large_string())
        at = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset :][: len(keys) + 1]
        ends[here.start + 1 : count + 1] = at[1:] - at[0] + len(text)
        text += memoryview(keys.buffers()[2])[at[0] : at[-1]]
        shard = rows["shard"].combine_chunks().dictionary_encode()
        known = [numbers.setdefault(name, len(numbers)) for name in shard.dictionary.to_pylist()]
        shards[here] = np.array(known, np.int32)[shard.indices.to_numpy()]
        offsets[here], sizes[here] = rows["offset"].to_numpy(), rows["size"].to_numpy()
        if digests:
            sha256[here] = _binary(rows["sha256"])
        release_memory()  # else decoding takes more than the columns
    if not count:
        raise NoSuchSplit(
            f"dataset {dataset.digest[:12]} has no samples in split {split!r}; set pack.holdout "
            "above 0 to have a holdout, or use split 'train'"
        )
    joined = pa.LargeStringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text))
    release_memory()
    bytes_of = {entry.path: entry.size for entry in dataset.manifest.files}
    ends = np.array([bytes_of.get(name, -1) for name in numbers], np.int64)[shards[:count]]
    wrong = find_outside(offsets[:count], sizes[:count], ends)
    if wrong is not None:
        shard = list(numbers)[shards[wrong]]
        raise _damaged_index(
            dataset,
            f"it has sample {joined[wrong].as_py()!r} in bytes {offsets[wrong]} to "
            f"{int(offsets[wrong]) + int(sizes[wrong]) - 1} of {shard!r}, "
            + ("which has fewer" if shard in bytes_of else "which is no file of this dataset"),
        )
    local = dataset.is_local or fetch
    return ShardIndex(
        digest=dataset.digest,
        files=tuple(str(dataset.local(n) if local else dataset.path(n)) for n in numbers),
        keys=joined,
        shards=shards[:count],
        offsets=offsets[:count],
        sizes=sizes[:count],
        sha256=sha256[:count] if digests else None,
    )


def _binary(column: pa.ChunkedArray) -> NDArray[np.void]:
    """Hex digests as 32 bytes each."""
    joined = bytes.fromhex("".join(column.to_pylist()))
    return np.frombuffer(joined, dtype=np.dtype("V32"))


def most_open() -> int:
    """How many tars the threads of a process hold open together."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least, most = OPEN_FILES
    return most if allowed == resource.RLIM_INFINITY else min(max(allowed // 4, least), most)


@dataclass(frozen=True, eq=False)
class _Held:
    """What a thread holds open, as something that is known to be gone when the thread is."""

    opened: OrderedDict[int, int]


class ShardFiles:
    """The tars of an index, opened when they are first read; threads may share it."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._local = threading.local()
        self._all: dict[int, OrderedDict[int, int]] = {}
        self._most = most_open()
        self.is_remote = "://" in index.files[0]

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[ShardIndex]]:
        return ShardFiles, (self.index,)

    def close(self) -> None:
        """Close what is open."""
        for opened in list(self._all.values()):
            _close(opened)

    def _opened(self) -> OrderedDict[int, int]:
        """Descriptors of the local shards that this thread holds open; they go with it."""
        held: _Held | None = getattr(self._local, "held", None)
        if held is None:
            held = self._local.held = _Held(OrderedDict())
            self._all[id(held.opened)] = held.opened
            weakref.finalize(held, _let_go, self._all, held.opened)
        return held.opened

    def descriptor(self, shard: int) -> int:
        """A descriptor of a local shard, this thread's own."""
        opened = self._opened()
        found = opened.get(shard)
        if found is None:
            found = opened[shard] = os.open(self.index.files[shard], FLAGS)
            while len(opened) > max(1, self._most // len(self._all)):
                os.close(opened.popitem(last=False)[1])
        return found

    def scan(
        self,
        numbers: NDArray[np.integer[Any]],
        damaged: Callable[[DamagedShard], Any],
        epoch: int = 0,
        check: bool = False,
        decode: bool = True,
        ahead: int = 0,
    ) -> Iterator[Sample]:
        """Samples of local shards, in order, each read when it is asked for.

        Args:
            numbers: of the samples.
            damaged: gives what comes in the place of a damaged one, or raises. Not called for
                a sample that is out of reach: that is an error.
            epoch: what the samples are told.
            check: compare their SHA-256.
            decode: give pixels; else the ``.npy`` bytes.
            ahead: the kernel is told of samples so many places before they are read, as long as
                some are not in its memory already.
        """
        index, pread = self.index, os.pread
        new: Any = tuple.__new__  # as Sample(...), without the call of a Python function
        view: Any = np.ndarray
        found: Any
        # of the sample before: chips of a dataset have the same head, parsed once
        head, whole, shape, dtype = b"", -1, (), None
        for start in range(0, len(numbers), SCAN):
            part = numbers[start : start + SCAN]
            coming = iter(numbers[start + ahead : start + ahead + len(part)].tolist())
            opened = self._opened()
            waits = ahead > 0 and self._has_waited()
            rows = zip(
                part.tolist(), index.keys.take(part).to_pylist(), index.shards[part].tolist(),
                index.offsets[part].tolist(), index.sizes[part].tolist(), strict=True,
            )  # fmt: skip
            for number, key, shard, offset, size in rows:
                try:
                    file = opened.get(shard)
                    data = pread(self.descriptor(shard) if file is None else file, size, offset)
                    if check or len(data) < size:
                        self._require_whole(number, data, check)
                    if not decode:
                        found = data
                    elif size == whole and data.startswith(head):
                        found = view(shape, dtype, data, HEAD)
                    else:
                        found = chip_from_bytes(data)
                        head, whole, shape, dtype = data[:HEAD], size, found.shape, found.dtype
                    found = new(Sample, (number, epoch, key, found))
                except DamagedShard as damage:
                    found = damaged(damage)
                except (OSError, ValueError) as error:
                    found = damaged(_damaged_or_away(index, number, error))
                if waits:
                    self._will_need(next(coming, None))
                yield found

    def _has_waited(self) -> bool:
        """Whether this thread has had to read from a disk since it asked before."""
        before = getattr(self._local, "disk_reads", None)
        self._local.disk_reads = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        return bool(self._local.disk_reads != before)

    def _will_need(self, number: int | None) -> None:
        """Tell the kernel that a sample is read soon, so that it is in memory by then."""
        if number is None:
            return
        index = self.index
        with suppress(OSError):  # told when it is read
            os.posix_fadvise(
                self.descriptor(int(index.shards[number])), int(index.offsets[number]),
                int(index.sizes[number]), os.POSIX_FADV_WILLNEED,
            )  # fmt: skip

    def _require_whole(self, number: int, data: bytes, check: bool) -> None:
        """Raises DamagedShard for bytes that are too few or (with ``check``) others."""
        if len(data) < self.index.sizes[number]:
            raise _damaged(self.index, number, "the file ends before")
        if check:
            digests = self.index.sha256
            if digests is None:
                raise UsageError("open the index with digests=True to check samples")
            if hashlib.sha256(data).digest() != digests[number].tobytes():
                raise _damaged(self.index, number, "its SHA-256 is not that of the index")

    def read(self, number: int, check: bool = False) -> bytes:
        """The bytes of one sample.

        Raises:
            DamagedShard: it is not there, or (with ``check``) its SHA-256 is another.
            OutOfReach: it could not be read, which says nothing about its content.
        """
        index = self.index
        shard, start, size = (
            int(column[number]) for column in (index.shards, index.offsets, index.sizes)
        )
        try:
            if self.is_remote:
                # made anew after a fork: fsspec's connections do not survive one, its cache knows
                data = read_range(UPath(index.files[shard]), start, size)
            else:
                data = os.pread(self.descriptor(shard), size, start)
        except OSError as error:
            raise _damaged_or_away(index, number, error) from error
        self._require_whole(number, data, check)
        return data

    def pixels(self, number: int, check: bool = False) -> NDArray[Any]:
        """The pixels of one sample [bands, height, width], read-only.

        Raises:
            DamagedShard: its bytes cannot be read, are no ``.npy``, or as ``read`` says.
        """
        data = self.read(number, check)
        try:
            return chip_from_bytes(data)
        except ValueError as error:
            raise _damaged(self.index, number, error) from error

    def sample(
        self, number: int, epoch: int = 0, check: bool = False, decode: bool = True
    ) -> Sample:
        """One sample of a local or remote shard; arguments are those of ``scan``.

        Raises:
            DamagedShard: as ``pixels`` says.
        """
        read = self.pixels if decode else self.read
        return Sample(number, epoch, self.index.keys[number].as_py(), read(number, check))


def _let_go(everyone: dict[int, OrderedDict[int, int]], opened: OrderedDict[int, int]) -> None:
    """A thread has ended, or nobody reads any more."""
    everyone.pop(id(opened), None)
    _close(opened)


def _close(opened: OrderedDict[int, int]) -> None:
    while opened:
        os.close(opened.popitem()[1])


def _damaged_index(dataset: Artifact, why: str) -> DamagedShard:
    return DamagedShard(
        f"{INDEX} of dataset {dataset.digest[:12]} is damaged: {why}; run `geofm verify "
        f"{dataset.digest[:12]}` and restore it from another copy"
    )


def _damaged_or_away(index: ShardIndex, number: int, error: Exception) -> DamagedShard:
    """The damage of a sample; raises OutOfReach where it could not be looked at."""
    if isinstance(error, OSError) and is_away(error):
        raise out_of_reach(index.says(number), error) from error
    return _damaged(index, number, error)


def _damaged(index: ShardIndex, number: int, why: str | Exception) -> DamagedShard:
    why = getattr(why, "strerror", None) or why
    return DamagedShard(
        f"{index.says(number)} is damaged: {why}; run `geofm verify {index.digest[:12]}` and "
        "restore the shard or pack it again"
    )
