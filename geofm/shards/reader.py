"""Samples by number: their byte ranges, and reading them from local tars or an object store."""

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
from data_catalog.errors import CheckError, UsageError, first_line
from data_catalog.storage.reach import is_away, out_of_reach, read_range
from geofm.formats.npy import chip_from_bytes
from geofm.shards.index import INDEX, find_outside, release_memory

#: Limits of the number of open tars, which is a quarter of the files that a process may open.
OPEN_FILES = (64, 4096)
#: Flags to open a tar: links are not followed, and a pipe does not block.
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
#: Samples whose offsets and sizes become Python numbers at a time.
SCAN_ROWS = 256


class DamagedShard(CheckError):
    """A shard does not hold the bytes that its index lists."""


class NoSuchSplit(UsageError):
    """The dataset has no samples in this split."""


class Sample(NamedTuple):
    """A sample.

    Attributes:
        number: Row in the index.
        epoch: Epoch in which it was read.
        key: Chip id.
        pixels: Read-only array (bands, height, width), or the ``.npy`` bytes if not decoded.
    """

    number: int
    epoch: int
    key: str
    pixels: NDArray[Any] | bytes


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Byte ranges of the pixels of all samples. The number of a sample is its row.

    Attributes:
        digest: Digest of the dataset.
        files: Local paths or addresses of the shards.
        keys: Chip ids.
        shards: Number of each sample's shard in ``files``.
        offsets: Offset of each ``.npy`` in its shard, bytes.
        sizes: Size of each ``.npy``, bytes.
        sha256: SHA-256 of each ``.npy``, 32 bytes; None if the index was opened without digests.
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
        """Return an index of these samples, in this order."""
        return replace(
            self,
            keys=self.keys.take(pa.array(numbers)),
            shards=self.shards[numbers],
            offsets=self.offsets[numbers],
            sizes=self.sizes[numbers],
            sha256=None if self.sha256 is None else self.sha256[numbers],
        )

    def describe(self, number: int) -> str:
        """Name a sample and its location, for messages."""
        file = self.files[int(self.shards[number])]
        return f"sample {self.keys[number].as_py()} at byte {self.offsets[number]} of {file}"


def open_index(
    dataset: Artifact, split: str = "train", digests: bool = False, fetch: bool = False
) -> ShardIndex:
    """Open the index of one split of a dataset, in the order of the shards.

    Args:
        dataset: Artifact of kind ``dataset``, local or on an object store.
        split: ``train``, ``holdout`` or ``all``.
        digests: Read the SHA-256 of the samples as well, to check them.
        fetch: Copy remote shards to the local cache first, instead of reading ranges of them.

    Raises:
        NoSuchSplit: The split has no samples.
        DamagedShard: The index is missing or damaged, or lists shards or bytes that do not exist.
        CheckError: The index is a link or a special file.
        OutOfReach: The index could not be read.
    """
    try:
        return _read_index(dataset, split, digests, fetch)
    except FileNotFoundError as error:
        raise _damaged_index(dataset, "it is missing") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged_index(dataset, first_line(error)) from error
    except OSError as error:
        if is_away(error):
            raise out_of_reach(dataset.path(INDEX), error) from error
        raise _damaged_index(dataset, str(error)) from error


def _read_index(dataset: Artifact, split: str, digests: bool, fetch: bool) -> ShardIndex:
    """Read the index and check it; raises the errors of Arrow for a damaged file."""
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
    # The keys are joined while they are read; joined at the end, they would need twice the memory.
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
    """Convert hexadecimal digests to 32 bytes each."""
    joined = bytes.fromhex("".join(column.to_pylist()))
    return np.frombuffer(joined, dtype=np.dtype("V32"))


def max_open_files() -> int:
    """Return how many tars the threads of a process may hold open together."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least, most = OPEN_FILES
    return most if allowed == resource.RLIM_INFINITY else min(max(allowed // 4, least), most)


@dataclass(frozen=True, eq=False)
class _ThreadFiles:
    """Descriptors of a thread; the object is collected when the thread ends."""

    opened: OrderedDict[int, int]


class ShardFiles:
    """The tars of an index, opened when they are first read; threads may share the object."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._local = threading.local()
        self._all: dict[int, OrderedDict[int, int]] = {}
        self._most = max_open_files()
        self.is_remote = "://" in index.files[0]

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[ShardIndex]]:
        return ShardFiles, (self.index,)

    def close(self) -> None:
        """Close all tars."""
        for opened in list(self._all.values()):
            _close(opened)

    def _opened(self) -> OrderedDict[int, int]:
        """Return the descriptors of this thread, which are closed when it ends."""
        own: _ThreadFiles | None = getattr(self._local, "files", None)
        if own is None:
            own = self._local.files = _ThreadFiles(OrderedDict())
            self._all[id(own.opened)] = own.opened
            weakref.finalize(own, _close_thread, self._all, own.opened)
        return own.opened

    def descriptor(self, shard: int) -> int:
        """Return this thread's descriptor of a local shard."""
        opened = self._opened()
        descriptor = opened.get(shard)
        if descriptor is None:
            descriptor = opened[shard] = os.open(self.index.files[shard], FLAGS)
            while len(opened) > max(1, self._most // len(self._all)):
                os.close(opened.popitem(last=False)[1])
        return descriptor

    def scan(
        self,
        numbers: NDArray[np.integer[Any]],
        on_damage: Callable[[DamagedShard], Any],
        epoch: int = 0,
        check: bool = False,
        decode: bool = True,
        lookahead: int = 0,
    ) -> Iterator[Sample]:
        """Yield samples of local shards in order; each is read when it is requested.

        Args:
            numbers: Numbers of the samples.
            on_damage: Returns what to yield in place of a damaged sample, or raises. It is not
                called if a sample is out of reach, which is an error.
            epoch: Epoch that the samples carry.
            check: Compare the SHA-256 of each sample with the index.
            decode: Yield pixels; else the ``.npy`` bytes.
            lookahead: Number of samples that the kernel is asked to load before they are read.
        """
        index = self.index
        step = min(SCAN_ROWS, lookahead) if lookahead else SCAN_ROWS
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            if lookahead:
                self._load_ahead(numbers[start + lookahead : start + lookahead + step])
            rows = zip(
                part.tolist(),
                index.keys.take(part).to_pylist(),
                index.shards[part].tolist(),
                index.offsets[part].tolist(),
                index.sizes[part].tolist(),
                strict=True,
            )
            for number, key, shard, offset, size in rows:
                try:
                    data = os.pread(self.descriptor(shard), size, offset)
                    if check or len(data) < size:
                        self._require_whole(number, data, check)
                    pixels = chip_from_bytes(data) if decode else data
                    sample = Sample(number, epoch, key, pixels)
                except DamagedShard as damage:
                    sample = on_damage(damage)
                except (OSError, ValueError) as error:
                    sample = on_damage(_damaged_or_away(index, number, error))
                yield sample

    def _load_ahead(self, numbers: NDArray[np.integer[Any]]) -> None:
        """Ask the kernel to load samples into memory, if this thread has waited for a disk.

        Samples that are in memory already cost nothing that way.
        """
        if not self._has_waited():
            return
        index = self.index
        for number in numbers.tolist():
            with suppress(OSError):  # reported when the sample is read
                os.posix_fadvise(
                    self.descriptor(int(index.shards[number])),
                    int(index.offsets[number]),
                    int(index.sizes[number]),
                    os.POSIX_FADV_WILLNEED,
                )

    def _has_waited(self) -> bool:
        """Return whether this thread has read from a disk since the previous call."""
        before = getattr(self._local, "disk_reads", None)
        self._local.disk_reads = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        return bool(self._local.disk_reads != before)

    def _require_whole(self, number: int, data: bytes, check: bool) -> None:
        """Raise DamagedShard if bytes are missing or, with ``check``, differ."""
        if len(data) < self.index.sizes[number]:
            raise _damaged(self.index, number, "the file ends before")
        if check:
            digests = self.index.sha256
            if digests is None:
                raise UsageError("open the index with digests=True to check samples")
            if hashlib.sha256(data).digest() != digests[number].tobytes():
                raise _damaged(self.index, number, "its SHA-256 is not that of the index")

    def read(self, number: int, check: bool = False) -> bytes:
        """Read the ``.npy`` bytes of a sample.

        Raises:
            DamagedShard: The sample is missing or, with ``check``, its SHA-256 differs.
            OutOfReach: The shard could not be read; it is not known to be damaged.
        """
        index = self.index
        shard, start, size = (
            int(column[number]) for column in (index.shards, index.offsets, index.sizes)
        )
        try:
            if self.is_remote:
                # fsspec makes a new file system in a forked process: connections do not survive
                data = read_range(UPath(index.files[shard]), start, size)
            else:
                data = os.pread(self.descriptor(shard), size, start)
        except OSError as error:
            raise _damaged_or_away(index, number, error) from error
        self._require_whole(number, data, check)
        return data

    def pixels(self, number: int, check: bool = False) -> NDArray[Any]:
        """Read the pixels of a sample: a read-only array (bands, height, width).

        Raises:
            DamagedShard: As ``read``, or the bytes are not a ``.npy``.
        """
        data = self.read(number, check)
        try:
            return chip_from_bytes(data)
        except ValueError as error:
            raise _damaged(self.index, number, error) from error

    def sample(
        self, number: int, epoch: int = 0, check: bool = False, decode: bool = True
    ) -> Sample:
        """Read a sample of a local or remote shard; arguments are those of ``scan``.

        Raises:
            DamagedShard: As ``pixels``.
        """
        read = self.pixels if decode else self.read
        return Sample(number, epoch, self.index.keys[number].as_py(), read(number, check))


def _close_thread(threads: dict[int, OrderedDict[int, int]], opened: OrderedDict[int, int]) -> None:
    """Close the descriptors of a thread that has ended."""
    threads.pop(id(opened), None)
    _close(opened)


def _close(opened: OrderedDict[int, int]) -> None:
    """Close all descriptors of a thread."""
    while opened:
        os.close(opened.popitem()[1])


def _damaged_index(dataset: Artifact, why: str) -> DamagedShard:
    """Make the error for a damaged index."""
    return DamagedShard(
        f"{INDEX} of dataset {dataset.digest[:12]} is damaged: {why}; run `geofm verify "
        f"{dataset.digest[:12]}` and restore it from another copy"
    )


def _damaged_or_away(index: ShardIndex, number: int, error: Exception) -> DamagedShard:
    """Make the error for a damaged sample; raise OutOfReach if it could not be read."""
    if isinstance(error, OSError) and is_away(error):
        raise out_of_reach(index.describe(number), error) from error
    return _damaged(index, number, error)


def _damaged(index: ShardIndex, number: int, why: str | Exception) -> DamagedShard:
    """Make the error for a damaged sample."""
    why = getattr(why, "strerror", None) or why
    return DamagedShard(
        f"{index.describe(number)} is damaged: {why}; run `geofm verify {index.digest[:12]}` and "
        "restore the shard or pack it again"
    )
