"""Decoded tiles that a neighbouring window will want as well, of all open files together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

#: Bytes of decoded tiles that a process keeps.
KEPT = 256 * 2**20


@dataclass
class Decoded:
    """The tiles that were used last, up to ``most`` bytes, by open file and place in it."""

    most: int = KEPT
    size: int = 0
    tiles: OrderedDict[tuple[Hashable, Hashable], NDArray[Any]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self, key: tuple[Hashable, Hashable]) -> NDArray[Any] | None:
        """A tile, if it is still there."""
        with self._lock:
            if key not in self.tiles:
                return None
            self.tiles.move_to_end(key)
            return self.tiles[key]

    def put(self, key: tuple[Hashable, Hashable], tile: NDArray[Any]) -> None:
        """Keep a tile of an open file, in place of those that nobody used for longest."""
        with self._lock:
            self.tiles[key] = tile
            self.size += tile.nbytes
            while self.size > self.most:
                self._drop(next(iter(self.tiles)))

    def forget(self, owner: Hashable) -> None:
        """Drop the tiles of a file that is closed."""
        with self._lock:
            for key in [key for key in self.tiles if key[0] is owner]:
                self._drop(key)

    def _drop(self, key: tuple[Hashable, Hashable]) -> None:
        self.size -= self.tiles.pop(key).nbytes


DECODED = Decoded()
