"""One optimisation step: crop, teach, loss, backward, clip, update; alone or with others."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from data_catalog.errors import RunError
from geofm.config.recipe import PretrainSettings
from geofm.pretraining.augment import crop
from geofm.pretraining.data import Batch, Corpus
from geofm.pretraining.objective import Losses, Pretrainer
from geofm.pretraining.optimiser import Schedule, alpha_at, build_optimiser, set_lr
from geofm.pretraining.parallel import whole
from geofm.pretraining.student import derived_seed
from geofm.pretraining.teacher import Teacher, teach

#: Images a teacher sees at once where memory is short.
FEW = 16


class OutOfMemory(RunError):
    """The device has too little memory for a step."""


class NotCompiled(RunError):
    """torch.compile cannot translate the network on this machine."""


class Stepper:
    """The pieces that stay the same from step to step, ready for any number of processes.

    Args:
        fabric: device, precision and the other processes.
        module: student, decoder and projector.
        teacher: asked for each crop; None without one.
        taught: its features of every sample [N, C], where they are known beforehand.
        corpus: the dataset.
        settings: the recipe's section.
        plan: learning rates.
        seed: of the run.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: Pretrainer,
        teacher: Teacher | None,
        taught: NDArray[np.float32] | None,
        corpus: Corpus,
        settings: PretrainSettings,
        plan: Schedule,
        seed: int,
    ) -> None:
        self.fabric, self.settings, self.plan, self.seed = fabric, settings, plan, seed
        self.module = module.train()
        # FSDP2 replaces the parameters: the optimiser comes after it
        self._wrapped = fabric.setup_module(module)
        self.optimiser = build_optimiser(module, settings)
        self._update: Any = fabric.setup_optimizers(self.optimiser)
        self._teacher, self._taught = teacher, taught
        self._rgb = list(corpus.rgb)
        self._spans: list[Any] = []
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=fabric.device)[:, None, None]
            for values in (corpus.mean, corpus.std)
        )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.fabric.device

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process, and of all."""
        return self.fabric.global_rank, self.fabric.world_size

    def take(self, step: int, batch: Batch) -> Tensor:
        """One optimisation step; loss, its terms and the gradient norm as a tensor [4].

        Raises:
            OutOfMemory: says which settings need less.
            NotCompiled: ``compile`` is set, and the compiler failed.
        """
        try:
            return self._take(step, batch)
        except torch.OutOfMemoryError as error:
            raise self._too_large(step, error) from error
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise NotCompiled(
                    f"{self.settings.student} cannot be compiled here "
                    f"({str(error).strip().splitlines()[0]}); set pretrain.compile=false"
                ) from error
            if "can't allocate memory" not in str(error):
                raise
            raise self._too_large(step, error) from error

    def _too_large(self, step: int, error: RuntimeError) -> OutOfMemory:
        images = self.settings.at_once(self.share[1])
        return OutOfMemory(
            f"step {step}: no memory left for {images} images at a time on {self.device} "
            f"({str(error).splitlines()[0]}). Set pretrain.microbatch below {images}, or "
            "pretrain.activation_checkpointing=true: the run goes on from its last checkpoint. "
            "pretrain.precision=bf16 or a smaller pretrain.batch begin a new one"
        )

    def _take(self, step: int, batch: Batch) -> Tensor:
        set_lr(self.optimiser, self.plan.lr(step))
        if self.settings.alpha_end is not None:
            self.module.alpha = alpha_at(self.settings, step, self.plan.steps)
        # what is random in layers depends on nothing that came before
        torch.manual_seed(derived_seed(self.seed, f"step {step} of {self.share[0]}"))
        size = self.settings.at_once(self.share[1])
        pieces = len(batch.samples) // size
        terms = []
        for piece in range(pieces):
            some = slice(piece * size, (piece + 1) * size)
            with self.fabric.no_backward_sync(self._wrapped, enabled=piece < pieces - 1):
                losses = self._losses(batch, some)
                self.fabric.backward(losses.loss / pieces)
            terms.append(self._numbers(losses))
        norm: Any = self.fabric.clip_gradients(
            self._wrapped, self._update, max_norm=self.settings.clip, error_if_nonfinite=False
        )
        self._update.step()
        self._update.zero_grad(set_to_none=True)
        return torch.cat([torch.stack(terms).mean(dim=0), whole(norm).double()[None]])

    def _losses(self, batch: Batch, some: slice) -> Losses:
        """Losses of some images of a batch."""
        images, windows, mask = (
            tensor[some].to(self.device, non_blocking=True)
            for tensor in (batch.images, batch.windows, batch.mask)
        )
        unit = crop(images, windows, self.settings.size_px)
        taught = None
        if self._taught is not None:
            rows = torch.from_numpy(self._taught[batch.samples[some]])
            taught = rows.to(self.device, non_blocking=True)
        elif self._teacher is not None:
            with self._span():
                rgb = unit[:, self._rgb].clamp(0, 1)
                # memory is short where activations are not kept: the teacher takes a few at a time
                count = FEW if self.settings.activation_checkpointing else len(rgb)
                taught = torch.cat([teach(self._teacher, part) for part in torch.split(rgb, count)])
        losses: Losses = self._wrapped((unit - self._mean) / self._std, mask, taught)
        return losses

    def _numbers(self, losses: Losses) -> Tensor:
        nothing = torch.full((), math.nan, device=self.device)
        terms = [nothing if t is None else t.detach() for t in (losses.mim, losses.distill)]
        return torch.stack([value.double() for value in (losses.loss.detach(), *terms)])

    @contextmanager
    def _span(self) -> Iterator[None]:
        """Note how long the device works on a block."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            yield
            self._spans.append(time.perf_counter() - started)
            return
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._spans.append((first, last))

    def teaching(self) -> float:
        """Seconds the teacher took since this was asked last."""
        spans = [
            span if isinstance(span, float) else span[0].elapsed_time(span[1]) / 1e3
            for span in self._spans
        ]
        self._spans.clear()
        return sum(spans)

    def meet(self, values: Tensor, stopped: bool) -> tuple[Tensor, bool]:
        """Numbers of some steps [n, 4] as means over all processes; whether any was to stop."""
        flag = torch.tensor([float(stopped)], dtype=torch.float64, device=self.device)
        if self.share[1] > 1:
            together: Any = self.fabric.all_reduce(
                torch.cat([values.flatten(), flag]), reduce_op="mean"
            )
            values, flag = together[:-1].reshape(values.shape), together[-1:]
        return values.cpu(), bool(flag > 0)
