"""Rates: from the nearest records, scaled by rows and settings; else built in."""

from __future__ import annotations

from typing import Any

import pytest

from data_catalog.provenance.timings import Timing
from geofm.config.recipe import PretrainSettings
from geofm.forecasting.rates import (
    BUILT_IN,
    Machine,
    Rate,
    built_in_seconds,
    rate_of,
    typical_watts,
)
from geofm.stages import ALL_STAGES

HERE = Machine("here", workers=2)
CUT = {"bands": ["red", "green", "blue", "nir"], "size_px": 128}


def timing(
    seconds: float, rows: int = 100, settings: dict[str, Any] | None = None, **more: Any
) -> Timing:
    """A run of ``cut`` on this machine."""
    counts = {"rows_in": rows, "rows_out": rows, "images": rows}
    manifest = {"settings": settings or CUT, "counts": counts, "files": [{"size": rows * 1000}]}
    fields = {
        "gpu_seconds": 0.0, "kwh": seconds * 36 / 3.6e6, "host": "here", "workers": 2,
        "processes": 1, "share": 1.0, "inputs": {"chips": {"rows_out": rows}},
    }  # fmt: skip
    return Timing(seconds=seconds, manifest=manifest, **{**fields, **more})


def test_a_run_like_an_earlier_one_is_forecast_to_take_as_long() -> None:
    rate = rate_of("cut", [timing(40.0)], CUT, HERE)
    assert rate.scale * built_in_seconds("cut", 100, CUT) == pytest.approx(40.0)
    assert rate.watts == pytest.approx(36.0)
    assert rate.bytes_per_row == 1000
    assert rate.source == "records (1 run)"


def test_the_median_of_three_runs_counts() -> None:
    rate = rate_of("cut", [timing(s) for s in (40.0, 400.0, 44.0, 1.0)], CUT, HERE)
    assert rate.scale * built_in_seconds("cut", 100, CUT) == pytest.approx(44.0)
    assert rate.source == "records (3 runs)"


def test_a_run_that_found_most_parts_counts_with_the_rows_that_it_worked_on() -> None:
    whole = rate_of("cut", [timing(built_in_seconds("cut", 1000, CUT), rows=1000)], CUT, HERE)
    part = timing(built_in_seconds("cut", 50, CUT), rows=1000, share=0.05)
    assert rate_of("cut", [part], CUT, HERE).scale == pytest.approx(whole.scale) == 1.0


def test_records_with_the_same_settings_on_this_machine_come_first() -> None:
    other = {"bands": ["red"], "size_px": 64}
    runs = [timing(9.0, settings=other), timing(20.0, host="there"), timing(30.0, workers=8)]
    nearest = rate_of("cut", runs, CUT, HERE)
    assert nearest.scale * built_in_seconds("cut", 100, CUT) == pytest.approx(30.0)
    assert rate_of("cut", runs[:2], CUT, HERE).source == "records (1 run, other machine)"
    assert rate_of("cut", runs[:1], CUT, HERE).source == "records (1 run, other settings)"


def test_searches_of_dry_runs_count_only_if_there_are_no_others() -> None:
    dry, whole = (
        timing(1.0, settings={"stac": "planet"}, kwh=None),
        timing(3.0, settings={"stac": "planet"}),
    )
    rate = rate_of("search", [dry, whole], {"stac": "planet"}, HERE)
    assert rate.scale * built_in_seconds("search", 100, {}) == pytest.approx(3.0)
    assert rate_of("search", [dry], {"stac": "planet"}, HERE).source == "records (1 run)"


def test_larger_chips_take_more_time_and_bytes_than_the_records_of_small_ones() -> None:
    small = {**CUT, "size_px": 64}
    rate = rate_of("cut", [timing(built_in_seconds("cut", 1000, small), 1000, small)], CUT, HERE)
    assert rate.scale == pytest.approx(1.0)
    assert rate.bytes_per_row == pytest.approx(4000)
    assert built_in_seconds("cut", 1000, CUT) > 2.5 * built_in_seconds("cut", 1000, small)


def test_records_of_a_processor_say_nothing_about_a_gpu() -> None:
    assert (
        rate_of("embed", [timing(9.0, settings={"size_px": 64})], {}, Machine("h", 2, 1)) == Rate()
    )


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"epochs": 3}, True),
        ({"base_lr": 0.1}, True),
        ({"batch": 64}, False),
        ({"size_px": 224}, False),
        ({"alpha": 0.0}, False),
    ],
    ids=str,
)
def test_trainings_count_if_an_image_takes_as_long(change: dict[str, Any], counts: bool) -> None:
    settings = PretrainSettings().model_dump(mode="json")
    rate = rate_of("pretrain", [timing(100.0, settings={**settings, **change})], settings, HERE)
    assert rate.is_recorded == counts


def test_without_a_teacher_its_name_does_not_matter() -> None:
    alone = PretrainSettings(alpha=0).model_dump(mode="json")
    rate = rate_of("pretrain", [timing(9.0, settings={**alone, "teacher": "t"})], alone, HERE)
    assert rate.is_recorded


def test_every_stage_has_a_built_in_rate() -> None:
    assert tuple(BUILT_IN) == ALL_STAGES


def test_the_power_is_that_of_measured_runs() -> None:
    runs = {"cut": [timing(10.0), timing(10.0, kwh=None)], "embed": [timing(0.5, kwh=1.0)]}
    assert typical_watts(runs, on_gpu=False) == pytest.approx(36.0)
    assert typical_watts(runs, on_gpu=True) is None
