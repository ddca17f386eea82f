from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.recipe import SearchSettings
from geofm.stac.canonical_item import CanonicalItem
from geofm.stac.incremental import items_of_rows
from geofm.stac.search import STAGE, list_catalogue
from geofm.stac.validate_items import validate_items
from tests.geofm.stac.filter_api import FILTER, QUERY, Api, an_item
from tests.geofm.stac.small_world import identity

S2 = "sentinel-2-test"


@pytest.fixture
def api(running: Api) -> Api:
    """An API with one collection and three items of different days."""
    running.__dict__.update(Api(url=running.url).__dict__)
    running.collections = [{"id": S2, "license": "CC-BY-4.0"}]
    running.items = [
        scene(f"i{n}", f"2024-01-0{n + 1}T00:00:00.000Z", tile=f"T{n}") for n in range(3)
    ]
    return running


def scene(
    name: str, updated: str | None, tile: str = "T", version: str = "05.00", **more: Any
) -> dict[str, Any]:
    when = {} if updated is None else {"updated": updated}
    made = f"20{version[:2]}-01-01T00:00:00Z"
    return an_item(name, collection=S2, **identity(tile, version, made), **when, **more)


@pytest.fixture
def refresh(api: Api, store: Store, catalogue: Catalogue) -> Any:
    def once(**more: Any) -> tuple[Artifact, dict[str, Any]]:
        search_settings = SearchSettings.model_validate({"stac": api.url, **more})
        made = run_stage(STAGE, store, catalogue, {}, search_settings)
        return made, catalogue.runs()[-1].metrics

    return once


def verdicts(items: Artifact) -> dict[str, str]:
    frame = items.table("items.parquet", ["item_id", "status", "reason"])
    return {row.item_id: row.reason or row.status for row in frame.itertuples()}


def test_an_unchanged_world_is_asked_little_and_gives_the_same(api: Api, refresh: Any) -> None:
    first, asked = refresh()
    assert asked["asked"] == "whole"
    before = len(api.asked)
    again, asked = refresh()
    assert again.digest == first.digest
    assert asked["asked"] == "updated"
    assert asked["requests"] == 6  # root twice, collections, and three searches of its collection
    assert len(api.asked) - before == 3


@pytest.mark.parametrize("conforms", [FILTER, QUERY])
def test_only_what_is_new_is_sent(api: Api, refresh: Any, conforms: list[str]) -> None:
    api.conforms = conforms
    api.items = [
        scene(f"i{n}", f"2024-{n // 28 + 1:02}-{n % 28 + 1:02}T00:00:00Z", tile=f"T{n}")
        for n in range(250)
    ]
    refresh()
    api.items.append(scene("new", "2025-02-01T00:00:00Z"))
    api.items[7] = scene("i7", "2025-02-01T00:00:00Z", tile="T7", gsd=10)
    before = len(api.asked)
    items, asked = refresh()
    assert asked["asked"] == "updated"
    assert len(api.asked) - before == 3
    assert len(api.answer(api.asked[-2])[1]["features"]) == 4, "two are new, two within a day"
    assert items.manifest.counts == {"rows_in": 251, "rows_out": 251}
    assert '"gsd":10' in items.table("items.parquet").set_index("item_id").item_json["i7"]


def test_a_withdrawn_item_leaves_the_table_and_comes_back(api: Api, refresh: Any) -> None:
    first, _ = refresh()
    gone = api.items.pop(1)
    without, asked = refresh()
    assert asked["asked"] == "whole"
    assert verdicts(without) == {"i0": "ok", "i2": "ok"}
    assert refresh()[0].digest == without.digest
    assert refresh()[1]["asked"] == "updated"
    api.items.append(gone)
    assert refresh()[0].digest == first.digest
    api.items.remove(gone)
    assert refresh()[0].digest == without.digest, "what counts is the newest run, not artifact"


def test_a_catalogue_that_loses_most_of_its_items_is_not_believed(api: Api, refresh: Any) -> None:
    first, _ = refresh()
    lost = [api.items.pop() for _ in range(2)]
    with pytest.raises(RunError, match=r"2 of 3 items .* are gone; .* search\.max_withdrawn"):
        refresh()
    api.items += lost
    assert refresh()[0].digest == first.digest


def test_when_the_newer_version_is_withdrawn_the_older_one_is_back(api: Api, refresh: Any) -> None:
    api.items.append(scene("better", "2024-02-01T00:00:00Z", tile="T0", version="06.00"))
    assert verdicts(refresh()[0])["i0"] == "reprocessed"
    api.items.pop()
    found = verdicts(refresh()[0])
    assert found == {"i0": "ok", "i1": "ok", "i2": "ok"}


@pytest.mark.parametrize(
    "change", [{"counts": False}, {"conforms": []}], ids=["no numberMatched", "no filter"]
)
def test_servers_that_cannot_say_are_listed_whole(
    api: Api, refresh: Any, change: dict[str, Any]
) -> None:
    api.__dict__.update(change)
    first, _ = refresh()
    again, asked = refresh()
    assert (again.digest, asked["asked"]) == (first.digest, "whole")


def test_items_without_an_updated_time_are_listed_whole(api: Api, refresh: Any) -> None:
    api.items.append(scene("timeless", None, tile="T9"))
    refresh()
    assert refresh()[1]["asked"] == "whole"


@pytest.mark.parametrize("when", ["2999-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "soon"])
def test_times_that_say_nothing_are_not_relied_on(api: Api, refresh: Any, when: str) -> None:
    api.items.append(scene("odd", when, tile="T9"))
    refresh()
    api.items[0] = scene("i0", "2024-03-01T00:00:00Z", tile="T0", gsd=10)
    items, asked = refresh()
    assert asked["asked"] == "whole"
    assert '"gsd":10' in items.table("items.parquet").set_index("item_id").item_json["i0"]


def test_too_many_items_are_too_many_either_way(api: Api, refresh: Any) -> None:
    refresh(max_items=3)
    api.items.append(scene("i3", "2024-02-01T00:00:00Z", tile="T3"))
    with pytest.raises(UsageError, match=r"search\.max_items = 3"):
        refresh(max_items=3)


def test_the_watermark_can_be_switched_off(api: Api, refresh: Any) -> None:
    refresh(watermark=False)
    assert refresh(watermark=False)[1]["asked"] == "whole"


def test_one_timeless_item_that_takes_the_place_of_another_is_noticed(
    api: Api, refresh: Any
) -> None:
    refresh()
    api.items[0] = scene("timeless", None, tile="T9")
    assert verdicts(refresh()[0]) == {"i1": "ok", "i2": "ok", "timeless": "ok"}


def test_an_update_within_the_newest_second_is_seen(api: Api, refresh: Any) -> None:
    refresh()
    same = api.items[2]["properties"]["updated"]
    api.items[2] = scene("i2", same, tile="T2", gsd=10)
    api.items.append(scene("i3", same, tile="T3"))
    items, asked = refresh()
    assert asked["asked"] == "updated"
    assert items.table("items.parquet").item_json.str.contains('"gsd":10').sum() == 1
    assert verdicts(items)["i3"] == "ok"


def test_quarantined_items_are_remembered_as_they_are(api: Api, refresh: Any) -> None:
    big = scene("big", "2024-01-01T00:00:00Z", text="x" * 300_000)
    twice = scene("twice", "2024-01-02T00:00:00Z", tile="T8")
    api.items += [big, twice, twice, {**twice, "extra": 1}, scene("../x", "2024-01-02T00:00:00Z")]
    assert refresh()[1]["asked"] == "whole"
    assert refresh()[1]["asked"] == "whole", "a stub tells no time"
    api.items.remove(big)
    gone, _ = refresh()
    assert "big" not in verdicts(gone)
    again, asked = refresh()
    assert asked["asked"] == "updated"
    assert again.digest == gone.digest


#: One thing that happens to the world: what, to which item, with or without a time.
EVENTS = st.tuples(
    st.sampled_from(["add", "update", "withdraw", "supersede", "same second", "timeless"]),
    st.integers(0, 5),
)


@given(st.lists(st.lists(EVENTS, max_size=3), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_asking_for_what_is_new_is_as_good_as_listing_everything(
    api: Api, history: list[list[tuple[str, int]]]
) -> None:
    """Random histories; both ways are refreshed after each step and must hold the same table."""
    api.items = [scene(f"i{n}", "2024-01-01T00:00:00Z", tile=f"T{n}") for n in range(3)]
    known: dict[bool, list[CanonicalItem]] = {True: [], False: []}
    for day, events in enumerate([[], *history], start=2):
        for event, number in events:
            happen(api, event, number, f"2024-01-{2 * day:02}T00:00:00.000Z")
        tables = {}
        for way in (True, False):
            rows = table(api, way, known[way])
            known[way] = items_of_rows(rows)
            tables[way] = pd.DataFrame(rows).drop(columns=["identity", "geometry"])
        pd.testing.assert_frame_equal(tables[True], tables[False])


def happen(api: Api, event: str, number: int, now: str) -> None:
    place = number % len(api.items) if api.items else 0
    if event == "add" or len(api.items) < 2:
        api.items.append(scene(f"n{len(api.items)}-{now}", now, tile=f"N{number}"))
    elif event == "withdraw":
        del api.items[place]
    elif event == "timeless":
        api.items.append(scene(f"t{number}", None, tile=f"N{number}"))
    elif event == "supersede":
        api.items.append(scene(f"s{number}-{now}", now, tile=f"T{number}", version="06.00"))
    else:
        old = api.items[place]
        newest = max(str(one["properties"].get("updated", "")) for one in api.items)
        same = event == "same second" and old["properties"].get("updated") == newest
        when = newest if same else now
        api.items[place] = {
            **old,
            "properties": {**old["properties"], "updated": when, "gsd": number},
        }


def table(api: Api, watermark: bool, previous: list[CanonicalItem]) -> list[dict[str, Any]]:
    search_settings = SearchSettings(stac=api.url, watermark=watermark)
    listing = list_catalogue(search_settings, previous)
    return validate_items(listing.items, SearchSettings(stac=api.url), listing.collections)
