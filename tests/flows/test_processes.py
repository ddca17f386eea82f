"""Workers end with their parent, and a parent survives the death of a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from data_catalog.catalogue import open_catalogue
from data_catalog.storage.process import is_gone, process_mark
from tests.data_catalog.helpers import NO_STORE
from tests.flows.conftest import Outcome
from tests.geofm.stac.small_world import WEST, World, add_scene, identity, serve, texture

pytestmark = pytest.mark.slow
Geofm = Callable[..., Outcome]
#: Seconds within which the children of a killed process have ended.
GONE_S = 5.0


@pytest.fixture
def world() -> Iterator[World]:
    """Four scenes whose first band never arrives: cutting stays where it is."""
    with serve() as served:
        for n in range(4):
            bands = {band: texture(64, 64, n * 10 + b) for b, band in enumerate(("red", "blue"))}
            about = identity(f"31UD{'QRST'[n]}", "04.00", "2020-01-04T00:00:00Z")
            add_scene(served, f"scene{n}", bands, west=WEST + 6400 * n, **about)
        for path in [path for path in served.files if "red" in path]:
            served.raw[path] = lambda connection: time.sleep(120)
        yield served


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> str:
    content = {
        "search": {"stac": world.url},
        "cut": {"size_px": 32, "bands": ["red", "blue"]},
        "embed": {"size_px": 32},
        "curate": {"max_saturated": 1, "threshold": 1},
        "pack": {"name": "small"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def begin(
    recipe: str, environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a refresh with a task runner; its output goes to ``errors.log``."""
    running: list[subprocess.Popen[str]] = []

    def start(runner: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.cli", "refresh", recipe]
        with (tmp_path / "errors.log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--runner", runner, "--workers", "2"], cwd=tmp_path, env=environment,
                text=True, stdout=log, stderr=log,
            )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        for mark in [process_mark(pid) for pid in children(process.pid)]:
            if mark and not is_gone(mark):
                os.kill(int(mark.split("/")[-2]), signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait(30)


def children(pid: int) -> list[int]:
    """A process's children and theirs, but for the Prefect server, which stays on purpose."""
    text = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in text.splitlines()]
    own = [int(r[0]) for r in rows if int(r[1]) == pid and "serve" not in r[-1]]
    return own + [grandchild for child in own for grandchild in children(child)]


def wait_for_work(world: World, process: subprocess.Popen[str], log: Path) -> list[int]:
    """Wait until workers wait for the first band; returns the children."""
    deadline = time.monotonic() + 240
    while not any("red" in path for path in world.asked):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    return children(process.pid)


@pytest.mark.long
@pytest.mark.parametrize("runner", ["processes", "dask"])
def test_no_worker_outlives_its_parent(
    runner: str, world: World, begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = begin(runner)
    marks = [process_mark(p) for p in wait_for_work(world, process, tmp_path / "errors.log")]
    assert len(marks) >= 2
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + GONE_S
    while not all(map(is_gone, marks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [mark for mark in marks if not is_gone(mark)] == []
    # the catalogue shows what happened, and still says that the run goes on: nothing has written
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/geofm-store/catalogue.db", NO_STORE)
    assert [row.status for row in catalogue.runs()] == ["done", "lost"]


@pytest.mark.long
def test_a_killed_worker_ends_the_run_with_a_message(
    world: World, begin: Callable[[str], subprocess.Popen[str]], tmp_path: Path, geofm: Geofm,
    recipe: str,
) -> None:  # fmt: skip
    process = begin("processes")
    log = tmp_path / "errors.log"
    for pid in wait_for_work(world, process, log):
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            break
    assert process.wait(120) == 3
    assert "a worker process ended" in " ".join(log.read_text().split())
    assert "not foreseen" not in log.read_text()
    world.raw.clear()
    again = geofm("refresh", recipe, "--runner", "processes", "--json")
    assert again.code == 0, again.stderr[-3000:]
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/geofm-store/catalogue.db", NO_STORE)
    assert "failed" in [row.status for row in catalogue.runs()]
    assert not list((tmp_path / "geofm-store" / "staging").iterdir())
