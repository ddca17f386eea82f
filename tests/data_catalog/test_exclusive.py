"""One process at a time runs a job that keeps state; what it kept is never another's to delete."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.lease import LeaseHeld, LeaseLost
from data_catalog.database.schema import LeaseRow
from data_catalog.progress import listen
from data_catalog.run import attempt, make_job, run_stage
from data_catalog.stage import Job, NotExclusive, Sealed, Stage, no_parts, no_work
from data_catalog.storage.lock import Locked
from data_catalog.store import Store, open_store
from tests.data_catalog.helpers import NO_STORE, NUMBERS, Settings

STEPS = 8


def train(job: Job, parts: list[Path], out: Path) -> Sealed:
    """Count to eight with a checkpoint after each step, as slowly as the store's ``slow`` says."""
    checkpoint, log = job.scratch / "checkpoint", job.store.local_root / "steps.log"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, STEPS):
        with log.open("a") as file:
            file.write(f"{step}\n")
        checkpoint.write_text(str(step + 1))
        slow = job.store.local_root / "slow"
        time.sleep(float(slow.read_text()) if slow.exists() else 0)
    (out / "weights").write_text("trained")
    return Sealed({"rows_in": 0, "rows_out": 0})


TRAIN = Stage("pretrain", "1", "model", (), (), no_parts, no_work, train, exclusive=True)

RUNNER = """
import sys
from data_catalog.catalogue import open_catalogue
from data_catalog.progress import listen
from data_catalog.run import run_stage
from data_catalog.store import open_store
from tests.data_catalog.helpers import Settings
from tests.data_catalog.test_exclusive import TRAIN
root, url = sys.argv[1:]
with listen(lambda what, done, total, note: print(what, note, flush=True)):
    store = open_store(root)
    print(run_stage(TRAIN, store, open_catalogue(url, store), {}, Settings()).digest)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(store: Store, catalogue: Catalogue) -> Iterator[Start]:
    """Start a process that runs the job; what is left of them ends with the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(url: str = catalogue.url) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUNNER, store.url, url]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def steps(store: Store) -> list[int]:
    log = store.local_root / "steps.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def wait_for_step(store: Store, step: int) -> None:
    deadline = time.monotonic() + 60
    while step not in steps(store):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_that_come_to_one_job_train_once(
    store: Store, catalogue: Catalogue, start: Start
) -> None:
    (store.local_root / "slow").write_text("0.5")
    both = [start(), start()]
    ends = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ends[0][-1] == ends[1][-1]  # the same model
    assert steps(store) == list(range(STEPS))
    told = [" ".join(words) for words in ends]
    assert sum("waiting pretrain job" in one for one in told) == 1
    assert sum(f"is being run by process {both[0].pid}" in one for one in told) <= 1
    runs = catalogue.runs()
    assert [row.status for row in runs] == ["done", "done"]
    assert sorted(bool(row.metrics.get("cached")) for row in runs) == [False, True]
    # the one that waited has not counted its waiting as its own time
    assert min(row.seconds or 0 for row in runs) < 1


def test_after_a_kill_the_next_goes_on_from_the_checkpoint(
    store: Store, catalogue: Catalogue, start: Start
) -> None:
    (store.local_root / "slow").write_text("0.3")
    first = start()
    wait_for_step(store, 2)
    second = start()  # waits
    time.sleep(0.3)
    with pytest.raises(LeaseHeld, match=rf"'pretrain job \w+' is being run by process {first.pid}"):
        no_wait(store, catalogue)
    first.kill()
    first.wait(30)
    second.communicate(timeout=120)
    assert second.returncode == 0
    done = steps(store)
    assert sorted(set(done)) == list(range(STEPS))
    assert len(done) <= STEPS + 1  # at most the step that was killed is repeated


def no_wait(store: Store, catalogue: Catalogue) -> None:
    job = make_job(TRAIN, store, {}, Settings(), catalogue=catalogue.url)
    with attempt(TRAIN, job, catalogue, wait=False):
        raise AssertionError("this process must not run the job")


def test_another_catalogue_does_not_open_the_folder(
    store: Store, tmp_path: Path, start: Start
) -> None:
    (store.local_root / "slow").write_text("0.3")
    first = start()
    wait_for_step(store, 1)
    with pytest.raises(Locked, match=rf"is in use by process {first.pid} on .*; run again"):
        no_wait(store, open_catalogue(f"sqlite:///{tmp_path}/another.db", store))
    second = start(f"sqlite:///{tmp_path}/another.db")
    first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0)
    assert steps(store) == list(range(STEPS))  # the second found the last checkpoint


def test_hosts_with_one_catalogue_and_stores_of_their_own_take_turns(
    postgres_url: str, tmp_path: Path
) -> None:
    """As with a bucket: the artifacts are shared, the scratch folders are each host's own."""
    inside: list[int] = []
    most: list[int] = []

    def host(name: str, catalogue: Catalogue) -> None:
        store = open_store(tmp_path / name)
        job = make_job(TRAIN, store, {}, Settings(count=99))
        with attempt(TRAIN, job, catalogue):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()

    threads = [
        threading.Thread(target=host, args=(name, open_catalogue(postgres_url, NO_STORE)))
        for name in ("one", "two", "three")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1, 1, 1]


def test_a_run_whose_lease_was_taken_records_nothing(store: Store, catalogue: Catalogue) -> None:
    def seal_after_a_long_sleep(job: Job, parts: list[Path], out: Path) -> Sealed:
        with catalogue.session() as session:
            session.query(LeaseRow).update({"holder": "another"})
        return train(job, parts, out)

    stage = Stage("pretrain", "1", "model", (), (), no_parts, no_work, seal_after_a_long_sleep,
                  exclusive=True)  # fmt: skip
    with pytest.raises(LeaseLost, match="another run has taken over 'pretrain job"):
        run_stage(stage, store, catalogue, {}, Settings())
    assert catalogue.artifacts() == []
    assert [row.status for row in catalogue.runs()] == ["failed"]


def test_a_stage_that_is_not_exclusive_has_no_scratch_folder_and_no_lease(
    store: Store, catalogue: Catalogue
) -> None:
    seen: list[str] = []
    with listen(lambda what, done, total, note: seen.append(what)):
        run_stage(NUMBERS, store, catalogue, {}, Settings())
        run_stage(NUMBERS, store, catalogue, {}, Settings())
    assert "waiting" not in seen
    job = make_job(NUMBERS, store, {}, Settings())
    with pytest.raises(NotExclusive, match=r"stage search keeps state .* Stage\.exclusive"):
        assert job.scratch
