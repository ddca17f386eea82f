"""When a run should not go on: losses that are no numbers, or that lost what had been learned."""

from __future__ import annotations

import math
from statistics import median

from data_catalog.errors import RunError

#: Steps whose mean loss counts as where a run began.
FIRST = 10
#: Spreads (median absolute deviations) a run must have learned before it can lose it.
SURE = 6.0

REMEDY = (
    "lower pretrain.base_lr or pretrain.clip, use more pretrain.warmup_epochs, or "
    "pretrain.precision fp32"
)


class Diverged(RunError):
    """The loss is no number any more, or far above what it had been."""


def check_numbers(step: int, steps: int, loss: float, norm: float, rate: float) -> None:
    """Refuse a step whose loss or gradient is infinite or not a number.

    Raises:
        Diverged: with the remedy.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"the loss is {loss} and the gradient norm {norm} at step {step} of {steps} (learning "
            f"rate {rate:.2e}): {REMEDY}"
        )


class Guard:
    """Watches the sum of both terms; knows of a run only its losses, so a resumed one is the same.

    Of each window of losses the median counts. A run is lost when the last window lies more than
    half way back from the best one to where the run began. What had been learned must stand out
    from the noise of the best window, or nothing is said.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._losses: list[float] = []
        self._best = math.inf
        self._spread = 0.0

    def add(self, loss: float) -> None:
        """Take the next step's loss in."""
        self._losses.append(loss)
        count, window = len(self._losses), self._window
        if window and count % window == 0:
            last = self._losses[-window:]
            middle = median(last)
            if middle < self._best:
                self._best = middle
                self._spread = median(abs(x - middle) for x in last)

    @property
    def limit(self) -> float:
        """Losses above this have lost half of what was learned; infinite while that is unsure."""
        if self._best == math.inf:
            return math.inf
        begin = self._losses[:FIRST]
        learned = sum(begin) / len(begin) - self._best
        if learned <= SURE * self._spread:
            return math.inf
        return self._best + learned / 2

    @property
    def healthy(self) -> bool:
        """Whether the last few losses are below the limit: worth a checkpoint."""
        return not self._losses or median(self._losses[-FIRST:]) <= self.limit

    def check(self, steps: int, rate: float) -> None:
        """Stop a run that lost what it had learned, and did not come back for a whole window.

        Raises:
            Diverged: with the remedy.
        """
        window = self._window
        if not window or len(self._losses) < 2 * window:
            return
        now = median(self._losses[-window:])
        if now > self.limit:
            raise Diverged(
                f"the loss rose from {self._best:.4f} to {now:.4f} and stayed there for {window} "
                f"steps (step {len(self._losses)} of {steps}, learning rate {rate:.2e}): {REMEDY}. "
                "The last good checkpoint is kept; pretrain.spike_steps=0 turns this check off"
            )
