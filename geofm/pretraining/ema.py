"""A running mean of the weights, which is often a better model than the last of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geofm.pretraining.parallel import whole


class RunningMean:
    """Exponential moving average of a module's weights and statistics (shards under FSDP2).

    Early on the decay is smaller, (1 + step) / (10 + step), or the random start would stay in it.

    Args:
        module: starts from its present weights.
        decay: share of the old mean that a step keeps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        held = module.state_dict(keep_vars=True)
        self._of = {name: t for name, t in held.items() if t.is_floating_point()}
        self._mean = {name: t.detach().clone() for name, t in self._of.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, mean in self._mean.items():
            mean.lerp_(self._of[name].detach(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU by name."""
        return {name: whole(mean).cpu() for name, mean in self._mean.items()}

    @torch.no_grad()
    def give(self) -> None:
        """Put the mean in the place of the weights."""
        for name, mean in self._mean.items():
            self._of[name].copy_(mean)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name, mean in self._mean.items():
            mean.copy_(like(state[name], mean))


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as the target holds it: on its device, or spread over its processes."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return tensor.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), mesh, target.placements)  # type: ignore[attr-defined]
