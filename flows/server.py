"""The standing Prefect server: used where one is configured, started where none is.

The ephemeral server that Prefect falls back to keeps only part of its rows, so geofm never uses
it. A server started here lives in ``GEOFM_HOME``, keeps running for the next command, and ends
with ``geofm down``. It asks every client for the home's secret (flows/serve.py). A server counts
as this home's only if its process is the one that this home started and it proves that it knows
the secret; the secret itself is sent to no other server.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment

import httpx

from data_catalog.errors import RunError, UsageError
from data_catalog.storage.process import is_gone, process_mark
from flows import serve
from flows.home import (
    auth_string,
    home,
    home_mark,
    known_auth_string,
    read_note,
    write_note,
)

START_SECONDS = 300.0
STOP_SECONDS = 15.0
LOOPBACK = "127.0.0.1"
#: Variable with the address that a new server listens on; "0.0.0.0" is every interface.
HOST = "GEOFM_SERVER_HOST"


class NoServer(RunError):
    """No Prefect server answers and none could be started."""


@dataclass(frozen=True)
class Server:
    """A Prefect server.

    Attributes:
        ui: Address of its UI.
        pid: Number of its process; 0 when geofm did not start it.
        mark: Tells the process from a later one with the same number; empty where the system has
            no such mark.
        host: Host name or address that it listens on.
        home: Mark of the home that started it.
    """

    ui: str
    pid: int
    mark: str = ""
    host: str = LOOPBACK
    home: str = ""

    @property
    def api(self) -> str:
        """Address of its API."""
        return f"{self.ui}/api"

    @property
    def alive(self) -> bool:
        """Whether its process runs, as far as this machine can tell."""
        return self.mark != "" and process_mark(self.pid) == self.mark


def find_or_launch() -> Server:
    """Return the configured server, the one started before, or a new one that is still starting.

    Raises:
        NoServer: a configured server does not answer, or refuses the credentials.
        UsageError: the running server listens elsewhere, or has no authentication.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    _bypass_proxy(LOOPBACK, "localhost", "::1")
    if configured := configured_server():
        api = configured["PREFECT_API_URL"]
        _check_configured(api)
        return Server(api.removesuffix("/api"), 0)
    with _lock():  # two commands at once start one server
        server = running_server()
        if server is None:
            return launch_server()
        wanted = os.environ.get(HOST)
        if wanted and wanted != server.host:
            raise UsageError(
                f"The Prefect server of {home()} listens on {server.host}, not on {wanted}. "
                "`geofm down` stops it; then give the command again."
            )
        return server


def configured_server() -> dict[str, str]:
    """Return the variables of the server that the user set, from the environment or the profile.

    Returns:
        ``PREFECT_API_URL`` and, if there is one, ``PREFECT_API_AUTH_STRING``. Empty where no
        server is set, and where the variables name this home's own server: ``geofm env`` sets them
        so, and a shell may keep them after the server or its secret is gone.
    """
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
    prefect_home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    try:
        profiles = tomllib.loads((prefect_home / "profiles.toml").read_text())
        active = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        profile = dict(profiles["profiles"][active])
    except (OSError, ValueError, KeyError, TypeError):  # no profile, or a damaged one
        profile = {}
    settings = {**profile, **os.environ}
    found = {name: str(settings[name]) for name in names if settings.get(name)}
    if "PREFECT_API_URL" not in found or _is_own(*(found.get(name, "") for name in names)):
        return {}
    return {**found, "PREFECT_API_URL": found["PREFECT_API_URL"].rstrip("/")}


def _is_own(url: str, secret: str) -> bool:
    """Whether an address and a secret, which may be missing, are those of this home's server.

    A shell can hold an earlier secret of the home. Then the address decides: the home's server
    runs there, or ran there last and no other program has taken the port.
    """
    if secret and secret == known_auth_string():
        return True
    ui = url.rstrip("/").removesuffix("/api").replace("//localhost:", f"//{LOOPBACK}:")
    note = read_note("server.json")
    if ui == note.get("ui"):
        server = _read_server(note)
        if not secret or (server and server.alive):
            return True
    port = read_note("server.port").get("port")
    if type(port) is not int or ui not in (f"http://{LOOPBACK}:{port}", f"http://[::1]:{port}"):
        return False
    return not _is_taken(httpx.URL(ui).host, port)


def _is_taken(host: str, port: int) -> bool:
    """Whether a program listens on a port of this machine."""
    try:
        with socket.create_connection((host, port), timeout=3.0):
            return True
    except (OSError, OverflowError):
        return False


def _check_configured(api: str) -> None:
    """Ask a configured server, as Prefect's own client does: with its credentials and CA."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": 10.0}, sync_client=True) as client,
        ):
            client.hello()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise NoServer(
                f"The Prefect server at {api} refuses the credentials ({status}). Set "
                "PREFECT_API_AUTH_STRING (or PREFECT_API_KEY) to those of that server, or unset "
                "PREFECT_API_URL so that geofm starts a server of its own."
            ) from error
        if status >= 500:
            raise NoServer(f"The Prefect server at {api} fails: {status}.") from error
    except (httpx.HTTPError, OSError) as error:
        raise NoServer(
            f"The Prefect server at {api} does not answer ({error}). Start it, or unset "
            "PREFECT_API_URL so that geofm starts a server of its own."
        ) from error


def running_server() -> Server | None:
    """Return the server that this home started, if it still runs; it may not answer yet.

    A server of this home that knows another secret, because the file was replaced, is stopped.

    Raises:
        UsageError: an earlier version of geofm started the server, without authentication.
    """
    note = read_note("server.json")
    server = _read_server(note)
    if server is None:
        if _is_open_server(note):
            raise UsageError(
                f"The Prefect server at {note['ui']} was started by an earlier version of geofm "
                "and lets everybody in. `geofm down` stops it; then give the command again."
            )
        return None
    if is_gone(server.mark):
        return None
    proven = _proves(server)
    if server.alive and proven is False:
        _stop(server.pid, server.mark)
        return None
    return server if server.alive or proven else None


def launch_server() -> Server:
    """Start a server in the background without waiting for it. The caller holds the home's lock."""
    secret, host = auth_string(), os.environ.get(HOST) or LOOPBACK
    listener = _listen(host)
    port = listener.getsockname()[1]
    name = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104
    ui = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    origins = {ui, f"http://{LOOPBACK}:{port}", f"http://localhost:{port}"}
    if name != host:  # on every interface the machine goes by its own name as well
        origins |= {f"http://{n}:{port}" for n in (socket.gethostname(), socket.getfqdn())}
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_API_URL": f"{ui}/api",
        "PREFECT_API_AUTH_STRING": secret,
        # a relative address works wherever the UI is opened, also through a tunnel
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(sorted(origins)),
        "PREFECT_SERVER_API_BASE_PATH": "/api",
    }
    environment.pop("PREFECT_PROFILE", None)  # the home has no profiles
    with (home() / "server.log").open("ab") as log, listener:
        process = subprocess.Popen(  # noqa: S603
            # by path and with -P: a folder "flows" in the current folder must not be run instead
            [sys.executable, "-P", serve.__file__, "--fd", str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            pass_fds=[listener.fileno()],
        )
    server = Server(ui, process.pid, process_mark(process.pid), host, home_mark())
    write_note("server.json", asdict(server))
    write_note("server.port", {"port": port})
    return server


def wait_for(server: Server) -> None:
    """Wait until a server answers, and point this process and its children at it.

    Raises:
        NoServer: the server ended, another program answers in its place, or time is up.
    """
    if not server.pid:
        os.environ["PREFECT_API_URL"] = server.api
        return
    deadline = time.monotonic() + START_SECONDS
    log = f"its log is {home() / 'server.log'}"
    while not (proven := _proves(server)):
        if proven is False:
            raise NoServer(f"{server.ui} is not the Prefect server of {home()}; {log}")
        if is_gone(server.mark):
            raise NoServer(f"The Prefect server ended while it started; {log}")
        if time.monotonic() > deadline:
            raise NoServer(f"The Prefect server did not start within {START_SECONDS:.0f} s; {log}")
        time.sleep(0.25)
    os.environ["PREFECT_API_URL"] = server.api
    os.environ["PREFECT_API_AUTH_STRING"] = auth_string()
    os.environ["PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"] = "true"
    _bypass_proxy(httpx.URL(server.ui).host)


def client_variables() -> dict[str, str]:
    """Return the variables with which the ``prefect`` command reaches the server.

    Raises:
        NoServer: no server is configured, and none of this home runs.
    """
    if configured := configured_server():
        return configured
    server = running_server()
    if server is None:
        raise NoServer(f"No Prefect server of {home()} runs; `geofm up` starts one.")
    wait_for(server)
    names = ["PREFECT_API_URL", "PREFECT_API_AUTH_STRING"]
    if getproxies_environment():  # a proxy is set: the server's own address must bypass it
        names += ["NO_PROXY", "no_proxy"]
    return {name: os.environ[name] for name in names if name in os.environ}


def stop_server() -> bool:
    """End the server that this home started; False when there is none.

    Raises:
        UsageError: the server runs on another machine or in another container.
    """
    with _lock():
        note = read_note("server.json")
        server = _read_server(note)
        pid, mark = (server.pid, server.mark) if server else (0, "")
        if server is None and _is_open_server(note):
            pid, mark = note["pid"], process_mark(note["pid"])
        elif server and not server.alive:
            if not is_gone(server.mark) and _proves(server) and server.mark:
                raise UsageError(
                    f"The Prefect server at {server.ui} runs on another machine or in another "
                    "container; stop it there."
                )
            pid = pid if not server.mark and _proves(server) else 0
        (home() / "server.json").unlink(missing_ok=True)
        return _stop(pid, mark)


def note_worker(pid: int) -> None:
    """Remember a worker that runs in the background, so that ``stop_worker`` finds it."""
    note = {"pid": pid, "mark": process_mark(pid), "home": home_mark()}
    write_note("worker.pid", note)


def stop_worker() -> bool:
    """End the background worker of this home and what it runs; False when there is none."""
    path = home() / "worker.pid"
    note = read_note("worker.pid")
    if note.get("home") == home_mark():
        pid, mark = note.get("pid"), note.get("mark")
    else:
        pid, mark = _earlier_worker(path), ""
    path.unlink(missing_ok=True)
    if type(pid) is not int or (mark and process_mark(pid) != mark):
        return False
    return _stop(pid, process_mark(pid))


def _read_server(note: dict[str, Any]) -> Server | None:
    """Return the server that a note names; None where it is damaged or another home's."""
    try:
        server = Server(**note)
    except TypeError:
        return None
    texts = (server.ui, server.mark, server.host, server.home)
    if not all(isinstance(text, str) for text in texts) or type(server.pid) is not int:
        return None
    whole = (
        server.pid > 1
        and re.fullmatch(r"http://[\w.:\[\]-]+:[0-9]{1,5}", server.ui)
        and re.fullmatch(r"(\S+/[0-9]+/[0-9]+)?", server.mark)
    )
    return server if whole and server.home == home_mark() else None


def _proves(server: Server) -> bool | None:
    """Whether the program at a server's address knows this home's secret; None without answer."""
    nonce = secrets.token_hex(16)
    try:
        port = httpx.URL(server.ui).port or 80
        with httpx.stream(
            "GET",
            f"{server.api}/health",
            headers={serve.NONCE_HEADER: nonce},
            timeout=3.0,
            trust_env=False,
        ) as answer:
            given = answer.headers.get(serve.PROOF_HEADER, "")
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    expected = serve.proof(auth_string(), port, nonce)
    return hmac.compare_digest(given.encode(), expected.encode())


def _is_open_server(note: dict[str, Any]) -> bool:
    """Whether an earlier version of geofm, without authentication, started the server of a note."""
    if "ui" not in note or "mark" in note:
        return False
    words, variables, folder = _inspect(note.get("pid"))
    prefect_home = variables.get("PREFECT_HOME")
    return (
        {"prefect", "server"} <= words
        and prefect_home is not None
        and (folder / prefect_home).resolve() == (home() / "prefect").resolve()
    )


def _earlier_worker(path: Path) -> int:
    """Return the worker that an earlier version of geofm noted by number alone; 0 for none."""
    try:
        pid = int(path.read_text())
    except (OSError, ValueError):
        return 0
    words, variables, _ = _inspect(pid)
    address = f"{read_note('server.json').get('ui')}/api"
    own = {"prefect", "worker"} <= words and variables.get("PREFECT_API_URL") == address
    return pid if own else 0


def _inspect(pid: Any) -> tuple[set[str], dict[str, str], Path]:
    """Return words, environment and folder of one of the user's processes; empty if unknown."""
    try:
        process = Path(f"/proc/{pid if type(pid) is int and pid > 1 else 'none'}")
        words = (process / "cmdline").read_bytes().split(b"\0")
        lines = (process / "environ").read_bytes().split(b"\0")
        folder = (process / "cwd").readlink()
    except OSError:
        return set(), {}, Path()
    pairs = (os.fsdecode(line).partition("=") for line in lines)
    return {os.fsdecode(word) for word in words}, {name: value for name, _, value in pairs}, folder


def _stop(pid: int, mark: str) -> bool:
    """End a process that leads its group, and the group; after a while it is killed."""
    if pid <= 1:
        return False
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while process_mark(pid) == mark != "":
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                break
            time.sleep(0.1)
    return True


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the home's lock: one command at a time starts or stops the server."""
    with (home() / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _listen(host: str) -> socket.socket:
    """Return a listening socket: on the port used last, else on 4200, else on any free port.

    The socket is opened here and inherited by the server, so that no other program can take the
    port between the choice and the start. The port stays the same where possible, because a
    browser keeps the secret per address and port.
    """
    last = read_note("server.port").get("port")
    failure = OSError()
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UsageError(f"{HOST}={host} is no host name or address: {error}") from error
    for port in (last if type(last) is int and 0 < last < 65536 else 4200, 4200, 0):
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            failure = error
    raise UsageError(
        f"The Prefect server cannot listen on {host}: {failure}. Set {HOST} to an address of this "
        "machine, or unset it."
    ) from failure


def _bypass_proxy(*hosts: str) -> None:
    """Let this process and its children reach hosts without the proxy that is set, if one is."""
    proxies = getproxies_environment()
    if proxies and proxies.get("no") != "*":
        listed = [name for name in proxies.get("no", "").split(",") if name]
        value = ",".join(dict.fromkeys([*listed, *hosts]))
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = value
