from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from shapely.geometry import box

from data_catalog.run import run_stage
from geofm.config.recipe import CalibrateSettings, EmbedSettings, RecipeSection
from geofm.dedup import calibrate, describe
from geofm.dedup.calibrate import choose_threshold, precision_curve
from geofm.dedup.known_pairs import far_pairs, other_dates, overlapping
from geofm.embeddings import embed
from tests.geofm.dedup.synthetic import Chip, make_chips, texture


def _known(alike: list[float], unlike: list[float]) -> pd.DataFrame:
    rows = [("haze", value) for value in alike] + [("far", value) for value in unlike]
    return pd.DataFrame(rows, columns=["class", "similarity"])


def test_the_lowest_threshold_that_is_precise_for_sure():
    draw = np.random.default_rng(0)
    known = _known(list(draw.uniform(0.8, 1, 800)), list(draw.uniform(0, 0.7, 500)))
    found = choose_threshold(precision_curve(known), known, CalibrateSettings())
    assert found["source"] == "calibrated"
    assert 0.69 <= found["threshold"] <= 0.705
    assert found["precision_lower_bound"] >= 0.99
    assert found["recall"] == 1
    assert (found["positives"], found["negatives"]) == (800, 500)


@pytest.mark.parametrize(
    ("alike", "unlike", "why"),
    [([0.9] * 40, [0.1] * 500, "fewer than 100"), ([0.9] * 200, [0.1] * 200, "no threshold"),
     ([0.9] * 900, [0.99] * 200, "no threshold"), ([], [], "fewer than 100")],
)  # fmt: skip
def test_the_default_stands_with_a_reason(alike, unlike, why):
    known = _known(alike, unlike)
    found = choose_threshold(precision_curve(known), known, CalibrateSettings(default=0.93))
    assert (found["threshold"], found["source"]) == (0.93, "default")
    assert why in found["reason"]


def test_pairs_by_metadata():
    rows = [("c", "s1", "a", "2024-01-01T10:00:00Z", box(0, 0, 0.01, 0.01)),
            ("c", "s2", "b", "2024-01-01T10:00:20Z", box(0.001, 0, 0.011, 0.01)),
            ("c", "s3", "a", "2024-03-01T10:00:00Z", box(0, 0, 0.01, 0.01)),
            ("c", "s4", "z", "2024-01-01T10:00:00Z", box(5, 0, 5.01, 0.01)),
            ("d", "s5", "a", "2024-05-01T10:00:00Z", box(0, 0, 0.01, 0.01))]  # fmt: skip
    chips = pd.DataFrame(rows, columns=["collection", "item_id", "cell", "datetime", "geometry"])
    chips["chip_id"] = [f"chip{row}" for row in range(len(chips))]

    def pairs(found):
        return set(zip(*(side.tolist() for side in found), strict=True))

    assert pairs(overlapping(chips, 10)) == {(0, 1)}
    assert pairs(other_dates(chips, 10)) == {(0, 2)}
    assert pairs(far_pairs(chips, 50)) == {(0, 3), (1, 3), (2, 3)}
    assert len(far_pairs(chips, 2)[0]) == 2
    assert pairs(far_pairs(chips[:0], 2)) == set()


@pytest.mark.parametrize("rows", [60, 3000])
def test_most_known_pairs_stay_when_a_few_chips_are_added(rows):
    """So the threshold changes little from night to night."""
    draw = np.random.default_rng(3)
    count = rows + rows // 25
    chips = pd.DataFrame(
        {
            "chip_id": [f"chip{n}" for n in draw.permutation(count)],
            "collection": "c",
            "geometry": [box(x, 0, x + 0.01, 0.01) for x in draw.uniform(0, 60, count)],
        }
    )
    fewer = chips.drop(index=draw.choice(count, rows // 25, replace=False)).reset_index(drop=True)
    kept = []
    for table in (chips, fewer):
        left, right = far_pairs(table, 400)
        ids = table["chip_id"].to_numpy()
        assert len(left) == 400
        kept.append({frozenset(pair) for pair in zip(ids[left], ids[right], strict=True)})
    assert len(kept[0] & kept[1]) > 0.8 * 400


def test_the_stage_measures_renderings_through_the_encoder(store, catalogue):
    chips = [Chip(texture(n, size=64), x=500_000.0 + 300_000 * n) for n in range(12)]
    chips += [Chip(np.full((3, 64, 64), 900, np.uint16))]
    inputs = {"chips": make_chips(store, chips, per_part=4)}
    inputs["descriptors"] = run_stage(describe.STAGE, store, catalogue, inputs, RecipeSection())
    settings = EmbedSettings(size_px=32)
    inputs["embeddings"] = run_stage(embed.STAGE, store, catalogue, inputs, settings)
    asked = CalibrateSettings(sample=8, min_precision=0.5, least_pairs=5)
    found = run_stage(calibrate.STAGE, store, catalogue, inputs, asked)
    pairs = found.table("known_pairs.parquet")
    counts = pairs["class"].value_counts()
    assert 7 <= counts["half_pixel"] == counts["gain"] == counts["haze"] <= 8
    assert counts["far"] >= 20
    assert pairs["similarity"].between(-1, 1.000001).all()
    by = pairs.groupby("class")["similarity"].median()
    assert by["gain"] > by["far"] + 0.1  # so few chips are not centred
    facts = found.manifest.facts
    assert facts["thresholds"]["c"]["source"] == "calibrated"
    assert facts["threshold"] == facts["thresholds"]["c"]["threshold"]
    assert facts["thresholds"]["c"]["monotone_left_out"] == 1
    curve = found.table("curve.parquet")
    whole = curve[curve["class"] == "all"]
    assert list(whole.columns[:4]) == ["collection", "class", "threshold", "precision"]
    assert (np.diff(whole["recall"]) <= 0).all()
