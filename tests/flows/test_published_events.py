"""A new version is a Prefect event, and an automation pretrains on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest

from flows.automations import PRETRAIN_ON_NEW
from flows.deployments import deploy_all
from tests.flows.conftest import SMALL, Outcome
from tests.flows.ui import Ui, wait_for

pytestmark = pytest.mark.slow


def automation(ui: Ui) -> dict[str, Any]:
    """The automation, as the API shows it."""
    named = [one for one in ui.post("/automations/filter") if one["name"] == PRETRAIN_ON_NEW]
    assert len(named) == 1
    return dict(named[0])


def publication(ref: str, flow: str) -> dict[str, Any]:
    """The event of a dataset version that a run of a flow has published."""
    name = ref.partition("@")[0]
    return {
        "event": "geofm.dataset.published",
        "resource": {"prefect.resource.id": f"geofm.dataset.{name}"},
        "related": [
            {
                "prefect.resource.id": f"prefect.flow.{uuid4()}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": flow,
            }
        ],
        "payload": {"ref": ref, "digest": "0" * 64, "chips": 5},
        "id": str(uuid4()),
        "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def test_the_automation_pretrains_on_what_a_refresh_publishes(
    deployed: list[str], api: httpx.Client
) -> None:
    ui = Ui(api)
    made = automation(ui)
    assert made["enabled"] is False
    address = f"/automations/{made['id']}"
    api.patch(address, json={"enabled": True}).raise_for_status()
    time.sleep(2)  # the server loads the change
    events = [
        publication("corpus@2026-11-29", "geofm-pretrain"),
        publication("corpus@2026-11-30", "geofm-refresh"),
    ]
    api.post("/events", json=events).raise_for_status()
    query = {
        "deployments": {"id": {"any_": [ui.deployments()["geofm-pretrain"]["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    wait_for(lambda: ui.post("/flow_runs/filter", **query), 60)
    time.sleep(2)  # for a run that should not be there
    runs = ui.post("/flow_runs/filter", **query)
    for run in runs:
        api.delete(f"/flow_runs/{run['id']}").raise_for_status()
    assert [run["parameters"]["dataset"] for run in runs] == ["corpus@2026-11-30"]

    # an update leaves the switch as it is
    deploy_all(deployed.append)
    assert automation(ui)["enabled"] is True
    assert sum(PRETRAIN_ON_NEW in line for line in deployed) <= 1


@pytest.mark.long
def test_a_new_version_is_an_event_and_an_unchanged_one_is_none(
    geofm: Callable[..., Outcome], api: httpx.Client, tmp_path: Any
) -> None:
    name = f"corpus-{uuid4().hex[:8]}"
    line = ("refresh", "demo", *SMALL, "--set", f"pack.name={name}", "--json")
    results = [geofm(*line, "--store", str(tmp_path / "store")) for _ in range(2)]
    assert [done.code for done in results] == [0, 0]
    query = {"filter": {"event": {"name": ["geofm.dataset.published"]},
                        "resource": {"id": [f"geofm.dataset.{name}"]}}}  # fmt: skip

    def found() -> list[Any]:
        answer = api.post("/events/filter", json=query).raise_for_status().json()
        return list(answer["events"])

    wait_for(found, 30)
    (event,) = found()
    first, second = (done.json for done in results)
    assert [first["version"]["new"], second["version"]["new"]] == [True, False]
    assert event["payload"] == {
        "ref": first["version"]["ref"],
        "digest": first["artifacts"]["pack"],
        "chips": first["counts"]["pack"]["rows_out"],
    }
    roles = {each["prefect.resource.role"]: each for each in event["related"]}
    assert roles["flow"]["prefect.resource.name"] == "geofm-refresh"
    run = roles["flow-run"]["prefect.resource.id"].rpartition(".")[2]
    assert api.get(f"/flow_runs/{run}").raise_for_status().json()["state_type"] == "COMPLETED"
