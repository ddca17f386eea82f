"""Figures: sums, JSON and back, and the comparison with what came."""

from __future__ import annotations

from geofm.forecasting.figures import COMPARED, HEAD, RunForecast, StageForecast, compare

CUT = StageForecast("cut", 648, 5.0, 0.0, 0.2, 2**20, 2**27, "records (3 runs)")
EMBED = StageForecast("embed", 648, 10.0, 10.0, 2.0, 0, 2**21, "default")
POOL = StageForecast("pool", 616, source="unchanged")


def test_the_sum_is_that_of_all_stages() -> None:
    total = RunForecast([CUT, EMBED, POOL]).total()
    assert (total.seconds, total.gpu_seconds, total.watt_hours) == (15.0, 10.0, 2.2)
    assert (total.fetch_bytes, total.disk_bytes) == (2**20, 2**27 + 2**21)


def test_the_table_has_a_row_per_stage_and_the_sum() -> None:
    rows = RunForecast([CUT, POOL]).rows()
    assert {len(row) for row in rows} == {len(HEAD)}
    assert rows[0] == [
        "cut", "648", "1.0 MiB", "128.0 MiB", "5.0 s", "", "0.2 Wh", "records (3 runs)",
    ]  # fmt: skip
    assert rows[1] == ["pool", "616", "", "", "", "", "", "unchanged"]
    assert rows[2][0] == "all"


def test_the_log_names_what_is_there() -> None:
    lines = RunForecast([CUT, POOL]).lines()
    assert lines[0] == (
        "forecast of cut: 5.0 s, 648 rows, 1.0 MiB to fetch, 128.0 MiB on disk, 0.2 Wh "
        "(records (3 runs))"
    )
    assert lines[1] == "forecast of pool: 616 rows (unchanged)"
    assert lines[2].startswith("forecast of all: 5.0 s")


def test_a_forecast_survives_its_record_and_fields_of_other_versions() -> None:
    noted = {**EMBED.to_json(), "of_a_later_version": 1}
    assert StageForecast.from_json("embed", noted) == EMBED


def test_short_stages_have_no_quotient_and_unchanged_ones_no_row() -> None:
    short = StageForecast("curate", 616, 0.5)
    found = {
        e.forecast.stage: e for e in compare([CUT, EMBED, POOL, short], {"cut": 6.0, "curate": 0.7})
    }
    assert list(found) == ["cut", "embed", "curate"]
    assert found["cut"].ratio == 1.2
    assert found["cut"].cells()[3:5] == ("6.0 s", "1.20")
    assert found["embed"].ratio is None
    assert found["embed"].cells()[3] == "unchanged"
    assert found["curate"].ratio is None
    assert {len(entry.cells()) for entry in found.values()} == {len(COMPARED)}
    assert found["cut"].to_json()["took"] == 6.0
