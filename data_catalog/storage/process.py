"""Processes: the cores that this one may use, whether another one lives, ending with a parent.

Whether a process lives is known for certain on its own machine only.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
#: Seconds between two looks at the parent.
LOOK_S = 0.5
#: ``prctl`` option: the signal that the kernel sends when the parent ends (Linux).
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def process_mark(pid: int | None = None) -> str:
    """Return a text that identifies one process for good: boot, pid namespace, pid, start time.

    A pid alone is used again after a while, and means another process in another container.

    Returns:
        An empty text if the process has ended (zombies included) or the system has no /proc.
    """
    pid = os.getpid() if pid is None else pid
    try:
        # the command may hold blanks and brackets: the other fields begin after the last ")"
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeError):
        return ""
    state, started = fields[0], fields[19]
    return "" if state in "ZX" or not _here() else f"{_here()}/{pid}/{started}"


def is_alive(mark: str) -> bool:
    """Return whether the process with this mark runs here; False if unknown."""
    here, _, rest = mark.rpartition("/")[0].rpartition("/")
    return bool(here) and here == _here() and process_mark(int(rest)) == mark


def is_gone(mark: str) -> bool:
    """Return whether the process with this mark ran here and has ended; False if unknown."""
    here, _, rest = mark.rpartition("/")[0].rpartition("/")
    if not here or here != _here():
        return False
    now = process_mark(int(rest))
    return now != mark if now else not _is_hidden(int(rest))


def _is_hidden(pid: int) -> bool:
    """Return whether a process of another user lives and /proc hides it (``hidepid``)."""
    if os.access(_PROC / str(pid) / "stat", os.R_OK):  # a zombie
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True


def end_with_parent(parent: int | None = None, grace_s: float = 0.0, kernel: bool = True) -> None:
    """End this process when the process that started it has ended, however that ended.

    Args:
        parent: Pid of the parent, if it may have ended already; else the present parent.
        grace_s: Seconds between SIGTERM and SIGKILL; without a grace period only SIGKILL is sent.
        kernel: Let the kernel send SIGKILL as well (Linux), which ends a process whose interpreter
            is busy in foreign code. The kernel does so when the *thread* that started this process
            ends, so that thread must live as long as this process is needed.
    """
    parent = os.getppid() if parent is None else parent
    if kernel and not grace_s and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watch = threading.Thread(target=_watch, args=(parent, grace_s), name="parent", daemon=True)
    watch.start()


def _watch(parent: int, grace_s: float) -> None:
    """Wait until this process has another parent, then end it."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    if grace_s:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def following(module: str, *arguments: str, grace_s: float = 0.0) -> list[str]:
    """Return the command that runs a Python module in a child which ends with this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(grace_s), module, *arguments]


@cache
def boot_mark() -> str:
    """Return a text that identifies this machine since it was started, the same in containers.

    Without /proc it is the host's name.
    """
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


@cache
def _here() -> str:
    """This boot of this machine and the pid namespace; empty if the system has no /proc."""
    try:
        return f"{boot_mark()}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


if __name__ == "__main__":  # the child of ``following``
    end_with_parent(int(sys.argv[1]), float(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
