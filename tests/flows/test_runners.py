"""The dataset is the same for every runner and number of workers, and after any kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import SMALL, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.long]
Geofm = Callable[..., Outcome]
REFRESH = ("refresh", "demo", *SMALL, "--json")


@pytest.fixture(scope="module")
def dataset(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the dataset that the default runner makes."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *REFRESH], env=environment, text=True,
        cwd=tmp_path_factory.mktemp("reference"), capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    return dataset_of(Outcome(done.returncode, done.stdout, done.stderr))


def dataset_of(done: Outcome) -> str:
    assert done.code == 0, done.stderr[-3000:]
    digest: str = done.json["artifacts"]["pack"]
    return digest


@pytest.mark.parametrize(
    "how",
    [("processes", "2"), ("threads", "1"), ("dask", "2")],
    ids="-".join,
)
def test_runners_and_workers_give_the_same_dataset(
    dataset: str, geofm: Geofm, how: tuple[str, str]
) -> None:
    runner, workers = how
    assert dataset_of(geofm(*REFRESH, "--runner", runner, "--workers", workers)) == dataset


def test_killed_at_random_points_it_ends_with_the_same_dataset(
    dataset: str, geofm: Geofm, environment: dict[str, str], tmp_path: Path
) -> None:
    draw = random.Random(2023)
    command = [sys.executable, "-m", "flows.cli", *REFRESH]
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(draw.uniform(6, 16))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert dataset_of(geofm(*REFRESH)) == dataset
    assert not list((tmp_path / "geofm-store" / "staging").iterdir())
