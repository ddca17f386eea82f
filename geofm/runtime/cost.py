"""The cost of a lineage as a table and as remarks, for the terminal, the page and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_catalog.provenance.costs import ArtifactCost, totals
from geofm.runtime.text import amount
from geofm.stages import ALL_STAGES

#: Mendieta et al. 2023, Table 1: 13.3 kg for 93.3 V100-hours, which is 0.30 kW × 0.475 kg/kWh.
PAPER_V100_HOURS, PAPER_KG = 93.3, 13.3
PAPER_KG_PER_V100_HOUR = 0.1425
ALL = "all"
TEACHER = "of it the teacher"
#: Below this energy the table uses Wh and g.
SMALL_KWH = 0.1


@dataclass(frozen=True)
class CostTable:
    """A row per stage and one for their sum; columns without a measurement are left out."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: frozenset[int]


def sort_by_stage(costs: Iterable[ArtifactCost]) -> list[ArtifactCost]:
    """Sort costs in the order of the pipeline; stages of older versions come last."""
    positions = {name: number for number, name in enumerate(ALL_STAGES)}
    return sorted(costs, key=lambda cost: positions.get(cost.stage, len(positions)))


def cost_table(costs: Sequence[ArtifactCost], details: bool = False) -> CostTable:
    """Build the table of seconds, GPU-seconds, energy and carbon.

    Args:
        costs: Cost of each stage.
        details: Add rate, memory and device, if measured.

    The teacher's seconds are a row below training. Training contains them, so the sum does not
    count them again.
    """
    total = totals(costs)
    small = total.get("kwh", 1.0) < SMALL_KWH
    factor, energy, carbon = (1e3, "Wh", "g CO2e") if small else (1.0, "kWh", "kg CO2e")
    rows = []
    for cost in sort_by_stage(costs):
        rows.append(_row(cost.stage, asdict(cost), factor, cost.metrics))
        share = cost.metrics.get("teacher_seconds")
        if share:
            rows.append(_row(TEACHER, {"seconds": share}, factor, {}))
    rows.append(_row(ALL, total, factor, {}))
    units = (energy, carbon, "Images/s", "Peak memory, MiB", "Device")
    head = ("Stage", "Seconds", "GPU-seconds", *units)
    kept = [i for i in range(len(head)) if i < 5 or (details and any(row[i] for row in rows))]
    return CostTable(
        tuple(head[i] for i in kept),
        [tuple(row[i] for i in kept) for row in rows],
        frozenset(n for n, i in enumerate(kept) if 1 <= i <= 6),
    )


def _row(
    name: str, spent: dict[str, Any], factor: float, metrics: dict[str, Any]
) -> tuple[str, ...]:
    """Format a row of the table."""
    return (
        name,
        _number(spent.get("seconds"), 1),
        _number(spent.get("gpu_seconds"), 1),
        _number(spent.get("kwh"), 3, factor),
        _number(spent.get("kg_co2e"), 3, factor),
        _number(metrics.get("images_per_second"), 1),
        _number(metrics.get("peak_mib"), 0),
        str(metrics.get("device", "")),
    )


def _number(value: Any, digits: int, factor: float = 1.0) -> str:
    """Format a number; empty for None."""
    return "" if value is None else f"{factor * float(value):,.{digits}f}"


def remarks(costs: Sequence[ArtifactCost]) -> list[str]:
    """Write the sentences that a reader needs to understand the table."""
    ordered = sort_by_stage(costs)
    sentences = [_comparison_with_paper(ordered)]
    restarted = [f"{c.stage} ({c.sessions})" for c in ordered if c.sessions > 1]
    if restarted:
        sentences.append(
            f"Stopped and started again, all sessions counted: {', '.join(restarted)}."
        )
    unknown = [c.stage for c in ordered if c.seconds is None]
    if unknown:
        sentences.append(
            f"Not in the sum, because this catalogue has no run that made them: "
            f"{', '.join(unknown)}."
        )
    unmeasured = [c.stage for c in ordered if c.seconds is not None and c.kwh is None]
    if unmeasured:
        sentences.append(
            f"Without a measurement of energy, so the sum is too low: {', '.join(unmeasured)}."
        )
    reused = [_parts(c, c.parts_reused) for c in ordered if c.parts_reused]
    if reused:
        sentences.append(
            f"Parts that earlier runs had computed are counted, each once: {', '.join(reused)}."
        )
    unknown_parts = [_parts(c, c.parts_unknown) for c in ordered if c.parts_unknown]
    if unknown_parts:
        sentences.append(
            "Not in the sum, because no run recorded what these parts have cost: "
            f"{', '.join(unknown_parts)}."
        )
    if any(c.stage in ("embed", "pretrain") for c in ordered):
        sentences.append(
            "Energy used elsewhere to train the teacher and the encoder is not counted."
        )
    return [text for text in sentences if text]


def _parts(cost: ArtifactCost, count: int) -> str:
    """Write a number of a stage's parts."""
    return f"{cost.stage} ({count} of {cost.metrics.get('parts', 0)} parts)"


def _comparison_with_paper(costs: Sequence[ArtifactCost]) -> str:
    """State the carbon of these hours at the paper's rate; empty without hours."""
    on_gpus = totals(costs).get("gpu_seconds", 0.0)
    trained = sum(c.seconds or 0.0 for c in costs if c.stage == "pretrain")
    hours = (on_gpus or trained) / 3600
    if not hours:
        return ""
    took = (
        f"All stages held GPUs for {hours:.3g} hours."
        if on_gpus
        else f"Training took {hours:.3g} hours on processors alone."
    )
    return (
        f"{took} The paper counts {PAPER_KG_PER_V100_HOUR} kg CO2e per V100-hour "
        f"({PAPER_V100_HOURS} hours, {PAPER_KG} kg for GFM); at that rate as many hours would be "
        f"{amount(hours * PAPER_KG_PER_V100_HOUR, 'kg')}. That constant is a multiple of "
        "time (0.30 kW × 0.475 kg/kWh), not a measurement."
    )


def as_json(costs: Sequence[ArtifactCost]) -> dict[str, Any]:
    """Return stages, sum and the paper's rate as JSON."""
    gpu_hours = totals(costs).get("gpu_seconds", 0.0) / 3600
    return {
        "stages": [asdict(cost) for cost in sort_by_stage(costs)],
        "total": totals(costs),
        "paper": {
            "v100_hours": PAPER_V100_HOURS,
            "kg_co2e": PAPER_KG,
            "kg_co2e_per_v100_hour": PAPER_KG_PER_V100_HOUR,
            "kg_co2e_of_these_gpu_hours": gpu_hours * PAPER_KG_PER_V100_HOUR,
        },
    }


def as_markdown(costs: Sequence[ArtifactCost]) -> str:
    """Write the table and its remarks as Markdown."""
    table = cost_table(costs)
    lines = [f"| {' | '.join(table.head)} |"]
    lines.append("|" + "".join("---:|" if i in table.numeric else "---|"
                               for i in range(len(table.head))))  # fmt: skip
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks(costs))])
