"""A process's own largest resident size, for peers: they run where geofm is not installed."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path


def peak_rss_mib() -> float:
    """Largest resident size of this process so far, MiB; as ``data_catalog.run`` tells it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
