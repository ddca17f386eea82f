"""Sequences of nights: nothing is lost, nothing is asked in vain for ever, nothing is invented."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_catalog.artifact import Artifact
from data_catalog.database import items
from data_catalog.database.items import ItemEntry, read_items
from data_catalog.errors import RunError
from data_catalog.provenance.diff import record_of
from tests.geofm.stac.nights_world import (
    ABSENT,
    DOWN,
    HERE,
    WRONG,
    Changing,
    Killed,
    Nights,
    changing_world,
    held,
    killed_after,
    wanted,
)

FAULTS = [ABSENT, DOWN, WRONG]
#: Sequences of up to eight nights.
EXAMPLES = int(os.environ.get("GEOFM_EXAMPLES", "30"))


@pytest.fixture
def world() -> Iterator[Changing]:
    """A world with one scene that stays."""
    with changing_world() as made:
        made.add(0)
        yield made


@pytest.fixture
def nights(world: Changing, tmp_path: Path) -> Nights:
    return Nights(world, tmp_path)


def night(nights: Nights) -> Artifact:
    """A night that must hold what the rules say."""
    nights.world.serve()
    chips = nights.night()
    assert held(chips) == wanted(nights.expect())
    assert waiting(nights, chips) == set().union(*nights.failing.values())
    return chips


def entries(nights: Nights, chips: Artifact) -> dict[str, ItemEntry]:
    assert nights.items is not None
    found = read_items(nights.catalogue, record_of(nights.items, chips))
    return {name: entry for (_, name), entry in found.items()}


def waiting(nights: Nights, chips: Artifact) -> set[str]:
    found = entries(nights, chips).items()
    return {name for name, entry in found if entry.state.is_retried}


def files_asked(nights: Nights) -> set[str]:
    return {path.split("/")[2] for path in nights.world.server.asked if path.startswith("/files")}


@pytest.mark.long
@pytest.mark.parametrize("told", [True, False], ids=["told", "looked at"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_announced_before_it_is_there_is_fetched_when_it_is(
    nights: Nights, fault: str, told: bool
) -> None:
    late = nights.world.add(1, files=fault, told=told)
    chips = night(nights)
    first = entries(nights, chips)[late.name]
    assert (first.state.state, first.tries) == ("out of reach" if fault == DOWN else "waiting", 1)
    again = entries(nights, night(nights))[late.name]
    assert (again.since, again.tries) == (first.since, 2)
    late.files = HERE
    chips = night(nights)
    assert len(held(chips)) == 8
    assert entries(nights, chips)[late.name].state.state == "ok"
    assert "retry" not in chips.manifest.facts
    assert chips.digest == nights.fresh("scratch").digest
    nights.world.server.asked.clear()
    assert night(nights).digest == chips.digest
    assert not files_asked(nights)


@pytest.mark.long
@pytest.mark.parametrize("told", [True, False], ids=["told", "looked at"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_first_night_without_any_file_is_not_the_last_word(
    tmp_path: Path, fault: str, told: bool
) -> None:
    with changing_world() as world:
        nights, late = Nights(world, tmp_path), world.add(1, files=fault, told=told)
        world.serve()
        with pytest.raises(RunError, match=r"1 of 1 items can't be used"):
            nights.night()
        late.files = HERE
        night(nights)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_reprocessed_item_whose_files_come_later_takes_over_then(
    nights: Nights, fault: str
) -> None:
    nights.world.add(1)
    night(nights)
    newer = nights.world.add(1, files=fault)
    chips = night(nights)
    assert {name for name, *_ in held(chips)} == {"p0-b1", "p1-b1"}
    assert entries(nights, chips)["p1-b1"].state.state == "stands in"
    newer.files = HERE
    chips = night(nights)
    assert {name for name, *_ in held(chips)} == {"p0-b1", "p1-b2"}
    assert entries(nights, chips)["p1-b1"].state.state == "superseded"
    assert chips.digest == nights.fresh("scratch").digest


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["updated", "reprocessed", "replaced"])
def test_the_chips_of_the_version_before_stand_in_for_any_number_of_nights(
    nights: Nights, fault: str, way: str
) -> None:
    old = nights.world.add(1)
    before = held(night(nights))
    if way == "updated":
        newer = old
        nights.world.update(old, fault)
    else:
        newer = nights.world.add(1, files=fault)
        old.listed = way == "reprocessed"
        old.files = DOWN  # neither can be read tonight
    for _ in range(3):
        chips = night(nights)
        assert held(chips) == before
        assert chips.manifest.facts["stand_ins" if way != "reprocessed" else "retry"] == 1
    newer.files = HERE
    chips = night(nights)
    assert held(chips) != before
    assert chips.digest == nights.fresh("scratch").digest


def test_a_version_that_is_withdrawn_takes_its_stand_in_with_it(nights: Nights) -> None:
    old = nights.world.add(1)
    night(nights)
    nights.world.update(old, ABSENT)
    assert len(held(night(nights))) == 8
    old.listed = False
    chips = night(nights)
    assert len(held(chips)) == 4
    assert entries(nights, chips)[old.name].state.state == "withdrawn"


def test_a_withdrawn_item_leaves_no_trace_in_the_digests(nights: Nights) -> None:
    nights.world.add(1)
    extra = nights.world.add(2)
    night(nights)
    extra.listed = False
    chips = night(nights)
    assert nights.items is not None
    scratch = Nights(nights.world, nights.folder / "scratch")
    assert scratch.night().digest == chips.digest
    assert scratch.items is not None
    assert scratch.items.digest == nights.items.digest


def test_a_changed_licence_reads_nothing_again(nights: Nights) -> None:
    before = night(nights)
    nights.world.licence = "CC0-1.0"
    nights.world.server.asked.clear()
    chips = night(nights)
    assert not files_asked(nights)
    assert set(chips.table("chips.parquet").licence) == {"CC0-1.0"}
    assert {f.sha256 for f in chips.manifest.files if f.path.endswith(".tar")} == {
        f.sha256 for f in before.manifest.files if f.path.endswith(".tar")
    }
    assert chips.digest == nights.fresh("scratch").digest


@pytest.mark.long
def test_pauses_between_attempts_grow_and_digests_stay(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = nights.world.add(1, files=ABSENT)
    start = items.now()
    digests, asked = set(), []
    for day in range(60):
        monkeypatch.setattr(items, "now", lambda day=day: start + timedelta(days=day))
        if day in (0, 1, 7, 8) or day > 8:
            nights.world.serve()
            nights.world.server.asked.clear()
            digests.add(nights.night().digest)
            if late.name in files_asked(nights):
                asked.append(day)
    assert len(digests) == 1
    pauses = [b - a for a, b in pairwise(asked[3:])]
    assert asked[:4] == [0, 1, 7, 8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 7


def test_a_clock_that_was_ahead_postpones_nothing(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = nights.world.add(1, files=ABSENT)
    now = items.now()
    for days in (0, 300, 600):
        monkeypatch.setattr(items, "now", lambda days=days: now + timedelta(days=days))
        night(nights)
    monkeypatch.setattr(items, "now", lambda: now)
    late.files = HERE
    assert len(held(night(nights))) == 8


def test_an_incomplete_listing_withdraws_nothing(nights: Nights) -> None:
    nights.world.add(1)
    before = night(nights)
    nights.world.api.skips = 2
    assert night(nights).digest == before.digest
    nights.world.api.skips = 10**6
    with pytest.raises(RunError, match=r"1 of 2 items were listed.*search\.check_counts"):
        night(nights)
    nights.world.api.skips = 0
    assert night(nights).digest == before.digest


#: What happens between two nights: to which place, and what.
EVENTS = st.tuples(
    st.sampled_from(
        ["add", "late", "update", "update late", "reprocess", "reprocess late", "replace",
         "replace late", "withdraw", "relist", "cut off", "repair", "cloudy", "licence"]
    ),
    st.integers(1, 3),
    st.sampled_from(FAULTS),
    st.booleans(),
)  # fmt: skip
#: How a night goes; ``killed`` with the number of the write that does not happen.
NIGHTS = st.tuples(
    st.sampled_from(["whole", "whole", "whole", "api down", "skipping", "skipping on", "killed"]),
    st.integers(0, 8),
    st.lists(EVENTS, max_size=3),
)


def happen(world: Changing, event: str, place: int, fault: str, told: bool) -> None:
    here = [item for item in world.items.values() if item.place == place]
    listed = sorted((i for i in here if i.listed), key=lambda item: item.baseline)
    files = fault if event.endswith("late") else HERE
    if event in ("add", "late") or (event.startswith("reprocess") and len(here) < 4):
        if event.startswith("reprocess") or not here:
            world.add(place, files=files, told=told)
    elif event == "licence":
        world.licence = "CC0-1.0" if world.licence == "CC-BY-4.0" else "CC-BY-4.0"
    elif event == "repair":
        for item in here:
            item.files = HERE
    elif event == "relist":
        for item in here:
            item.listed = True
    elif not listed:
        return
    elif event.startswith("update"):
        world.update(listed[-1], files)
    elif event == "withdraw":
        listed[-1].listed = False
    elif event.startswith("replace") and len(here) < 4:
        listed[-1].listed = False
        world.add(place, files=files, told=told)
    elif event == "cut off":
        listed[-1].files = DOWN
    elif event == "cloudy":
        listed[-1].cloud = 80.0 - listed[-1].cloud


def play(history: list[tuple[str, int, list[Any]]], folder: Path) -> None:
    """Play nights, and compare with the rules after each, and with a run from scratch at last."""
    with changing_world() as world:
        world.add(0)
        nights = Nights(world, folder)
        for kind, number, events in history:
            for event in events:
                happen(world, *event)
            world.serve()
            world.api.down = kind == "api down"
            world.api.skips = {"skipping": 1, "skipping on": 10**9}.get(kind, 0)
            if kind in ("api down", "skipping on"):
                with pytest.raises(RunError):
                    nights.night()
                continue
            if kind == "killed":
                with killed_after(number):
                    try:
                        nights.night()
                    except Killed:
                        world.serve()
            chips = night(nights)
            assert night(nights).digest == chips.digest, "the same night again"
        for item in world.items.values():
            item.files = HERE
        world.api.down, world.api.skips = False, 0
        chips = night(nights)
        assert chips.digest == nights.fresh("scratch").digest


@given(st.lists(NIGHTS, min_size=2, max_size=5))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_nights(tmp_path_factory: pytest.TempPathFactory, history: list[Any]) -> None:
    play(history, tmp_path_factory.mktemp("nights"))


@pytest.mark.long
@given(st.lists(NIGHTS, min_size=4, max_size=8))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_random_sequences(
    tmp_path_factory: pytest.TempPathFactory, history: list[Any]
) -> None:
    play(history, tmp_path_factory.mktemp("nights"))
