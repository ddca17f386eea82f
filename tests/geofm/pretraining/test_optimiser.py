from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofm.config.recipe import PretrainSettings
from geofm.pretraining.objective import build_pretrainer
from geofm.pretraining.optimiser import (
    LearningRateSchedule,
    build_optimiser,
    decay_groups,
    make_schedule,
)
from tests.geofm.pretraining.conftest import tiny_settings


def _reference(step: int, batch: int, warm: int, total: int, base: float, low: float) -> float:
    """Warm-up and cosine from the formula of SGDR, rates scaled linearly with the batch."""
    start, peak, end = (rate * batch / 512.0 for rate in (1e-6, base, low))
    if step < warm:
        share = step / warm
        return start * (1 - share) + peak * share
    angle = math.pi * step / total
    return end + (peak - end) * (math.cos(angle) + 1) / 2


def test_the_papers_schedule() -> None:
    settings = PretrainSettings(batch=1024)
    plan = make_schedule(settings, 574)
    assert (plan.steps, plan.warmup_steps) == (57_400, 5_740)
    assert plan.lr(0) == pytest.approx(2e-6)
    assert plan.peak == pytest.approx(4e-4)
    assert plan.lr(5_740) == pytest.approx(2e-5 + 3.8e-4 * (1 + math.cos(math.pi / 10)) / 2)
    assert plan.lr(57_399) == pytest.approx(2e-5, rel=1e-3)
    for step in range(0, 57_400, 97):
        expected = _reference(step, 1024, 5_740, 57_400, 2e-4, 1e-5)
        assert plan.lr(step) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 50), st.integers(1, 300))
def test_rates_rise_then_fall_within_bounds(warmup: int, rest: int) -> None:
    plan = LearningRateSchedule(1e-6, 1e-3, 1e-5, warmup, warmup + rest)
    rates = [plan.lr(step) for step in range(plan.steps)]
    assert all(1e-6 <= rate <= 1e-3 for rate in rates)
    assert all(a <= b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))


@pytest.mark.parametrize("student", ["swin", "vit"])
def test_what_is_spared_weight_decay(student: str) -> None:
    vit = {"student": "test_vit", "student_args": {}, "size_px": 64, "mask_patch_px": 16}
    settings = tiny_settings(**(vit if student == "vit" else {}))
    module = build_pretrainer(settings, 4, 0, 64)
    decayed, plain = decay_groups(module, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    spared = {names[id(parameter)] for parameter in plain["params"]}
    kept = {names[id(parameter)] for parameter in decayed["params"]}
    assert spared | kept == set(names.values())
    assert not spared & kept
    special = ("mask_token", "relative_position_bias_table", "pos_embed", "cls_token")
    expected = {
        name
        for name, p in module.named_parameters()
        if p.ndim == 1 or name.endswith(("bias", *special))
    }
    assert spared == expected
    assert "student.mask_token" in spared
    assert {"decoder.pixels.weight", "projector.weight"} <= kept
    tables = [name for name in spared if name.endswith("relative_position_bias_table")]
    assert len(tables) == (4 if student == "swin" else 0)


def test_adamw_has_the_papers_constants() -> None:
    module = build_pretrainer(tiny_settings(), 4, 0, 64)
    optimiser = build_optimiser(module, PretrainSettings())
    assert optimiser.defaults["betas"] == (0.9, 0.999)
    assert optimiser.defaults["eps"] == 1e-8
    assert optimiser.param_groups[0]["weight_decay"] == 0.05
