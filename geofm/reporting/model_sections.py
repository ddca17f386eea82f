"""The model half of the page: how it trained, what it scores, what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from data_catalog.provenance.costs import totals
from geofm.reporting import plots
from geofm.reporting.blocks import Facts, Note, Plain, Plot, Section, Table
from geofm.reporting.report_data import Material
from geofm.runtime import text as words
from geofm.runtime.cost import cost_table, in_order, remarks
from geofm.runtime.text import count, each, percent, plain, points

#: Facts of a model worth a line of their own, in this order.
_MODEL_FACTS = (
    "teacher", "teacher_weights_sha256", "student", "parameters", "alpha", "mim_weight",
    "distill_stage", "student_init", "steps", "images", "batch", "size_px", "arithmetic",
)  # fmt: skip


def training(material: Material) -> Section:
    """Curves and the facts of the training run."""
    metrics = material.metrics
    if metrics.empty:
        return Section("training", "Training", "This run trained no model.")
    settings = material.settings("model")
    known = {**settings, **material.facts("model"), **material.artifacts["model"].manifest.counts}
    first, last = metrics.iloc[0], metrics.iloc[-1]
    told = [
        f"{name} went from {first[column]:.3g} to {last[column]:.3g}"
        for column, name in (("mim", "reconstruction"), ("distill", "distillation"))
        if column in metrics and words.known(float(last[column]))
    ]
    lead = f"{count(len(metrics))} logged steps over {settings.get('epochs', '?')} epochs"
    lead += f": {', '.join(told)}." if told else "."
    blocks: list[Plain] = []
    if len(metrics) > 1:
        caption = (
            "Faint: every logged step; line: running mean. The losses are those of Mendieta et al. "
            "2023 (Eq. 2 and 3): masked L1 on normalised pixels, and similarity to the frozen "
            "teacher."
        )
        blocks.append(Plot(plots.curves(metrics), caption))
    pairs = [(n.replace("_", " "), plain(known[n])) for n in _MODEL_FACTS if n in known]
    blocks.append(Facts("The objective", pairs))
    return Section("training", "Training", lead, blocks)


def best_score(scores: pd.DataFrame) -> Any:
    """The best row of the trained model, or None."""
    ours = scores[scores["model"] == "model"] if len(scores) else scores
    return None if ours.empty else ours.iloc[int(ours["value"].to_numpy().argmax())]


def scores(material: Material) -> Section:
    """Accuracy against the two baselines."""
    table = material.scores
    if table.empty:
        return Section("scores", "Scores", "No downstream task was evaluated.")
    facts = material.facts("scores")
    tasks = facts.get("tasks", [])
    chance = {t["task"]: 1 / len(t["classes"]) for t in tasks if t.get("classes")}
    blocks: list[Plain] = [
        Plot(
            plots.score_dots(table, chance),
            "Dot: top-1 accuracy on the test part; bar: 95 % bootstrap interval over test images. "
            "The frozen teacher comes first: a student below it has not paid for itself yet.",
        )
    ]
    rows = [
        (
            r.task, plots.score_name(r.model, r.feature), plots.protocol_name(r.protocol),
            percent(r.value), f"{percent(r.ci_low)} – {percent(r.ci_high)}", count(r.n),
        )
        for r in each(table)
    ]  # fmt: skip
    ours = frozenset(i for i, model in enumerate(table["model"]) if model == "model")
    head = ("Task", "Features", "Protocol", "Accuracy", "95 % interval", "Test images")
    blocks.append(Table(head, rows, numeric=frozenset({3, 4, 5}), strong=ours))
    found = facts.get("differences", [])
    if found:
        blocks.append(_differences(found))
    blocks += [Note(text) for text in _remarks(facts, tasks)]
    return Section("scores", "Scores", _finding(found, table), blocks)


def _finding(found: list[dict[str, Any]], table: pd.DataFrame) -> str:
    """The best row in a sentence, with what it is worth against both baselines."""
    best = best_score(table)
    if best is None:
        return "No row of the model itself was scored."
    ours = int((table["model"] == "model").sum())
    text = (
        f"Best of {ours} rows: {percent(best.value)} on {best.task} "
        f"({plots.protocol_name(best.protocol)}, {best.feature} feature)"
    )
    for d in found:
        same = all(d[k] == best[k] for k in ("task", "protocol", "feature"))
        if same:
            other = "a random network" if d["against"] == "random" else "the frozen teacher"
            sure = "" if d["certain"] else ", which may be chance"
            text += f"; {points(d['value'])} points against {other}{sure}"
    return text + "."


def _differences(found: list[dict[str, Any]]) -> Table:
    rows = []
    for d in found:
        verdict = "better" if d["ci_low"] > 0 else "worse" if d["ci_high"] < 0 else "undecided"
        rows.append(
            (
                d["task"], f"this model, {d['feature']}",
                "frozen teacher" if d["against"] == "teacher" else "random init",
                plots.protocol_name(d["protocol"]), points(d["value"]),
                f"{points(d['ci_low'])} to {points(d['ci_high'])}", verdict,
            )
        )  # fmt: skip
    head = ("Task", "Features", "Against", "Protocol", "Difference, points", "95 % interval", "")
    return Table(head, rows, numeric=frozenset({4, 5}))


def _remarks(facts: dict[str, Any], tasks: list[dict[str, Any]]) -> Iterable[str]:
    if facts.get("training_seeds") == 1:
        yield (
            "One training seed: the intervals cover the choice of test images, not the chance in "
            "training. Train from other seeds before concluding."
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


def cost(material: Material) -> Section:
    """Time, energy and carbon of everything these artifacts come from, beside the paper's."""
    costs = in_order(material.costs)
    timed = [(c.stage, c.seconds) for c in costs if c.seconds is not None]
    if not timed:
        return Section("cost", "Cost", "The catalogue has no record of what these stages cost.")
    whole = totals(costs)
    table = cost_table(costs, details=True)
    blocks: list[Plain] = [
        Plot(
            plots.cost_bars(timed),
            "Wall-clock seconds, all sessions of a job together; stages found in the catalogue "
            "keep the cost of the run that made them.",
        ),
        Table(table.head, table.rows, table.numeric, strong=frozenset({len(table.rows) - 1})),
        *(Note(text) for text in remarks(costs)),
    ]
    lead = f"{words.duration(whole['seconds'])} in all"
    if whole.get("gpu_seconds"):
        lead += f", {words.duration(whole['gpu_seconds'])} on GPUs"
    if "kwh" in whole:
        lead += f", {words.amount(whole['kwh'], 'kWh')}"
    if "kg_co2e" in whole:
        lead += f", {words.amount(whole['kg_co2e'], 'kg')} CO2e"
    return Section("cost", "Cost", lead + ".", blocks)


def sections(material: Material) -> Iterable[Section]:
    """The model half, in the order of the page."""
    yield training(material)
    yield scores(material)
    yield cost(material)
