"""Two workers with homes, caches and folders of their own: one for data, one for training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from flows.service import workers
from geofm.stages import DATA_STAGES
from tests.flows.conftest import Outcome
from tests.flows.ui import Ui, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long]

#: A corner of the demo, as lines of the form's list of changes.
CORNER = [
    "search.bbox=5.70,45.07,5.76,45.10", "embed.size_px=64", "pretrain.batch=4",
    "pretrain.checkpoint_steps=1", "evaluate.resamples=100", "evaluate.max_images=160",
]  # fmt: skip


@dataclass(frozen=True)
class Machines:
    """Two machines that share a store and a catalogue.

    Attributes:
        folder: Holds a home, a cache and a working folder for each pool.
    """

    folder: Path
    store: str
    catalogue: str

    def cache(self, pool: str) -> Path:
        return self.folder / f"{pool} cache"

    def stop(self, pool: str) -> bool:
        """Stop the workers of a pool, as `geofm down` does."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GEOFM_HOME", str(self.folder / f"{pool} home"))
            return workers.stop_workers()

    def logged(self, pool: str) -> str:
        """The log of the worker of a pool."""
        return "".join(path.read_text() for path in self.cache(pool).rglob("worker.log"))


@pytest.fixture(scope="module")
def machines(
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    s3: str,
    postgres_url: str,
) -> Iterator[Machines]:
    """Start a worker for each pool, as two machines do."""
    folder = tmp_path_factory.mktemp("machines")
    made = Machines(folder, f"{s3}/{folder.name}", postgres_url)
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    homes = {pool: folder / f"{pool} home" for pool in ("cpu", "gpu")}
    for pool, home in homes.items():
        mine = {
            "GEOFM_HOME": str(home), "GEOFM_CACHE": str(made.cache(pool)),
            "GEOFM_STORE": made.store, "GEOFM_CATALOG": made.catalogue,
        }  # fmt: skip
        (work := folder / f"{pool} work").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "up", "--only", pool, "--detach"], cwd=work,
            env={**environment, **keys, **mine}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"of geofm-{pool}, log" in done.stdout
    yield made
    for pool in homes:
        made.stop(pool)


def test_training_runs_where_the_gpu_is(
    machines: Machines,
    environment: dict[str, str],
    api: httpx.Client,
    geofm: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    ui = Ui(api)
    run = ui.run("geofm-pretrain", epochs=1, changes=CORNER)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    (child,) = ui.children(run["id"])
    assert (child["name"], child["state_name"]) == ("pretrain · demo", "Completed")
    assert ui.stages(child["id"]) == {"pretrain": "Completed"}
    assert set(DATA_STAGES) | {"pretrain", "evaluate", "report"} <= set(ui.stages(run["id"]))

    # the summary links to the report, which asks for the password
    artifacts = ui.post("/artifacts/filter", sort="CREATED_DESC")
    (summary,) = [
        artifact["data"]
        for artifact in artifacts
        if (artifact["flow_run_id"], artifact["key"]) == (run["id"], "geofm-summary-demo")
    ]
    (link,) = re.findall(
        r"\[report\]\((http://127\.0\.0\.1:\d+/reports/\w{64}/report\.html)\)", summary
    )
    assert httpx.get(link, trust_env=False).status_code == 401
    user, _, password = environment["PREFECT_API_AUTH_STRING"].partition(":")
    page = httpx.get(link, auth=(user, password), trust_env=False)
    assert page.status_code == 200 and "<html" in page.text

    # each run was on its own machine, and no address is in the parameters
    for pool, here, there in (("cpu", run, child), ("gpu", child, run)):
        assert here["id"] in machines.logged(pool) and there["id"] not in machines.logged(pool)
    sent = str(child["parameters"])
    assert not [
        address
        for address in (str(machines.folder), machines.store, machines.catalogue)
        if address in sent
    ]

    # the dataset is that of a single machine
    alone = geofm("refresh", "demo", *[part for line in CORNER for part in ("--set", line)],
                  "--store", str(tmp_path / "alone"), "--catalog", "", "--json")  # fmt: skip
    assert alone.code == 0, alone.stderr
    store = open_store(machines.store, write=False)
    published = open_catalogue(machines.catalogue, store).resolve("demo")
    assert published.digest == alone.json["artifacts"]["pack"]


def test_a_cancelled_training_leaves_a_checkpoint(machines: Machines, api: httpx.Client) -> None:
    ui = Ui(api)
    training: dict[str, Any] = {"epochs": 3000, "changes": CORNER}
    earlier = set(machines.cache("gpu").rglob("checkpoint*"))
    run = ui.start("geofm-pretrain", **training)
    wait_for(lambda: set(machines.cache("gpu").rglob("checkpoint*")) - earlier, 400)
    (child,) = ui.children(run)
    assert not list(machines.cache("cpu").rglob("checkpoint*"))
    ui.cancel(run)
    assert ui.end(run, 45)["state_name"] == "Cancelled"
    assert ui.end(child["id"], 30)["state_name"] == "Cancelled"
    assert ui.stages(run)["pretrain"] == "Cancelled"
    assert ui.stages(child["id"]) == {"pretrain": "Cancelled"}

    again = ui.start("geofm-pretrain", **training)
    (child,) = wait_for(lambda: ui.children(again), 400)
    assert ui.logged(child["id"], "resuming after step", seconds=200)

    # geofm down on the machine with the GPU: the training says where it stopped
    assert machines.stop("gpu")
    ended = ui.end(child["id"], 45)
    assert ended["state_name"] == "Cancelled"
    assert "stopped after step" in ui.task_messages(child["id"])
    assert "was cancelled; what is done is kept" in ui.end(again, 45)["state"]["message"]
