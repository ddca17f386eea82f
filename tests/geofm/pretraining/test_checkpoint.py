"""A checkpoint that a process is writing is not deleted by others."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import torch

from data_catalog.storage.atomic import atomic_file
from geofm.pretraining.checkpoint import (
    CHECKPOINT_FILE,
    TrainingProgress,
    load_checkpoint,
    save_checkpoint,
)


def _write_half(folder: str, ready, go) -> None:
    with atomic_file(Path(folder) / CHECKPOINT_FILE, sync=True, lock=True) as file:
        torch.save({"identity": "job", "step": 7}, file)
        ready.set()
        go.wait(60)


def test_loading_leaves_a_file_that_another_process_is_writing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_write_half, args=(str(tmp_path), ready, go))
    process.start()
    assert ready.wait(120)
    time.sleep(2.1)  # the file is old now, so only its lock protects it
    assert load_checkpoint(tmp_path, "job") is None
    save_checkpoint(tmp_path, "job", {}, TrainingProgress(step=3))
    assert load_checkpoint(tmp_path, "job")["step"] == 3
    go.set()
    process.join(60)
    assert process.exitcode == 0
    assert load_checkpoint(tmp_path, "job")["step"] == 7
    assert list(tmp_path.iterdir()) == [tmp_path / CHECKPOINT_FILE]


def test_loading_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_write_half, args=(str(tmp_path), ready, go))
    process.start()
    assert ready.wait(120)
    process.kill()
    process.join(60)
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(2.1)
    assert load_checkpoint(tmp_path, "job") is None
    assert list(tmp_path.iterdir()) == []
