"""Limits of a machine that a run would meet: a missing GPU, too little disk or memory."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_catalog.errors import UsageError
from data_catalog.store import Store
from geofm.runtime.text import size

#: Bytes of a number of a vector while vectors are compared.
FLOAT32 = 4


def free_disk(store: Store) -> int | None:
    """Return the free bytes of a local store's disk; None for an object store."""
    return shutil.disk_usage(Path(store.root.path)).free if store.is_local else None


def check_disk(needed: int, free: int | None) -> None:
    """Refuse a run that adds more to its store than there is free.

    Args:
        needed: Bytes that the run adds to the store.
        free: Free bytes; None if they are not known.

    Raises:
        UsageError: Names both, and the remedy.
    """
    if free is not None and needed > free:
        raise UsageError(
            f"the run needs about {size(needed)} in the store, where {size(free)} are free: free "
            "some space, name another store with --store, or limit the chips with cut.max_chips or "
            "cut.max_gib"
        )


def available_memory() -> int | None:
    """Return the memory (bytes) that programs can have without swapping; None if not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    value = known.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None


def explain_memory(chips: int, width: int, available: int | None) -> str:
    """Warn if the vectors of all chips do not fit into memory; else return an empty text.

    Args:
        chips: Number of chips that are compared.
        width: Numbers of a vector.
        available: Available bytes; None if they are not known.
    """
    needed = chips * width * FLOAT32
    if available is None or needed <= available:
        return ""
    return (
        f"the vectors of {chips:,} chips take {size(needed)} of memory, and {size(available)} are "
        "available: limit the chips with cut.max_chips, choose an encoder with a narrower vector "
        "(embed.encoder), or use a machine with more memory"
    )
