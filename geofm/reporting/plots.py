"""Figures with axes of numbers, in the order of the page.

    style           colours, fonts and size of all figures; ``new_figure`` and ``save_figure``
    data            ``plot_drops``, ``plot_distributions``
    curation        ``plot_calibration``, ``plot_survival``
    model           ``plot_training``, ``plot_scores``, ``plot_costs``

Maps are in ``maps.py``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from geofm.runtime.text import count, each, reason

#: Colours of the states: the palette of Okabe and Ito, which colour-blind readers can distinguish,
#: darkened for a white background.
KEPT, DROPPED, QUARANTINED, NEUTRAL = "#0072B2", "#E08A00", "#A8448A", "#8A94A0"
INK, SOFT, GRID = "#1F2933", "#52606D", "#E4E7EB"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#A8448A", "#56B4E9", "#B89B00", "#5B4B9A", "#7A5C3E")
STATES = {"kept": KEPT, "dropped": DROPPED, "quarantined": QUARANTINED}

#: Width of a figure in inches of 100 CSS pixels. A figure has twice as many pixels as it is shown
#: with, so that it is sharp on high-density screens.
WIDTH = 10.6
DPI = 200

RC: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#9AA5B1",
    "axes.linewidth": 0.8,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "geofm",
}


@dataclass(frozen=True)
class Picture:
    """A figure as PNG.

    Attributes:
        name: Name of the file, without suffix.
        png: Bytes of the file.
        alt: Description in words.
        width: Width on the page, in CSS pixels.
    """

    name: str
    png: bytes
    alt: str
    width: int


@contextmanager
def new_figure(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """Yield an empty figure in the style of the page; sizes are in inches."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save_figure(figure: Figure, name: str, alt: str) -> Picture:
    """Encode a figure as PNG, without date and version, so that equal figures have equal bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, buffer.getvalue(), alt, round(figure.get_figwidth() * 100))


def grid_along(axes: Axes, axis: str = "x") -> None:
    """Draw only the grid lines of the axis that carries values."""
    axes.grid(False)
    axes.grid(True, axis="x" if axis == "x" else "y")


#: State, reason and number of rows that were dropped for it.
Drop = tuple[str, str, int]
#: Bars of a cascade; all rarer reasons share one more bar.
MOST_REASONS = 10


def plot_drops(scenes: tuple[int, list[Drop]], chips: tuple[int, list[Drop]]) -> Picture:
    """Draw two cascades from all rows to kept rows; each bar begins where the previous one ended.

    Args:
        scenes: Number of scenes, and their drops.
        chips: Number of candidate chips, and their drops.
    """
    panels = [("Scenes", *scenes), ("Candidate chips", *chips)]
    bars = [min(len(drops), MOST_REASONS + 1) + 2 for _, _, drops in panels]
    with new_figure(0.9 + 0.34 * sum(bars)) as figure:
        axes = figure.subplots(2, 1, gridspec_kw={"height_ratios": bars})
        for panel, (title, total, drops) in zip(axes, panels, strict=True):
            _draw_cascade(panel, title, total, drops)
        present = {state for _, _, drops in panels for state, _, _ in drops}
        names = ["kept", *(s for s in ("dropped", "quarantined") if s in present)]
        figure.legend(
            handles=[Patch(color=STATES[n], label=n) for n in names],
            loc="outside upper right",
            ncols=len(names),
        )
        description = "; ".join(
            f"{title.lower()}: {count(total)}, "
            + (", ".join(f"{count(n)} {reason(why)}" for _, why, n in drops) or "none dropped")
            for title, total, drops in panels
        )
        return save_figure(figure, "funnel", f"Dropped rows by reason. {description}")


def _draw_cascade(axes: Axes, title: str, total: int, drops: list[Drop]) -> None:
    shown = list(drops[:MOST_REASONS])
    rest = sum(n for _, _, n in drops[MOST_REASONS:])
    if rest:
        shown.append(("dropped", f"{len(drops) - MOST_REASONS} other reasons", rest))
    remaining = total
    labels, starts, widths, colours = ["all"], [0], [total], [NEUTRAL]
    for state, why, rows in shown:
        remaining -= rows
        labels.append(reason(why))
        starts.append(remaining)
        widths.append(rows)
        colours.append(STATES[state])
    labels.append("kept")
    starts.append(0)
    widths.append(remaining)
    colours.append(KEPT)
    y = np.arange(len(labels))
    axes.barh(y, widths, left=starts, color=colours, height=0.72)
    axes.set_yticks(y, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(total, 1) * 1.12)
    axes.set_title(title)
    grid_along(axes)
    for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
        x = start + width + total * 0.006
        axes.text(x, row, count(width), va="center", color=INK, fontsize=9)


#: Title and axis label of the histogram of each column.
HISTOGRAMS = {
    "quality": ("Quality", "clear share × texture, 0 to 1"),
    "entropy": ("Entropy", "grey-level entropy, bits"),
    "cloud_fraction": ("Cloud", "share of cloudy pixels"),
    "gradient": ("Gradient", "mean gradient, unit pixels"),
}


def measured_columns(chips: pd.DataFrame) -> list[str]:
    """The first three columns of ``HISTOGRAMS`` that have a value for at least one chip."""
    return [c for c in HISTOGRAMS if c in chips and chips[c].notna().any()][:3]


def plot_distributions(chips: pd.DataFrame, threshold: float | None) -> Picture:
    """Draw histograms over kept and dropped chips, and of the similarity to a kept chip.

    Args:
        chips: Chips with ``state``, ``why``, ``similarity`` and at least one measured column.
        threshold: Similarity from which two chips are duplicates.
    """
    names = measured_columns(chips)
    similar = chips[chips["why"].isin(["near_duplicate", "selection"])]["similarity"].dropna()
    panels = len(names) + bool(len(similar))
    columns = 2 if panels > 1 else 1
    rows = -(-panels // columns)
    with new_figure(0.4 + 2.35 * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, name in zip(axes, names, strict=False):
            _draw_histogram(panel, chips, name)
        if len(similar):
            _draw_similarities(axes[len(names)], chips, similar, threshold)
        for panel in axes[panels:]:
            panel.set_visible(False)
        figure.legend(
            handles=[
                Patch(facecolor=to_rgba(KEPT, 0.28), edgecolor=KEPT, label="kept"),
                Patch(facecolor=to_rgba(DROPPED, 0.28), edgecolor=DROPPED, label="dropped"),
            ],
            loc="outside upper right",
            ncols=2,
        )
        titles = ", ".join(HISTOGRAMS[n][0].lower() for n in names)
        return save_figure(
            figure, "distributions", f"Histograms of kept and dropped chips: {titles}, similarity"
        )


def _bin_edges(values: pd.Series, bins: int = 32) -> NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    pad = (high - low) * 0.01 or 0.5
    return np.linspace(low - pad, high + pad, bins + 1)


def _draw_histogram(axes: Axes, chips: pd.DataFrame, name: str) -> None:
    values = chips[name].dropna()
    edges = _bin_edges(values)
    for state, colour in (("dropped", DROPPED), ("kept", KEPT)):
        part = values[chips.loc[values.index, "state"] == state]
        if len(part):
            axes.hist(
                part,
                bins=edges.tolist(),
                histtype="stepfilled",
                linewidth=1.5,
                facecolor=to_rgba(colour, 0.28),
                edgecolor=colour,
            )
            axes.axvline(float(part.median()), color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
    title, label = HISTOGRAMS[name]
    axes.set(title=title, xlabel=f"{label} (dashed: median)", ylabel="chips")
    grid_along(axes, "y")


def _draw_similarities(
    axes: Axes, chips: pd.DataFrame, similar: pd.Series, threshold: float | None
) -> None:
    edges = _bin_edges(similar).tolist()
    duplicate = chips.loc[similar.index, "why"] == "near_duplicate"
    axes.hist(similar[duplicate], bins=edges, color=DROPPED, alpha=0.6, label="near duplicate")
    if (~duplicate).any():
        axes.hist(
            similar[~duplicate], bins=edges, color=NEUTRAL, alpha=0.7, label="outside the budget"
        )
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        axes.axvline(threshold, color=INK, linewidth=1.2, label=f"threshold {threshold:g}")
    axes.set(title="Similarity of dropped chips to a kept chip", xlabel="cosine", ylabel="chips")
    axes.legend(loc="upper left")
    grid_along(axes, "y")


#: Strata drawn in a panel of the survival figure: those with the most candidates.
MOST_STRATA = 12


def plot_calibration(curve: pd.DataFrame, chosen: dict[str, float]) -> Picture:
    """Draw precision and recall over the threshold; a panel per collection.

    Args:
        curve: Columns collection, threshold, precision, recall; shares, or NaN if undefined.
        chosen: Chosen threshold of each collection.
    """
    collections = sorted(set(curve["collection"]))
    with new_figure(2.9) as figure:
        axes = figure.subplots(1, len(collections), squeeze=False, sharey=True)[0]
        for panel, name in zip(axes, collections, strict=True):
            rows = curve[curve["collection"] == name].sort_values("threshold")
            panel.plot(rows["threshold"], 100 * rows["precision"], color=SERIES[0])
            panel.plot(rows["threshold"], 100 * rows["recall"], color=SERIES[1])
            if name in chosen:
                panel.axvline(chosen[name], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            panel.set(title=name, xlabel="threshold (cosine)", ylim=(0, 102))
            grid_along(panel, "y")
        axes[0].set_ylabel("%")
        axes[0].plot([], [], color=SERIES[0], label="precision")
        axes[0].plot([], [], color=SERIES[1], label="recall")
        axes[0].plot([], [], color=INK, linestyle=(0, (4, 2)), label="chosen")
        figure.legend(loc="outside upper right", ncols=3)
        thresholds = ", ".join(f"{name} {value:.3f}" for name, value in sorted(chosen.items()))
        return save_figure(
            figure, "calibration", f"Precision and recall by threshold; chosen: {thresholds}"
        )


#: Column, label, colour and size of the dot of each step.
SURVIVAL_STEPS = (
    ("passed", "passed the gates", NEUTRAL, 10),
    ("distinct", "not a duplicate", SERIES[1], 7),
    ("kept", "kept", KEPT, 4.5),
)


def plot_survival(table: pd.DataFrame) -> Picture:
    """Draw the share of candidates that remains after each step; a panel per kind of stratum.

    Args:
        table: Columns stratum_of, stratum, candidates, passed, distinct, kept; counts.
    """
    dimensions = list(dict.fromkeys(table["stratum_of"]))
    shown = {d: _largest(table[table["stratum_of"] == d]) for d in dimensions}
    tall = max(len(rows) for rows in shown.values())
    with new_figure(1.1 + 0.3 * tall) as figure:
        axes = figure.subplots(1, len(dimensions), squeeze=False)[0]
        for panel, name in zip(axes, dimensions, strict=True):
            rows = shown[name]
            y = np.arange(len(rows))
            # Later steps have smaller dots, so that equal shares remain visible.
            for column, _, colour, size in SURVIVAL_STEPS:
                share = 100 * rows[column] / rows["candidates"]
                panel.plot(share, y, "o", color=colour, markersize=size)
            whole = table[table["stratum_of"] == name]
            overall = 100 * whole["kept"].sum() / max(whole["candidates"].sum(), 1)
            panel.axvline(overall, color=DROPPED, linewidth=1.1, linestyle=":")
            labels = [f"{r.stratum} ({r.candidates})" for r in each(rows)]
            panel.set_yticks(y, labels)
            panel.set(title=f"by {name}", xlabel="% of candidates left", xlim=(-3, 103))
            panel.set_ylim(len(rows) - 0.5, -0.5)
            grid_along(panel)
        for _, label, colour, size in SURVIVAL_STEPS:
            axes[0].plot([], [], "o", color=colour, markersize=size, label=label)
        axes[0].plot([], [], color=DROPPED, linestyle=":", label="kept overall")
        figure.legend(loc="outside upper right", ncols=4)
        return save_figure(
            figure, "survival", f"Share of candidates left, by {', '.join(dimensions)}"
        )


def _largest(rows: pd.DataFrame) -> pd.DataFrame:
    """The strata with the most candidates, in the order of their names."""
    return rows.nlargest(MOST_STRATA, "candidates").sort_values("stratum")


def plot_training(metrics: pd.DataFrame) -> Picture:
    """Draw reconstruction loss, distillation loss and learning rate over the steps.

    Args:
        metrics: Columns step, epoch, mim, distill, lr.
    """
    panels = [
        ("mim", "Reconstruction", "masked L1 (normalised pixels)", SERIES[0]),
        ("distill", "Distillation", "loss against the frozen teacher", SERIES[1]),
        ("lr", "Learning rate", "per step", SERIES[2]),
    ]
    panels = [p for p in panels if p[0] in metrics and metrics[p[0]].notna().any()]
    with new_figure(2.9) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (name, title, label, colour) in zip(axes, panels, strict=True):
            values = metrics[name].astype(float)
            smooth = values if name == "lr" else _smooth(values)
            if name != "lr":
                panel.plot(metrics["step"], values, color=colour, alpha=0.28, linewidth=0.9)
            panel.plot(metrics["step"], smooth, color=colour)
            panel.set(title=title, xlabel="step", ylabel=label)
            panel.margins(x=0.02)
            if name == "lr":
                panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
                panel.set_ylim(bottom=0)
        ends = "; ".join(
            f"{title.lower()} from {metrics[name].iloc[0]:.3g} to {metrics[name].iloc[-1]:.3g}"
            for name, title, _, _ in panels
        )
        return save_figure(figure, "training", f"Training curves: {ends}")


def _smooth(values: pd.Series) -> pd.Series:
    window = max(len(values) // 25, 1)
    return values.rolling(window, center=True, min_periods=1).mean()


#: Name of each model in the figure of scores.
_MODEL_NAMES = {"teacher": "frozen teacher", "random": "random init", "model": "this model"}


def score_name(model: str, feature: str) -> str:
    """Label of a row of the score figure: the model and its feature."""
    name = _MODEL_NAMES.get(model, model)
    return name if model == "teacher" else f"{name}, {feature}"


def plot_scores(scores: pd.DataFrame, chance: dict[str, float]) -> Picture:
    """Draw accuracy as dots with 95 % intervals; a panel per task, a colour per protocol.

    Args:
        scores: Columns model, feature, task, protocol, value, ci_low, ci_high; values are shares.
        chance: Accuracy of guessing by task, if known.
    """
    tasks = list(dict.fromkeys(scores["task"]))
    protocols = list(dict.fromkeys(scores["protocol"]))
    rows = list(dict.fromkeys(zip(scores["model"], scores["feature"], strict=True)))
    columns = min(len(tasks), 2)
    lines = -(-len(tasks) // columns)
    with new_figure(lines * (1.0 + 0.42 * len(rows)) + 0.3) as figure:
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel, task in zip(axes, tasks, strict=False):
            _draw_scores(panel, scores[scores["task"] == task], rows, protocols)
            panel.set_title(task)
            if task in chance:
                panel.axvline(100 * chance[task], color=SOFT, linestyle=":", linewidth=1.2)
                panel.annotate(
                    "chance",
                    (100 * chance[task], 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -2),
                    textcoords="offset points",
                    color=SOFT,
                    fontsize=8.5,
                    va="top",
                )
        axes[0].invert_yaxis()
        for panel in axes[len(tasks) :]:
            panel.set_visible(False)
        marks = [Patch(color=SERIES[i], label=protocol_name(p)) for i, p in enumerate(protocols)]
        figure.legend(handles=marks, loc="outside upper right", ncols=len(marks))
        description = "; ".join(
            f"{r.task} {score_name(r.model, r.feature)} {r.protocol} {100 * r.value:.1f} %"
            for r in each(scores)
        )
        return save_figure(figure, "scores", f"Accuracy with 95 % intervals: {description}")


def protocol_name(protocol: str) -> str:
    """Name of a protocol."""
    if protocol.startswith("knn"):
        return f"kNN, k = {protocol[3:]}"
    return "linear probe" if protocol == "linear" else protocol


def _draw_scores(
    axes: Axes, scores: pd.DataFrame, rows: Sequence[tuple[str, str]], protocols: Sequence[str]
) -> None:
    for position, (model, feature) in enumerate(rows):
        if model == "model":
            axes.axhspan(position - 0.5, position + 0.5, color="#EEF4FA", zorder=0)
        selected = scores[(scores["model"] == model) & (scores["feature"] == feature)]
        for row in each(selected):
            number = protocols.index(row.protocol)
            y = position + 0.22 * (number - (len(protocols) - 1) / 2)
            colour = SERIES[number]
            axes.plot([100 * row.ci_low, 100 * row.ci_high], [y, y], color=colour, linewidth=2.2)
            axes.plot(100 * row.value, y, "o", color=colour, markersize=6, markeredgecolor="white")
    axes.set_yticks(range(len(rows)), [score_name(*row) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("top-1 accuracy, %")
    grid_along(axes)


def plot_costs(stages: Sequence[tuple[str, float]]) -> Picture:
    """Draw the seconds of each stage.

    Args:
        stages: Name and seconds of each stage, in order.
    """
    with new_figure(0.7 + 0.32 * len(stages)) as figure:
        axes = figure.subplots()
        names, seconds = [s for s, _ in stages], [v for _, v in stages]
        axes.barh(names, seconds, color=SERIES[0], height=0.66)
        axes.invert_yaxis()
        axes.set_xlim(0, max(*seconds, 0.1) * 1.12)
        axes.set_xlabel("seconds")
        grid_along(axes)
        for row, value in enumerate(seconds):
            axes.annotate(
                f"{value:,.1f}",
                (value, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        description = ", ".join(f"{name} {value:.1f}" for name, value in stages)
        return save_figure(figure, "cost", f"Seconds per stage: {description}")
