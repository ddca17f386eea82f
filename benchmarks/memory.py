"""A process's own largest resident size; imports nothing, since peers run in other environments."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_rss_mib() -> float:
    """Largest resident size of this process since it began, MiB.

    On Linux by its own memory map: ``ru_maxrss`` starts with what the process that started this
    one held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        told = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(told["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
