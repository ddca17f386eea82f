"""A remote file, read by byte ranges: prefetched where the blocks are known, else on demand."""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

from geofm.remote.assets import Piece, Remote
from geofm.remote.quarantine import Quarantine
from geofm.remote.retry import Fault, read_with_retries
from geofm.runtime.threads import shared_pool

#: Size of the first request for a file, and of the blocks that are read on demand (bytes).
BLOCK = 16 * 1024
#: Blocks that are kept for each file.
KEPT_BLOCKS = 512
#: Most blocks that are read ahead when blocks are read in order (JPEG 2000, long headers).
MAX_READ_AHEAD = 64
#: Ranges with a smaller gap (bytes) are merged; ranges longer than `MOST_RANGE` are divided.
GAP = 32 * 1024
MOST_RANGE = 4 * 2**20
#: Threads of a process that prefetch ranges.
PREFETCH_THREADS = 24

#: First byte, and the byte after the last.
Range = tuple[int, int]


def coalesce(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges, merge those that are close, and divide long ones into equal pieces."""
    joined: list[list[int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= GAP:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    pieces = []
    for start, end in joined:
        count = -(-(end - start) // MOST_RANGE)
        edges = [start + (end - start) * n // count for n in range(count + 1)]
        pieces += list(pairwise(edges))
    return pieces


@dataclass
class _Segment:
    start: int
    end: int
    data: Future[bytes]


class RangeSource:
    """A remote file, read by one thread while a pool prefetches other ranges of it."""

    def __init__(self, asset: Remote, retries: int, where: str) -> None:
        self.asset, self.retries, self.where = asset, retries, where
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.segments: list[_Segment] = []
        self.error: Quarantine | None = None
        self._lock = threading.Lock()
        self._next, self._ahead = 0, 0
        first = asset.part(0, BLOCK)
        self.size, self.etag = first.total, first.etag
        self.head = self.blocks[0] = first.data

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Fetch ranges in the background; a read of one of them waits for it."""
        pool = shared_pool("geofm-prefetch", PREFETCH_THREADS)
        for start, end in ranges:
            if end > len(self.head):  # other ranges were read with the beginning of the file
                self.segments.append(_Segment(start, end, pool.submit(self._bytes, start, end)))
        self.segments.sort(key=lambda segment: segment.start)

    def forget(self, ranges: Sequence[Range]) -> None:
        """Drop prefetched ranges."""
        dropped = set(ranges)
        for segment in self.segments:
            if (segment.start, segment.end) in dropped:
                segment.data.cancel()
        self.segments = [s for s in self.segments if (s.start, s.end) not in dropped]

    def close(self) -> None:
        """Cancel the prefetching that has not begun, and drop the rest."""
        for segment in self.segments:
            segment.data.cancel()
        self.segments = []

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes of the file; there are fewer only at its end.

        Raises:
            Quarantine: The bytes can't be read.
        """
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        pieces, at = [], offset
        while at < end:
            position = bisect_right(self.segments, at, key=lambda s: s.start) - 1
            segment = self.segments[position] if position >= 0 else None
            if segment is None or segment.end <= at:
                pieces.append(self._from_blocks(at, end))
                break
            stop = min(end, segment.end)
            pieces.append(segment.data.result()[at - segment.start : stop - segment.start])
            at = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _from_blocks(self, offset: int, end: int) -> bytes:
        """Read bytes that were not prefetched."""
        first, last = offset // BLOCK, (end - 1) // BLOCK
        missing = [n for n in range(first, last + 1) if n not in self.blocks]
        fetched: dict[int, bytes] = {}
        if missing:
            # blocks that are read in order: read twice as many ahead each time
            in_order = missing[0] == self._next
            self._ahead = min(2 * self._ahead + 1, MAX_READ_AHEAD) if in_order else 0
            stop = min(missing[-1] + self._ahead, (self.size - 1) // BLOCK)
            self._next = stop + 1
            data = self._bytes(missing[0] * BLOCK, (stop + 1) * BLOCK)
            for number in range(missing[0], stop + 1):
                start = (number - missing[0]) * BLOCK
                fetched[number] = self.blocks[number] = data[start : start + BLOCK]
        pieces = []
        for number in range(first, last + 1):
            block = fetched.get(number) or self.blocks[number]
            self.blocks[number] = block
            self.blocks.move_to_end(number)
            pieces.append(block)
        while len(self.blocks) > KEPT_BLOCKS:
            self.blocks.popitem(last=False)
        return b"".join(pieces)[offset - first * BLOCK : end - first * BLOCK]

    def _bytes(self, start: int, end: int) -> bytes:
        """Read a range in one request; a file that changed since it was opened is a fault."""

        def attempt() -> Piece:
            piece = self.asset.part(start, end)
            if piece.total != self.size or (piece.etag != self.etag and not self._same(piece)):
                raise Fault("the file changed while it was read")
            return piece

        return read_with_retries(attempt, self.retries, self.where).data

    def _same(self, piece: Piece) -> bool:
        """Return whether only the ETag differs, and the file still begins with the same bytes."""
        with self._lock:
            if piece.etag == self.etag:
                return True
            first = self.asset.part(0, BLOCK)
            if first.data != self.head or first.total != self.size or first.etag != piece.etag:
                return False
            self.etag = piece.etag
            return True


class RangeFile(io.RawIOBase):
    """A range source as a file object; GDAL sees nothing else."""

    def __init__(self, source: RangeSource) -> None:
        self.source, self.position = source, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the cursor."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.source.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """Return the cursor."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Read bytes from the cursor; GDAL can't pass on an error, so it is kept in the source."""
        wanted = self.source.size - self.position if size < 0 else size
        try:
            data = self.source.read(self.position, wanted)
        except Quarantine as error:
            self.source.error = error
            return b""
        self.position += len(data)
        return data
