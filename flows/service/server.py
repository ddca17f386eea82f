"""Find, start and stop the Prefect server.

If the user has configured a server (PREFECT_API_URL), geofm uses it. Otherwise geofm starts one,
which keeps its files in ``GEOFM_HOME``, runs on for the next command, and ends with ``geofm down``.
Prefect's own temporary server is never used, because it loses some of its rows.

A server of the home requires the home's secret in each request (``flows.service.serve``). Before
a command sends the secret, the server must prove that it knows it, and its process must be the one
that the home started. So no other program that listens on the port receives the secret.
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
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import httpx
import urllib3

from data_catalog.errors import RunError, UsageError
from data_catalog.storage.process import is_gone, process_mark
from flows.service import serve
from flows.service.home import (
    auth_string,
    home,
    home_mark,
    known_auth_string,
    read_note,
    write_note,
)

#: Seconds that a server may take to start; seconds from SIGTERM to SIGKILL.
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
        pid: Process id; 0 if geofm did not start the server.
        mark: Text that differs between the process and a later one with the same id; empty if the
            system offers none.
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
    """Return the configured server, the running server of the home, or a new one.

    A new server may still be starting: ``wait_for`` waits for it.

    Raises:
        NoServer: a configured server does not answer, or refuses the credentials.
        UsageError: the running server listens on another address, or has no authentication.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    _bypass_proxy(LOOPBACK, "localhost", "::1")
    if configured := configured_server():
        api = configured["PREFECT_API_URL"]
        _check_configured(api)
        return Server(api.removesuffix("/api"), 0)
    with hold_lock("server.lock"):  # two commands at the same time must start one server, not two
        server = running_server()
        if server is None:
            return launch_server()
        wanted = os.environ.get(HOST)
        if wanted and wanted != server.host:
            raise UsageError(
                f"The Prefect server of {home()} listens on {server.host}, not on {wanted}. "
                "Stop it with `geofm down`, then give the command again."
            )
        return server


def configured_server() -> dict[str, str]:
    """Return the server that the user configured, in the environment or a Prefect profile.

    Returns:
        ``PREFECT_API_URL`` and, if it is set, ``PREFECT_API_AUTH_STRING``. Empty if no server is
        configured. Also empty if the variables name the home's own server: `geofm env` sets them,
        and a shell may keep them after the server or its secret is gone.
    """
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
    prefect_home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    try:
        profiles = tomllib.loads((prefect_home / "profiles.toml").read_text())
        active = os.environ.get("PREFECT_PROFILE") or profiles["active"]
        profile = dict(profiles["profiles"][active])
    except (OSError, ValueError, KeyError, TypeError):  # there is no profile, or it is damaged
        profile = {}
    settings = {**profile, **os.environ}
    given = {name: str(settings[name]) for name in names if settings.get(name)}
    if "PREFECT_API_URL" not in given or _is_own(*(given.get(name, "") for name in names)):
        return {}
    return {**given, "PREFECT_API_URL": given["PREFECT_API_URL"].rstrip("/")}


def _is_own(url: str, secret: str) -> bool:
    """Return whether an address and a secret (may be empty) are those of the home's server.

    A shell may hold an earlier secret of the home. Then the address decides: the home's server
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
    return not _is_taken(urlsplit(ui).hostname or "", port)


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
    """Return the server that the home started, if its process runs; it may still be starting.

    A server that knows another secret, because the file with the secret was replaced, is stopped.

    Raises:
        UsageError: an earlier version of geofm started the server, without authentication.
    """
    note = read_note("server.json")
    server = _read_server(note)
    if server is None:
        if _is_open_server(note):
            raise UsageError(
                f"The Prefect server at {note['ui']} was started by an earlier version of geofm "
                "and requires no password. Stop it with `geofm down`, then give the command again."
            )
        return None
    if is_gone(server.mark):
        return None
    proven = _proves(server)
    if server.alive and proven is False:
        stop_process(server.pid, server.mark)
        return None
    return server if server.alive or proven else None


def launch_server() -> Server:
    """Start a server in the background, and return at once. The caller holds the home's lock."""
    secret, host = auth_string(), os.environ.get(HOST) or LOOPBACK
    listener = listen(host)
    port = listener.getsockname()[1]
    name = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104
    ui = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    origins = {ui, f"http://{LOOPBACK}:{port}", f"http://localhost:{port}"}
    if name != host:  # other machines use this machine's own name
        origins |= {f"http://{n}:{port}" for n in (socket.gethostname(), socket.getfqdn())}
    environment = {
        # Prefect removes runs that ended 90 days ago, each hour. Without it the database grows for
        # ever.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "true",
        **os.environ,
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_API_URL": f"{ui}/api",
        "PREFECT_API_AUTH_STRING": secret,
        # A relative address works at every address of the UI, also through a tunnel.
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(sorted(origins)),
        "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    environment.pop("PREFECT_PROFILE", None)  # the home has no profiles
    with (home() / "server.log").open("ab") as log, listener:
        process = subprocess.Popen(  # noqa: S603
            # The path and -P make sure that no folder "flows" in the current folder is run instead.
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
    return server


def wait_for(server: Server) -> None:
    """Wait until a server answers, and set the variables by which Prefect's client reaches it.

    Raises:
        NoServer: the server ended, another program answers at its address, or it did not start
            within ``START_SECONDS``.
    """
    if not server.pid:
        os.environ["PREFECT_API_URL"] = server.api
        return
    deadline = time.monotonic() + START_SECONDS
    log = f"see its log, {home() / 'server.log'}"
    while not (proven := _proves(server)):
        if proven is False:
            raise NoServer(
                f"The program at {server.ui} is not the Prefect server of {home()}; {log}"
            )
        if is_gone(server.mark):
            raise NoServer(f"The Prefect server ended while it started; {log}")
        if time.monotonic() > deadline:
            raise NoServer(f"The Prefect server did not start within {START_SECONDS:.0f} s; {log}")
        time.sleep(0.25)
    os.environ["PREFECT_API_URL"] = server.api
    os.environ["PREFECT_API_AUTH_STRING"] = auth_string()
    os.environ["PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"] = "true"
    _bypass_proxy(urlsplit(server.ui).hostname or "")


def client_variables() -> dict[str, str]:
    """Return the variables by which the ``prefect`` command reaches the server.

    Raises:
        NoServer: no server is configured, and no server of the home runs.
    """
    if configured := configured_server():
        return configured
    server = running_server()
    if server is None:
        raise NoServer(f"No Prefect server of {home()} runs. Start one with `geofm up`.")
    wait_for(server)
    names = ["PREFECT_API_URL", "PREFECT_API_AUTH_STRING"]
    if getproxies_environment():  # the address of the server must bypass a proxy
        names += ["NO_PROXY", "no_proxy"]
    return {name: os.environ[name] for name in names if name in os.environ}


def stop_server() -> bool:
    """Stop the server that the home started; return False if there is none.

    Raises:
        UsageError: the server runs on another machine or in another container.
    """
    with hold_lock("server.lock"):
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
        return stop_process(pid, mark)


def _read_server(note: dict[str, Any]) -> Server | None:
    """Return the server in a note; None if the note is damaged or from another home."""
    try:
        server = Server(**note)
    except TypeError:
        return None
    texts = (server.ui, server.mark, server.host, server.home)
    if not all(isinstance(text, str) for text in texts) or type(server.pid) is not int:
        return None
    is_valid = (
        server.pid > 1
        and re.fullmatch(r"http://[\w.:\[\]-]+:[0-9]{1,5}", server.ui)
        and re.fullmatch(r"(\S+/[0-9]+/[0-9]+)?", server.mark)
    )
    return server if is_valid and server.home == home_mark() else None


def _proves(server: Server) -> bool | None:
    """Return whether the program at a server's address knows the home's secret; None if silent."""
    nonce = secrets.token_hex(16)
    try:
        port = urlsplit(server.ui).port or 80
        with urllib3.PoolManager() as pool:  # it uses no proxy
            response = pool.request(
                "GET",
                f"{server.api}/health",
                headers={serve.NONCE_HEADER: nonce},
                timeout=3.0,
                retries=False,
                redirect=False,
                preload_content=False,
            )
            given = response.headers.get(serve.PROOF_HEADER, "")
    except (urllib3.exceptions.HTTPError, ValueError):
        return None
    expected = serve.proof(auth_string(), port, nonce)
    return hmac.compare_digest(given.encode(), expected.encode())


def _is_open_server(note: dict[str, Any]) -> bool:
    """Return whether an earlier version of geofm started the server of a note, without password."""
    if "ui" not in note or "mark" in note:
        return False
    words, variables, folder = inspect_process(note.get("pid"))
    prefect_home = variables.get("PREFECT_HOME")
    return (
        {"prefect", "server"} <= words
        and prefect_home is not None
        and (folder / prefect_home).resolve() == (home() / "prefect").resolve()
    )


def inspect_process(pid: Any) -> tuple[set[str], dict[str, str], Path]:
    """Return command line, environment and folder of a process of the user; empty if unknown."""
    try:
        process = Path(f"/proc/{pid if type(pid) is int and pid > 1 else 'none'}")
        words = (process / "cmdline").read_bytes().split(b"\0")
        lines = (process / "environ").read_bytes().split(b"\0")
        folder = (process / "cwd").readlink()
    except OSError:
        return set(), {}, Path()
    pairs = (os.fsdecode(line).partition("=") for line in lines)
    return {os.fsdecode(word) for word in words}, {name: value for name, _, value in pairs}, folder


def stop_process(pid: int, mark: str, seconds: float = STOP_SECONDS) -> bool:
    """End a process with its group, or alone if it leads none; kill it after some seconds."""
    if pid <= 1:
        return False
    with suppress(ProcessLookupError):
        send = os.killpg if os.getpgid(pid) == pid else os.kill
        send(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while process_mark(pid) == mark != "":
            if time.monotonic() > deadline:
                send(pid, signal.SIGKILL)
                break
            time.sleep(0.1)
    return True


@contextmanager
def hold_lock(name: str) -> Iterator[None]:
    """Hold a lock of the home, so that one command at a time starts or stops what it is for.

    Args:
        name: ``server.lock`` or ``worker.lock``.
    """
    with (home() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def listen(
    host: str, note: str = "server.port", first: int = 4200, variable: str = HOST
) -> socket.socket:
    """Return a listening socket: on the last port, or else on the first, or else on any free port.

    The server inherits the socket, so that no other program can take the port between the choice
    and the start. The port stays the same if possible, because browsers keep the password per
    address and port.

    Args:
        host: Host name or address to listen on.
        note: Name of the note with the last port; it is written.
        first: Port if there is none.
        variable: Environment variable that has the host, for messages.

    Raises:
        UsageError: The host is none of this machine's.
    """
    last = read_note(note).get("port")
    failure = OSError()
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UsageError(
            f"{variable}={host} is not a host name or address ({error}); unset it for {LOOPBACK}"
        ) from error
    for port in (last if type(last) is int and 0 < last < 65536 else first, first, 0):
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            failure = error
            continue
        write_note(note, {"port": listener.getsockname()[1]})
        return listener
    raise UsageError(
        f"No server can listen on {host}: {failure}. Set {variable} to an address of this machine, "
        "or unset it."
    ) from failure


def _bypass_proxy(*hosts: str) -> None:
    """Exempt hosts from a proxy that is set, for this process and its children."""
    proxies = getproxies_environment()
    if proxies and proxies.get("no") != "*":
        listed = [name for name in proxies.get("no", "").split(",") if name]
        value = ",".join(dict.fromkeys([*listed, *hosts]))
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = value
