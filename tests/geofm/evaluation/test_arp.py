"""ARP reproduces the paper's numbers to the second decimal."""

from __future__ import annotations

import pytest

from data_catalog.errors import UsageError
from geofm.evaluation.arp import (
    PAPER_REFERENCE,
    PAPER_TABLE_9,
    average_relative_performance,
    relative_gain,
)


@pytest.mark.parametrize(
    ("arm", "with_oscd", "without_oscd"),
    [("GFM", 3.31, 1.48), ("distillation only", 2.16, 0.21), ("MIM only", 1.41, 0.07)],
)
def test_arp_of_the_papers_table_9(arm: str, with_oscd: float, without_oscd: float) -> None:
    row = PAPER_TABLE_9[arm]
    assert round(average_relative_performance(row, PAPER_REFERENCE), 2) == with_oscd
    without = average_relative_performance(row, PAPER_REFERENCE, without=("OSCD",))
    assert round(without, 2) == without_oscd


def test_most_of_the_headline_is_one_small_data_set() -> None:
    gain = relative_gain(PAPER_TABLE_9["GFM"]["oscd_f1"], PAPER_REFERENCE["oscd_f1"])
    total = 7 * average_relative_performance(PAPER_TABLE_9["GFM"], PAPER_REFERENCE)
    assert round(gain, 2) == 14.27
    assert round(gain / total, 2) == 0.62


def test_the_reference_has_no_gain_over_itself() -> None:
    assert average_relative_performance(PAPER_REFERENCE, PAPER_REFERENCE) == 0


def test_a_missing_metric_is_named() -> None:
    scores = {k: v for k, v in PAPER_REFERENCE.items() if k != "ben_1"}
    with pytest.raises(UsageError, match=r"BigEarthNet.*ben_1"):
        average_relative_performance(scores, PAPER_REFERENCE)
    with pytest.raises(UsageError, match="at least one"):
        average_relative_performance({}, {}, datasets={})
    with pytest.raises(UsageError, match="positive"):
        relative_gain(1.0, 0.0)
