"""Freed memory stays with the process: to ask for it anew costs more than a small network."""

from __future__ import annotations

import ctypes
from functools import cache

#: Blocks up to here (bytes) come from memory that is kept, and so much of it is kept at most.
KEPT_BLOCK, KEPT = 2**26, 2**28
#: Names of glibc's ``mallopt`` for the two (malloc.h).
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


@cache
def keep_freed_memory() -> bool:
    """Keep up to ``KEPT`` bytes of what is freed; False where the C library cannot be told.

    By default glibc gives memory back to the system as soon as twice the largest block is free.
    Activations of a batch are such blocks: each batch then asks for all of them again, about 900
    pages a chip, 1 to 2 ms beside 4.4 ms of arithmetic (EfficientNet-Lite0 at 128 px).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BLOCK) and mallopt(_TRIM_THRESHOLD, KEPT))
