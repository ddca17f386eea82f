"""The forecast: of a dry run, beside what came, and from the record of the run afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from geofm.stages import ALL_STAGES, DATA_STAGES
from tests.flows.conftest import SMALL, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_run_is_forecast_compared_and_remembered(
    geofm: Callable[..., Outcome], tmp_path: Path
) -> None:
    command = ("demo", *SMALL, "--store", str(tmp_path / "store"), "--json")
    first = geofm(*command, "--dry-run").json["forecast"]
    assert tuple(first["stages"]) == ALL_STAGES
    assert first["problems"] == []
    sources = {name: stage["source"] for name, stage in first["stages"].items()}
    assert sources.pop("search") == "records (1 run)", "the dry run has searched"
    assert sources.pop("pretrain").startswith("probe (")
    assert set(sources.values()) == {"default"}
    for stage in first["stages"].values():
        assert stage["seconds"] > 0
        assert stage["watt_hours"] > 0
        assert stage["disk_bytes"] > 0
    assert first["stages"]["cut"]["fetch_bytes"] > 0
    assert first["total"]["seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in first["stages"].values())
    )

    made = geofm(*command)
    assert made.code == 0, made.stderr[-3000:]
    came = {entry["stage"]: entry for entry in made.json["forecast"]}
    assert tuple(came) == ALL_STAGES
    assert all(entry["took"] > 0 for entry in came.values())
    assert came["cut"]["rows"] == first["stages"]["cut"]["rows"]
    page = Path(made.json["report"]).read_text()
    assert "Took / forecast" in page
    assert "probe (" in page

    again = geofm(*command, "--dry-run").json["forecast"]["stages"]
    assert {again[name]["source"] for name in ALL_STAGES[1:]} == {"unchanged"}
    assert sum(again[name]["seconds"] for name in ALL_STAGES[1:]) == 0

    other = geofm(*command, "--dry-run", "--set", "cut.size_px=64").json["forecast"]["stages"]
    assert all(other[name]["source"].startswith("records (") for name in ALL_STAGES)
    assert other["cut"]["rows"] > came["cut"]["rows"]

    training = geofm(
        "run", "demo", *SMALL, "--store", str(tmp_path / "store"), "--json", "--dry-run",
        "--dataset", "demo", "--set", "compute.seed=1",
    ).json["forecast"]["stages"]  # fmt: skip
    assert tuple(training) == ALL_STAGES[len(DATA_STAGES) :]
    assert training["pretrain"]["source"] == "records (1 run)"
    assert training["pretrain"]["rows"] == made.json["counts"]["pretrain"]["images"]
    table = geofm("refresh", *command[:-1], "--dry-run").stdout
    assert "the forecast" in table
    assert "pretrain" not in table
