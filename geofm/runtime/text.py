"""Formatting for readers: numbers, units, reasons and JSON values as short texts."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

#: Reasons that the stages write and their texts; other reasons are shown with spaces.
REASONS = {
    "near_duplicate": "near duplicate",
    "identical": "identical pixels",
    "pixel_duplicate": "same pixels, shifted or changed",
    "eval_footprint": "ground of an evaluation set",
    "eval_pixels": "picture of an evaluation set",
    "eval_embedding": "like an evaluation set",
    "selection": "not chosen within the budget",
    "gate_constant": "constant",
    "gate_valid": "too few valid pixels",
    "gate_cloud": "too cloudy",
    "gate_saturated": "too saturated",
    "overlap": "overlaps another scene",
    "superseded": "superseded by a newer product",
}


def reason(name: str) -> str:
    """Return the text of a reason."""
    return REASONS.get(name, name.replace("_", " ").strip() or "no reason given")


def count(number: float) -> str:
    """Format a whole number with thin spaces between thousands."""
    return f"{round(number):,}".replace(",", "\u202f")


def some(number: int, noun: str) -> str:
    """Format a count with its noun, in the plural if needed."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def known(value: Any) -> bool:
    """Check that a value is neither None nor NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def percent(share: float, digits: int = 1) -> str:
    """Format a share as percent."""
    return f"{100 * share:.{digits}f}\u202f%"


def points(difference: float) -> str:
    """Format a difference of shares as percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def amount(value: float, unit: str) -> str:
    """Format a quantity with three significant digits; small kWh and kg become Wh and g."""
    small = {"kWh": ("Wh", 1000.0), "kg": ("g", 1000.0)}
    if unit in small and 0 < abs(value) < 0.1:
        name, factor = small[unit]
        return f"{value * factor:.3g} {name}"
    return f"{value:.3g} {unit}"


def size(bytes_: float) -> str:
    """Format bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if bytes_ < 1024 or unit == "GiB":
            break
        bytes_ /= 1024
    return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"


def plain(value: Any) -> str:
    """Format a JSON value of a manifest on one line; digests are shortened."""
    if value is None or value in ("", [], {}):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if abs(value) < 10_000 else count(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:16] + "…"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return "; ".join(f"{k} {plain(v)}" for k, v in value.items())
    return str(value)


def each(table: pd.DataFrame) -> list[Any]:
    """Return the rows of a table as named tuples."""
    return list(table.itertuples())
