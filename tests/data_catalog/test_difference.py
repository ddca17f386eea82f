"""What changed between two versions: by tables made by hand, and by any tables."""

from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from data_catalog.difference import Difference, Version, compare, item_changes

SAMPLES = ["chip_id", "collection", "item_id", "source", "cell"]
ITEMS = ["collection", "item_id", "item_sha256", "status", "reason", "superseded_by"]


def version(
    samples: list[tuple[str, str, str]],
    items: list[tuple[str, str, str, str, str]],
    chips: list[tuple[str, str, str]] = (),
    decisions: list[tuple[str, str, str]] = (),
) -> Version:
    """Samples are chip, item, cell; items are id, sha256, status, reason, superseded_by."""
    return Version(
        pd.DataFrame([(c, "s2", i, "src", cell) for c, i, cell in samples], columns=SAMPLES),
        pd.DataFrame([("s2", *row) for row in items], columns=ITEMS),
        pd.DataFrame(list(chips), columns=["chip_id", "status", "reason"]),
        pd.DataFrame(list(decisions), columns=["chip_id", "decision", "rule"]),
    )


OLD = version(
    [("a1", "a", "c1"), ("a2", "a", "c2"), ("b1", "b", "c3"), ("d1", "d", "c4"), ("d2", "d", "c5"),
     ("d3", "d", "c6"), ("e1", "e", "c7"), ("g1", "g", "c8")],
    [(i, i, "ok", "", "") for i in "abdeg"],
)  # fmt: skip
NEW = version(
    [("A1", "A", "c1"), ("f1", "f", "c9"), ("f2", "f", "c9"), ("E1", "e", "c7"), ("d4", "d", "c4")],
    [("a", "a", "dropped", "reprocessed", "A"), ("A", "A", "ok", "", ""),
     ("b", "b", "dropped", "withdrawn", ""), ("d", "d", "ok", "", ""), ("e", "E", "ok", "", ""),
     ("f", "f", "ok", "", ""), ("h", "h", "quarantined", "no_assets", "")],
    chips=[("d2", "dropped", "overlap"), ("d4", "ok", "")],
    decisions=[("d1", "drop", "near_duplicate"), ("d4", "keep", "kept")],
)  # fmt: skip


def test_each_sample_that_came_or_went_has_its_reason() -> None:
    found = compare(OLD, NEW)
    assert found.added == ["A1", "E1", "d4", "f1", "f2"]
    assert found.removed == ["a1", "a2", "b1", "d1", "d2", "d3", "e1", "g1"]
    assert found.kept == 0
    assert found.why_added == {
        "item added": 2, "item changed": 1, "selected now": 1, "supersedes an item": 1,
    }  # fmt: skip
    assert found.why_removed == {
        "item changed": 1, "item gone": 1, "item superseded": 2, "item withdrawn": 1,
        "near_duplicate": 1, "not cut any more": 1, "overlap": 1,
    }  # fmt: skip
    told = {row["item_id"]: (row["change"], row["by"], row["samples"]) for row in found.items}
    assert told == {
        "A": ("added", "", 1), "a": ("superseded", "A", 2), "b": ("withdrawn", "", 1),
        "e": ("changed", "", 2), "f": ("added", "", 2), "g": ("gone", "", 1),
    }  # fmt: skip
    assert found.headline() == (
        "+5 −8 (2 items added, 1 changed, 1 gone, 1 superseded, 1 withdrawn)"
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


def test_one_item_is_singular_and_a_returning_item_is_added() -> None:
    old = version([], [("a", "a", "dropped", "withdrawn", "")])
    new = version([("x", "a", "c")], [("a", "a", "ok", "", "")])
    assert compare(old, new).headline() == "+1 −0 (1 item added)"
    assert compare(new, old).headline() == "+0 −1 (1 item withdrawn)"
    # what was never used does not matter
    assert compare(old, version([], [("a", "a", "dropped", "cloud_cover", "")])).items == []


def test_an_id_that_is_there_twice_counts_by_the_row_that_is_used() -> None:
    old = pd.DataFrame(
        [("s2", "a", "1", "dropped", "listed_twice", "a"), ("s2", "a", "1", "ok", "", "")],
        columns=ITEMS,
    )
    assert item_changes(old, old.iloc[::-1]) == {}


def test_the_summary_names_no_more_than_it_should() -> None:
    many = version([(f"c{n}", f"i{n}", f"g{n}") for n in range(50)],
                   [(f"i{n}", "x", "ok", "", "") for n in range(50)])  # fmt: skip
    summary = compare(version([], []), many).summary(most=7)
    assert (summary["added"], summary["removed"], summary["kept"]) == (50, 0, 0)
    assert (len(summary["items"]), len(summary["by_cell"]), summary["cells"]) == (7, 7, 50)
    assert summary["item_counts"] == {"added": 50}


names = st.sampled_from(["a", "b", "c", "d"])
rows = st.tuples(names, st.sampled_from(["1", "2"]), st.sampled_from(["ok", "dropped"]),
                 st.sampled_from(["withdrawn", "reprocessed", "cloud_cover"]), names)  # fmt: skip
versions = st.builds(
    version,
    st.lists(st.tuples(st.text("xyz", min_size=1, max_size=2), names, names),
             unique_by=lambda row: row[0]),
    st.lists(rows, unique_by=lambda row: row[0]),
)  # fmt: skip


@given(versions, versions)
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
    back = compare(new, old)
    assert (back.added, back.removed, back.kept) == (found.removed, found.added, found.kept)
