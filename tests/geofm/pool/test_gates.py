from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from geofm.config.recipe import CurateSettings
from geofm.dedup.descriptors import entropy_bits, gradient_energy, luminance, measure
from geofm.pool.gates import apply_gates, quality


def _chips(**columns: list[float]) -> pd.DataFrame:
    rows = len(next(iter(columns.values())))
    usual = {"valid": 1.0, "cloud": 0.0, "saturated": 0.0, "entropy": 6.0, "constant": False}
    return pd.DataFrame({name: columns.get(name, [value] * rows) for name, value in usual.items()})


def test_each_gate_has_its_rule_and_sentence():
    chips = _chips(
        constant=[True, False, False, False, False, False],
        valid=[0.5, 0.5, 1.0, 1.0, 1.0, np.nan],
        cloud=[0.9, 0.9, 0.31, 0.0, np.nan, 0.0],
        saturated=[0.0, 0.0, 0.0, 0.5, 0.0, 0.0],
    )
    rules, reasons = apply_gates(chips, CurateSettings())
    assert rules == ["gate_constant", "gate_valid", "gate_cloud", "gate_saturated", "",
                     "gate_valid"]  # fmt: skip
    assert "curate.max_cloud allows 30.0 %" in reasons[2]
    assert reasons[4] == ""


def test_limits_themselves_pass():
    chips = _chips(valid=[0.95], cloud=[0.3], saturated=[0.2])
    assert apply_gates(chips, CurateSettings())[0] == [""]


def test_quality_prefers_clear_chips_and_noise_gains_nothing():
    chips = _chips(
        valid=[1.0, 0.96, 1.0, 1.0], cloud=[0.0, 0.0, 0.2, np.nan], entropy=[6.0, 8.0, 6.0, 8.0]
    )
    score = quality(chips)
    assert score.tolist() == [1.0, 0.96, 0.8, 1.0]


def test_entropy_is_that_of_the_histogram():
    assert entropy_bits(np.zeros((8, 8))) == 0
    assert entropy_bits(np.tile([0.0, 1.0], (8, 4))) == 1
    assert entropy_bits(np.arange(256).reshape(16, 16) / 255) == pytest.approx(8)


def test_gradient_energy():
    ramp = np.tile(np.arange(4.0), (4, 1))
    assert gradient_energy(ramp) == 1.0
    assert gradient_energy(ramp + ramp.T) == 2.0


def test_describe_in_unit_space():
    pixels = np.full((3, 8, 8), 1500, dtype=np.uint16)
    about, _ = measure(pixels, ["red", "green", "blue"], [1e-4] * 3)
    assert about["constant"] is True
    assert about["band_means"] == pytest.approx([0.5] * 3)
    pixels[0, 0, 0] = 3000
    assert measure(pixels, ["red", "green", "blue"], [1e-4] * 3)[0]["constant"] is False
    assert luminance(np.ones((3, 2, 2), dtype=np.float32)).max() == pytest.approx(1)
