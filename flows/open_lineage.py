"""OpenLineage: report the runs of flows and stages to a lineage service.

report_flow       report that a flow run starts, and how it ends
report_stage      report that a stage starts, and how it ends, as part of the flow run
report_published  name the version that the flow run has published among its outputs

Nothing happens unless the user has configured the OpenLineage client (``is_configured``), which is
imported only then. A thread sends the events in order, so a service that is slow or away delays no
stage. At the end of the run the thread has ``CLOSE_S`` seconds to send the rest.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING
from uuid import UUID

import yaml
from prefect.context import FlowRunContext

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import GeofmError, UsageError, first_line
from data_catalog.redaction import mask
from data_catalog.run import JobResult
from data_catalog.stage import Job, Stage
from data_catalog.stopping import Stopped

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import InputDataset, RunEvent

    from flows.open_lineage_events import NamedArtifact, RunId

log = logging.getLogger("geofm.lineage")

#: Seconds that the end of a run waits for events that are not sent yet.
CLOSE_S = 3.0
#: Namespace of the jobs, unless OPENLINEAGE_NAMESPACE names another.
NAMESPACE = "geofm"
#: Errors of the client and of its transports. After another one, which its author has not
#: foreseen, no more events are sent.
_REFUSED = (LookupError, OSError, RuntimeError, TypeError, ValueError)
#: Variables each of which configures the client.
_VARIABLES = ("OPENLINEAGE_URL", "OPENLINEAGE__TRANSPORT", "OPENLINEAGE__TRANSPORT__TYPE")


class LineageUnavailable(UsageError):
    """OpenLineage is configured, but its client cannot be used."""


class EventSender:
    """Send events in a thread, in order; a failure is logged once and fails nothing.

    Args:
        client: The client of OpenLineage.
    """

    def __init__(self, client: OpenLineageClient) -> None:
        self._client = client
        self._queue: SimpleQueue[RunEvent | None] = SimpleQueue()
        self._has_warned = self._is_closed = self._has_sent_all = False
        # in the context of the flow run, so that a warning is in the log of the run
        work = copy_context().run
        self._thread = threading.Thread(
            target=work, args=(self._send_all,), name="geofm-lineage", daemon=True
        )
        self._thread.start()

    def send(self, event: RunEvent) -> None:
        """Send an event soon."""
        self._queue.put(event)

    def warn(self, reason: str) -> None:
        """Log that events are lost, once."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "OpenLineage: %s; the run goes on, and its lineage there is incomplete", reason
            )

    def close(self) -> None:
        """Wait at most ``CLOSE_S`` seconds until all events are sent; then leave out the others."""
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        self._is_closed = True
        if self._thread.is_alive():
            self.warn(f"{self._address()} takes too long to accept events")
        elif not self._has_sent_all:
            self.warn(f"{self._address()} failed")

    def _send_all(self) -> None:
        """Send events until the end of the queue."""
        while (event := self._queue.get()) is not None and not self._is_closed:
            try:
                self._client.emit(event)
            except _REFUSED as error:
                self.warn(f"{self._address()} does not accept events ({mask(first_line(error))})")
        self._client.close(CLOSE_S)
        self._has_sent_all = True

    def _address(self) -> str:
        """Return where the client sends events, without secrets."""
        transport = self._client.transport
        path = getattr(getattr(transport, "config", None), "log_file_path", None)
        address = getattr(transport, "url", None) or path
        return mask(str(address)) if address else f"the transport {transport.kind}"


@dataclass
class FlowReport:
    """The report of a flow run.

    Attributes:
        names: Names of the datasets and models that the run has made, by digest.
        published: Versions that the run has published.
    """

    run: RunId
    sender: EventSender
    names: dict[str, str] = field(default_factory=dict)
    published: list[NamedArtifact] = field(default_factory=list)

    def send(self, make: Callable[[], RunEvent]) -> None:
        """Make and send an event. A record that cannot be read must not end the run."""
        try:
            self.sender.send(make())
        except (GeofmError, LookupError, OSError, TypeError, ValueError) as error:
            self.sender.warn(f"an event cannot be made ({mask(first_line(error))})")

    def name(self, artifact: Artifact, catalogue: Catalogue) -> NamedArtifact:
        """Find the name and version under which an artifact is published."""
        from flows.open_lineage_events import NamedArtifact

        if artifact.kind not in ("dataset", "model"):
            return NamedArtifact(artifact)
        name = self.names.get(artifact.digest, "")
        rows = [row for row in catalogue.names() if row.digest == artifact.digest]
        for row in sorted(rows, key=lambda row: row.name != name):
            return NamedArtifact(artifact, row.name, f"{row.name}@{row.version}")
        return NamedArtifact(artifact, name)


#: The report of the flow run, which its threads inherit; None if there is none.
_report: ContextVar[FlowReport | None] = ContextVar("geofm_lineage_report", default=None)


def is_configured() -> bool:
    """Tell whether the user has configured where the OpenLineage client sends events.

    These are the client's own rules, except that it prints events if nothing is configured.

    Raises:
        LineageUnavailable: The configuration file cannot be read.
    """
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return False
    if any(os.environ.get(name) for name in _VARIABLES):
        return True
    named = os.environ.get("OPENLINEAGE_CONFIG")
    files = [Path("openlineage.yml"), Path.home() / ".openlineage" / "openlineage.yml"]
    for path in [Path(named), *files] if named else files:
        if path.is_file():
            return _names_transport(path)
    return False


def _names_transport(path: Path) -> bool:
    """Tell whether a configuration file of the client names a transport."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise LineageUnavailable(
            f"the OpenLineage configuration {path} cannot be read ({first_line(error)}); correct "
            "it, or set OPENLINEAGE_DISABLED=true"
        ) from error
    transport = content.get("transport") if isinstance(content, dict) else None
    return isinstance(transport, dict) and bool(transport.get("type"))


def open_client() -> OpenLineageClient:
    """Open the client, which reads its own configuration.

    Raises:
        LineageUnavailable: It is not installed, or its configuration is wrong.
    """
    try:
        from openlineage.client import OpenLineageClient
    except ImportError as error:
        raise LineageUnavailable(
            "OpenLineage is configured, but its client is not installed: pip install "
            "'geofm[lineage]', or set OPENLINEAGE_DISABLED=true"
        ) from error
    try:
        return OpenLineageClient()
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LineageUnavailable(
            f"the OpenLineage client refuses its configuration ({first_line(error)}); correct "
            "OPENLINEAGE_URL, OPENLINEAGE__TRANSPORT__… or openlineage.yml, or set "
            "OPENLINEAGE_DISABLED=true"
        ) from error


@contextmanager
def report_flow() -> Iterator[None]:
    """Report the flow run of the caller: that it starts, and how the block ends.

    Raises:
        LineageUnavailable: OpenLineage is configured, but cannot be used.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow is None or not is_configured():
        yield
        return
    client = open_client()
    from openlineage.client.event_v2 import RunState

    from flows.open_lineage_events import RunId, error_facets, output_dataset, run_event

    namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or NAMESPACE
    run = RunId(namespace, context.flow.name, "FLOW", str(context.flow_run.id))
    report = FlowReport(run, EventSender(client))

    def end(_kind: object, error: BaseException | None, _trace: object) -> None:
        outputs = [] if error else report.published
        report.send(
            lambda: run_event(
                RunState(_ending(error)),
                run,
                outputs=[output_dataset(each) for each in outputs],
                facets=error_facets(error),
            )
        )

    with ExitStack() as stack:
        stack.callback(report.sender.close)
        stack.callback(_report.reset, _report.set(report))
        report.send(lambda: run_event(RunState.START, run))
        stack.push(end)
        yield


@contextmanager
def report_stage(
    stage: Stage, job: Job, catalogue: Catalogue, names: Mapping[str, str]
) -> Iterator[Callable[[JobResult], JobResult]]:
    """Report a stage of the flow run: that it starts, and how the block ends.

    Args:
        stage: The stage.
        job: Its job.
        catalogue: Catalogue with the names of published datasets and models.
        names: Name under which an artifact of a kind will be published.

    Yields:
        A function that takes note of the result and returns it.
    """
    report = _report.get()
    if report is None:
        yield lambda result: result
        return
    from openlineage.client.event_v2 import RunState

    from flows.open_lineage_events import (
        RunId,
        StageRunFacet,
        error_facets,
        input_dataset,
        output_dataset,
        run_event,
        source_datasets,
    )

    flow = report.run
    run = RunId(flow.namespace, f"geofm.{stage.name}", "STAGE", str(UUID(job.attempt)), flow)
    results: list[JobResult] = []

    def note(result: JobResult) -> JobResult:
        results.append(result)
        return result

    def inputs(items: Artifact | None = None) -> list[InputDataset]:
        if stage.name == "search":
            searched = items.manifest.facts["collections"] if items else job.settings.collections
            return source_datasets(job.settings.stac, list(searched))
        return [input_dataset(report.name(each, catalogue)) for each in job.inputs.values()]

    def complete() -> RunEvent:
        artifact, metrics = results[0].artifact, results[0].metrics
        if artifact.kind in names:
            report.names[artifact.digest] = names[artifact.kind]
        facet = StageRunFacet(stage.version, unchanged=bool(metrics.get("cached")))
        output = output_dataset(report.name(artifact, catalogue))
        return run_event(RunState.COMPLETE, run, inputs(artifact), [output], {"geofm_stage": facet})

    def fail(error: BaseException) -> RunEvent:
        return run_event(RunState(_ending(error)), run, inputs(), facets=error_facets(error))

    def end(_kind: object, error: BaseException | None, _trace: object) -> None:
        report.send(complete if error is None else lambda: fail(error))

    report.send(lambda: run_event(RunState.START, run, inputs()))
    with ExitStack() as stack:
        stack.push(end)
        yield note


def report_published(artifact: Artifact, name: str, version: str) -> None:
    """Name a published version among the outputs of the flow run.

    Args:
        artifact: The published dataset or model.
        name: Its name.
        version: Its version, without the name.
    """
    report = _report.get()
    if report is not None:
        from flows.open_lineage_events import NamedArtifact

        report.published.append(NamedArtifact(artifact, name, f"{name}@{version}"))


def _ending(error: BaseException | None) -> str:
    """Return the state in which a run ends: complete, stopped by someone, or failed."""
    if error is None:
        return "COMPLETE"
    stopped = isinstance(error, Stopped) or not isinstance(error, Exception)
    return "ABORT" if stopped else "FAIL"
