"""Training in two processes (gloo, CPU) compared with one process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_catalog.artifact import Artifact
from data_catalog.errors import RunError, UsageError
from data_catalog.progress import listen
from data_catalog.run import make_job, seal
from data_catalog.store import open_store
from geofm.pretraining import load_model
from geofm.pretraining.checkpoint import CHECKPOINT_FILE
from geofm.pretraining.data import open_corpus
from geofm.pretraining.launch import WorkersFailed, _worker_error, choose_workers, train_in_workers
from geofm.pretraining.loop import TrainingResult, WorkerGroup, check_microbatches, train
from geofm.pretraining.pretrain import STAGE
from tests.geofm.pretraining.conftest import child_of, tiny_settings

pytestmark = pytest.mark.slow


def train_single(dataset: Artifact, folder: Path, **fields: object) -> TrainingResult:
    folder.mkdir(exist_ok=True)
    return train(open_corpus(dataset), tiny_settings(**fields), 3, "cpu", folder, threads=1)


def train_double(
    dataset: Artifact, folder: Path, parallel: str = "ddp", **fields: object
) -> TrainingResult:
    folder.mkdir(exist_ok=True)
    workers = WorkerGroup(2, parallel)  # type: ignore[arg-type]
    return train_in_workers(dataset, tiny_settings(**fields), 3, "cpu", folder, workers)


def assert_close(one: TrainingResult, two: TrainingResult) -> None:
    for column in ("loss", "mim", "distill", "grad_norm"):
        np.testing.assert_allclose(two.history[column], one.history[column], rtol=0, atol=1e-5)
    state = two.module.state_dict()
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def one(dataset: Artifact, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Train 50 steps in one process."""
    torch.set_num_threads(1)
    return train_single(dataset, tmp_path_factory.mktemp("one"), epochs=10)


def test_two_processes_follow_one_for_50_steps(
    one: TrainingResult, dataset: Artifact, tmp_path: Path
) -> None:
    two = train_double(dataset, tmp_path / "two", epochs=10)
    assert len(one.history) == 50
    assert_close(one, two)
    assert two.metrics["processes"] == 2
    assert not np.array_equal(
        one.history["loss"], two.history["loss"]
    )  # the sums have other summands


CHILD = """
import sys
from pathlib import Path
from data_catalog.artifact import Artifact
from data_catalog.progress import listen
from geofm.pretraining.launch import train_in_workers
from geofm.pretraining.loop import WorkerGroup
from tests.geofm.pretraining.conftest import tiny_settings

url, folder = sys.argv[1:]
with listen(lambda what, done, total, note: print(done, flush=True)):
    train_in_workers(
        # the only checkpoint is that of workers whose parent has ended
        Artifact(url),
        tiny_settings(epochs=10, checkpoint_steps=1000),
        3,
        "cpu",
        Path(folder),
        WorkerGroup(2, "fsdp"),
    )
"""


@pytest.mark.long
def test_shards_of_a_killed_run_go_on_in_one_process(
    one: TrainingResult, dataset: Artifact, tmp_path: Path
) -> None:
    with child_of(CHILD, dataset, tmp_path) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 8:
                child.kill()
                break
    # the workers notice that their parent has ended, write a checkpoint and end
    step, deadline = -1, time.monotonic() + 60
    while step < 0 and time.monotonic() < deadline:
        time.sleep(1)
        if (tmp_path / CHECKPOINT_FILE).exists():
            step = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)["step"]
    assert 8 <= step < 50, step
    assert_close(one, train_single(dataset, tmp_path, epochs=10))


@pytest.mark.long
def test_one_process_goes_on_as_two_with_shards(dataset: Artifact, tmp_path: Path) -> None:
    fields = {"ema": 0.9, "mim_weight": 0, "checkpoint_steps": 3}
    straight = train_single(dataset, tmp_path / "straight", **fields)

    def stop(what: str, done: int, total: int, note: str) -> None:
        if done == 5:
            raise InterruptedError

    with listen(stop), pytest.raises(InterruptedError):
        train_single(dataset, tmp_path / "run", **fields)
    steps: list[int] = []
    with listen(lambda what, done, total, note: steps.append(done)):
        resumed = train_double(dataset, tmp_path / "run", "fsdp", **fields, microbatch=1)
    assert steps[0] == 4
    np.testing.assert_allclose(resumed.history["loss"], straight.history["loss"], rtol=0, atol=1e-5)
    state = resumed.module.state_dict()
    for name, value in straight.module.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.long
def test_parts_that_never_learn_and_pieces_of_a_batch(dataset: Artifact, tmp_path: Path) -> None:
    fields = {"mim_weight": 0, "microbatch": 1, "ema": 0.9}
    first = train_single(dataset, tmp_path / "one", mim_weight=0, ema=0.9)
    second = train_double(dataset, tmp_path / "two", **fields)
    np.testing.assert_allclose(second.history["loss"], first.history["loss"], rtol=0, atol=1e-5)
    state = second.module.state_dict()
    for name, value in first.module.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4)


@pytest.mark.long
def test_the_stage_seals_what_two_processes_trained(
    dataset: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = open_store(tmp_path / "store")
    catalogue = f"sqlite:///{tmp_path}/catalogue.db"
    settings = tiny_settings(teacher_features="once")
    job = make_job(STAGE, store, {"dataset": dataset}, settings, 3, "cpu", catalogue)
    sealed, metrics = seal(STAGE, replace(job, how={"processes": 2, "trackers": []}), [])
    facts = sealed.manifest.facts
    assert facts["arithmetic"] == "cpu, 1 threads, in each of 2 processes"
    assert facts["teacher_features"] == "one pass over whole chips"
    assert metrics["processes"] == 2
    model, _ = load_model(sealed)
    alone, _ = seal(STAGE, replace(job, store=open_store(tmp_path / "other")), [])
    for (name, one), two in zip(
        model.state_dict().items(), load_model(alone)[0].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4, msg=name)


@pytest.mark.long
def test_what_goes_wrong_in_a_process_is_said_in_its_words(
    dataset: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"the loss is .* lower pretrain\.base_lr"):
        train_double(dataset, tmp_path / "run", base_lr=1e38, warmup_epochs=0)


def test_an_unexpected_error_is_found_in_the_log(tmp_path: Path) -> None:
    lines = (
        "[rank1]: RuntimeError: [gloo/pair.cc:537] Connection closed by peer [127.0.0.1]:1",
        "[rank0]: Traceback (most recent call last):",
        "[rank0]: zipfile.BadZipFile: bad",
        "[rank0]: OverflowError: a number too large",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    )
    (tmp_path / "log").write_text("\n".join(lines))
    error = _worker_error(tmp_path, False)
    assert isinstance(error, WorkersFailed)
    assert "(OverflowError: a number too large)" in str(error)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert choose_workers({}, "cpu") == WorkerGroup()
    assert choose_workers({"processes": 2, "parallel": "fsdp"}, "cpu") == WorkerGroup(2, "fsdp")
    for fields, processes in (({"batch": 5}, 2), ({"batch": 12, "microbatch": 4}, 2)):
        with pytest.raises(UsageError, match=r"pretrain\.batch \d+ does not divide among"):
            check_microbatches(torch.nn.Linear(1, 1), tiny_settings(**fields), processes)
    normed = torch.nn.BatchNorm2d(3)
    check_microbatches(normed, tiny_settings(batch=4, microbatch=8), 1)
    for fields, processes in (({"batch": 4}, 2), ({"batch": 4, "microbatch": 2}, 1)):
        with pytest.raises(UsageError, match="has batch normalisation"):
            check_microbatches(normed, tiny_settings(**fields), processes)
    gpus = torch.cuda.device_count()
    with pytest.raises(UsageError, match=f"there are {gpus} GPUs here"):
        choose_workers({"processes": gpus + 1}, "cuda")
