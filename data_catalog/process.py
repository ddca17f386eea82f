"""A process: the cores that this one may use, and whether another is still there.

The latter is told surely on the machine it runs on, not at all elsewhere.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


def cores() -> int:
    """Cores that this process may use."""
    mine = getattr(os, "sched_getaffinity", None)
    return len(mine(0)) if mine else os.cpu_count() or 1


def process_mark(pid: int | None = None) -> str:
    """A text that names one process for good: boot, pid namespace, pid and start time.

    A pid alone comes again after a while, and means another process in another container.

    Returns:
        Empty where the process is gone (a zombie included), or the system does not tell.
    """
    pid = os.getpid() if pid is None else pid
    try:
        # the command may hold blanks and brackets, so what counts begins after the last ")"
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeError):
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" or not _here() else f"{_here()}/{pid}/{started}"


def is_gone(mark: str) -> bool:
    """Whether the process with this mark ran here and is gone; False where nobody can tell."""
    here, _, rest = mark.rpartition("/")[0].rpartition("/")
    return bool(here) and here == _here() and process_mark(int(rest)) != mark


@cache
def _here() -> str:
    """This boot of this machine and the pid namespace; empty where the system does not tell."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""
