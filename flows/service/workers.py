"""The workers of the home: one for each pool, kept running until `geofm down`, Ctrl-C or SIGTERM.

``keep_running`` starts the workers and the server of reports, and starts one again that has ended,
whatever ended it. It runs in the process of `geofm up`, or as ``python -m flows.service.workers``
behind `geofm up --detach`. They end with it. A note in the home says which process it is, so a home
has one worker for each pool.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_catalog.errors import GeofmError, UsageError
from data_catalog.hashing import digest_of
from data_catalog.storage.process import (
    child_command,
    child_processes,
    end_processes,
    is_gone,
    process_mark,
)
from flows.service.home import home, home_mark, read_note, write_note
from flows.service.pages import SOCKET
from flows.service.server import (
    Server,
    configured_server,
    find_or_launch,
    inspect_process,
    running_server,
    stop_process,
)

NOTE = "worker.pid"
#: Seconds that runs have to end, in which a training writes its checkpoint; then seconds that a
#: worker has; and seconds that `geofm down` waits for all of it.
RUNS_GRACE_S, WORKER_GRACE_S, GRACE_S = 30.0, 10.0, 60.0
#: Seconds before a worker that ended is started again, at first and at most. The pause doubles
#: while workers end within ``STABLE_S``.
PAUSE_S, LONGEST_PAUSE_S, STABLE_S = 1.0, 60.0, 60.0
#: Seconds between two looks at the workers.
LOOK_S = 0.5


#: Name of the server of reports among the processes that are kept running.
PAGES_SERVER = "pages"


def command_of(name: str) -> list[str]:
    """Return the command of a worker, or of the server of reports.

    It ends with the process that starts it.

    Args:
        name: Name of a work pool, or ``PAGES_SERVER``.
    """
    if name == PAGES_SERVER:
        return child_command("flows.service.pages")
    own = f"{name} on {platform.node()}"
    start = ("worker", "start", "--pool", name, "--type", "process", "--name", own)
    return child_command("prefect", *start, grace_s=WORKER_GRACE_S)


def keep_running(names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Keep processes and the home's server running, until SIGTERM or Ctrl-C reaches this process.

    Then the runs of the workers end first: Prefect's worker would kill them when it ends, and a
    training would not write its checkpoint.

    Args:
        names: Names of work pools, and ``PAGES_SERVER``.
        tell: Called with a line when one has ended.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    processes = [_Kept(name) for name in names]
    server = _KeptServer()
    try:
        while not stopped:
            if server.look(tell):
                tell("the Prefect server has another address now, so workers start again")
                _end(processes)
            for process in processes:
                process.look(tell)
            time.sleep(LOOK_S)
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Sequence[_Kept]) -> None:
    """End the runs of workers, and then the processes."""
    runs = [run for process in processes for run in process.find_runs()]
    end_processes(runs, RUNS_GRACE_S)
    for process in processes:
        process.end()


class _Kept:
    """A process that is started again when it has ended.

    Attributes:
        runs: Its child processes, the runs of a worker: their process ids and marks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.runs: list[tuple[int, str]] = []
        self.started = self.due = 0.0
        self.pause = PAUSE_S

    def look(self, tell: Callable[[str], None]) -> None:
        """Start the process if it does not run and its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            # no worker could cancel the runs of a worker that was killed
            end_processes(self.runs, RUNS_GRACE_S)
            code, self.process = self.process.returncode, None
            lived = now - self.started
            self.pause = PAUSE_S if lived > STABLE_S else min(2 * self.pause, LONGEST_PAUSE_S)
            self.due = now + self.pause
            tell(
                f"{self.name}: ended ({code}) after {lived:.0f} s, starts again in "
                f"{self.pause:.0f} s"
            )
        if self.process is None and now >= self.due:
            inherited = [int(os.environ[SOCKET])] if self.name == PAGES_SERVER else []
            # in a group of its own: a signal to this process's group would reach it twice, and
            # Prefect's worker kills itself at the second one
            self.process = subprocess.Popen(  # noqa: S603
                command_of(self.name), pass_fds=inherited, start_new_session=True
            )
            self.started = now
        self.find_runs()

    def find_runs(self) -> list[tuple[int, str]]:
        """Note the child processes of the process, while it lives."""
        if self.process is not None and self.process.poll() is None:
            children = child_processes(self.process.pid)
            self.runs = [(child, process_mark(child)) for child in children]
        return self.runs

    def end(self) -> None:
        """Ask the process to end, and kill it after ``WORKER_GRACE_S``."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(WORKER_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _KeptServer:
    """The server of the home, which is started again when it has ended; not a configured one."""

    def __init__(self) -> None:
        self.server = None if configured_server() else running_server()
        self.due, self.pause = 0.0, PAUSE_S

    def look(self, tell: Callable[[str], None]) -> bool:
        """Start the server again if it has ended; returns whether its address has changed."""
        if self.server is None or not is_gone(self.server.mark) or time.monotonic() < self.due:
            return False
        earlier = self.server
        tell("the Prefect server has ended and is started again")
        self.pause = min(2 * self.pause, LONGEST_PAUSE_S)
        self.due = time.monotonic() + self.pause
        try:
            self.server = find_or_launch()
        except GeofmError as error:
            tell(f"it cannot be started: {error}")
            return False
        os.environ["PREFECT_API_URL"] = self.server.api
        if self.server.api == earlier.api:
            return False
        note = read_note(NOTE)
        if note.get("pid") == os.getpid():
            write_note(NOTE, {**note, "api": self.server.api})
        return True


def start_detached(names: Sequence[str], log: Path) -> int:
    """Call ``keep_running`` in a process of its own; returns its id."""
    inherited = [int(os.environ[SOCKET])] if PAGES_SERVER in names else []
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603
            # -P: a folder "flows" in the current folder is not run instead
            [sys.executable, "-P", "-m", "flows.service.workers", *names],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ,
            start_new_session=True,
            pass_fds=inherited,
        )
    return process.pid


def note_workers(pid: int, place: dict[str, Any]) -> None:
    """Record the process that keeps the workers running, and where they work.

    Args:
        pid: Process id.
        place: Server, store, catalogue and pools, from ``place_of_workers``.
    """
    write_note(NOTE, {"pid": pid, "mark": process_mark(pid), "home": home_mark(), **place})


def place_of_workers(
    server: Server, store: str, catalogue: str, pools: Sequence[str]
) -> dict[str, Any]:
    """Describe where workers work; the catalogue's address may hold a password, so by a digest."""
    return {
        "api": server.api,
        "store": store,
        "catalogue": digest_of(catalogue),
        "pools": list(pools),
    }


def running_workers(place: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the note on the process that keeps the home's workers running, if it can stay.

    Workers of another store, catalogue or server are stopped.

    Returns:
        The note; empty if none runs there.

    Raises:
        UsageError: The home keeps workers of other pools running, at the same place.
    """
    note = read_note(NOTE)
    pid = note.get("pid")
    if note.get("home") != home_mark() or type(pid) is not int:
        return {}
    if process_mark(pid) != note.get("mark"):
        return {}
    if all(note.get(name) == value for name, value in place.items()):
        return note
    if all(note.get(name) == place[name] for name in ("api", "store", "catalogue")):
        pools = " and ".join(note.get("pools", []))
        raise UsageError(
            f"this home keeps workers of {pools} running (pid {pid}): "
            "stop them with `geofm down` first, or start the others with another GEOFM_HOME"
        )
    tell(f"workers     pid {pid} of store {note.get('store')} stop, with their runs")
    stop_workers()
    return {}


def stop_workers() -> bool:
    """Stop the home's workers and their runs; return False if there are none."""
    path = home() / NOTE
    note = read_note(NOTE)
    if note.get("home") == home_mark():
        pid, mark = note.get("pid"), note.get("mark")
    else:
        pid, mark = _earlier_worker(path), ""
    path.unlink(missing_ok=True)
    if type(pid) is not int or (mark and process_mark(pid) != mark):
        return False
    return stop_process(pid, process_mark(pid), GRACE_S)


def _earlier_worker(path: Path) -> int:
    """Return the process id of a worker that an earlier version of geofm recorded; 0 for none."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError):
        return 0
    words, variables, _ = inspect_process(pid)
    address = f"{read_note('server.json').get('ui')}/api"
    own = {"prefect", "worker"} <= words and variables.get("PREFECT_API_URL") == address
    return pid if own else 0


if __name__ == "__main__":
    keep_running(sys.argv[1:], lambda line: print(line, flush=True))
