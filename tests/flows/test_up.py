"""``geofm up``: deployments with forms, a schedule that really schedules, a click that runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from data_catalog.catalogue import open_catalogue
from flows import server
from tests.data_catalog.helpers import NO_STORE
from tests.flows.conftest import Outcome, files_with_secret

pytestmark = pytest.mark.slow


@pytest.fixture
def up(geofm_process: Callable[..., Outcome], tmp_path: Path) -> Iterator[Outcome]:
    done = geofm_process("up", "--detach", "--store", str(tmp_path / "store"))
    yield done
    found = re.search(r"worker +pid (\d+)", done.stdout)
    assert server.stop_worker() == (found is not None)
    if found:
        wait_for(lambda: not Path(f"/proc/{found[1]}/cmdline").exists(), 5)


def wait_for(what: Callable[[], object], seconds: float) -> object:
    """The first true answer within a time; fails the test otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s")


def test_deploy_schedule_and_run(
    up: Outcome, environment: dict[str, str], api: httpx.Client, tmp_path: Path
) -> None:
    assert up.code == 0, up.stderr
    assert "geofm-pretrain/demo" in up.stdout
    assert "geofm-refresh/sentinel2-concise" in up.stdout
    deployments = api.post("/deployments/filter", json={}).raise_for_status().json()
    by_flow = {d["entrypoint"].split(":")[1]: d for d in deployments if d["name"] == "demo"}
    assert set(by_flow) == {"pretrain_flow", "refresh_flow"}
    refresh = by_flow["refresh_flow"]
    assert "password" not in str(refresh["parameters"])
    form = refresh["parameter_openapi_schema"]["definitions"]
    assert form["CutSettings"]["properties"]["size_px"]["minimum"] == 16

    # the nightly schedule waits to be switched on, and then there are runs to come
    (schedule,) = refresh["schedules"]
    assert not schedule["active"]
    place = f"/deployments/{refresh['id']}/schedules/{schedule['id']}"
    api.patch(place, json={"active": True}).raise_for_status()
    query = {
        "deployments": {"id": {"any_": [refresh["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    assert wait_for(lambda: api.post("/flow_runs/filter", json=query).json(), 90)
    api.patch(place, json={"active": False}).raise_for_status()

    # one click: the form's own values, a smaller area
    recipe = refresh["parameters"]["recipe"]
    recipe["search"]["bbox"] = [5.70, 45.07, 5.76, 45.10]
    recipe["embed"]["size_px"] = 64
    parameters = {**refresh["parameters"], "recipe": recipe}
    place = f"/deployments/{refresh['id']}/create_flow_run"
    run = api.post(place, json={"parameters": parameters})
    for _ in range(5):  # a busy server asks to come again, as the UI and the client do
        if run.status_code != 503:
            break
        time.sleep(2)
        run = api.post(place, json={"parameters": parameters})
    run.raise_for_status()
    address = f"/flow_runs/{run.json()['id']}"
    ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    wait_for(lambda: api.get(address).json()["state_type"] in ended, 400)
    state = api.get(address).json()["state"]
    assert state["type"] == "COMPLETED", state
    tasks = {"task_runs": {"name": {"like_": "seal"}}}
    names = {t["name"] for t in api.post("/task_runs/filter", json=tasks).json()}
    assert {"seal search", "seal cut", "seal embed", "seal curate", "seal pack"} <= names
    artifacts = api.post("/artifacts/filter", json={}).json()
    assert any(a["key"] == "geofm-summary" and "scenes" in a["data"] for a in artifacts)
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/store/catalogue.db", NO_STORE)
    assert [name.name for name in catalogue.names()] == ["demo"]
    folders = (tmp_path, Path(environment["GEOFM_HOME"]))
    assert {"server.log", "prefect.db", "worker.log"} <= {
        path.name for folder in folders for path in folder.rglob("*")
    }
    assert files_with_secret(*folders) == []
