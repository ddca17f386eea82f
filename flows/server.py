"""The standing Prefect server: used where one is configured, started where none is.

The ephemeral server that Prefect falls back to keeps only part of its rows, so geofm never uses
it. A server started here lives in ``GEOFM_HOME`` (default ~/.geofm), keeps running for the next
command, and ends with ``geofm down``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import httpx

from data_catalog.address import folder_setting
from data_catalog.errors import RunError

START_SECONDS = 120.0


class NoServer(RunError):
    """No Prefect server answers and none could be started."""


@dataclass(frozen=True)
class Server:
    """Address of a Prefect server; ``pid`` is 0 when it isn't ours."""

    ui: str
    pid: int

    @property
    def api(self) -> str:
        """Address of its API."""
        return f"{self.ui}/api"


def home() -> Path:
    """Where a server of ours keeps its database and log."""
    folder = folder_setting("GEOFM_HOME", Path.home() / ".geofm")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def healthy(api: str, timeout_s: float = 3.0) -> bool:
    """Whether a Prefect API answers."""
    try:
        return httpx.get(f"{api}/health", timeout=timeout_s, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def configured_api() -> str | None:
    """The API that the user set: ``PREFECT_API_URL``, or the active profile's."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    prefect_home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    try:
        profiles = tomllib.loads((prefect_home / "profiles.toml").read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return url.rstrip("/") if url else None


def running_server() -> Server | None:
    """The server that an earlier command started, if its process lives (it may still be busy)."""
    try:
        note = json.loads((home() / "server.json").read_text())
    except (OSError, ValueError):
        return None
    server = Server(note["ui"], note["pid"])
    return server if _alive(server.pid) or healthy(server.api) else None


def _alive(pid: int) -> bool:
    """Whether the process is a Prefect server, not something else that got its number."""
    try:
        return b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def launch_server() -> Server:
    """Start a server in the background without waiting for it."""
    port = _free_port(4200)
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
    }
    log = (home() / "server.log").open("ab")
    process = subprocess.Popen(  # noqa: S603
        [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    note = home() / "server.json"
    beside = note.with_name(f".server.{process.pid}.json")
    beside.write_text(json.dumps({"ui": server.ui, "pid": server.pid}))
    beside.replace(note)
    return server


def find_or_launch() -> Server:
    """The configured server, the one we started before, or a new one that is still starting.

    Raises:
        NoServer: a configured server does not answer.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    api = configured_api()
    if api is not None:
        if not healthy(api, 10.0):
            raise NoServer(
                f"the Prefect server at {api} does not answer; start it, or unset PREFECT_API_URL "
                "so that geofm starts one of its own"
            )
        return Server(api.removesuffix("/api"), 0)
    with (home() / "server.lock").open("w") as lock:  # two commands at once start one server
        fcntl.flock(lock, fcntl.LOCK_EX)
        return running_server() or launch_server()


def wait_for(server: Server) -> None:
    """Wait until a server answers, and point this process and its children at it.

    Raises:
        NoServer: with the log to read.
    """
    deadline = time.monotonic() + START_SECONDS
    while not healthy(server.api):
        if time.monotonic() > deadline:
            raise NoServer(
                f"the Prefect server did not start within {START_SECONDS:.0f} s; its log is "
                f"{home() / 'server.log'}"
            )
        time.sleep(0.25)
    os.environ["PREFECT_API_URL"] = server.api


def stop_server() -> bool:
    """End the server that geofm started; False when there is none."""
    note = home() / "server.json"
    server = running_server()
    note.unlink(missing_ok=True)
    if server is None or not _alive(server.pid):
        return False
    os.killpg(server.pid, signal.SIGTERM)
    return True


def note_worker(pid: int) -> None:
    """Remember a worker that runs in the background, so that ``stop_worker`` finds it."""
    (home() / "worker.pid").write_text(str(pid))


def stop_worker(patience_s: float = 10.0) -> bool:
    """End the background worker and what it runs; False when there is none.

    It may sign off first; after ``patience_s`` seconds it is killed.
    """
    note = home() / "worker.pid"
    try:
        pid = int(note.read_text())
    except (OSError, ValueError):
        return False
    note.unlink()
    if not _alive(pid):
        return False
    os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while _alive(pid):
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            break
        time.sleep(0.1)
    return True


def _free_port(preferred: int) -> int:
    """``preferred`` where it is free on loopback, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise NoServer("no free port on 127.0.0.1 for the Prefect server")
