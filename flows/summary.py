"""The result of a run of the pipeline, and its summary for the terminal and the Prefect UI."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.provenance.costs import lineage_costs, totals
from flows.settings import report_address
from flows.versions import Published
from geofm.config.recipe import Recipe
from geofm.forecasting.figures import COMPARED, StageComparison
from geofm.stages import get_stage


@dataclass
class PipelineRun:
    """The result of a flow run, as far as it has come.

    Attributes:
        comparison: ``comparison()`` compares the forecast of each stage with what came.
        artifacts: Artifact of each stage, by the stage's name.
        version: Version of the dataset.
        model: Version of the model.
    """

    recipe: Recipe
    catalogue: Catalogue
    comparison: Callable[[], list[StageComparison]] = list
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    version: Published | None = None
    model: Published | None = None

    def inputs(self) -> dict[str, Artifact]:
        """Return the artifacts by kind, as the next stage names its inputs."""
        return {get_stage(stage).kind: artifact for stage, artifact in self.artifacts.items()}


def run_counts(run: PipelineRun) -> dict[str, Any]:
    """Return counts and drops of every stage of a run."""
    manifests = {name: artifact.manifest for name, artifact in run.artifacts.items()}
    return {name: {**m.counts, "dropped": m.dropped} for name, m in manifests.items()}


def summary_rows(run: PipelineRun) -> list[tuple[str, str]]:
    """Return the printed summary as pairs of label and value."""
    rows: list[tuple[str, str]] = []
    manifests = {name: artifact.manifest for name, artifact in run.artifacts.items()}
    costs = lineage_costs(run.catalogue, [a.digest for a in run.artifacts.values()])
    for stage, label in (("search", "scenes"), ("cut", "chips"), ("curate", "selected")):
        if stage in manifests:
            rows.append((label, _in_and_out(manifests[stage].counts, manifests[stage].dropped)))
    if "pack" in manifests:
        shards = [f for f in manifests["pack"].files if f.path.endswith(".tar")]
        size = sum(f.size for f in shards) / 2**20
        rows.append(("shards", f"{len(shards)} ({size:.1f} MiB)"))
    if run.version is not None:
        rows.append(("dataset", run.version.headline()))
    if run.model is not None:
        rows.append(("model", run.model.headline()))
    for cost in costs:
        if cost.stage == "pretrain" and "images_per_second" in cost.metrics:
            rows.append(("training", f"{cost.metrics['images_per_second']:,.0f} images/s"))
    total = totals(costs)
    if "seconds" in total:
        text = f"{total['seconds']:.0f} s, {total['gpu_seconds']:.0f} GPU-s"
        for name, unit in (("kwh", "Wh"), ("kg_co2e", "g CO2e")):
            if name in total:
                text += f", {1000 * total[name]:.2f} {unit}"
        rows.append(("cost", text))
    return rows


def score_rows(scores: Artifact | None) -> list[dict[str, Any]]:
    """Return the rows of the scores table; empty if nothing was evaluated."""
    if scores is None:
        return []
    frame = scores.table("scores.parquet")
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def scores_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the scores as a table in Markdown for the Prefect UI."""
    lines = [
        "| model | feature | task | protocol | score | 95 % |",
        "|---|---|---|---|---:|---|",
    ]
    lines += [
        f"| {s['model']} | {s['feature']} | {s['task']} | {s['protocol']} | {s['value']:.3f} "
        f"| {s['ci_low']:.3f} to {s['ci_high']:.3f} |"
        for s in rows
    ]
    return "\n".join(lines)


def summary_markdown(run: PipelineRun) -> str:
    """Return the summary as Markdown for the Prefect UI."""
    lines = ["| what | |", "|---|---|", *(f"| {a} | {b} |" for a, b in summary_rows(run)), ""]
    scores = score_rows(run.artifacts.get("evaluate"))
    if scores:
        lines.append(scores_markdown(scores))
    lines += ["", "| stage | artifact | rows |", "|---|---|---:|"]
    for stage, artifact in run.artifacts.items():
        manifest = artifact.manifest
        rows = f"{manifest.counts.get('rows_out', 0):,}"
        lines.append(f"| {stage} | `{manifest.kind} {artifact.digest[:12]}` | {rows} |")
    compared = run.comparison()
    if compared:
        lines += ["", f"| {' | '.join(COMPARED)} |", "|---|---:|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(entry.cells())} |" for entry in compared]
    if "report" in run.artifacts:
        report = run.artifacts["report"]
        address = report_address(report.digest)
        link = f"[report]({address})" if address else f"`{report.path('report.html')}`"
        lines = [f"Report: {link}", "", *lines]
    return "\n".join(lines)


#: Pictures of the report that are shown in the UI, with their titles, and their largest edge.
SHOWN = {"funnel": "Chips by step", "kept-chips": "Kept chips", "training": "Training"}
SHOWN_PX = 640
#: Most steps in the curves of a training that is going on.
SHOWN_STEPS = 2000


def pictures_markdown(report: Artifact) -> str:
    """Return some pictures of a report, inline and small, as Markdown for the Prefect UI."""
    lines = []
    there = report.manifest.facts.get("pictures", [])
    for name, title in SHOWN.items():
        if f"{name}.png" not in there:
            continue
        lines += [f"### {title}", _inline(report.local(f"{name}.png").read_bytes(), title), ""]
    return "\n".join(lines)


def curves_markdown(values: Mapping[int, Mapping[str, float]]) -> str:
    """Return a picture of the curves of a training, inline and small, as Markdown.

    Args:
        values: Numbers by step, as ``metrics.parquet`` has them; at most ``SHOWN_STEPS`` are drawn.
    """
    import pandas as pd

    from geofm.reporting.plots import plot_training

    steps = sorted(values)
    shown = steps[:: len(steps) // SHOWN_STEPS + 1]
    picture = plot_training(pd.DataFrame([{"step": step, **values[step]} for step in shown]))
    return f"\n{_inline(picture.png, picture.alt)}\n"


def _inline(picture: bytes, title: str) -> str:
    """Return a picture as a small JPEG within Markdown."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as whole:
        small = whole.convert("RGB")
    small.thumbnail((SHOWN_PX, SHOWN_PX))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=75)
    return f"![{title}](data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()})"


def _in_and_out(counts: dict[str, int], dropped: dict[str, int]) -> str:
    """Return ``in → out`` with the drops by reason."""
    by_count = sorted(dropped.items(), key=lambda entry: -entry[1])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in by_count)
    text = f"{counts.get('rows_in', 0):,} → {counts.get('rows_out', 0):,}"
    return f"{text}  (dropped: {reasons})" if reasons else text
