"""A training that was stopped goes on with its dataset, whatever the catalogue lists by then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import SMALL, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.long]

#: A corner of the planet, and a part of it.
AREA = (*SMALL, "--set", "search.bbox=5.70,45.07,5.76,45.10")
FEWER = (*SMALL, "--set", "search.bbox=5.70,45.07,5.76,45.085")
TRAINING = (
    *AREA, "--set", "pretrain.epochs=20", "--set", "pretrain.checkpoint_steps=1",
    "--set", "pretrain.batch=4",
)  # fmt: skip
ENDS_WITHIN_S = 30


def test_a_stopped_training_goes_on_with_its_dataset(
    geofm: Callable[..., Outcome], environment: dict[str, str], tmp_path: Path
) -> None:
    store = ("--store", str(tmp_path / "store"))
    first = geofm("refresh", "demo", *FEWER, *store, "--json").json
    ref = first["version"]["ref"]
    command = [
        sys.executable, "-m", "flows.cli", "--verbose", "run", "demo", *TRAINING, "--dataset", ref,
        *store, "--json",
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        deadline = time.monotonic() + 300
        while not list((tmp_path / "store").rglob("checkpoint*")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS_WITHIN_S) == 130, log.read_text()[-3000:]
    assert "give the same command again" in log.read_text()

    # the catalogue lists more by now, and a refresh publishes it
    second = geofm("refresh", "demo", *AREA, *store, "--json").json
    assert second["version"]["new"]
    assert second["version"]["digest"] != first["version"]["digest"]

    done = subprocess.run(
        command, env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pretrain: resuming after step" in done.stderr
    assert first["version"]["digest"] in done.stdout
    assert second["version"]["digest"] not in done.stdout
