"""Sections about the model: training, scores, cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from data_catalog.provenance.costs import ArtifactCost, totals
from geofm.forecasting.figures import COMPARED, JUDGED_S, StageForecast, compare
from geofm.reporting import plots
from geofm.reporting.blocks import Block, FactList, Note, PageSection, Plot, Table
from geofm.reporting.report_data import ReportData
from geofm.runtime.cost import cost_table, remarks, sort_by_stage
from geofm.runtime.text import amount, count, duration, each, known, percent, plain, points

#: Facts and settings of a model that the section on training shows, in order.
_MODEL_FACTS = (
    "teacher",
    "teacher_weights_sha256",
    "student",
    "parameters",
    "alpha",
    "mim_weight",
    "distill_stage",
    "student_init",
    "steps",
    "images",
    "batch",
    "size_px",
    "arithmetic",
)


def model_sections(data: ReportData) -> Iterable[PageSection]:
    """Make the sections about the model, in the order of the page."""
    yield training_section(data)
    yield scores_section(data)
    yield cost_section(data)


def training_section(data: ReportData) -> PageSection:
    """Loss curves and facts of the training run."""
    metrics = data.metrics
    if metrics.empty:
        return PageSection("training", "Training", "This run trained no model.")
    settings = data.settings("model")
    first, last = metrics.iloc[0], metrics.iloc[-1]
    changes = [
        f"{name} went from {first[column]:.3g} to {last[column]:.3g}"
        for column, name in (("mim", "reconstruction"), ("distill", "distillation"))
        if column in metrics and known(float(last[column]))
    ]
    lead = f"{count(len(metrics))} logged steps over {settings.get('epochs', '?')} epochs"
    lead += f": {', '.join(changes)}." if changes else "."
    blocks: list[Block] = []
    if len(metrics) > 1:
        caption = (
            "Faint: every logged step; line: running mean. The losses are those of Mendieta et al. "
            "2023 (Eq. 2 and 3): masked L1 on normalised pixels, and similarity to the frozen "
            "teacher."
        )
        blocks.append(Plot(plots.plot_training(metrics), caption))
    values = {**settings, **data.facts("model"), **data.artifacts["model"].manifest.counts}
    pairs = [(n.replace("_", " "), plain(values[n])) for n in _MODEL_FACTS if n in values]
    blocks.append(FactList("The objective", pairs))
    return PageSection("training", "Training", lead, blocks)


def scores_section(data: ReportData) -> PageSection:
    """Accuracy of the model and of both baselines."""
    table = data.scores
    if table.empty:
        return PageSection("scores", "Scores", "No downstream task was evaluated.")
    facts = data.facts("scores")
    tasks = facts.get("tasks", [])
    differences = facts.get("differences", [])
    chance = {t["task"]: 1 / len(t["classes"]) for t in tasks if t.get("classes")}
    blocks: list[Block] = [
        Plot(
            plots.plot_scores(table, chance),
            "Dot: top-1 accuracy on the test part; bar: 95 % bootstrap interval over test images. "
            "The frozen teacher is the first row: training has not paid off for a student with "
            "lower accuracy.",
        ),
        _score_table(table),
    ]
    if differences:
        blocks.append(_difference_table(differences))
    blocks += [Note(text) for text in _score_remarks(facts, tasks)]
    return PageSection("scores", "Scores", _best_row_sentence(differences, table), blocks)


def best_score(scores: pd.DataFrame) -> Any:
    """The row of the trained model with the highest value, or None."""
    own = scores[scores["model"] == "model"] if len(scores) else scores
    return None if own.empty else own.iloc[int(own["value"].to_numpy().argmax())]


def _score_table(scores: pd.DataFrame) -> Table:
    """Accuracy and interval of every row; the model's rows are highlighted."""
    head = ("Task", "Features", "Protocol", "Accuracy", "95 % interval", "Test images")
    rows = [
        (
            row.task,
            plots.score_name(row.model, row.feature),
            plots.protocol_name(row.protocol),
            percent(row.value),
            f"{percent(row.ci_low)} – {percent(row.ci_high)}",
            count(row.n),
        )
        for row in each(scores)
    ]
    own = frozenset(i for i, model in enumerate(scores["model"]) if model == "model")
    return Table(head, rows, numeric=frozenset({3, 4, 5}), strong=own)


def _difference_table(differences: list[dict[str, Any]]) -> Table:
    """Paired differences of the model to its baselines."""
    head = ("Task", "Features", "Against", "Protocol", "Difference, points", "95 % interval", "")
    rows = []
    for d in differences:
        verdict = "better" if d["ci_low"] > 0 else "worse" if d["ci_high"] < 0 else "undecided"
        rows.append(
            (
                d["task"],
                f"this model, {d['feature']}",
                "frozen teacher" if d["against"] == "teacher" else "random init",
                plots.protocol_name(d["protocol"]),
                points(d["value"]),
                f"{points(d['ci_low'])} to {points(d['ci_high'])}",
                verdict,
            )
        )
    return Table(head, rows, numeric=frozenset({4, 5}))


def _best_row_sentence(differences: list[dict[str, Any]], scores: pd.DataFrame) -> str:
    """The model's best row in a sentence, with its differences to both baselines."""
    best = best_score(scores)
    if best is None:
        return "No row of the model itself was scored."
    own = int((scores["model"] == "model").sum())
    sentence = (
        f"Best of {own} rows: {percent(best.value)} on {best.task} "
        f"({plots.protocol_name(best.protocol)}, {best.feature} feature)"
    )
    for d in differences:
        if all(d[key] == best[key] for key in ("task", "protocol", "feature")):
            baseline = "a random network" if d["against"] == "random" else "the frozen teacher"
            doubt = "" if d["certain"] else ", which may be chance"
            sentence += f"; {points(d['value'])} points against {baseline}{doubt}"
    return sentence + "."


def _score_remarks(facts: dict[str, Any], tasks: list[dict[str, Any]]) -> Iterable[str]:
    """Limits of the scores, in sentences."""
    if facts.get("training_seeds") == 1:
        yield (
            "One training seed: the intervals cover the choice of test images, not the chance in "
            "training. Train with other seeds before you draw a conclusion."
        )
    for task in tasks:
        if task.get("filled_bands"):
            bands = ", ".join(task["filled_bands"])
            yield (
                f"{task['task']} lacks {bands}: filled with the pretraining set's mean, which "
                "normalisation turns into zero."
            )
        leakage = task.get("leakage", {})
        if leakage:
            yield (
                f"{task['task']}: {count(leakage['identical'])} of "
                f"{count(leakage['test_images'])} test images are pixel for pixel among the "
                f"{count(leakage['training_samples'])} training samples (sha256). Near copies are "
                "not covered by this check."
            )


def cost_section(data: ReportData) -> PageSection:
    """Time, energy and carbon of the whole lineage, beside the paper's figures."""
    costs = sort_by_stage(data.costs)
    timed = [(cost.stage, cost.seconds) for cost in costs if cost.seconds is not None]
    if not timed:
        return PageSection("cost", "Cost", "The catalogue has no record of what these stages cost.")
    table = cost_table(costs, details=True)
    last_row = frozenset({len(table.rows) - 1})
    blocks: list[Block] = [
        Plot(
            plots.plot_costs(timed),
            "Wall-clock seconds, all sessions of a job together. A stage that was reused from the "
            "catalogue has the cost of the run that made it.",
        ),
        Table(table.head, table.rows, table.numeric, strong=last_row),
        *_forecast_blocks(data.costs),
        *(Note(text) for text in remarks(costs)),
    ]
    total = totals(costs)
    lead = f"{duration(total['seconds'])} in total"
    if total.get("gpu_seconds"):
        lead += f", {duration(total['gpu_seconds'])} on GPUs"
    if "kwh" in total:
        lead += f", {amount(total['kwh'], 'kWh')}"
    if "kg_co2e" in total:
        lead += f", {amount(total['kg_co2e'], 'kg')} CO2e"
    return PageSection("cost", "Cost", lead + ".", blocks)


def _forecast_blocks(costs: Iterable[ArtifactCost]) -> list[Block]:
    """Table of the forecasts that the runs noted, beside the time that came."""
    noted = {
        cost.stage: (StageForecast.from_json(cost.stage, cost.metrics["forecast"]), cost)
        for cost in sort_by_stage(costs)
        if cost.metrics.get("forecast")
    }
    took = {name: cost.session_seconds for name, (_, cost) in noted.items()}
    known_times = {name: seconds for name, seconds in took.items() if seconds is not None}
    rows = [entry.cells() for entry in compare([made for made, _ in noted.values()], known_times)]
    if not rows:
        return []
    text = (
        "Each run writes a forecast before its stages begin. Below are the forecast of each stage, "
        "by the run that made its artifact, and the time that this run took, without parts that "
        f"were there. Stages under {JUDGED_S:g} s have no quotient: their time is mostly chance."
    )
    return [Note(text), Table(COMPARED, rows, numeric=frozenset({1, 2, 3, 4}))]
