"""Workers are started again when they end, and end with the process that keeps them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

#: Keeps two stand-ins for workers, which write their process ids and sleep.
SCRIPT = """
import sys
from flows.service import workers
code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'a')); time.sleep(600)"
workers.command_of = lambda name: [sys.executable, "-c", code, name]
workers.keep_running(["a", "b"], lambda line: print(line, flush=True))
"""


def pids(folder: Path, pool: str) -> list[int]:
    """Process ids that the workers of a pool have written, in order."""
    path = folder / pool
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for_pid(folder: Path, pool: str, count: int) -> int:
    deadline = time.monotonic() + 30
    while len(pids(folder, pool)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return pids(folder, pool)[-1]


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    return False


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "GEOFM_HOME": str(tmp_path / "home")},
    ) as process:  # fmt: skip
        yield process
        process.kill()


def test_a_worker_that_dies_is_started_again(keeper: subprocess.Popen[str], tmp_path: Path) -> None:
    first, other = wait_for_pid(tmp_path, "a", 1), wait_for_pid(tmp_path, "b", 1)
    os.kill(first, signal.SIGKILL)
    second = wait_for_pid(tmp_path, "a", 2)
    assert second != first
    assert keeper.stdout is not None
    assert "a: ended (-9)" in keeper.stdout.readline()
    assert pids(tmp_path, "b") == [other] and is_running(other)

    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(20) == 0
    assert not is_running(second) and not is_running(other)


#: A worker with a run, as Prefect has them: the run has a session of its own, and writes a file
#: when it is asked to end.
RUN = """
import os, signal, sys, time
def stop(*_):
    time.sleep(1)
    open(sys.argv[1] + ".checkpoint", "a").write("written")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print(os.getpid(), file=open(sys.argv[1] + ".run", "a"))
time.sleep(600)
"""
WORKER = """
import os, signal, subprocess, sys, time
run = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], start_new_session=True)
def stop(*_):
    run.kill()  # as Prefect's worker does when it ends
    sys.exit()
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print(os.getpid(), file=open(sys.argv[1], "a"))
run.wait()
time.sleep(600)
"""
KEEPER = f"""
import sys
from flows.service import workers
workers.command_of = lambda name: [sys.executable, "-c", {WORKER!r}, name, {RUN!r}]
workers.keep_running(["a"], lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("ended", ["keeper", "group of the keeper", "worker"])
def test_a_run_has_time_to_write_its_checkpoint(tmp_path: Path, ended: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "GEOFM_HOME": str(tmp_path / "home")},
    ) as keeper:  # fmt: skip
        try:
            run, worker = wait_for_pid(tmp_path, "a.run", 1), wait_for_pid(tmp_path, "a", 1)
            time.sleep(1.5)  # the keeper looks at its workers twice a second
            if ended == "keeper":
                keeper.send_signal(signal.SIGTERM)
            elif ended == "worker":  # by lack of memory: nobody could cancel its run any more
                os.kill(worker, signal.SIGKILL)
                assert wait_for_pid(tmp_path, "a", 2) != worker
                keeper.send_signal(signal.SIGTERM)
            else:
                os.killpg(keeper.pid, signal.SIGINT)
            assert keeper.wait(40) == 0
        finally:
            keeper.kill()
    assert not is_running(run) and not is_running(worker)
    written = (tmp_path / "a.checkpoint").read_text()
    assert written == "written" * (2 if ended == "worker" else 1)
