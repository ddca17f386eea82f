"""The cost table and its remarks."""

from __future__ import annotations

import pytest

from data_catalog.provenance.costs import ArtifactCost
from geofm.runtime.cost import PAPER_KG, PAPER_V100_HOURS, as_json, as_markdown, cost_table, remarks

COSTS = [
    ArtifactCost("pretrain", "b", 7200.0, 14400.0, 0.9, 0.4, sessions=3,
         metrics={"teacher_seconds": 1800.0, "images_per_second": 99.5, "device": "GPU"}),
    ArtifactCost("cut", "a", 60.0, 0.0, 0.1, 0.05, sessions=1, parts_reused=5, parts_unknown=2,
         metrics={"parts": 28, "peak_mib": 812.3}),
]  # fmt: skip


def test_stages_in_their_order_the_teachers_share_and_a_sum_without_it() -> None:
    table = cost_table(COSTS)
    assert table.head == ("Stage", "Seconds", "GPU-seconds", "kWh", "kg CO2e")
    assert table.rows == [
        ("cut", "60.0", "0.0", "0.100", "0.050"),
        ("pretrain", "7,200.0", "14,400.0", "0.900", "0.400"),
        ("of it the teacher", "1,800.0", "", "", ""),
        ("all", "7,260.0", "14,400.0", "1.000", "0.450"),
    ]
    detailed = cost_table(COSTS, details=True)
    assert detailed.head[5:] == ("Images/s", "Peak memory, MiB", "Device")
    assert detailed.rows[0][5:] == ("", "812", "")
    assert detailed.rows[1][5:] == ("99.5", "", "GPU")
    small = cost_table([ArtifactCost("cut", "a", 60.0, 0.0, 0.001, 0.0005)])
    assert small.head[3:] == ("Wh", "g CO2e")
    assert small.rows[0][3:] == ("1.000", "0.500")


def test_the_papers_figures_agree_with_its_constant() -> None:
    paper = as_json(COSTS)["paper"]
    assert PAPER_V100_HOURS * paper["kg_co2e_per_v100_hour"] == pytest.approx(PAPER_KG, abs=0.01)
    assert paper["kg_co2e_of_these_gpu_hours"] == pytest.approx(4 * 0.1425)
    assert as_json(COSTS)["total"]["seconds"] == 7260


def test_remarks_say_what_the_numbers_do_not() -> None:
    text = "\n".join(remarks(COSTS))
    assert "held GPUs for 4 hours" in text
    assert "0.1425 kg CO2e per V100-hour (93.3 hours, 13.3 kg for GFM)" in text
    assert "pretrain (3)" in text
    assert "are counted, each once: cut (5 of 28 parts)." in text
    assert "Not in the sum, because no run recorded what these parts have cost: cut (2 of" in text
    assert "without" not in text.lower()
    assert text.endswith("train the teacher and the encoder is not counted.")
    lacking = [ArtifactCost("search", "c"), ArtifactCost("cut", "a", 5.0, 0.0, sessions=1)]
    text = "\n".join(remarks(lacking))
    assert "no run that made them: search." in text
    assert "Without a measurement of energy, so the sum is too low: cut." in text
    assert "V100" not in text
    on_processors = [ArtifactCost("pretrain", "m", 7200.0, 0.0)]
    assert "Training took 2 hours on processors" in remarks(on_processors)[0]
    assert remarks([]) == []


def test_the_markdown_has_a_line_per_row() -> None:
    lines = as_markdown(COSTS).splitlines()
    assert lines[0] == "| Stage | Seconds | GPU-seconds | kWh | kg CO2e |"
    assert lines[1] == "|---|---:|---:|---:|---:|"
    assert lines[2] == "| cut | 60.0 | 0.0 | 0.100 | 0.050 |"
    assert lines[6] == ""
