"""What changed between two versions: by tables made by hand, and by any tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_catalog.database.item_states import CHIP_COLUMNS, ITEM_COLUMNS, item_states
from data_catalog.provenance.diff import Difference, Version, compare, item_changes

SAMPLES = ["chip_id", "collection", "item_id", "source", "cell", "licence"]


def version(
    samples: list[tuple[str, str, str]],
    items: list[tuple[str, str, str, str, str]],
    chips: list[tuple[str, ...]] = (),
    decisions: list[tuple[str, str, str]] = (),
    licence: str = "CC-BY-4.0",
    **more: Any,
) -> Version:
    """Samples are chip, item, cell; items are id, sha256, status, reason, superseded_by.

    Chips are chip, status, reason, and the item and its sha256 where they matter.
    """
    rows = [(c, "s2", *([*item, "?", "?"][:2]), status, reason, "")
            for c, status, reason, *item in chips]  # fmt: skip
    return Version(
        pd.DataFrame([(c, "s2", i, "src", cell, licence) for c, i, cell in samples],
                     columns=SAMPLES),
        pd.DataFrame([("s2", *row, licence) for row in items], columns=ITEM_COLUMNS),
        pd.DataFrame(rows, columns=CHIP_COLUMNS),
        pd.DataFrame(list(decisions), columns=["chip_id", "decision", "rule"]),
        **more,
    )  # fmt: skip


OLD = version(
    [("a1", "a", "c1"), ("a2", "a", "c2"), ("b1", "b", "c3"), ("d1", "d", "c4"), ("d2", "d", "c5"),
     ("d3", "d", "c6"), ("e1", "e", "c7"), ("g1", "g", "c8")],
    [(i, i, "ok", "", "") for i in "abdeg"],
)  # fmt: skip
NEW = version(
    [("A1", "A", "c1"), ("f1", "f", "c9"), ("f2", "f", "c9"), ("E1", "e", "c7"), ("d4", "d", "c4")],
    [("a", "a", "dropped", "reprocessed", "A"), ("A", "A", "ok", "", ""),
     ("g", "g", "dropped", "cloud_cover", ""), ("d", "d", "ok", "", ""), ("e", "E", "ok", "", ""),
     ("f", "f", "ok", "", ""), ("h", "h", "quarantined", "no_assets", "")],
    chips=[("d2", "dropped", "overlap"), ("d4", "ok", "")],
    decisions=[("d1", "drop", "near_duplicate"), ("d4", "keep", "kept")],
)  # fmt: skip


def told(found: Difference) -> dict[str, tuple[str, str, int]]:
    """Change, other item and number of samples by item."""
    return {row["item_id"]: (row["change"], row["by"], row["samples"]) for row in found.items}


def test_each_sample_that_came_or_went_has_its_reason() -> None:
    found = compare(OLD, NEW)
    assert found.added == ["A1", "E1", "d4", "f1", "f2"]
    assert found.removed == ["a1", "a2", "b1", "d1", "d2", "d3", "e1", "g1"]
    assert found.kept == 0
    assert found.why_added == {
        "item added": 2, "item changed": 1, "selected now": 1, "supersedes an item": 1,
    }  # fmt: skip
    assert found.why_removed == {
        "item changed": 1, "item cloud_cover": 1, "item superseded": 2, "item withdrawn": 1,
        "near_duplicate": 1, "not cut any more": 1, "overlap": 1,
    }  # fmt: skip
    assert told(found) == {
        "A": ("added", "", 1), "a": ("superseded", "A", 2), "b": ("withdrawn", "", 1),
        "d": ("selected", "", 4), "e": ("changed", "", 2), "f": ("added", "", 2),
        "g": ("cloud_cover", "", 1),
    }  # fmt: skip
    assert [row["reason"] for row in found.items if row["item_id"] == "d"] == [
        "near_duplicate 1, not cut any more 1, overlap 1, selected now 1"
    ]
    assert found.headline() == (
        "+5 −8 (2 items added, 1 changed, 1 cloud_cover, 1 selected, 1 superseded, 1 withdrawn)"
    )
    assert found.by_source == [
        {"source": "src", "collection": "s2", "added": 5, "removed": 8, "kept": 0}
    ]
    assert found.by_cell[:2] == [
        {"cell": "c1", "added": 1, "removed": 1}, {"cell": "c4", "added": 1, "removed": 1},
    ]  # fmt: skip


def test_nothing_changed_is_nothing() -> None:
    found = compare(OLD, OLD)
    assert found == Difference([], [], 8, {}, {}, [], found.by_source, [])
    assert found.headline() == "+0 −0"
    assert found.by_source[0]["kept"] == 8


def test_an_item_that_another_search_does_not_list_is_gone_not_withdrawn() -> None:
    elsewhere = replace(NEW, search={"bbox": [1, 2, 3, 4]})
    assert told(compare(OLD, elsewhere))["b"] == ("gone", "", 1)


def test_one_item_is_singular_and_a_returning_item_is_returned() -> None:
    old = version([], [("a", "a", "dropped", "reprocessed", "b")])
    new = version([("x", "a", "c")], [("a", "a", "ok", "", "")])
    found = compare(old, new)
    assert found.headline() == "+1 −0 (1 item returned)"
    assert found.items[0]["reason"] == "was reprocessed by b"
    assert found.why_added == {"item returned": 1}
    assert compare(new, version([], [])).headline() == "+0 −1 (1 item withdrawn)"
    # what was never used does not matter
    assert compare(old, version([], [("a", "a", "dropped", "cloud_cover", "")])).items == []


def test_tables_of_older_versions_have_rows_of_withdrawn_items() -> None:
    old = version([], [("a", "a", "dropped", "withdrawn", "")])
    new = version([("x", "a", "c")], [("a", "a", "ok", "", "")])
    assert compare(old, new).headline() == "+1 −0 (1 item returned)"
    assert compare(new, old).headline() == "+0 −1 (1 item withdrawn)"


def test_a_changed_licence_is_told_with_its_samples() -> None:
    found = compare(OLD, version(
        [(s.chip_id, s.item_id, s.cell) for s in OLD.samples.itertuples()],
        [(i, i, "ok", "", "") for i in "abdeg"], licence="CC0-1.0",
    ))  # fmt: skip
    assert (found.added, found.removed) == ([], [])
    assert told(found)["d"] == ("licence changed", "", 3)
    assert found.items[0]["reason"] == "CC-BY-4.0 is CC0-1.0 now"
    assert found.headline() == "+0 −0 (5 items licence changed)"


OUTAGE = ("q", "quarantined", "unreachable", "a", "2")


def test_an_item_out_of_reach_is_told_with_its_reason() -> None:
    old = version([("x", "a", "c")], [("a", "1", "ok", "", "")], [("x", "ok", "", "a", "1")])
    new = version([], [("a", "2", "ok", "", "")], [OUTAGE])
    found = compare(old, new)
    assert told(found) == {"a": ("out of reach", "", 1)}
    assert found.items[0]["reason"] == "unreachable"
    assert found.why_removed == {"item out of reach": 1}
    back = compare(new, old)
    assert told(back) == {"a": ("readable", "", 1)}
    assert back.items[0]["reason"] == "was out of reach (unreachable)"
    assert back.why_added == {"item readable": 1}


def test_a_stand_in_is_told() -> None:
    chip = ("x", "ok", "", "a", "1")
    old = version([("x", "a", "c")], [("a", "1", "ok", "", "")], [chip])
    new = version([("x", "a", "c")], [("a", "2", "ok", "", "")], [OUTAGE, chip])
    found = compare(old, new)
    assert told(found) == {"a": ("out of reach", "", 0)}
    assert found.items[0]["reason"] == "unreachable; the version before stands in"
    assert compare(new, new).items == []


@pytest.mark.parametrize("read", [True, False])
def test_superseded_is_only_what_a_newer_item_with_samples_replaces(read: bool) -> None:
    old = version([("x", "a", "c")], [("a", "1", "ok", "", "")], [("x", "ok", "", "a", "1")])
    items = [("a", "1", "dropped", "reprocessed", "b"), ("b", "2", "ok", "", "")]
    waits = [("q", "quarantined", "not_found", "b", "2"), ("x", "ok", "", "a", "1")]
    new = version(
        [] if read else [("x", "a", "c")], items, [("y", "ok", "", "b", "2")] if read else waits
    )
    found = compare(old, new)
    if read:
        assert told(found)["a"] == ("superseded without samples", "b", 1)
        assert found.items[0]["reason"] == "no sample of b was kept"
    else:
        assert told(found) == {"a": ("stands in", "b", 0), "b": ("waiting", "", 0)}
        assert found.items[0]["reason"] == "b: not_found"
        assert told(compare(new, version([], [items[1]])))["a"][0] == "superseded without samples"


def test_a_window_that_fell_out_of_the_plan_has_the_reason_of_the_plan() -> None:
    plan = pd.DataFrame({"item_sha256": ["1"], "x": [3], "y": [4], "reason": ["over_budget"]})
    items = [("a", "1", "ok", "", "")]
    new = version([], items, windows=lambda: plan)
    found = compare(version([("x", "a", "EPSG:1/32x10m/3/4")], items), new)
    assert found.why_removed == {"over_budget": 1}
    assert told(found) == {"a": ("selected", "", 1)}


def test_an_id_that_is_there_twice_counts_by_the_row_that_is_used() -> None:
    rows = [("a", "1", "dropped", "listed_twice", "a"), ("a", "1", "ok", "", "")]
    assert item_changes(version([], rows), version([], rows[::-1])) == {}


def test_the_summary_names_no_more_than_it_should() -> None:
    many = version([(f"c{n}", f"i{n}", f"g{n}") for n in range(50)],
                   [(f"i{n}", "x", "ok", "", "") for n in range(50)])  # fmt: skip
    summary = compare(version([], []), many).summary(most=7)
    assert (summary["added"], summary["removed"], summary["kept"]) == (50, 0, 0)
    assert (len(summary["items"]), len(summary["by_cell"]), summary["cells"]) == (7, 7, 50)
    assert summary["item_counts"] == {"added": 50}


names = st.sampled_from(["a", "b", "c", "d"])
digests = st.sampled_from(["1", "2"])
rows = st.tuples(names, digests, st.sampled_from(["ok", "dropped"]),
                 st.sampled_from(["reprocessed", "cloud_cover"]), names)  # fmt: skip
chips = st.tuples(st.text("xyz", min_size=1, max_size=2),
                  st.sampled_from(["ok", "dropped", "quarantined"]),
                  st.sampled_from(["unreachable", "not_found", "overlap"]),
                  names, digests)  # fmt: skip
versions = st.builds(
    version,
    st.lists(st.tuples(st.text("xyz", min_size=1, max_size=2), names, names),
             unique_by=lambda row: row[0]),
    st.lists(rows, unique_by=lambda row: row[0]),
    st.lists(chips, unique_by=lambda row: row[0]),
)  # fmt: skip


@given(versions, versions)
@settings(max_examples=50, deadline=None)
def test_no_sample_is_lost_or_told_twice(old: Version, new: Version) -> None:
    found = compare(old, new)
    assert len(old.samples) == found.kept + len(found.removed)
    assert len(new.samples) == found.kept + len(found.added)
    assert sum(found.why_added.values()) == len(found.added)
    assert sum(found.why_removed.values()) == len(found.removed)
    for what, number in (
        ("added", len(found.added)), ("removed", len(found.removed)), ("kept", found.kept),
    ):  # fmt: skip
        assert sum(row[what] for row in found.by_source) == number
        if what != "kept":
            assert sum(row[what] for row in found.by_cell) == number
    changed = {(row["collection"], row["item_id"]) for row in found.items}
    moved = pd.concat([
        old.samples[old.samples.chip_id.isin(found.removed)],
        new.samples[new.samples.chip_id.isin(found.added)],
    ])  # fmt: skip
    assert set(zip(moved.collection, moved.item_id, strict=True)) <= changed
    assert all(row["change"] for row in found.items)
    assert item_states(old.items, old.chips).keys() >= {("s2", i) for i in old.items.item_id}
    back = compare(new, old)
    assert (back.added, back.removed, back.kept) == (found.removed, found.added, found.kept)
