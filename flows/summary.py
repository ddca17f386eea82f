"""What a run amounts to: one table for people, one object for programs."""

from __future__ import annotations

from typing import Any

from data_catalog.provenance.costs import lineage_costs, totals
from flows.stage_flow import Run


def run_counts(run: Run) -> dict[str, Any]:
    """Counts and drops of every stage of a run."""
    manifests = {name: artifact.manifest for name, artifact in run.made.items()}
    return {name: {**m.counts, "dropped": m.dropped} for name, m in manifests.items()}


def summary_rows(run: Run) -> list[tuple[str, str]]:
    """The printed summary as label and value."""
    rows: list[tuple[str, str]] = []
    made = {name: artifact.manifest for name, artifact in run.made.items()}
    spent = lineage_costs(run.catalogue, [a.digest for a in run.made.values()])
    if "search" in made:
        rows.append(("scenes", _flow(made["search"].counts, made["search"].dropped)))
    if "cut" in made:
        rows.append(("chips", _flow(made["cut"].counts, made["cut"].dropped)))
    if "curate" in made:
        rows.append(("selected", _flow(made["curate"].counts, made["curate"].dropped)))
    if "pack" in made:
        shards = [f for f in made["pack"].files if f.path.endswith(".tar")]
        size = sum(f.size for f in shards) / 2**20
        rows.append(("shards", f"{len(shards)} ({size:.1f} MiB)"))
    if run.version is not None:
        rows.append(("dataset", run.version.headline()))
    if run.model is not None:
        rows.append(("model", run.model.headline()))
    for cost in spent:
        if cost.stage == "pretrain" and "images_per_second" in cost.metrics:
            rows.append(("training", f"{cost.metrics['images_per_second']:,.0f} images/s"))
    whole = totals(spent)
    if "seconds" in whole:
        told = f"{whole['seconds']:.0f} s, {whole['gpu_seconds']:.0f} GPU-s"
        for name, unit in (("kwh", "Wh"), ("kg_co2e", "g CO2e")):
            if name in whole:
                told += f", {1000 * whole[name]:.2f} {unit}"
        rows.append(("cost", told))
    return rows


def score_rows(run: Run) -> list[dict[str, Any]]:
    """The scores table, one dictionary a row; empty where nothing was evaluated."""
    if "evaluate" not in run.made:
        return []
    frame = run.made["evaluate"].table("scores.parquet")
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def summary_markdown(run: Run) -> str:
    """The summary for the Prefect UI."""
    lines = ["| what | |", "|---|---|", *(f"| {a} | {b} |" for a, b in summary_rows(run)), ""]
    scores = score_rows(run)
    if scores:
        lines += [
            "| model | feature | task | protocol | score | 95 % |",
            "|---|---|---|---|---:|---|",
        ]
        lines += [
            f"| {s['model']} | {s['feature']} | {s['task']} | {s['protocol']} | {s['value']:.3f} "
            f"| {s['ci_low']:.3f} to {s['ci_high']:.3f} |"
            for s in scores
        ]
    if "report" in run.made:
        lines += ["", f"Report: `{run.made['report'].path('report.html')}`"]
    return "\n".join(lines)


def _flow(counts: dict[str, int], dropped: dict[str, int]) -> str:
    """``in -> out`` with the drops by reason."""
    why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items(), key=lambda d: -d[1]))
    head = f"{counts.get('rows_in', 0):,} → {counts.get('rows_out', 0):,}"
    return f"{head}  (dropped: {why})" if why else head
