"""What the server does by itself: tell about failures, limit the time, and forget old runs."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_catalog.errors import UsageError
from flows.automations import FAILURE_NOTICE, TIME_LIMIT, WEBHOOK_BLOCK
from flows.deployments import deploy_all
from flows.settings import NOTIFY_URL, take_notify_url
from tests.flows.ui import Ui, wait_for

#: A part of the webhook's address, as Slack has it.
TOKEN = "T0Pq7secret"


class Webhook:
    """A webhook on loopback, and what it received."""

    def __init__(self) -> None:
        received: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers["content-type"] == "application/json"
                received.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.received = received
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def automations(ui: Ui, name: str) -> list[dict[str, Any]]:
    """The automations of a name, as the API shows them."""
    return [each for each in ui.post("/automations/filter") if each["name"] == name]


def edit(ui: Ui, automation: dict[str, Any], **changes: Any) -> None:
    """Change an automation, and save it."""
    form = {"name", "description", "enabled", "tags", "trigger", "actions"}
    body = {field: value for field, value in automation.items() if field in form} | changes
    ui.request("PUT", f"/automations/{automation['id']}", json=body)


def set_state(ui: Ui, run: str, state: str, message: str = "") -> None:
    """Set the state of a run, as the process of the run does."""
    ui.post(f"/flow_runs/{run}/set_state", state={"type": state, "message": message}, force=True)


def begin(ui: Ui, deployment: str, name: str) -> str:
    """Begin a run that no worker works on."""
    place = f"/deployments/{ui.deployments()[deployment]['id']}/create_flow_run"
    run = ui.post(place, name=name, state={"type": "PENDING"}, enforce_parameter_schema=False)
    set_state(ui, run["id"], "RUNNING")
    return str(run["id"])


@pytest.mark.slow
def test_a_run_that_fails_is_one_message_to_the_webhook(
    deployed: list[str], environment: dict[str, str], api: httpx.Client, webhook: Webhook
) -> None:
    ui = Ui(api)
    assert automations(ui, FAILURE_NOTICE) == []  # nobody has asked for it
    deploy_all(deployed.append, f"{webhook.url}/first/{TOKEN}")
    (made,) = automations(ui, FAILURE_NOTICE)
    assert made["enabled"] is True
    time.sleep(2)  # the server loads the automation

    # a run in the GPU pool is the child of another one, and a terminal shows its run's end itself
    stage = begin(ui, "geofm-stage", "pretrain · demo")
    flow = ui.deployments()["geofm-refresh"]["flow_id"]
    terminal = ui.post("/flow_runs/", flow_id=flow, name="in a terminal")["id"]
    good = begin(ui, "geofm-refresh", "a good night")
    bad = begin(ui, "geofm-refresh", 'a "bad" night')
    set_state(ui, stage, "FAILED", "the stage failed")
    set_state(ui, terminal, "FAILED", "the terminal's run failed")
    set_state(ui, good, "COMPLETED")
    set_state(ui, bad, "FAILED", "UsageError: no item has\n<b02> & 'b03'")
    wait_for(lambda: webhook.received, 60)
    time.sleep(3)  # for messages that should not be there
    link = f"{environment['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/{bad}"
    text = (
        'geofm: the run a "bad" night ended as Failed: '
        f"UsageError: no item has\n<b02> & 'b03'\n{link}"
    )
    assert webhook.received == [(f"/first/{TOKEN}", {"text": text})]

    # an update without the address leaves the notice; with another address, only that changes
    edited = {**made["actions"][0], "payload": '{"text": {{ flow_run.state.name | tojson }} }'}
    edit(ui, made, actions=[edited])
    deploy_all(deployed.append)
    deploy_all(deployed.append, f"{webhook.url}/second/{TOKEN}")
    time.sleep(2)
    set_state(ui, begin(ui, "geofm-audit", "an audit"), "CRASHED")
    wait_for(lambda: len(webhook.received) > 1, 60)
    assert webhook.received[1:] == [(f"/second/{TOKEN}", {"text": "Crashed"})]

    # the address is readable neither in the database nor in the log nor in an event
    assert not any(TOKEN in line for line in deployed)
    home = Path(environment["GEOFM_HOME"])
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {"server.log", "prefect.db"} <= {path.name for path in files}
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []

    # a block that was deleted comes back with the next address
    block = api.get(f"/block_types/slug/webhook/block_documents/name/{WEBHOOK_BLOCK}").json()
    assert TOKEN not in str(block)
    ui.delete(f"/block_documents/{block['id']}")
    deploy_all(deployed.append, f"{webhook.url}/third/{TOKEN}")
    (again,) = automations(ui, FAILURE_NOTICE)
    assert again["actions"][0]["block_document_id"] != block["id"]
    for run in (stage, terminal, good, bad):
        ui.delete(f"/flow_runs/{run}")


def test_the_webhook_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_notify_url() == ""
    monkeypatch.setenv(NOTIFY_URL, f" https://hooks.example/{TOKEN}\n")
    assert take_notify_url() == f"https://hooks.example/{TOKEN}"
    assert take_notify_url() == ""
    for wrong in (TOKEN, f"ftp://hooks.example/{TOKEN}", f"https:///{TOKEN}", f"http://[{TOKEN}"):
        monkeypatch.setenv(NOTIFY_URL, wrong)
        with pytest.raises(UsageError, match=NOTIFY_URL) as error:
            take_notify_url()
        assert TOKEN not in str(error.value)


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_cancelled(deployed: list[str], api: httpx.Client) -> None:
    ui = Ui(api)
    (limit,) = automations(ui, TIME_LIMIT)
    assert limit["enabled"] is False
    assert limit["trigger"]["within"] == 24 * 3600
    # a user switches it on, with another time
    edit(ui, limit, enabled=True, trigger={**limit["trigger"], "within": 10})
    deploy_all(deployed.append)
    (kept,) = automations(ui, TIME_LIMIT)
    assert (kept["enabled"], kept["trigger"]["within"]) == (True, 10)
    time.sleep(2)  # the server loads the change

    hangs = begin(ui, "geofm-refresh", "hangs")
    ends = begin(ui, "geofm-refresh", "ends")
    child = begin(ui, "geofm-stage", "a child")
    set_state(ui, ends, "COMPLETED")
    wait_for(lambda: ui.read(hangs)["state_type"] == "CANCELLING", 60)
    assert TIME_LIMIT in ui.read(hangs)["state"]["message"]
    assert ui.read(ends)["state_type"] == "COMPLETED"
    assert ui.read(child)["state_type"] == "RUNNING"  # its parent's run cancels it
    edit(ui, limit)
    for run in (hangs, ends, child):
        ui.delete(f"/flow_runs/{run}")


@pytest.mark.slow
def test_runs_that_ended_long_ago_leave_the_database(
    deployed: list[str], environment: dict[str, str], api: httpx.Client
) -> None:
    ui = Ui(api)
    old, recent = begin(ui, "geofm-refresh", "old"), begin(ui, "geofm-refresh", "recent")
    hangs = begin(ui, "geofm-refresh", "has never ended")
    now = datetime.now(UTC)
    line = {"name": "geofm.run", "level": 20, "message": "a line", "timestamp": str(now)}
    lines = [{**line, "flow_run_id": run} for run in (old, recent)]
    ui.request("POST", "/logs/", json=lines)
    for run in (old, recent):
        ui.post("/artifacts/", key="geofm-summary-demo", type="markdown", data="#", flow_run_id=run)
        set_state(ui, run, "COMPLETED")
    query = {"logs": {"flow_run_id": {"any_": [old, recent]}}}
    wait_for(lambda: len(ui.post("/logs/filter", **query)) == 2, 30)
    # no client can set the time at which a run ended
    then = str((now - timedelta(days=91)).replace(tzinfo=None))
    database = Path(environment["GEOFM_HOME"]) / "prefect" / "prefect.db"
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        changed = connection.execute("UPDATE flow_run SET end_time=? WHERE id=?", (then, old))
        changed_too = connection.execute(
            "UPDATE flow_run SET start_time=? WHERE id=?", (then, hangs)
        )
        assert (changed.rowcount, changed_too.rowcount) == (1, 1)

    wait_for(lambda: api.get(f"/flow_runs/{old}").status_code == 404, 60)
    wait_for(lambda: len(ui.post("/logs/filter", **query)) == 1, 60)
    artifacts = {"artifacts": {"flow_run_id": {"any_": [old, recent]}}}
    assert [each["flow_run_id"] for each in ui.post("/artifacts/filter", **artifacts)] == [recent]
    assert [ui.read(run)["state_type"] for run in (recent, hangs)] == ["COMPLETED", "RUNNING"]
    for run in (recent, hangs):
        ui.delete(f"/flow_runs/{run}")
