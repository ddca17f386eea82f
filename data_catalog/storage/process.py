"""Processes: cores, threads of BLAS, peak memory, which processes live, ending with a parent.

Only the machine of a process knows for certain whether the process lives.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

_PROC = Path("/proc")
#: Seconds between two checks of the parent.
LOOK_S = 0.5
#: ``prctl`` option: the signal that the kernel sends when the parent ends (Linux).
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_lock = threading.Lock()
#: Blocks of ``one_blas_thread`` that run now, and the limits that the first of them has set.
_blocks: dict[str, Any] = {"count": 0, "limits": None}


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS (numpy, scipy, faiss) compute with one thread; the last block to end restores it.

    Work that is divided among threads or processes needs this: otherwise each of them would start
    as many BLAS threads as there are cores, which wait for each other.
    """
    with _lock:
        if _blocks["count"] == 0:
            _blocks["limits"] = threadpool_limits(1, user_api="blas")
        _blocks["count"] += 1
    try:
        yield
    finally:
        with _lock:
            _blocks["count"] -= 1
            if _blocks["count"] == 0:
                _blocks["limits"].restore_original_limits()


def peak_memory_mib() -> float:
    """Return the largest resident size of this process so far, MiB.

    On Linux it is read from /proc: ``ru_maxrss`` starts with the memory of the process that
    started this one.
    """
    with suppress(OSError):
        for line in (_PROC / "self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@cache
def _c_library() -> ctypes.CDLL:
    """Return the C library of this process."""
    return ctypes.CDLL(None)


def return_freed_memory() -> None:
    """Return memory that the process has freed to the system, where the C library can (glibc).

    glibc keeps freed memory of each thread, so the peaks of one piece of work after another add up.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def process_mark(pid: int | None = None) -> str:
    """Return a text that identifies one process for ever: boot, pid namespace, pid, start time.

    A pid alone is used again after a while, and means another process in another container.

    Args:
        pid: Id of the process; by default this process.

    Returns:
        An empty text if the process has ended (zombies included) or the system has no /proc.
    """
    pid = os.getpid() if pid is None else pid
    try:
        # The command may have blanks and brackets: the other fields begin after the last ")".
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeError):
        return ""
    state, started = fields[0], fields[19]
    namespace = _boot_and_namespace()
    return "" if state in "ZX" or not namespace else f"{namespace}/{pid}/{started}"


def is_alive(mark: str) -> bool:
    """Return whether the process with this mark runs on this machine; False if unknown."""
    namespace, _, pid = mark.rpartition("/")[0].rpartition("/")
    is_here = bool(namespace) and namespace == _boot_and_namespace()
    return is_here and process_mark(int(pid)) == mark


def is_gone(mark: str) -> bool:
    """Return whether the process with this mark ran on this machine and has ended.

    Returns:
        False if it is not known.
    """
    namespace, _, pid = mark.rpartition("/")[0].rpartition("/")
    if not namespace or namespace != _boot_and_namespace():
        return False
    current = process_mark(int(pid))
    return current != mark if current else not _is_hidden(int(pid))


def _is_hidden(pid: int) -> bool:
    """Return whether a process of another user lives that /proc hides (``hidepid``)."""
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
    """End this process when its parent process has ended, for whatever reason.

    Args:
        parent: Pid of the parent, if it may have ended already; by default the present parent.
        grace_s: Seconds between SIGTERM and SIGKILL; without a grace period only SIGKILL is sent.
        kernel: Let the kernel send SIGKILL as well (Linux), which also ends a process whose
            interpreter is busy in native code. The kernel sends it when the *thread* that started
            this process ends, so that thread must live as long as this process is needed.
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


def child_processes(pid: int) -> list[int]:
    """List the process ids of the children of a process (Linux; elsewhere none)."""
    found: list[int] = []
    for thread in (_PROC / str(pid) / "task").glob("[0-9]*"):
        with suppress(OSError):  # the thread or the process has ended
            found += map(int, (thread / "children").read_text().split())
    return found


def end_processes(processes: Sequence[tuple[int, str]], seconds: float) -> None:
    """Send SIGTERM to processes, wait for their end, and kill those that remain.

    Args:
        processes: Process ids and marks; a process with another mark is a later one.
        seconds: Seconds to wait.
    """
    alive = [(pid, mark) for pid, mark in processes if mark and process_mark(pid) == mark]
    _signal_all(alive, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [(pid, mark) for pid, mark in alive if process_mark(pid) == mark]
    _signal_all(alive, signal.SIGKILL)


def _signal_all(processes: Sequence[tuple[int, str]], number: int) -> None:
    for pid, _ in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def child_command(module: str, *arguments: str, grace_s: float = 0.0) -> list[str]:
    """Return a command that runs a Python module in a child process that ends with this process.

    Args:
        module: Name of the module.
        arguments: Its command-line arguments.
        grace_s: See ``end_with_parent``.
    """
    # -P: a folder in the current folder that has the name of a package is not run instead
    own = [sys.executable, "-P", "-m", __name__]
    return [*own, str(os.getpid()), str(grace_s), module, *arguments]


@cache
def boot_mark() -> str:
    """Return a text that identifies this machine since its start, the same in all containers.

    It is the host's name on systems without /proc.
    """
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


@cache
def _boot_and_namespace() -> str:
    """Identify this boot of this machine and the pid namespace; empty without /proc."""
    try:
        return f"{boot_mark()}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


if __name__ == "__main__":  # the child of ``child_command``
    end_with_parent(int(sys.argv[1]), float(sys.argv[2]))
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
