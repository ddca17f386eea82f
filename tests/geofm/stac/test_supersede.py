from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, box

from data_catalog.sources import source_for
from geofm.stac.supersede import Acquisition, cover, find_superseded, read_acquisition, version_key

HERE = box(2, 48, 3, 49)
OLD = Acquisition(
    "s2", "old", "GS2A_1", "31UDQ", "02.05", "2017-01-01T00:00:00Z", "DS1|0", "uri-old", HERE
)
NEW = replace(
    OLD, item_id="new", version="05.10", generated="2023-01-01T00:00:00Z", product="uri-new",
    sequence="DS2|1",
)  # fmt: skip


def test_newest_baseline_wins_and_names_the_winner() -> None:
    superseded = find_superseded([OLD, NEW])
    assert {n: (v.reason, v.by) for n, v in superseded.items()} == {0: ("reprocessed", "new")}


def test_second_station_keeps_one() -> None:
    twin = replace(OLD, item_id="twin", sequence="DS9|1", generated="2017-01-01T00:11:00Z",
                   product="uri-twin")  # fmt: skip
    superseded = find_superseded([OLD, twin])
    assert [(v.reason, v.by) for v in superseded.values()] == [("second_station", "twin")]


@pytest.mark.parametrize(
    "change",
    [
        {"collection": "other"},
        {"acquisition": ""},
        {"acquisition": "GS2A_2"},
        {"tile": "31UDR"},
        {"geometry": box(2.5, 48, 3.5, 49)},
        {"product": "uri-old"},
        {"version": "02.05", "generated": OLD.generated, "sequence": OLD.sequence},
    ],
    ids=["collection", "no acquisition", "other pass", "other tile", "half the ground",
         "claims the same product", "nothing newer"],
)  # fmt: skip
def test_different_or_doubtful_items_both_stay(change: dict[str, object]) -> None:
    assert find_superseded([OLD, replace(NEW, **change)]) == {}  # type: ignore[arg-type]


def test_the_baseline_suffix_is_not_part_of_the_acquisition() -> None:
    rule = source_for("http://x", "sentinel-2-l2a").identity
    item = {
        "id": "a", "collection": "sentinel-2-l2a",
        "properties": {"s2:datatake_id": "GS2B_20171014T110959_003166_N05.00",
                       "grid:code": "MGRS-30TXT", "s2:processing_baseline": "05.00"},
    }  # fmt: skip
    acquisition = read_acquisition(item, rule, HERE)
    assert (acquisition.acquisition, acquisition.tile) == (
        "GS2B_20171014T110959_003166",
        "MGRS-30TXT",
    )


def test_versions_compare_as_numbers() -> None:
    assert version_key("05.10") > version_key("05.09") > version_key("5.2") > version_key("")


def test_cover_across_the_antimeridian() -> None:
    two = MultiPolygon([box(179, 0, 180, 1), box(-180, 0, -179, 1)])
    assert cover(two, box(179.5, 0, 180, 1)) == pytest.approx(1)
    assert cover(box(179, 0, 181, 1), two) == pytest.approx(1)
    assert cover(box(-180, 0, -179, 1), box(179, 0, 180, 1)) == pytest.approx(0)


@given(st.permutations(range(6)))
def test_the_order_of_items_decides_nothing(order: list[int]) -> None:
    items = [
        replace(OLD, item_id=f"i{n}", version=f"0{n % 3}.00", product=f"p{n}", sequence=f"d{n}|{n}")
        for n in range(6)
    ]
    shuffled = [items[n] for n in order]
    dropped = {shuffled[n].item_id: v for n, v in find_superseded(shuffled).items()}
    assert dropped == {items[n].item_id: v for n, v in find_superseded(items).items()}
    assert len(dropped) == 5
    assert all(v.by == "i5" for v in dropped.values())
