"""Cache, resume, refresh and the two laws, on a tiny chain of stages."""

from __future__ import annotations

import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_catalog.catalogue import Catalogue
from data_catalog.manifest import ConservationError
from data_catalog.provenance.verify import verify_artifact
from data_catalog.run import (
    find,
    make_job,
    plan_parts,
    run_stage,
    seal,
    with_previous,
    work_parts,
)
from data_catalog.stage import Job, Part, Sealed
from data_catalog.store import Store, open_store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings, computed, square


def test_second_run_finds_everything(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    first = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    again = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert again.digest == first.digest
    assert sorted(computed(store.local_root)) == list(range(6))
    assert [run.metrics.get("cached", False) for run in catalogue.runs()] == [False, False, True]
    assert first.manifest.inputs == {"items": items.digest}


def test_killed_run_computes_only_what_is_missing(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    (store.local_root / "stop-at").write_text("4")
    with pytest.raises(InterruptedError):
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert computed(store.local_root) == [0, 1, 2, 3]
    assert catalogue.runs()[-1].status == "failed"
    (store.local_root / "stop-at").unlink()
    resumed = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert computed(store.local_root) == [0, 1, 2, 3, 4, 5]
    assert not list((store.local_root / "staging").iterdir())
    assert resumed.path("005.txt").read_text() == "25"


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_parts_are_the_same_for_any_number_of_threads(
    store: Store, catalogue: Catalogue, threads: int
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=5))
    whole = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    stage = replace(SQUARES, at_once=threads)
    shutil.rmtree(store.local_root / "parts")
    job = make_job(stage, store, {"items": items}, Settings())
    parts = plan_parts(stage, job)
    assert work_parts(stage, job, parts) == 5
    assert seal(stage, job, parts)[0].digest == whole.digest


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_ends_what_was_begun_and_nothing_more_is(
    store: Store, catalogue: Catalogue, threads: int
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=50))
    begun: list[int] = []
    ended: list[int] = []
    failed = threading.Event()

    def work(job: Job, part: Part, out: Path) -> None:
        number = part.payload["n"]
        begun.append(number)
        try:
            if number > 1:
                failed.wait(1)
            square(job, part, out)
        except InterruptedError:
            failed.set()
            raise
        finally:
            ended.append(number)

    stage = replace(SQUARES, work=work, at_once=threads)
    job = make_job(stage, store, {"items": items}, Settings())
    parts = plan_parts(stage, job)
    (store.local_root / "stop-at").write_text("1")
    with pytest.raises(InterruptedError):
        work_parts(stage, job, parts)
    assert sorted(begun) == sorted(ended)
    assert len(begun) < 50
    if threads == 1:
        assert (begun, computed(store.local_root)) == ([0, 1], [0])
    assert not list((store.local_root / "staging").iterdir())
    (store.local_root / "stop-at").unlink()
    finished = len(computed(store.local_root))
    assert work_parts(stage, job, parts) == 50 - finished
    assert sorted(computed(store.local_root)) == list(range(50))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_threads_share_few_parts(store: Store, catalogue: Catalogue, count: int) -> None:
    """Two large scenes are cut by two threads."""
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=count))
    both = threading.Barrier(2)
    threads: list[int] = []

    def slow(job: Job, part: Part, out: Path) -> None:
        square(job, part, out)
        threads.append(threading.get_ident())
        if len(threads) <= 2:
            both.wait(10)  # no thread goes on before each has written a part

    stage = replace(SQUARES, work=slow, at_once=2)
    job = make_job(stage, store, {"items": items}, Settings())
    assert work_parts(stage, job, plan_parts(stage, job)) == count
    assert len(set(threads[:2])) == 2


def test_an_interruption_stops_the_other_parts(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=50))
    going_on = threading.Event()
    begun: list[int] = []

    def work(job: Job, part: Part, out: Path) -> None:
        begun.append(part.payload["n"])
        assert going_on.wait(10)

    def interrupted(_: object) -> None:
        going_on.set()
        raise KeyboardInterrupt

    monkeypatch.setattr("data_catalog.run.as_completed", interrupted)
    stage = replace(SQUARES, work=work, at_once=2)
    job = make_job(stage, store, {"items": items}, Settings())
    with pytest.raises(KeyboardInterrupt):
        work_parts(stage, job, plan_parts(stage, job))
    assert len(begun) < 50


def test_more_rows_reuse_the_parts_that_did_not_change(store: Store, catalogue: Catalogue) -> None:
    for count in (6, 9):
        items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=count))
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert computed(store.local_root) == list(range(9))


def test_order_and_place_do_not_change_the_digest(
    store: Store, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory
) -> None:
    digests = set()
    for place in (store, open_store(tmp_path_factory.mktemp("other"))):
        items = run_stage(NUMBERS, place, catalogue, {}, Settings())
        job = make_job(SQUARES, place, {"items": items}, Settings(), catalogue="elsewhere")
        parts = plan_parts(SQUARES, job)
        moved = pickle.loads(pickle.dumps(job))
        work_parts(SQUARES, moved, parts[3:][::-1])
        work_parts(SQUARES, moved, parts[:3])
        digests.add(seal(SQUARES, moved, parts)[0].digest)
    assert len(digests) == 1


def test_a_lost_row_is_never_published(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    with pytest.raises(ConservationError, match="6 rows in, but 5 out and 0 dropped"):
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings(lose=1))
    assert [row.kind for row in catalogue.artifacts()] == ["items"]
    assert not (store.local_root / "artifacts" / "chips").exists()


def test_version_settings_and_inputs_make_the_key(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    other = run_stage(NUMBERS, store, catalogue, {}, Settings(count=2))
    job = make_job(SQUARES, store, {"items": items}, Settings(), seed=1)
    assert job.key == make_job(SQUARES, store, {"items": items}, Settings(), seed=2).key
    seeded = replace(SQUARES, seeded=True)
    keys = {
        job.key,
        make_job(replace(SQUARES, version="2"), store, {"items": items}, Settings()).key,
        make_job(SQUARES, store, {"items": other}, Settings()).key,
        make_job(SQUARES, store, {"items": items}, Settings(count=7)).key,
        make_job(seeded, store, {"items": items}, Settings(), seed=1).key,
        make_job(seeded, store, {"items": items}, Settings(), seed=2).key,
    }
    assert len(keys) == 6


def test_a_setting_of_another_stage_in_the_section_changes_nothing(
    store: Store, catalogue: Catalogue
) -> None:
    some = replace(NUMBERS, fields=("count",))
    first = run_stage(some, store, catalogue, {}, Settings())
    job = make_job(some, store, {}, Settings(lose=1))
    assert find(some, job, catalogue) == first
    assert first.manifest.settings == {"count": 6}
    assert make_job(some, store, {}, Settings(count=2)).key != job.key


def test_a_live_stage_asks_again_and_a_wiped_store_is_noticed(
    store: Store, catalogue: Catalogue
) -> None:
    live = replace(NUMBERS, live=True)
    first = run_stage(live, store, catalogue, {}, Settings())
    job = make_job(live, store, {}, Settings())
    assert find(live, job, catalogue) is None
    assert find(NUMBERS, job, catalogue) == first
    first.path("manifest.json").unlink()
    assert find(NUMBERS, job, catalogue) is None


def test_a_damaged_part_is_worked_on_again(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    whole = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    part = next((store.local_root / "parts").rglob("square.txt"))
    part.unlink()
    part.write_text("wrong")  # a new file: the artifact's own hard link keeps its bytes
    shutil.rmtree(store.local_root / "artifacts" / "chips")
    again = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert again.digest == whole.digest
    assert verify_artifact(again) == []
    assert len(computed(store.local_root)) == 7  # six, and the damaged one once more


def test_what_was_sealed_during_an_outage_is_not_served_again(
    store: Store, catalogue: Catalogue
) -> None:
    def half(job: Job, parts: list[Path], out: Path) -> Sealed:
        return Sealed({"rows_in": 2, "rows_out": 1}, {"unreachable": 1}, {"retry": 1})

    away = replace(NUMBERS, seal=half)
    first = run_stage(away, store, catalogue, {}, Settings())
    job = make_job(away, store, {}, Settings())
    assert catalogue.find(job.key) == first
    assert find(away, job, catalogue) is None
    back = run_stage(NUMBERS, store, catalogue, {}, Settings())
    assert back.digest != first.digest
    assert find(NUMBERS, job, catalogue) == back


def test_a_live_stage_is_told_what_it_came_to_last_time(store: Store, catalogue: Catalogue) -> None:
    told: list[str | None] = []
    world: list[str] = []

    def look(job: Job, parts: list[Path], out: Path) -> Sealed:
        told.append(job.previous.digest if job.previous else None)
        (out / "world.txt").write_text(world[-1])
        return Sealed({"rows_in": 1, "rows_out": 1})

    stage = replace(NUMBERS, seal=look, live=True)
    made = []
    for state in ("a", "b", "a"):
        world.append(state)
        made.append(run_stage(stage, store, catalogue, {}, Settings()).digest)
    with pytest.raises(IsADirectoryError):
        run_stage(replace(stage, seal=_fails), store, catalogue, {}, Settings())
    run_stage(stage, store, catalogue, {}, Settings())
    assert made[0] == made[2]
    assert told == [None, made[0], made[1], made[2]], "the newest finished run, not artifact"
    run_stage(stage, store, catalogue, {}, Settings(count=7))
    assert told[-1] is None, "another job"
    shutil.rmtree(store.artifact("items", made[0]).root.path)
    run_stage(stage, store, catalogue, {}, Settings())
    assert told[-1] is None, "it is no longer in the store"


def _fails(job: Job, parts: list[Path], out: Path) -> Sealed:
    raise IsADirectoryError


def test_what_was_made_before_is_not_part_of_the_key(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    job = make_job(NUMBERS, store, {}, Settings())
    assert replace(job, previous=items).key == job.key
    assert with_previous(NUMBERS, job, catalogue).previous is None, "it is not live"
    again = with_previous(replace(NUMBERS, live=True), job, catalogue)
    assert pickle.loads(pickle.dumps(again)).previous.digest == items.digest
