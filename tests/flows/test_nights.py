"""Nights: passing faults are tried again, late runs are one, a second refresh is left out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
import urllib3
from prefect.states import Failed

from data_catalog.database.lease import CatalogueAway
from data_catalog.errors import CheckError, RunError, UsageError
from data_catalog.storage.reach import OutOfReach
from flows import nights
from flows.deployments import deploy_all
from flows.nights import is_superseded, is_tried_again, passes
from tests.flows.ui import Ui, wait_for


def caused_by(cause: BaseException, error: type[Exception] = RunError) -> Exception:
    try:
        raise error("it failed") from cause
    except error as made:
        return made


def answered(status: int) -> httpx.HTTPStatusError:
    response = httpx.Response(status, request=httpx.Request("POST", "http://127.0.0.1/api"))
    return httpx.HTTPStatusError("refused", request=response.request, response=response)


@pytest.mark.parametrize(
    "cause",
    [
        ConnectionRefusedError(), TimeoutError(), httpx.ConnectError("away"),
        urllib3.exceptions.ReadTimeoutError(None, "", ""), CatalogueAway("away"),
        OutOfReach("away"), caused_by(ConnectionResetError()), answered(503), answered(502),
    ],
)  # fmt: skip
def test_faults_of_the_network_may_pass(cause: Exception) -> None:
    assert passes(cause)
    assert passes(caused_by(cause))
    assert not passes(caused_by(cause, UsageError))
    assert not passes(caused_by(cause, CheckError))


@pytest.mark.parametrize(
    "error",
    [
        RunError("no"),
        ValueError(),
        MemoryError(),
        FileNotFoundError(),
        answered(404),
        answered(409),
    ],
)  # fmt: skip
def test_other_faults_do_not(error: Exception) -> None:
    assert not passes(error)


def test_only_a_run_of_a_deployment_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Failed(data=ConnectionRefusedError())
    assert not is_tried_again(None, None, failed)
    monkeypatch.setattr(nights, "deployed_run", object)
    assert is_tried_again(None, None, failed)
    assert not is_tried_again(None, None, Failed(data=UsageError("no")))


class Client:
    """Stands in for Prefect's client: runs that are live."""

    runs: ClassVar[list[Any]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_flow_runs(self, deployment_filter: Any, flow_run_filter: Any) -> list[Any]:
        after = flow_run_filter.expected_start_time.after_
        return [run for run in self.runs if run.expected_start_time >= after]


def scheduled(minutes_ago: int, **changes: Any) -> Any:
    when = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    about = {"auto_scheduled": True, "parameters": {"recipe": "demo"}, **changes}
    return SimpleNamespace(id=uuid4(), deployment_id=uuid4(), expected_start_time=when, **about)


def test_of_late_runs_only_the_last_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = (scheduled(minutes) for minutes in (30, 20, 10))
    other = scheduled(5, parameters={"recipe": "naip-geopile"})
    clicked = scheduled(1, auto_scheduled=False)
    monkeypatch.setattr(Client, "runs", [first, second, last, other, clicked])
    monkeypatch.setattr(nights, "get_client", lambda sync_client: Client())

    def skipped(run: Any) -> bool:
        monkeypatch.setattr(nights, "deployed_run", lambda: run)
        return is_superseded()

    assert [skipped(run) for run in (first, second, last, other, clicked)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert not skipped(None)


def test_only_a_schedule_leaves_out_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A click may have other settings, so it waits."""
    for run, expected in (
        (None, False),
        (scheduled(1), True),
        (scheduled(1, auto_scheduled=False), False),
    ):
        monkeypatch.setattr(nights, "deployed_run", lambda run=run: run)
        assert nights.is_scheduled() is expected


@pytest.mark.slow
def test_each_schedule_of_a_deployment_has_its_own_recipe(
    deployed: list[str], api: httpx.Client
) -> None:
    ui = Ui(api)
    refresh = ui.deployments()["geofm-refresh"]
    place = f"/deployments/{refresh['id']}/schedules"
    there = {schedule["id"] for schedule in refresh["schedules"]}
    recipes = {"0 1 * * *": "demo", "0 2 * * 6": "naip-geopile"}
    mine = [
        {
            "schedule": {"cron": cron, "timezone": "Europe/Paris"},
            "parameters": {"recipe": recipe, "changes": ["compute.workers=1"]},
            "slug": recipe,
        }
        for cron, recipe in recipes.items()
    ]
    ui.request("POST", place, json=mine)

    def schedules() -> list[dict[str, Any]]:
        now = ui.deployments()["geofm-refresh"]["schedules"]
        return sorted((each for each in now if each["id"] not in there), key=lambda s: s["slug"])

    made = schedules()
    assert [schedule["parameters"]["recipe"] for schedule in made] == ["demo", "naip-geopile"]
    deploy_all(deployed.append)  # as `geofm up` does
    assert schedules() == made

    # the runs to come are at the time of their schedule, with its parameters
    query = {
        "deployments": {"id": {"any_": [refresh["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }

    def coming() -> dict[str, set[int]]:
        hours: dict[str, set[int]] = {}
        for run in ui.post("/flow_runs/filter", **query):
            if run["parameters"].get("changes") == ["compute.workers=1"]:
                assert run["auto_scheduled"]
                when = datetime.fromisoformat(run["expected_start_time"])
                hour = when.astimezone(ZoneInfo("Europe/Paris")).hour
                hours.setdefault(run["parameters"]["recipe"], set()).add(hour)
        return hours

    wait_for(lambda: len(coming()) == 2, 60)
    assert coming() == {"demo": {1}, "naip-geopile": {2}}
    for schedule in made:
        ui.delete(f"{place}/{schedule['id']}")
