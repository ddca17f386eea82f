"""OpenLineage: what is reported, to whom, and that a service that is away costs seconds at most."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import jsonschema
import pytest
from openlineage.client import event_v2, facet_v2
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from pydantic import BaseModel

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.run import make_job, run_job
from data_catalog.stage import Job, Sealed, Stage, no_parts, no_work
from data_catalog.stopping import Stopped
from data_catalog.store import Store, open_store
from flows import open_lineage, open_lineage_events
from flows.open_lineage import (
    LineageUnavailable,
    is_configured,
    report_flow,
    report_published,
    report_stage,
)
from flows.pipeline import refresh_flow
from geofm.stages import DATA_STAGES
from tests.flows.conftest import SMALL, Outcome
from tests.flows.test_imports import imported_by

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECRET = "hunter2"
#: The catalogue of the hand-made search, with a secret that no event may show.
STAC = f"https://user:{SECRET}@stac.example/api?token={SECRET}"
#: What the specification demands of an event and of the facets in it.
FACETS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["_producer", "_schemaURL"],
        "properties": {
            "_producer": {"pattern": r"^\w+:."},
            "_schemaURL": {"pattern": r"^\w+:.+#/"},
        },
    },
}
NAMED = {
    "type": "object",
    "required": ["namespace", "name"],
    "properties": {
        "namespace": {"type": "string", "minLength": 1},
        "name": {"type": "string", "minLength": 1},
        "facets": FACETS, "inputFacets": FACETS, "outputFacets": FACETS,
    },
    "additionalProperties": False,
}  # fmt: skip
EVENT = {
    "type": "object",
    "required": ["eventTime", "eventType", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventType": {"enum": ["START", "COMPLETE", "FAIL", "ABORT"]},
        "eventTime": {"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*[+]00:00$"},
        "producer": {"type": "string"},
        "schemaURL": {"pattern": r"^https://openlineage.io/spec/2-.*RunEvent$"},
        "run": {
            "type": "object",
            "required": ["runId"],
            "properties": {"runId": {"pattern": r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                           "facets": FACETS},
        },
        "job": NAMED,
        "inputs": {"type": "array", "items": NAMED},
        "outputs": {"type": "array", "items": NAMED},
    },
    "additionalProperties": False,
}  # fmt: skip
#: Class of each facet that geofm uses, by its key.
CLASSES = {
    "parent": facet_v2.parent_run.ParentRunFacet,
    "processing_engine": facet_v2.processing_engine_run.ProcessingEngineRunFacet,
    "errorMessage": facet_v2.error_message_run.ErrorMessageRunFacet,
    "geofm_stage": open_lineage_events.StageRunFacet,
    "tags": facet_v2.tags_run.TagsRunFacet,
    "jobType": facet_v2.job_type_job.JobTypeJobFacet,
    "version": facet_v2.dataset_version_dataset.DatasetVersionDatasetFacet,
    "geofm_artifact": open_lineage_events.ArtifactDatasetFacet,
    "outputStatistics":
        facet_v2.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet,
}  # fmt: skip
Json = dict[str, Any]


def check(event: Json) -> None:
    """Validate an event against the specification, the client's classes and geofm's schemas."""
    jsonschema.validate(event, EVENT)
    own = json.loads((DOCS / "lineage-facets.json").read_text())
    for facets in all_facets(event):
        for key, facet in facets.items():
            made = CLASSES[key](**{k: v for k, v in facet.items() if k[0] != "_"})
            assert made._get_schema() == facet["_schemaURL"], key
            if key.startswith("geofm_"):
                base, _, pointer = facet["_schemaURL"].partition("#")
                assert base == own["$id"]
                jsonschema.validate(facet, {**own, "$ref": f"#{pointer}"})
    event_v2.RunEvent(
        eventTime=event["eventTime"],
        eventType=event_v2.RunState(event["eventType"]),
        run=event_v2.Run(event["run"]["runId"]),
        job=event_v2.Job(event["job"]["namespace"], event["job"]["name"]),
        producer=event["producer"],
    )


def all_facets(event: Json) -> Iterator[Json]:
    yield event["run"]["facets"]
    yield event["job"]["facets"]
    for dataset in [*event["inputs"], *event["outputs"]]:
        for key in ("facets", "inputFacets", "outputFacets"):
            yield dataset.get(key, {})


class SearchLike(BaseModel):
    stac: str = STAC
    collections: list[str] = ["first"]
    fail: str = ""


class PackLike(BaseModel):
    name: str = "corpus"


def list_items(job: Job, parts: list[Path], out: Path) -> Sealed:
    if job.settings.fail == "stopped":
        raise Stopped("stopped")
    if job.settings.fail == "interrupt":
        raise KeyboardInterrupt
    if job.settings.fail:
        raise OSError(f"cannot read {STAC}")
    (out / "items.txt").write_text("four items")
    sources = [{"source": name, "licence": name, "rows": 2} for name in ("CC0-1.0", "CC-BY-4.0")]
    return Sealed(
        {"rows_in": 5, "rows_out": 4},
        dropped={"cloudy": 1},
        facts={"collections": ["first", "second"], "sources": sources},
    )


def write_dataset(job: Job, parts: list[Path], out: Path) -> Sealed:
    (out / "shard.tar").write_bytes(b"12345678")
    return Sealed({"rows_in": 4, "rows_out": 4})


SEARCH = Stage("search", "7", "items", (), (), no_parts, no_work, list_items)
PACK = Stage("pack", "2", "dataset", ("items",), (), no_parts, no_work, write_dataset)
#: A stage with a dataset as its input.
SUMMARY = Stage("report", "1", "report", ("dataset",), (), no_parts, no_work, write_dataset)
NAMES = {"dataset": "corpus", "model": "corpus-model"}


@pytest.fixture(autouse=True)
def unconfigured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the configuration of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def catalogue(store: Store) -> Catalogue:
    return open_catalogue(f"sqlite:///{store.local_root}/catalogue.db", store)


@pytest.fixture
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which events go."""
    path = tmp_path / "events.jsonl"
    configuration = {"type": "file", "log_file_path": str(path), "append": True}
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps(configuration))
    return path


@contextmanager
def flow_run() -> Iterator[UUID]:
    """Be inside a run of geofm-refresh, without a server."""
    run = FlowRun(flow_id=uuid4())
    token = FlowRunContext.__var__.set(
        FlowRunContext.model_construct(flow=refresh_flow, flow_run=run)
    )
    try:
        yield run.id
    finally:
        FlowRunContext.__var__.reset(token)


def run_stage(
    stage: Stage, catalogue: Catalogue, settings: BaseModel, **inputs: Artifact
) -> Artifact:
    job = make_job(stage, catalogue.store, inputs, settings)
    with report_stage(stage, job, catalogue, NAMES) as note:
        return note(run_job(stage, job, catalogue)).artifact


def read(path: Path) -> list[Json]:
    """Read and check the events in a file."""
    assert SECRET not in path.read_text()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        check(event)
    return events


def steps(events: list[Json]) -> list[str]:
    return [f"{event['job']['name']} {event['eventType']}" for event in events]


def test_a_run_with_its_stages_datasets_and_digests(
    catalogue: Catalogue, store: Store, log_file: Path
) -> None:
    with flow_run() as run_id, report_flow():
        items = run_stage(SEARCH, catalogue, SearchLike())
        dataset = run_stage(PACK, catalogue, PackLike(), items=items)
        catalogue.publish("corpus", dataset, "2026-11-30")
        report_published(dataset, "corpus", "2026-11-30")
        page = run_stage(SUMMARY, catalogue, PackLike(), dataset=dataset)
    events = read(log_file)
    assert steps(events) == [
        "geofm-refresh START", "geofm.search START", "geofm.search COMPLETE", "geofm.pack START",
        "geofm.pack COMPLETE", "geofm.report START", "geofm.report COMPLETE",
        "geofm-refresh COMPLETE",
    ]  # fmt: skip
    assert {event["job"]["namespace"] for event in events} == {"geofm"}
    flow, stages = [events[0], events[-1]], events[1:-1]
    assert [event["run"]["runId"] for event in flow] == [str(run_id)] * 2
    for event in stages:
        parent = event["run"]["facets"]["parent"]
        assert parent["run"] == {"runId": str(run_id), "facets": {}}
        assert (parent["job"]["namespace"], parent["job"]["name"]) == ("geofm", "geofm-refresh")
        assert event["job"]["facets"]["jobType"]["jobType"] == "STAGE"
    assert len({event["run"]["runId"] for event in events}) == 4
    times = [event["eventTime"] for event in events]
    assert times == sorted(times)

    _, search, pack_start, pack, summary, _ = stages
    assert [(i["namespace"], i["name"]) for i in stages[0]["inputs"]] == [
        ("https://stac.example/api", "first")
    ]
    assert [i["name"] for i in search["inputs"]] == ["first", "second"]
    (output,) = search["outputs"]
    assert output["namespace"] == store.local_root.as_uri()
    assert output["name"] == f"items/{items.digest[:12]}"
    assert output["facets"]["version"]["datasetVersion"] == items.digest
    record = output["facets"]["geofm_artifact"]
    assert {key: value for key, value in record.items() if key[0] != "_"} == {
        "digest": items.digest, "kind": "items", "schemaVersion": "geofm/1", "stage": "search",
        "stageVersion": "7", "counts": {"rows_in": 5, "rows_out": 4}, "dropped": {"cloudy": 1},
        "licences": ["CC-BY-4.0", "CC0-1.0"],
    }  # fmt: skip
    assert search["run"]["facets"]["geofm_stage"]["unchanged"] is False
    assert pack_start["inputs"] == pack["inputs"]
    assert pack["inputs"][0]["name"] == output["name"]
    assert pack["inputs"][0]["facets"] == output["facets"]
    statistics = pack["outputs"][0]["outputFacets"]["outputStatistics"]
    assert [statistics[key] for key in ("rowCount", "size", "fileCount")] == [4, 8, 1]

    # the dataset has its name before it is published, as an input, and among the flow's outputs
    named = [pack["outputs"][0], summary["inputs"][0], flow[1]["outputs"][0]]
    assert {dataset["name"] for dataset in named} == {"corpus"}
    assert {d["facets"]["version"]["datasetVersion"] for d in named} == {dataset.digest}
    versions = [d["facets"]["geofm_artifact"].get("published") for d in named]
    assert versions == [None, "corpus@2026-11-30", "corpus@2026-11-30"]
    assert stages[-1]["outputs"][0]["name"] == f"report/{page.digest[:12]}"


def test_a_stage_that_finds_its_result_says_so(catalogue: Catalogue, log_file: Path) -> None:
    for _ in range(2):
        with flow_run(), report_flow():
            items = run_stage(SEARCH, catalogue, SearchLike())
    events = [event for event in read(log_file) if event["eventType"] == "COMPLETE"]
    stages = [event for event in events if event["job"]["name"] == "geofm.search"]
    facets = [event["run"]["facets"]["geofm_stage"]["unchanged"] for event in stages]
    assert facets == [False, True]
    assert stages[0]["outputs"] == stages[1]["outputs"]
    assert stages[0]["outputs"][0]["facets"]["version"]["datasetVersion"] == items.digest


@pytest.mark.parametrize(
    ("fail", "raised", "ending"),
    [
        ("error", OSError, "FAIL"),
        ("stopped", Stopped, "ABORT"),
        ("interrupt", KeyboardInterrupt, "ABORT"),
    ],
)
def test_how_a_run_ends(
    fail: str, raised: type[BaseException], ending: str, catalogue: Catalogue, log_file: Path
) -> None:
    with pytest.raises(raised), flow_run(), report_flow():
        run_stage(SEARCH, catalogue, SearchLike(fail=fail))
    events = read(log_file)
    assert steps(events) == [
        "geofm-refresh START", "geofm.search START", f"geofm.search {ending}",
        f"geofm-refresh {ending}",
    ]  # fmt: skip
    for event in events[2:]:
        message = event["run"]["facets"]["errorMessage"]
        assert message["message"].startswith(raised.__name__)
        assert message["programmingLanguage"] == "PYTHON"


def test_a_record_that_cannot_be_read_ends_no_run(
    catalogue: Catalogue, store: Store, log_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = store.artifact("dataset", "0" * 64)
    with flow_run(), report_flow():
        report_published(gone, "corpus", "2026-11-30")
    assert steps(read(log_file)) == ["geofm-refresh START"]
    (record,) = (r for r in caplog.records if r.name == "geofm.lineage")
    assert "an event cannot be made" in record.getMessage()


@dataclass
class Service:
    """A lineage service on loopback: it notes what arrives and answers with ``status``."""

    status: int = 201
    url: str = ""
    events: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def service() -> Iterator[Service]:
    noted = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            noted.events.append(json.loads(body))
            noted.headers.append(dict(self.headers))
            noted.paths.append(self.path)
            self.send_response(noted.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    noted.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield noted
    server.shutdown()
    server.server_close()


def test_events_go_to_a_service_with_its_key_and_namespace(
    service: Service, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_URL", service.url)
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "the-key")
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "team")
    with flow_run(), report_flow():
        run_stage(SEARCH, catalogue, SearchLike())
    assert steps(service.events) == [
        "geofm-refresh START", "geofm.search START", "geofm.search COMPLETE",
        "geofm-refresh COMPLETE",
    ]  # fmt: skip
    for event in service.events:
        check(event)
        assert event["job"]["namespace"] == "team"
    assert set(service.paths) == {"/api/v1/lineage"}
    assert {headers["Authorization"] for headers in service.headers} == {"Bearer the-key"}
    assert "the-key" not in json.dumps(service.events)


@pytest.mark.parametrize("how", ["refuses", "hangs", "forbids"])
def test_a_service_that_is_away_costs_seconds_and_one_warning(
    how: str,
    service: Service,
    catalogue: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        if how == "hangs":
            silent.listen()
        if how == "forbids":
            service.status, port = 403, int(service.url.rpartition(":")[2])
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://user:{SECRET}@127.0.0.1:{port}")
        started = time.monotonic()
        with flow_run(), report_flow():
            items = run_stage(SEARCH, catalogue, SearchLike())
            in_stage = time.monotonic() - started
        seconds = time.monotonic() - started
    assert items.manifest.counts["rows_out"] == 4
    assert in_stage < 2.5  # the client is imported and a stage is run
    assert seconds < in_stage + open_lineage.CLOSE_S + 1
    warnings = [r for r in caplog.records if r.name == "geofm.lineage"]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    text = warnings[0].getMessage()
    assert f"127.0.0.1:{port}" in text and SECRET not in text
    if how == "forbids":
        assert "403" in text and len(service.events) == 4


@pytest.mark.parametrize(
    ("environment", "file", "wanted"),
    [
        ({}, "", False),
        ({"OPENLINEAGE_NAMESPACE": "team"}, "", False),
        ({"OPENLINEAGE_URL": "http://127.0.0.1:5000"}, "", True),
        ({"OPENLINEAGE__TRANSPORT__TYPE": "console"}, "", True),
        ({"OPENLINEAGE__TRANSPORT": '{"type": "console"}'}, "", True),
        ({"OPENLINEAGE_URL": "http://127.0.0.1:5000", "OPENLINEAGE_DISABLED": "True"}, "", False),
        ({}, "openlineage.yml", True),
        ({}, "home/.openlineage/openlineage.yml", True),
        ({"OPENLINEAGE_CONFIG": "mine.yml"}, "mine.yml", True),
        ({"OPENLINEAGE_CONFIG": "other.yml"}, "mine.yml", False),
    ],
)
def test_what_configures_it_is_what_configures_the_client(
    environment: dict[str, str],
    file: str,
    wanted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if file:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("transport: {type: console}\n")
    assert is_configured() is wanted
    caplog.set_level(logging.INFO)
    kind = open_lineage.open_client().transport.kind
    fallback = "Couldn't find any OpenLineage transport" in caplog.text
    assert wanted is (kind != "noop" and not fallback)
    if file and wanted:
        path.write_text("facets: {}\n")
        assert not is_configured()
        path.write_text("transport: [")
        with pytest.raises(LineageUnavailable, match=path.name):
            is_configured()


def test_without_configuration_the_client_is_not_imported() -> None:
    program = """
import flows.pipeline
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from uuid import uuid4
run = FlowRun(flow_id=uuid4())
FlowRunContext.__var__.set(
    FlowRunContext.model_construct(flow=flows.pipeline.refresh_flow, flow_run=run)
)
with flows.pipeline._logged():
    print("inside")
"""
    names = imported_by(program)
    assert {"flows", "prefect"} <= names
    assert "openlineage" not in names


def test_a_client_that_cannot_be_used_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "no.such.Transport")
    refused = pytest.raises(LineageUnavailable, match="OPENLINEAGE__TRANSPORT")
    with flow_run(), refused, report_flow():
        raise AssertionError("the run must not begin")
    for name in [name for name in sys.modules if name.partition(".")[0] == "openlineage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openlineage", None)
    refused = pytest.raises(LineageUnavailable, match=r"pip install 'geofm\[lineage\]'")
    with flow_run(), refused, report_flow():
        raise AssertionError("the run must not begin")


@pytest.mark.slow
@pytest.mark.long
def test_a_refresh_is_reported_as_it_was(
    geofm: Callable[..., Outcome], api: httpx.Client, tmp_path: Path
) -> None:
    log_file = tmp_path / "events.jsonl"
    configuration = {"type": "file", "log_file_path": str(log_file), "append": True}
    runs = []
    for _ in range(2):
        log_file.unlink(missing_ok=True)
        done = geofm(
            "refresh", "demo", *SMALL, "--store", str(tmp_path / "store"), "--json",
            OPENLINEAGE__TRANSPORT=json.dumps(configuration),
        )  # fmt: skip
        assert done.code == 0, done.stderr
        assert "eventType" not in done.stdout + done.stderr
        runs.append((done.json, read(log_file)))
    for number, (result, events) in enumerate(runs):
        stages = [event for event in events if event["job"]["name"].startswith("geofm.")]
        ended = {e["job"]["name"]: e for e in stages if e["eventType"] == "COMPLETE"}
        assert len(stages) == 2 * len(DATA_STAGES)
        assert {name: event["outputs"][0]["facets"]["geofm_artifact"]["digest"]
                for name, event in ended.items()} == {
            f"geofm.{stage}": digest for stage, digest in result["artifacts"].items()
        }  # fmt: skip
        assert {e["run"]["facets"]["geofm_stage"]["unchanged"] for e in ended.values()} == {
            bool(number)
        }
        # each input of a stage is the output of an earlier one, by name
        made = {e["outputs"][0]["name"] for e in ended.values()}
        search = ended.pop("geofm.search")
        assert {each["namespace"] for each in search["inputs"]} == {"planet"}
        assert {i["name"] for e in ended.values() for i in e["inputs"]} <= made
        assert ended["geofm.pack"]["outputs"][0]["name"] == "demo"
        first, last = events[0], events[-1]
        assert [first["eventType"], last["eventType"]] == ["START", "COMPLETE"]
        run = api.get(f"/flow_runs/{first['run']['runId']}").raise_for_status().json()
        assert run["state_type"] == "COMPLETED"
        published = [o["facets"]["geofm_artifact"]["published"] for o in last["outputs"]]
        assert published == ([] if number else [result["version"]["ref"]])

    wrong = geofm("refresh", "demo", *SMALL, OPENLINEAGE__TRANSPORT__TYPE="no.such.Transport")
    assert wrong.code == 2
    assert "OPENLINEAGE_DISABLED=true" in wrong.stderr
