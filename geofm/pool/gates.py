"""Hard gates and the quality of a chip. They are separate: no quality rescues a cloudy chip.

A gate is a named rule with a limit from the settings. A chip that fails several gates is dropped by
the first in the order below. The quality only orders chips: the best chip of a group of near
duplicates is kept, and no chip is dropped because of its quality alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geofm.config.recipe import CurateSettings
from geofm.types import Floats

#: Entropy above which the quality does not rise further: noise has the highest (8 bits).
ENOUGH_ENTROPY_BITS = 6.0


@dataclass(frozen=True)
class Gate:
    """A rule that drops chips.

    Attributes:
        rule: value of the column ``rule``.
        fails: function of a table of chips and the settings; returns whether each chip fails.
        reason: function of a failing chip and the settings; returns the text of the column
            ``reason``.
    """

    rule: str
    fails: Callable[[pd.DataFrame, CurateSettings], NDArray[np.bool_]]
    reason: Callable[[pd.Series, CurateSettings], str]


def _percent(share: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.1f} %"


#: The gates in the order in which they apply. Columns: constant, valid, cloud, saturated.
#: A chip without a cloud mask (cloud is NaN) passes ``gate_cloud``.
GATES = (
    Gate(
        "gate_constant",
        lambda chips, _: chips["constant"].to_numpy(dtype=np.bool_),
        lambda chip, _: "every band has one value throughout",
    ),
    Gate(
        "gate_valid",
        lambda chips, s: ~(chips["valid"].to_numpy(dtype=np.float64) >= s.min_valid),
        lambda chip, s: (
            f"{_percent(chip['valid'])} of its pixels are valid, "
            f"curate.min_valid asks for {_percent(s.min_valid)}"
        ),
    ),
    Gate(
        "gate_cloud",
        lambda chips, s: chips["cloud"].to_numpy(dtype=np.float64) > s.max_cloud,
        lambda chip, s: (
            f"{_percent(chip['cloud'])} of its pixels are cloud, "
            f"curate.max_cloud allows {_percent(s.max_cloud)}"
        ),
    ),
    Gate(
        "gate_saturated",
        lambda chips, s: chips["saturated"].to_numpy(dtype=np.float64) > s.max_saturated,
        lambda chip, s: (
            f"{_percent(chip['saturated'])} of its pixels are saturated, "
            f"curate.max_saturated allows {_percent(s.max_saturated)}"
        ),
    ),
)


def apply_gates(chips: pd.DataFrame, settings: CurateSettings) -> tuple[list[str], list[str]]:
    """Return the first gate that each chip fails, and the reason; empty if it passes them all."""
    rules, reasons = [""] * len(chips), [""] * len(chips)
    for gate in reversed(GATES):
        for row in np.flatnonzero(gate.fails(chips, settings)):
            rules[row] = gate.rule
            reasons[row] = gate.reason(chips.iloc[row], settings)
    return rules, reasons


def quality(chips: pd.DataFrame) -> Floats:
    """Compute the quality of chips: clear share * (0.9 + 0.1 * texture), in 0..1.

    The clear share is valid * (1 - cloud, 0 if unknown) * (1 - saturated). The texture is the
    grey-level entropy up to 6 bits, divided by 6. Entropy has little weight and is capped, because
    pure noise maximises it.

    Returns:
        Values rounded to 6 decimals, shape (n,).
    """
    cloud = np.nan_to_num(chips["cloud"].to_numpy(dtype=np.float64), nan=0.0)
    clear = chips["valid"].to_numpy(dtype=np.float64) * (1 - cloud)
    clear = clear * (1 - chips["saturated"].to_numpy(dtype=np.float64))
    entropy = chips["entropy"].to_numpy(dtype=np.float64)
    texture = np.minimum(entropy, ENOUGH_ENTROPY_BITS) / ENOUGH_ENTROPY_BITS
    return np.asarray(np.round(clear * (0.9 + 0.1 * texture), 6), dtype=np.float64)
