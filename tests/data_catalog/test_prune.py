"""A pruned store has what its kept versions need, and nothing that they do not."""

from __future__ import annotations

import json
import os
import time

import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.lease import LeaseHeld
from data_catalog.errors import UsageError
from data_catalog.prune import RunsNow, plan_prune, prune
from data_catalog.run import make_job, plan_parts, run_stage, work_parts
from data_catalog.store import Store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings, computed


def night(store: Store, catalogue: Catalogue, number: int) -> Artifact:
    """A refresh that lists one number more, and publishes a version."""
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=3 + number))
    chips = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    newest = catalogue.newest("squares")
    catalogue.publish("squares", chips, f"night{number}", None, newest.number if newest else 0)
    return chips


def folders(store: Store) -> tuple[int, int]:
    """Artifacts and parts in a store."""
    root = store.local_root
    return len(list(root.glob("artifacts/*/*"))), len(list(root.glob("parts/*/*")))


def prune_all(store: Store, catalogue: Catalogue, keep: int = 1):
    return prune(store, catalogue, keep, {"report"})


def test_only_what_kept_versions_need_stays(store: Store, catalogue: Catalogue) -> None:
    made = [night(store, catalogue, number) for number in range(4)]
    assert folders(store) == (8, 6)
    planned = plan_prune(store, catalogue, 2, {"report"})
    assert (len(planned.artifacts), len(planned.parts)) == (4, 0)
    assert planned.size > 0
    assert folders(store) == (8, 6), "a plan removes nothing"
    prune_all(store, catalogue, 2)
    assert folders(store) == (4, 6)
    for chips in made[2:]:
        assert store.has(chips)
        assert chips.manifest.files
    # what is gone is still known, and is made again by the same run, from the parts that stayed
    assert not store.has(made[0])
    assert len(catalogue.artifacts()) == 8
    before = len(computed(store.local_root))
    assert night_again(store, catalogue).digest == made[0].digest
    assert len(computed(store.local_root)) == before


def night_again(store: Store, catalogue: Catalogue) -> Artifact:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=3))
    return run_stage(SQUARES, store, catalogue, {"items": items}, Settings())


def test_parts_that_no_kept_version_has_go(store: Store, catalogue: Catalogue) -> None:
    night(store, catalogue, 5)  # 0 to 7
    fewer = run_stage(NUMBERS, store, catalogue, {}, Settings(count=2))
    chips = run_stage(SQUARES, store, catalogue, {"items": fewer}, Settings())
    newest = catalogue.newest("squares")
    assert newest is not None
    catalogue.publish("squares", chips, "fewer", None, newest.number)
    found = prune_all(store, catalogue)
    assert folders(store) == (2, 2)
    assert len(found.parts) == 6
    assert json.loads(fewer.path("numbers.json").read_bytes()) == [0, 1]
    assert plan_prune(store, catalogue, 1, set()).size == 0


def test_thirty_nights_take_the_space_of_one(store: Store, catalogue: Catalogue) -> None:
    sizes = []
    for number in range(30):
        night(store, catalogue, number % 2)
        prune_all(store, catalogue)
        sizes.append(sum(path.stat().st_size for path in store.local_root.rglob("*.txt")))
    assert len(set(sizes[2:])) <= 2


def test_a_run_that_did_not_end_keeps_its_parts_for_a_week(
    store: Store, catalogue: Catalogue
) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=4))
    job = make_job(SQUARES, store, {"items": items}, Settings())
    work_parts(SQUARES, job, plan_parts(SQUARES, job)[:2])
    scratch = store.scratch(job.key)
    (scratch / "checkpoint.pt").write_bytes(b"state")
    other = night(store, catalogue, 0)
    prune_all(store, catalogue)
    assert (scratch / "checkpoint.pt").exists()
    assert store.has(other)
    before = len(computed(store.local_root))
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=4))
    run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    assert computed(store.local_root)[before:] == [3]  # 0 to 2 had been computed

    stale = store.scratch("0" * 64)
    old = time.time() - 8 * 86_400
    os.utime(stale, (old, old))
    prune_all(store, catalogue)
    assert not stale.exists()


def test_nothing_is_removed_beside_a_run(store: Store, catalogue: Catalogue) -> None:
    night(store, catalogue, 0)
    with catalogue.run("cut", "k"), pytest.raises(RunsNow, match="stage cut is running"):
        prune_all(store, catalogue)
    with catalogue.lease("squares"), pytest.raises(LeaseHeld):
        prune_all(store, catalogue)
    with pytest.raises(UsageError, match="keep at least 1"):
        plan_prune(store, catalogue, 0, set())


def test_what_another_catalogue_recorded_is_left_alone(store: Store, catalogue: Catalogue) -> None:
    night(store, catalogue, 0)
    stranger = store.local_root / "artifacts" / "chips" / ("f" * 64)
    stranger.mkdir(parents=True)
    (stranger / "manifest.json").write_text("{}")
    prune_all(store, catalogue)
    assert (stranger / "manifest.json").exists()
