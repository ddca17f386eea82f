from __future__ import annotations

import builtins
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geofm.pretraining.data import Corpus
from geofm.pretraining.loop import WorkerGroup, train
from geofm.pretraining.trackers import TrackerMissing, open_trackers
from tests.geofm.pretraining.conftest import tiny_settings


def test_tensorboard_gets_every_step(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs tensorboard: pip install 'geofm[track]'",
    )
    monkeypatch.setenv("GEOFM_LOGS", str(tmp_path / "logs"))
    (tmp_path / "run").mkdir()
    workers = WorkerGroup(trackers=("tensorboard",))
    trained = train(corpus, tiny_settings(), 3, "cpu", tmp_path / "run", threads=1, workers=workers)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("swin_tiny_patch4_window7_224-")
    read = events.EventAccumulator(str(folder)).Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "mim", "distill", "lr", "grad_norm"}
    told = read.Scalars("loss")
    assert [event.step for event in told] == list(range(10))
    np.testing.assert_allclose([e.value for e in told], trained.history["loss"], rtol=1e-6)


def test_wandb_logs_offline_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs wandb: pip install 'geofm[track]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEOFM_LOGS", str(tmp_path))
    with open_trackers(["wandb"], "a-run", {"alpha": 1.0}) as log:
        for step in range(3):
            log(step, {"loss": 1.0 / (step + 1)})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process writes the file
    while b"loss" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.5)
    content = file.read_bytes()
    assert b"a-run" in content
    assert b"loss" in content


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.endswith(name):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    missing = pytest.raises(TrackerMissing, match=r"pip install 'geofm\[track\]'")
    with missing, open_trackers([name], "run", {}):
        pytest.fail("it was opened")
