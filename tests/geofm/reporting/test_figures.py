"""The computations behind the figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import Point, box

from geofm.reporting.lineage_diagram import draw_lineage
from geofm.reporting.maps import group_scenes, has_footprint, mosaic_rows, project_vectors
from geofm.reporting.page import code_spans
from geofm.reporting.pictures import arrange_in_sheet, display_pixels, evenly_spaced
from geofm.reporting.report_data import count_drops
from geofm.runtime import text


@given(st.lists(st.sampled_from(["kept", "dropped", "quarantined"]), max_size=60))
def test_a_cascade_adds_up(states: list[str]) -> None:
    table = pd.DataFrame({"state": states, "why": [s[:1] for s in states]})
    steps = count_drops(table, "state", "why")
    assert sum(n for _, _, n in steps) + states.count("kept") == len(states)
    assert [n for _, _, n in steps] == sorted((n for _, _, n in steps), reverse=True)


def test_scenes_near_each_other_are_one_place() -> None:
    shapes = [box(10, 45, 11, 46), box(10.9, 45, 11.5, 46), box(100, -5, 101, -4)]
    found = group_scenes(shapes)
    assert [f.tolist() for f in found] == [[10, 45, 11.5, 46], [100, -5, 101, -4]]


def test_footprints_that_no_map_can_show_are_left_out() -> None:
    shapes = [box(0, 0, 1, 1), None, Point(), box(300, 0, 301, 1)]
    assert has_footprint(pd.DataFrame({"geometry": shapes})).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("n", "method"), [(3, "principal components"), (60, "t-SNE")])
def test_flattening_is_the_same_twice(n: int, method: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    flat, name = project_vectors(vectors)
    assert name == method
    assert flat.shape == (n, 2)
    assert (flat == project_vectors(vectors)[0]).all()


def test_identical_vectors_can_be_flattened() -> None:
    flat, _ = project_vectors(np.ones((5, 4), dtype=np.float32))
    assert np.isfinite(flat).all()
    assert len(mosaic_rows(flat)) == 1


def test_a_mosaic_takes_one_per_cell() -> None:
    flat = np.random.default_rng(0).uniform(size=(500, 2))
    rows = mosaic_rows(flat, columns=5, lines=4)
    assert len(rows) == len(set(rows)) == 20


def test_pictures_of_reflectance_are_brightened_and_others_left_alone() -> None:
    dark = np.full((3, 2, 2), 300, dtype=np.uint16)
    assert display_pixels(dark, ["red", "green", "blue"], [1e-4] * 3)[0, 0, 0] == 55
    photo = np.full((3, 2, 2), 77, dtype=np.uint8)
    assert (display_pixels(photo, ["red", "green", "blue"], [1.0] * 3) == 77).all()


def test_a_sheet_has_room_for_all() -> None:
    png = arrange_in_sheet([np.full((8, 8, 3), i, dtype=np.uint8) for i in range(5)], columns=3)
    assert png.startswith(b"\x89PNG")


def test_a_sample_is_spread_over_the_table() -> None:
    table = pd.DataFrame({"collection": ["a"] * 50 + ["b"] * 50, "chip_id": map(str, range(100))})
    shown = evenly_spaced(table, 10)
    assert len(shown) == 10
    assert shown["collection"].value_counts().to_dict() == {"a": 5, "b": 5}


def test_lineage_escapes_names_from_outside() -> None:
    assert "<b>" not in draw_lineage({}, ["<b>x</b>"])


def test_values_as_text() -> None:
    assert text.count(1234567) == "1\u202f234\u202f567"
    assert text.percent(0.1234) == "12.3\u202f%"
    assert text.points(-0.04) == "−4.0"
    assert text.duration(5400) == "90.0 min"
    assert text.amount(0.002, "kWh") == "2 Wh"
    assert text.size(3 * 1024 * 1024) == "3.0 MiB"
    assert text.some(1, "scene") + text.some(2, " scene") == "1 scene2  scenes"
    assert text.plain("ab" * 32) == "abababababababab…"
    assert text.plain({"a": [1, 2.5], "b": None}) == "a 1, 2.5; b —"
    assert text.reason("near_duplicate") == "near duplicate"


def test_code_spans_escape_first() -> None:
    assert str(code_spans("a `<b>` <i>")) == "a <code>&lt;b&gt;</code> &lt;i&gt;"
