"""Costs of parts: a run that uses parts of earlier runs knows what these have cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from data_catalog.database.schema import PartCostRow
from data_catalog.stage import Part

if TYPE_CHECKING:
    from data_catalog.catalogue import Catalogue

#: Figures of a run that its parts share.
SHARED = ("seconds", "gpu_seconds", "kwh", "kg_co2e")
#: Keys of one query; databases limit the number of parameters.
KEYS = 500


def note_parts(
    catalogue: Catalogue, job: str, parts: Sequence[Part], spent: dict[str, float | None]
) -> None:
    """Divide what a run has spent on parts among them, by their rows.

    Args:
        catalogue: Catalogue of the run.
        job: Key of the job.
        parts: Parts that the run computed.
        spent: ``seconds``, ``gpu_seconds``, ``kwh`` and ``kg_co2e`` of the work on them.
    """
    rows = sum(max(part.rows, 1) for part in parts)
    with catalogue.session() as session:
        for part in parts:
            share = max(part.rows, 1) / rows
            costs = {
                name: value * share for name in SHARED if (value := spent.get(name)) is not None
            }
            session.merge(PartCostRow(part=part.key, job=job, **costs))


def reused_costs(catalogue: Catalogue, job: str, keys: Sequence[str]) -> dict[str, Any]:
    """Add up the costs of parts that earlier runs of other jobs computed.

    Args:
        catalogue: Catalogue of the runs.
        job: Key of the job that uses the parts; what its own earlier sessions computed is counted
            with them.
        keys: Keys of the parts, each once.

    Returns:
        The sums by name, where they are known; ``parts``, the number of these parts; and
        ``unknown``, the number of parts whose cost is not recorded.
    """
    sums: dict[str, Any] = {"parts": 0, "unknown": 0}
    with catalogue.session() as session:
        for first in range(0, len(keys), KEYS):
            some = keys[first : first + KEYS]
            query = select(PartCostRow).where(PartCostRow.part.in_(some))
            rows = list(session.scalars(query))
            sums["unknown"] += len(some) - len(rows)
            for row in rows:
                if row.job == job:
                    continue
                sums["parts"] += 1
                for name in SHARED:
                    if (value := getattr(row, name)) is not None:
                        sums[name] = sums.get(name, 0.0) + value
    return sums
