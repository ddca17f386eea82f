from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofm.pretraining.loop import Diverged, DivergenceGuard, check_finite_loss


def run_through(losses: list[float], window: int = 20) -> int:
    """Number of losses that a guard with a window of 20 steps accepts."""
    guard = DivergenceGuard(window)
    for number, loss in enumerate(losses, start=1):
        guard.add(loss)
        try:
            guard.check(1000, 1e-3)
        except Diverged:
            return number
    return len(losses)


def falling(steps: int, noise: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [1 / (1 + step / 20) + draw.gauss(0, noise) for step in range(steps)]


@given(st.integers(0, 1000), st.floats(0, 0.05))
def test_a_run_that_learns_is_never_stopped(seed: int, noise: float) -> None:
    losses = falling(300, noise, seed)
    assert run_through(losses) == 300


@given(st.integers(0, 1000))
def test_a_run_that_learns_nothing_is_not_stopped_either(seed: int) -> None:
    draw = random.Random(seed)
    assert run_through([draw.gauss(1, 0.1) for _ in range(300)]) == 300


def test_a_short_spike_passes_and_a_lasting_one_does_not() -> None:
    losses = falling(100, 0.01)
    assert run_through([*losses, *[0.9] * 9, *falling(100, 0.01)[50:]]) == 159
    stopped = run_through([*losses, *[0.9] * 50])
    assert 105 <= stopped <= 121


def test_the_message_has_figures_and_remedies() -> None:
    guard = DivergenceGuard(20)
    for loss in [*falling(100, 0.0), *[0.9] * 20]:
        guard.add(loss)
    assert not guard.healthy
    with pytest.raises(Diverged, match=r"rose from 0\.18\d+ to 0\.9.*lower pretrain\.base_lr"):
        guard.check(1000, 1e-3)
    never = DivergenceGuard(0)
    for loss in [*falling(100, 0.0), *[0.9] * 200]:
        never.add(loss)
        never.check(1000, 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_stops_at_once(bad: float) -> None:
    check_finite_loss(3, 10, 1.0, 2.0, 1e-3)
    for loss, norm in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(Diverged, match=r"step 3 of 10 .*pretrain\.precision fp32"):
            check_finite_loss(3, 10, loss, norm, 1e-3)
