"""``geofm up``: forms of one screen, schedules that stay as they are, a click that runs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from data_catalog.catalogue import open_catalogue
from flows.service import server, workers
from geofm.config.recipe_book import recipe_names
from geofm.stages import DATA_STAGES, get_stage
from tests.data_catalog.helpers import NO_STORE
from tests.flows.conftest import Outcome, files_with_secret
from tests.flows.ui import Ui, wait_for

pytestmark = pytest.mark.slow

#: A small part of the demo, as lines of the form's list of changes.
SMALL = ["search.bbox=5.70,45.07,5.76,45.10", "embed.size_px=64"]


@pytest.fixture
def up(geofm_process: Callable[..., Outcome], tmp_path: Path) -> Iterator[Outcome]:
    done = geofm_process("up", "--detach", "--store", str(tmp_path / "store"))
    yield done
    found = re.search(r"workers +pid (\d+)", done.stdout)
    assert workers.stop_workers() == (found is not None)
    if found:
        wait_for(lambda: not Path(f"/proc/{found[1]}/cmdline").exists(), 5)


def test_deploy_schedule_and_run(
    up: Outcome,
    geofm_process: Callable[..., Outcome],
    environment: dict[str, str],
    api: httpx.Client,
    tmp_path: Path,
) -> None:
    assert up.code == 0, up.stderr
    ui = Ui(api)
    forms = ui.deployments()
    stage = forms.pop("geofm-stage")
    assert (stage["work_pool_name"], stage["path"]) == ("geofm-gpu", None)
    assert set(forms) == {"geofm-refresh", "geofm-pretrain", "geofm-evaluate", "geofm-audit"}
    for form in forms.values():
        assert f"{form['name']}/{form['name']}: created" in up.stdout
        assert str(tmp_path) not in str(form)
        assert form["path"] is None and not form["pull_steps"]
        fields = form["parameter_openapi_schema"]["properties"]
        assert len([name for name in fields if name != "changes"]) <= 12
        for name, field in fields.items():
            assert len(field["description"]) > 15, name
            assert "anyOf" not in field and "$ref" not in field, name
    epochs = forms["geofm-pretrain"]["parameter_openapi_schema"]["properties"]["epochs"]
    assert (epochs["minimum"], epochs["default"]) == (0, 0)
    names = forms["geofm-refresh"]["parameter_openapi_schema"]["properties"]["recipe"]["enum"]
    assert names == recipe_names()

    # reports are served behind the same password
    (pages,) = re.findall(r"reports +(http://127\.0\.0\.1:\d+),", up.stdout)
    assert httpx.get(pages, trust_env=False).status_code == 401
    user, _, password = environment["PREFECT_API_AUTH_STRING"].partition(":")
    opened = wait_for(lambda: httpx.get(pages, auth=(user, password), trust_env=False), 30)
    assert opened.status_code == 200 and "No report is in this catalogue" in opened.text

    # the nightly schedule waits to be switched on, and then there are runs to come
    refresh = forms["geofm-refresh"]
    (schedule,) = refresh["schedules"]
    assert not schedule["active"]
    place = f"/deployments/{refresh['id']}/schedules/{schedule['id']}"
    mine = {"cron": "30 4 * * *", "timezone": "Europe/Paris"}
    ui.request("PATCH", place, json={"active": True, "schedule": mine})
    scheduled = {
        "deployments": {"id": {"any_": [refresh["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    assert wait_for(lambda: ui.post("/flow_runs/filter", **scheduled), 90)

    # an upgrade or a restart leaves it as it is
    again = geofm_process("up", "--detach", "--store", str(tmp_path / "store"))
    assert "geofm-refresh/geofm-refresh: up to date" in again.stdout
    (worker,) = re.findall(r"workers +pid (\d+)", up.stdout)
    assert f"workers     pid {worker}, already running" in again.stdout
    (kept,) = ui.deployments()["geofm-refresh"]["schedules"]
    assert kept["active"]
    assert {name: kept["schedule"][name] for name in mine} == mine
    ui.request("PATCH", place, json={"active": False})

    # one click: a smaller area
    run = ui.run("geofm-refresh", recipe="demo", changes=SMALL)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert re.fullmatch(r"demo · [\d,]+ chips", run["name"])
    stages, edges = ui.graph(run["id"])
    assert set(stages) == set(DATA_STAGES)
    assert set(stages.values()) == {"Completed"}
    made_by = {get_stage(name).kind: name for name in DATA_STAGES}
    wanted = {(made_by[kind], name) for name in DATA_STAGES for kind in get_stage(name).inputs}
    assert {edge for edge in edges if set(edge) <= set(DATA_STAGES)} == wanted
    assert ui.logged(run["id"], "recipe demo: search.bbox (5.7, 45.07, 5.76")
    artifacts = ui.post("/artifacts/filter")
    mine = {a["key"]: a for a in artifacts if a["flow_run_id"] == run["id"]}
    assert set(mine) == {"geofm-progress-demo", "geofm-version-demo", "geofm-summary-demo"}
    assert "scenes" in mine["geofm-summary-demo"]["data"]
    progress = mine["geofm-progress-demo"]
    assert float(progress["data"]) == 100
    assert all(f"**{stage}**" in progress["description"] for stage in DATA_STAGES)
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/store/catalogue.db", NO_STORE)
    assert [name.name for name in catalogue.names()] == ["demo"]

    # the same click finds everything in the catalogue, and a name that was typed stays
    run = ui.run("geofm-refresh", "my night", recipe="demo", changes=SMALL)
    assert (run["state"]["type"], run["name"]) == ("COMPLETED", "my night")
    stages, _ = ui.graph(run["id"])
    assert set(stages.values()) == {"Unchanged"}

    # a wrong field: the reason is in the logs
    run = ui.run("geofm-refresh", recipe="demo", changes=[*SMALL, "cut.size=3"])
    assert run["state"]["type"] == "FAILED"
    assert ui.logged(run["id"], "did you mean 'size_px'")

    # what was published can be audited
    run = ui.run("geofm-audit", reference="demo", recut=2)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert ui.logged(run["id"], "2 samples", "identical pixels")

    folders = (tmp_path, Path(environment["GEOFM_HOME"]))
    assert {"server.log", "prefect.db", "worker.log"} <= {
        path.name for folder in folders for path in folder.rglob("*")
    }
    assert files_with_secret(*folders) == []


@pytest.mark.long
def test_a_power_cut_is_seen_and_the_next_click_goes_on(
    up: Outcome, geofm_process: Callable[..., Outcome], api: httpx.Client, tmp_path: Path
) -> None:
    assert "geofm: lost runs: created" in up.stdout or ui_has_automation(api)
    ui = Ui(api)
    place = f"/deployments/{ui.deployments()['geofm-refresh']['id']}/create_flow_run"
    run = ui.post(place, parameters={"recipe": "demo", "changes": SMALL})
    address = f"/flow_runs/{run['id']}"
    wait_for(lambda: api.get(address).json()["state_type"] == "RUNNING", 180)
    tasks = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    wait_for(lambda: ui.post("/task_runs/filter", **tasks), 180)
    (worker,) = re.findall(r"workers +pid (\d+)", up.stdout)
    for pid in [int(worker), *descendants(int(worker))]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # three minutes at most
    wait_for(lambda: api.get(address).json()["state_type"] == "CRASHED", 180)
    assert "no sign of life" in api.get(address).json()["state"]["message"]

    again = geofm_process("up", "--detach", "--store", str(tmp_path / "store"))
    assert "already running" not in again.stdout
    done = ui.run("geofm-refresh", recipe="demo", changes=SMALL)
    assert done["state"]["type"] == "COMPLETED", done["state"]


@pytest.mark.long
def test_a_server_that_dies_is_started_again_and_the_run_goes_on(
    up: Outcome, api: httpx.Client, tmp_path: Path
) -> None:
    assert up.code == 0
    ui = Ui(api)
    run = ui.start("geofm-refresh", recipe="demo", changes=SMALL)
    wait_for(lambda: ui.read(run)["state_type"] == "RUNNING", 180)
    before = server.running_server()
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)

    def follower() -> server.Server | None:
        found = server.running_server()
        return found if found is not None and found.pid != before.pid else None

    def answers(address: str) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{address}/health", trust_env=False, timeout=10).is_success
        return False

    try:
        after = wait_for(follower, 120)
        assert wait_for(lambda: answers(after.api), 300)
    except AssertionError as late:
        (log,) = (tmp_path / "store").glob("worker.log")
        raise AssertionError(log.read_text()[-3000:]) from late
    if after.ui != before.ui:
        pytest.skip("another program has taken the port meanwhile, so workers start again")
    assert ui.end(run)["state_type"] == "COMPLETED"


def ui_has_automation(api: httpx.Client) -> bool:
    """Another test of the session may have made it, on the same server."""
    found = api.post("/automations/filter", json={}).raise_for_status().json()
    return any(one["name"] == "geofm: lost runs" for one in found)


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and of theirs."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found
