"""What things cost: the runs that made an artifact and everything it was made from.

A job may have been stopped and started again: all its sessions count, also those that were killed
(a run notes what it has spent as it goes). An artifact that was found in the catalogue counts with
the run that made it, and once, however many ways lead to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database.schema import ArtifactRow, EdgeRow, RunRow

#: What is summed over sessions and stages, where it was measured.
MEASURED = ("seconds", "gpu_seconds", "kwh", "kg_co2e")


@dataclass(frozen=True)
class Cost:
    """What it took to make one artifact.

    Attributes:
        stage: that made it.
        digest: of the artifact.
        seconds: wall clock; None where this catalogue has no run that made it.
        gpu_seconds: seconds for which GPUs were held, times their number.
        kwh: energy; None where it was not measured.
        kg_co2e: carbon; None where it was not measured.
        sessions: how often the job was started until it was done.
        parts_found: parts of the work that were there before, from runs that made something else.
        metrics: what the last session noted (rates, memory, device, shares).
    """

    stage: str
    digest: str
    seconds: float | None = None
    gpu_seconds: float | None = None
    kwh: float | None = None
    kg_co2e: float | None = None
    sessions: int = 0
    parts_found: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)


def lineage_costs(catalogue: Catalogue, digests: Iterable[str]) -> list[Cost]:
    """The cost of artifacts and of all they were made from, each once, first made first."""
    stages = _ancestors(catalogue, digests)
    with catalogue.session() as session:
        mine = select(RunRow.key).where(RunRow.artifact.in_(stages), RunRow.status == "done")
        runs = list(
            session.scalars(
                select(RunRow).where(RunRow.key.in_(mine)).order_by(RunRow.started_at, RunRow.id)
            )
        )
    waiting: dict[str, list[RunRow]] = {}
    made: dict[str, Cost] = {}
    for run in runs:
        sessions = [*waiting.pop(run.key, []), run]
        if run.status != "done":
            waiting[run.key] = sessions
        elif run.artifact in stages and run.artifact not in made and not run.metrics.get("cached"):
            made[run.artifact] = _cost(stages[run.artifact], run, sessions)
    unknown = [Cost(stage, digest) for digest, stage in stages.items() if digest not in made]
    return [*unknown, *made.values()]


def costs(url: str, digests: Iterable[str]) -> list[Cost]:
    """``lineage_costs`` by the catalogue's address; nothing without one."""
    return lineage_costs(open_catalogue(url), digests) if url else []


def totals(found: Sequence[Cost]) -> dict[str, float]:
    """Sums over costs, of what was measured at all: a lower bound where some lack it."""
    summed = {}
    for name in MEASURED:
        values = [value for cost in found if (value := getattr(cost, name)) is not None]
        if values:
            summed[name] = float(sum(values))
    return summed


def _ancestors(catalogue: Catalogue, digests: Iterable[str]) -> dict[str, str]:
    """Digests of artifacts and all they were made from, with the stage that made each."""
    seen: dict[str, str] = {}
    wave = set(digests)
    with catalogue.session() as session:
        while wave:
            rows = session.execute(
                select(ArtifactRow.digest, ArtifactRow.stage).where(ArtifactRow.digest.in_(wave))
            )
            seen |= {row.digest: row.stage for row in rows}
            parents = session.scalars(select(EdgeRow.parent).where(EdgeRow.child.in_(wave)))
            wave = set(parents) - set(seen)
    return seen


def _cost(stage: str, run: RunRow, sessions: list[RunRow]) -> Cost:
    """The sum of a job's sessions, the last of which is the run that sealed."""
    metrics = run.metrics
    counted = float(metrics.get("seconds") or run.seconds or 0)
    # training's checkpoint remembers more of a killed session than its last note
    seconds = max(sum(_seconds(one) for one in sessions), counted)
    gpus = float(metrics.get("gpu_seconds", 0)) / counted if counted else 0.0
    worked = sum(int(one.metrics.get("parts_worked", 0)) for one in sessions)
    found = int(metrics.get("parts", 0)) - worked if "parts_worked" in metrics else 0
    return Cost(
        stage=stage,
        digest=str(run.artifact),
        seconds=seconds,
        gpu_seconds=seconds * gpus,  # a session that was killed held as many
        kwh=_sum(sessions, "kwh"),
        kg_co2e=_sum(sessions, "kg_co2e"),
        sessions=len(sessions),
        parts_found=max(found, 0),
        metrics=metrics,
    )


def _seconds(run: RunRow) -> float:
    """How long a session took; of one that was killed, as far as it noted it."""
    return float(run.seconds if run.seconds is not None else run.metrics.get("seconds", 0))


def _sum(sessions: list[RunRow], name: str) -> float | None:
    values = [float(one.metrics[name]) for one in sessions if one.metrics.get(name) is not None]
    return sum(values) if values else None
