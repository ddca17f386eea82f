"""The OpenLineage events of a run, as typed objects of the client library.

This module imports the client library, which takes a second: only flows/open_lineage.py imports
it, and only if OpenLineage is configured. docs/lineage-facets.json has the schemas of the facets
that are geofm's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    RunFacet,
    dataset_version_dataset,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    parent_run,
    processing_engine_run,
    set_producer,
)

from data_catalog.artifact import Artifact
from data_catalog.provenance.licences import source_licences
from data_catalog.redaction import mask, without_secrets
from data_catalog.store import Store

#: Identifies geofm as the source of an event or facet.
PRODUCER = f"urn:geofm:{version('geofm')}"
#: Identifies the schemas of geofm's own facets: the ``$id`` of docs/lineage-facets.json.
SCHEMAS = "urn:geofm:lineage-facets:1"
#: Longest message of an error (characters) that an event carries.
MAX_MESSAGE = 2000

set_producer(PRODUCER)


@dataclass(frozen=True)
class RunId:
    """A run of a flow or of a stage, and the job that it is a run of.

    Attributes:
        kind: ``FLOW`` or ``STAGE``.
        id: UUID of the run.
        parent: Run of the flow, for a run of a stage.
    """

    namespace: str
    job: str
    kind: str
    id: str
    parent: RunId | None = None


@dataclass(frozen=True)
class NamedArtifact:
    """An artifact with the name of its dataset in OpenLineage.

    Attributes:
        name: Name of a dataset or model. Empty for an artifact that has none: its name is then made
            of kind and digest.
        version: Version ``NAME@VERSION`` as which it is published; empty if it is not, or not yet.
    """

    artifact: Artifact
    name: str = ""
    version: str = ""


@attrs.define
class ArtifactDatasetFacet(DatasetFacet):
    """Facet ``geofm_artifact``: the record of a sealed artifact, from its manifest."""

    digest: str
    kind: str
    schemaVersion: str  # noqa: N815  facets are written in camel case
    stage: str
    stageVersion: str  # noqa: N815
    counts: dict[str, int]
    dropped: dict[str, int]
    licences: list[str] | None = None
    published: str | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{SCHEMAS}#/$defs/ArtifactDatasetFacet"


@attrs.define
class StageRunFacet(RunFacet):
    """Facet ``geofm_stage``: whether a stage has found its result, and computed nothing."""

    stageVersion: str  # noqa: N815
    unchanged: bool

    @staticmethod
    def _get_schema() -> str:
        return f"{SCHEMAS}#/$defs/StageRunFacet"


def run_event(
    state: RunState,
    run: RunId,
    inputs: Sequence[InputDataset] = (),
    outputs: Sequence[OutputDataset] = (),
    facets: Mapping[str, RunFacet] | None = None,
) -> RunEvent:
    """Return an event of a run, with the present time.

    Args:
        state: What has happened to the run.
        run: The run.
        inputs: Datasets that the run reads.
        outputs: Datasets that the run has written.
        facets: Facets of the run, besides those of every event.
    """
    engine = processing_engine_run.ProcessingEngineRunFacet(version("prefect"), name="Prefect")
    run_facets: dict[str, RunFacet] = {"processing_engine": engine, **(facets or {})}
    if run.parent is not None:
        run_facets["parent"] = parent_run.ParentRunFacet(
            parent_run.Run(run.parent.id), parent_run.Job(run.parent.namespace, run.parent.job)
        )
    job_type = job_type_job.JobTypeJobFacet("BATCH", integration="GEOFM", jobType=run.kind)
    return RunEvent(
        eventTime=datetime.now(UTC).isoformat(),
        eventType=state,
        run=Run(run.id, run_facets),
        job=Job(run.namespace, run.job, {"jobType": job_type}),
        inputs=list(inputs),
        outputs=list(outputs),
        producer=PRODUCER,
    )


def input_dataset(named: NamedArtifact) -> InputDataset:
    """Return an artifact as an input."""
    return InputDataset(*_identity(named), facets=_facets(named))


def output_dataset(named: NamedArtifact) -> OutputDataset:
    """Return an artifact as an output."""
    manifest = named.artifact.manifest
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=manifest.counts.get("rows_out"),
        size=sum(entry.size for entry in manifest.files),
        fileCount=len(manifest.files),
    )
    return OutputDataset(*_identity(named), {"outputStatistics": statistics}, facets=_facets(named))


def source_datasets(catalogue: str, collections: Sequence[str]) -> list[InputDataset]:
    """Return the collections of a STAC catalogue as inputs."""
    return [InputDataset(_namespace(catalogue), name) for name in collections]


def error_facets(error: BaseException | None) -> dict[str, RunFacet]:
    """Return the facet with the message of an error, without secrets; none for no error."""
    if error is None:
        return {}
    message = mask(f"{type(error).__name__}: {error}")[:MAX_MESSAGE]
    return {"errorMessage": error_message_run.ErrorMessageRunFacet(message, "PYTHON")}


def _identity(named: NamedArtifact) -> tuple[str, str]:
    """Return namespace and name of an artifact: its store, and its own name or kind and digest."""
    artifact = named.artifact
    name = named.name or f"{artifact.kind}/{artifact.digest[:12]}"
    return _namespace(Store.of(artifact).url), name


def _namespace(address: str) -> str:
    """Return an address as a namespace: no secret, and a local path as a URI."""
    return Path(address).as_uri() if address.startswith("/") else without_secrets(address)


def _facets(named: NamedArtifact) -> dict[str, DatasetFacet]:
    """Return the facets of an artifact: its digest as the version, and its record."""
    artifact, manifest = named.artifact, named.artifact.manifest
    facts: dict[str, Any] = manifest.facts
    record = ArtifactDatasetFacet(
        digest=artifact.digest,
        kind=manifest.kind,
        schemaVersion=manifest.format,
        stage=manifest.stage,
        stageVersion=manifest.version,
        counts=manifest.counts,
        dropped=manifest.dropped,
        licences=source_licences(facts) if facts.get("sources") else None,
        published=named.version or None,
    )
    return {
        "version": dataset_version_dataset.DatasetVersionDatasetFacet(artifact.digest),
        "geofm_artifact": record,
    }
