"""Children of a killed process end, whatever they are and whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_catalog.storage.process import is_alive, is_gone

#: Workers of a process pool that sleep.
POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from data_catalog.storage.process import end_with_parent, process_mark

def work(name):
    print(process_mark(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), initializer=end_with_parent,
        initargs=(os.getpid(),),
    ) as pool:
        list(pool.map(work, "ab"))
"""

#: A module in a process of its own that ignores SIGTERM.
MODULE = """
import subprocess, sys, time
from data_catalog.storage.process import child_command
code = child_command("stubborn", grace_s=float(sys.argv[1]))
subprocess.run(code)
"""
STUBBORN = """
import signal, sys, time
from data_catalog.storage.process import process_mark
def stop(*_):
    open("asked", "w").close()
signal.signal(signal.SIGTERM, stop)
assert sys.argv == [__file__], sys.argv
print(process_mark(), flush=True)
while True:
    time.sleep(1)
"""


def killed(command: list[str], count: int, folder: Path) -> list[str]:
    """Start a process, wait until its children have said who they are, kill it."""
    there = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    parent = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=there)
    assert parent.stdout is not None
    marks = [parent.stdout.readline().strip() for _ in range(count)]
    assert all(map(is_alive, marks))
    os.kill(parent.pid, signal.SIGKILL)  # not waited for: a zombie is no parent either
    return marks


def wait_until_gone(marks: list[str], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not all(map(is_gone, marks)):
        assert time.monotonic() < deadline, marks
        time.sleep(0.05)


def test_workers_of_a_pool_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    marks = killed([sys.executable, str(tmp_path / "pool.py")], 2, tmp_path)
    assert len(set(marks)) == 2
    wait_until_gone(marks, 5)


@pytest.mark.parametrize("grace_s", [0.0, 1.0])
def test_a_module_ends_with_its_parent_after_its_grace(tmp_path: Path, grace_s: float) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    marks = killed([sys.executable, "-c", MODULE, str(grace_s)], 1, tmp_path)
    wait_until_gone(marks, 5 + grace_s)
    assert (tmp_path / "asked").exists() == bool(grace_s)
