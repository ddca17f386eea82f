"""The figures of a curation: where thresholds come from, and whom the filters hit."""

from __future__ import annotations

import numpy as np
import pandas as pd

from geofm.reporting.style import (
    DROPPED,
    INK,
    KEPT,
    NEUTRAL,
    SERIES,
    Picture,
    drawing,
    finish,
    quiet,
)
from geofm.reporting.words import each

#: Strata drawn in the figure of survival, those with most candidates first.
MOST_STRATA = 12


def calibration(curve: pd.DataFrame, chosen: dict[str, float]) -> Picture:
    """Precision and recall over the threshold, a panel per collection.

    Args:
        curve: collection, threshold, precision, recall (shares; NaN where there is none).
        chosen: the threshold of each collection.
    """
    collections = sorted(set(curve["collection"]))
    with drawing(2.9) as figure:
        axes = figure.subplots(1, len(collections), squeeze=False, sharey=True)[0]
        for panel, name in zip(axes, collections, strict=True):
            mine = curve[curve["collection"] == name].sort_values("threshold")
            panel.plot(mine["threshold"], 100 * mine["precision"], color=SERIES[0])
            panel.plot(mine["threshold"], 100 * mine["recall"], color=SERIES[1])
            if name in chosen:
                panel.axvline(chosen[name], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            panel.set(title=name, xlabel="threshold (cosine)", ylim=(0, 102))
            quiet(panel, "y")
        axes[0].set_ylabel("%")
        axes[0].plot([], [], color=SERIES[0], label="precision")
        axes[0].plot([], [], color=SERIES[1], label="recall")
        axes[0].plot([], [], color=INK, linestyle=(0, (4, 2)), label="chosen")
        figure.legend(loc="outside upper right", ncols=3)
        told = ", ".join(f"{name} {value:.3f}" for name, value in sorted(chosen.items()))
        return finish(figure, "calibration", f"Precision and recall by threshold; chosen: {told}")


#: Column, name, colour and size of each dot.
STEPS = (
    ("passed", "passed the gates", NEUTRAL, 10),
    ("distinct", "not a duplicate", SERIES[1], 7),
    ("kept", "kept", KEPT, 4.5),
)


def survival(table: pd.DataFrame) -> Picture:
    """The share of candidates that is left after each step, a panel per kind of stratum.

    Args:
        table: stratum_of, stratum, candidates, passed, distinct, kept (counts).
    """
    dimensions = list(dict.fromkeys(table["stratum_of"]))
    shown = {d: _largest(table[table["stratum_of"] == d]) for d in dimensions}
    tall = max(len(rows) for rows in shown.values())
    with drawing(1.1 + 0.3 * tall) as figure:
        axes = figure.subplots(1, len(dimensions), squeeze=False)[0]
        for panel, name in zip(axes, dimensions, strict=True):
            rows = shown[name]
            at = np.arange(len(rows))
            for column, _, colour, size in STEPS:  # equal shares stay visible: larger below
                share = 100 * rows[column] / rows["candidates"]
                panel.plot(share, at, "o", color=colour, markersize=size)
            whole = table[table["stratum_of"] == name]
            overall = 100 * whole["kept"].sum() / max(whole["candidates"].sum(), 1)
            panel.axvline(overall, color=DROPPED, linewidth=1.1, linestyle=":")
            labels = [f"{r.stratum} ({r.candidates})" for r in each(rows)]
            panel.set_yticks(at, labels)
            panel.set(title=f"by {name}", xlabel="% of candidates left", xlim=(-3, 103))
            panel.set_ylim(len(rows) - 0.5, -0.5)
            quiet(panel)
        for _, label, colour, size in STEPS:
            axes[0].plot([], [], "o", color=colour, markersize=size, label=label)
        axes[0].plot([], [], color=DROPPED, linestyle=":", label="kept overall")
        figure.legend(loc="outside upper right", ncols=4)
        return finish(figure, "survival", f"Share of candidates left, by {', '.join(dimensions)}")


def _largest(rows: pd.DataFrame) -> pd.DataFrame:
    """The strata with most candidates, in the order of their names."""
    return rows.nlargest(MOST_STRATA, "candidates").sort_values("stratum")
