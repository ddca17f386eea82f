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

from data_catalog.hashing import digest_of
from data_catalog.storage.process import child_command, process_mark
from flows.service.home import home, home_mark, read_note, write_note
from flows.service.pages import SOCKET
from flows.service.server import (
    Server,
    configured_server,
    find_or_launch,
    inspect_process,
    running_server,
    stop_process,
    wait_for,
)

NOTE = "worker.pid"
#: Seconds that a worker has to end: a training writes its checkpoint.
GRACE_S = 30.0
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
    return child_command("prefect", *start, grace_s=GRACE_S)


def keep_running(names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Keep processes and the home's server running, until SIGTERM or Ctrl-C reaches this process.

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
    server = None if configured_server() else running_server()
    try:
        while not stopped:
            if server is not None and not server.alive:
                tell("the Prefect server has ended and is started again")
                earlier, server = server, find_or_launch()
                wait_for(server)
                if server.api != earlier.api:  # another program has taken the port
                    tell(f"the Prefect server is at {server.ui} now, so workers start again")
                    for process in processes:
                        process.ask_to_end()
            for process in processes:
                process.look(tell)
            time.sleep(LOOK_S)
    finally:
        for process in processes:
            process.ask_to_end()
        deadline = time.monotonic() + GRACE_S
        for process in processes:
            process.end(max(0.0, deadline - time.monotonic()))
        for number, handler in before.items():
            signal.signal(number, handler)


class _Kept:
    """A process that is started again when it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.started = self.due = 0.0
        self.pause = PAUSE_S

    def look(self, tell: Callable[[str], None]) -> None:
        """Start the process if it does not run and its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
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
            self.process = subprocess.Popen(command_of(self.name), pass_fds=inherited)  # noqa: S603
            self.started = now

    def ask_to_end(self) -> None:
        """Send SIGTERM to the process."""
        if self.process is not None:
            self.process.terminate()

    def end(self, seconds: float) -> None:
        """Wait for the process to end, and kill it after some seconds."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


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

    Workers of another store, catalogue, server or pool are stopped.

    Returns:
        The note; empty if none runs there.
    """
    note = read_note(NOTE)
    pid = note.get("pid")
    if note.get("home") != home_mark() or type(pid) is not int:
        return {}
    if process_mark(pid) != note.get("mark"):
        return {}
    if all(note.get(name) == value for name, value in place.items()):
        return note
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
