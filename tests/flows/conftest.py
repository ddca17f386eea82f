"""A standing Prefect server and the command line as a user has it, each once per test session."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_catalog.errors import UsageError
from flows.service import home, serve, server
from tests.flows.homes import Enter
from tests.flows.ui import Ui


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The JSON object on the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


#: What pointing at a server sets in this process.
SET_BY_SERVER = (
    "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED",
    "NO_PROXY", "no_proxy",
)  # fmt: skip


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a user with a home and a cache of their own, and a server that runs."""
    home = tmp_path_factory.mktemp("home")
    mine = {
        "GEOFM_HOME": str(home / "geofm"),
        "GEOFM_CACHE": str(home / "cache"),
        # the same services, looking more often than once a minute
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "5",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # logs say all they can, so that a test can look for the secret in them
        "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG",
    }
    before = {name: os.environ.pop(name, None) for name in (*SET_BY_SERVER, *mine)}
    os.environ.update(mine)
    started = server.find_or_launch()
    server.wait_for(started)
    yield {**os.environ, **mine, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    server.stop_server()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def api(environment: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of the server's API that has what the server asks for."""
    user, _, password = environment["PREFECT_API_AUTH_STRING"].partition(":")
    url = environment["PREFECT_API_URL"]
    with httpx.Client(base_url=url, auth=(user, password), trust_env=False, timeout=60) as client:
        token = client.get("/csrf-token", params={"client": "test"}).raise_for_status().json()
        client.headers["Prefect-Csrf-Client"] = "test"
        client.headers["Prefect-Csrf-Token"] = token["token"]
        yield client


@pytest.fixture
def deployed(environment: dict[str, str], api: httpx.Client) -> Iterator[list[str]]:
    """Deploy the flows; remove what was not there before, because other tests deploy too."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from flows.deployments import deploy_all

    ui = Ui(api)

    def there() -> dict[str, str]:
        paths = {f"/deployments/{one['id']}": name for name, one in ui.deployments().items()}
        automations = ui.post("/automations/filter")
        return paths | {f"/automations/{one['id']}": one["name"] for one in automations}

    before, lines = there(), []
    settings = {
        PREFECT_API_URL: environment["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: environment["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(settings):
        deploy_all(lines.append)
        yield lines
        deploy_all(lines.append)  # an update
    for path in there().keys() - before.keys():
        ui.delete(path)


def files_with_secret(*folders: Path) -> list[str]:
    """Files and command lines that hold the secret of the home, plain or in base64."""
    secret = home.auth_string()
    wanted = [secret.encode(), secret.partition(":")[2].encode()]
    wanted += [base64.b64encode(secret.encode()).rstrip(b"=")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    files += list(Path("/proc").glob("[0-9]*/cmdline"))
    found = []
    for path in files:
        with suppress(OSError):  # a process or a temporary file may be gone by now
            text = path.read_bytes()
            found += [str(path)] if any(w in text for w in wanted) else []
    return [path for path in found if Path(path).name != home.AUTH_FILE]


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Enter]:
    """Make a home the current one; servers of all homes entered are stopped at the end."""
    for name in (*SET_BY_SERVER, "PREFECT_PROFILE", server.HOST, "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-profiles"))
    stand_in = Path(__file__).with_name("stand_in_server.py")
    monkeypatch.setattr(serve, "__file__", str(stand_in))
    monkeypatch.setenv("PYTHONPATH", str(stand_in.parents[2]))
    entered: set[Path] = set()

    def change(name: str) -> Path:
        folder = tmp_path / name
        entered.add(folder)
        monkeypatch.setenv("GEOFM_HOME", str(folder))
        for variable in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            monkeypatch.delenv(variable, raising=False)
        return folder

    yield change
    for folder in entered:
        monkeypatch.setenv("GEOFM_HOME", str(folder))
        with suppress(UsageError):  # a home that a test made unusable
            server.stop_server()


@pytest.fixture
def geofm(environment: dict[str, str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run ``geofm ARGS`` in this process, in an empty folder."""

    def run(*args: str, **more: str) -> Outcome:
        return run_command(args, {**environment, **more}, tmp_path)

    return run


def run_command(args: Sequence[str], environment: dict[str, str], folder: Path) -> Outcome:
    """Run the command line in this process, with an environment and a working directory.

    A process of its own takes five seconds to import what this one has loaded already.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from flows.cli import console, main

    stdout, stderr = io.StringIO(), io.StringIO()
    console._printed.clear()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["geofm", *args])
        server_settings = {
            PREFECT_API_URL: environment["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: environment["PREFECT_API_AUTH_STRING"],
        }
        stack.enter_context(temporary_settings(server_settings))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        code = 0
        try:
            main.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture
def geofm_process(environment: dict[str, str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run ``geofm ARGS`` in a process of its own, in an empty folder."""

    def run(*args: str, timeout_s: float = 600, **more: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *args], cwd=tmp_path, text=True,
            env={**environment, **more}, capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


#: The demo, shrunk: three tiles of the planet (sea, coast, hills), two epochs.
SMALL = (
    "--set", "search.bbox=5.68,45.07,5.79,45.24", "--set", "embed.size_px=64",
    "--set", "pretrain.epochs=2", "--set", "pretrain.warmup_epochs=0",
    "--set", "evaluate.resamples=100", "--set", "evaluate.max_images=160",
)  # fmt: skip
