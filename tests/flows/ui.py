"""What a user does in the UI of Prefect, by the requests that it makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from geofm.stages import DATA_STAGES

Found = TypeVar("Found")
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def wait_for(what: Callable[[], Found], seconds: float) -> Found:
    """The first true answer within a time; fails the test otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s")


class Ui:
    """A user of the UI."""

    def __init__(self, api: httpx.Client) -> None:
        self.api = api

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send a request again if the server is busy, as the UI and the client do."""
        for _ in range(5):
            answer = self.api.request(method, path, **arguments)
            if answer.status_code != 503:
                break
            time.sleep(2)
        return answer.raise_for_status()

    def post(self, path: str, **json: Any) -> Any:
        return self.request("POST", path, json=json).json()

    def delete(self, path: str) -> None:
        """Delete an object, such as /flow_runs/ID."""
        self.request("DELETE", path)

    def deployments(self) -> dict[str, Any]:
        query = {"tags": {"all_": ["geofm"]}}
        return {one["name"]: one for one in self.post("/deployments/filter", deployments=query)}

    def start(self, deployment: str, name: str | None = None, **parameters: Any) -> str:
        """Fill in a form and submit it; returns the id of the run."""
        place = f"/deployments/{self.deployments()[deployment]['id']}/create_flow_run"
        run = self.post(place, parameters=parameters, **({"name": name} if name else {}))
        return str(run["id"])

    def read(self, run: str) -> dict[str, Any]:
        """Read a run."""
        found: dict[str, Any] = self.api.get(f"/flow_runs/{run}").raise_for_status().json()
        return found

    def end(self, run: str, seconds: float = 400) -> dict[str, Any]:
        """Wait for the end of a run, and read it."""
        wait_for(lambda: self.read(run)["state_type"] in ENDED, seconds)
        return self.read(run)

    def run(self, deployment: str, name: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Fill in a form, submit it, and wait for the end of the run."""
        return self.end(self.start(deployment, name, **parameters))

    def cancel(self, run: str) -> None:
        """Click on Cancel."""
        self.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})

    def children(self, run: str) -> list[dict[str, Any]]:
        """Read the child runs of a run, the latest first."""
        tasks = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        parents = {"parent_task_run_id": {"any_": [task["id"] for task in tasks]}}
        found: list[dict[str, Any]] = self.post(
            "/flow_runs/filter", flow_runs=parents, sort="START_TIME_DESC"
        )
        return found

    def stages(self, run: str) -> dict[str, str]:
        """Read the names and states of the tasks of a run."""
        tasks = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {task["name"]: task["state_name"] for task in tasks}

    def task_messages(self, run: str) -> str:
        """Read the messages of the states of a run's tasks."""
        tasks = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return "\n".join(str(task["state"]["message"]) for task in tasks)

    def graph(self, run: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
        """The state of each stage's task, and the edges between them, in the UI's graph."""
        found = self.api.get(f"/flow_runs/{run}/graph-v2").raise_for_status().json()
        nodes = dict(found["nodes"])
        states = self.stages(run)
        stages = {node["label"]: states[node["label"]] for node in nodes.values()
                  if node["label"] in DATA_STAGES}  # fmt: skip
        edges = {
            (node["label"], nodes[child["id"]]["label"])
            for node in nodes.values()
            for child in node["children"]
        }
        return stages, edges

    def logged(self, run: str, *words: str, seconds: float = 30) -> bool:
        """Whether a line of a run's log has some words; lines arrive a little after the end."""
        query = {"flow_run_id": {"any_": [run]}}

        def found() -> bool:
            lines = [line["message"] for line in self.post("/logs/filter", logs=query)]
            return any(all(word in line for word in words) for line in lines)

        return wait_for(found, seconds)
