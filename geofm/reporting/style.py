"""One look for all figures: colours that colour-blind readers can tell apart, and sharp PNGs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Okabe and Ito's palette, darkened where it stands on white.
KEPT, DROPPED, QUARANTINED, NEUTRAL = "#0072B2", "#E08A00", "#A8448A", "#8A94A0"
INK, SOFT, GRID = "#1F2933", "#52606D", "#E4E7EB"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#A8448A", "#56B4E9", "#B89B00", "#5B4B9A", "#7A5C3E")
STATES = {"kept": KEPT, "dropped": DROPPED, "quarantined": QUARANTINED}

#: Figures are drawn for a column this wide (inches of 100 CSS pixels) and shown at half their
#: pixels, so that they are sharp on screens of double density.
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
    """A PNG with what it shows in words; ``width`` is its size on the page in CSS pixels."""

    name: str
    png: bytes
    alt: str
    width: int


@contextmanager
def drawing(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure in the house style, laid out so that nothing overlaps (sizes in inches)."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finish(figure: Figure, name: str, alt: str) -> Picture:
    """The figure as PNG. No date and no version is written into it."""
    buffer = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, buffer.getvalue(), alt, round(figure.get_figwidth() * 100))


def quiet(axes: Axes, keep: str = "x") -> None:
    """Grid lines along one direction only: those that help to read a value."""
    axes.grid(False)
    axes.grid(True, axis="x" if keep == "x" else "y")
