"""Costs: time, GPU time, energy and carbon of an artifact and of everything it was made from.

A job may have been stopped and started again. All its sessions count, including killed ones: a run
notes what it has spent as it goes. An artifact that was found in the catalogue has the cost of the
run that made it, with the cost of the parts that earlier runs of other jobs had computed. In a
lineage each artifact and each part counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.schema import RunRow
from data_catalog.store import Store

#: Figures that are summed over sessions and stages, where they were measured.
MEASURED = ("seconds", "gpu_seconds", "kwh", "kg_co2e")


@dataclass(frozen=True)
class ArtifactCost:
    """The cost of making one artifact.

    Attributes:
        stage: Name of the stage.
        digest: Digest of the artifact.
        seconds: Wall-clock time; None if the catalogue has no run that made the artifact.
        gpu_seconds: Number of GPUs held times the seconds they were held.
        kwh: Energy; None if it was not measured.
        kg_co2e: Carbon; None if it was not measured.
        sessions: Number of times the job was started until it was done.
        parts_reused: Parts that runs of other jobs had computed; their cost is counted.
        parts_unknown: Parts that existed before and whose cost is not recorded.
        metrics: Metrics of the last session (rates, memory, device, shares).
        session_seconds: Wall-clock time of the last session, without parts that were there.
    """

    stage: str
    digest: str
    seconds: float | None = None
    gpu_seconds: float | None = None
    kwh: float | None = None
    kg_co2e: float | None = None
    sessions: int = 0
    parts_reused: int = 0
    parts_unknown: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    session_seconds: float | None = None


def lineage_costs(catalogue: Catalogue, digests: Iterable[str]) -> list[ArtifactCost]:
    """List the costs of artifacts and of all they were made from, each once, oldest run first.

    Artifacts that no recorded run made come before the others.
    """
    stages = {digest: entry.stage for digest, entry in catalogue.lineage(digests).items()}
    with catalogue.session() as session:
        keys = select(RunRow.key).where(RunRow.artifact.in_(stages), RunRow.status == "done")
        query = select(RunRow).where(RunRow.key.in_(keys)).order_by(RunRow.started_at, RunRow.id)
        runs = list(session.scalars(query))
    unfinished: dict[str, list[RunRow]] = {}
    costs: dict[str, ArtifactCost] = {}
    for run in runs:
        sessions = [*unfinished.pop(run.key, []), run]
        if run.status != "done":
            unfinished[run.key] = sessions
        elif run.artifact in stages and run.artifact not in costs and not run.metrics.get("cached"):
            costs[run.artifact] = _cost(stages[run.artifact], run, sessions)
    unknown = [ArtifactCost(stage, digest) for digest, stage in stages.items()]
    return [*(cost for cost in unknown if cost.digest not in costs), *costs.values()]


def costs_at(url: str, store: Store, digests: Iterable[str]) -> list[ArtifactCost]:
    """List lineage costs by the address of a catalogue; an empty address gives no costs."""
    return lineage_costs(open_catalogue(url, store), digests) if url else []


def totals(costs: Sequence[ArtifactCost]) -> dict[str, float]:
    """Sum the figures that were measured. A sum is a lower bound if some costs lack the figure."""
    sums = {}
    for name in MEASURED:
        values = [value for cost in costs if (value := getattr(cost, name)) is not None]
        if values:
            sums[name] = float(sum(values))
    return sums


def _cost(stage: str, run: RunRow, sessions: list[RunRow]) -> ArtifactCost:
    """Sum the sessions of a job; the last one is the run that sealed the artifact."""
    metrics = run.metrics
    reported = float(metrics.get("seconds") or run.seconds or 0)
    # The checkpoint of a training run covers more of a killed session than its last note does.
    seconds = max(sum(_seconds(session) for session in sessions), reported)
    gpus = float(metrics.get("gpu_seconds", 0)) / reported if reported else 0.0
    reused = metrics.get("reused", {})
    return ArtifactCost(
        stage=stage,
        digest=str(run.artifact),
        seconds=seconds + reused.get("seconds", 0.0),
        # a killed session held as many GPUs as the last one
        gpu_seconds=seconds * gpus + reused.get("gpu_seconds", 0.0),
        kwh=_sum(sessions, "kwh", reused),
        kg_co2e=_sum(sessions, "kg_co2e", reused),
        session_seconds=_seconds(run),
        sessions=len(sessions),
        parts_reused=int(reused.get("parts", 0)),
        parts_unknown=_unknown_parts(sessions),
        metrics=metrics,
    )


def _unknown_parts(sessions: list[RunRow]) -> int:
    """Count the parts that existed before the first session and whose cost is not recorded."""
    metrics = sessions[-1].metrics
    if "parts_worked" not in metrics:
        return 0
    worked = sum(int(session.metrics.get("parts_worked", 0)) for session in sessions)
    known = int(metrics.get("reused", {}).get("parts", 0))
    return max(int(metrics.get("parts", 0)) - worked - known, 0)


def _seconds(run: RunRow) -> float:
    """Return the length of a session; of a killed session, the length at its last note."""
    return float(run.seconds if run.seconds is not None else run.metrics.get("seconds", 0))


def _sum(sessions: list[RunRow], name: str, reused: dict[str, Any]) -> float | None:
    """Add up a figure over sessions and reused parts; None if it was never measured."""
    values = [*(session.metrics.get(name) for session in sessions), reused.get(name)]
    measured = [float(value) for value in values if value is not None]
    return sum(measured) if measured else None
