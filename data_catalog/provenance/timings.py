"""Timings: what earlier runs of a stage took, for forecasts of later ones.

Only runs that computed something are listed. A run that found its artifact in the catalogue says
nothing about the time of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import ArtifactRow, EdgeRow, RunRow

#: Newest runs of a stage that are looked through; most of a dataset's nights change nothing.
LOOKED_AT = 400


@dataclass(frozen=True)
class Timing:
    """A finished run that computed an artifact, or those of its parts that were missing.

    Attributes:
        seconds: Wall-clock time of the run; of resumed training, of all its sessions.
        gpu_seconds: Number of GPUs held times the seconds they were held.
        kwh: Energy; None if it was not measured.
        host: Name of the machine.
        workers: Number of workers.
        processes: Number of processes that trained together.
        share: Share of the stage's parts that the run computed; 1 for a stage without parts.
        manifest: Manifest of the artifact, as JSON.
        inputs: Counts of the input artifacts, by role.
    """

    seconds: float
    gpu_seconds: float
    kwh: float | None
    host: str
    workers: int
    processes: int
    share: float
    manifest: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, int]]

    @property
    def bytes(self) -> int:
        """Size of the artifact's files."""
        return sum(int(file["size"]) for file in self.manifest["files"])


def timings_of(catalogue: Catalogue, stage: str, most: int = 8) -> list[Timing]:
    """List the newest runs of a stage that computed something, the newest first.

    Args:
        catalogue: The record.
        stage: Name of the stage.
        most: Number of runs.
    """
    query = select(RunRow).where(RunRow.stage == stage, RunRow.status == "done")
    query = query.where(RunRow.artifact.is_not(None)).order_by(RunRow.number.desc())
    with catalogue.session() as session:
        runs = [run for run in session.scalars(query.limit(LOOKED_AT)) if _share(run) > 0][:most]
        rows = {run.id: session.get(ArtifactRow, run.artifact) for run in runs}
        inputs: dict[str, dict[str, dict[str, int]]] = {}
        for digest in {run.artifact for run in runs if run.artifact}:
            # only the counts: the manifests of large chips artifacts are megabytes
            edges = select(EdgeRow.role, ArtifactRow.manifest["counts"]).where(
                EdgeRow.child == digest, ArtifactRow.digest == EdgeRow.parent
            )
            inputs[digest] = dict(session.execute(edges).tuples().all())
    return [
        Timing(
            seconds=max(float(run.seconds or 0), float(run.metrics.get("seconds", 0))),
            gpu_seconds=float(run.metrics.get("gpu_seconds", 0)),
            kwh=run.metrics.get("kwh"),
            host=run.host,
            workers=int(run.metrics.get("workers", 1)),
            processes=int(run.metrics.get("processes", 1)),
            share=_share(run),
            manifest=row.manifest,
            inputs=inputs.get(row.digest, {}),
        )
        for run in runs
        if (row := rows[run.id]) is not None
    ]


def _share(run: RunRow) -> float:
    """Return the share of its parts that a run computed; 0 if it computed nothing."""
    metrics = run.metrics
    if "parts" not in metrics:  # the artifact was found in the catalogue
        return 0.0
    parts = int(metrics["parts"])
    return int(metrics.get("parts_worked", 0)) / parts if parts else 1.0
