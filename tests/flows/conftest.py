"""A standing Prefect server and the command line as a user has it, each once per test session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows import server


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


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a user with a home and a cache of their own, and a server that runs."""
    home = tmp_path_factory.mktemp("home")
    mine = {
        "GEOFM_HOME": str(home / "geofm"),
        "GEOFM_CACHE": str(home / "cache"),
        # the same services, looking more often than once a minute
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    before = {name: os.environ.pop(name, None) for name in ("PREFECT_API_URL", *mine)}
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
def geofm(environment: dict[str, str], tmp_path: Path) -> Callable[..., Outcome]:
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
