"""How processes share a model, and its whole state in one form: the same for one process or many.

Under DDP each process has the model whole; under FSDP2 each keeps a shard of every parameter. A
checkpoint always holds whole tensors by name, so it goes on with any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils import deterministic

from data_catalog.storage.process import cores
from geofm.pretraining.objective import Pretrainer

# The arithmetic of a run: threads, determinism and random state, put back afterwards.


def device_name(device: str) -> str:
    """What the run record calls the device."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def cpu_threads() -> int:
    """Threads of the processor: ``OMP_NUM_THREADS``, or every core this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return cores()


def threads_each(processes: int) -> int:
    """Threads of each of so many processes that share the processor."""
    return max(1, cpu_threads() // processes)


@contextmanager
def arithmetic(device: str, seed: int, threads: int) -> Iterator[None]:
    """Fixed threads, a seeded random state and, on the CPU, deterministic algorithms only."""
    memory: Any = deterministic
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    fill = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):  # a GPU's is set anew at every step
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        if device == "cpu":
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            memory.fill_uninitialized_memory = fill
            torch.set_num_threads(before)


PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
#: Whole tensors, on the CPU, in process 0; read by process 0 and handed to the others.
WRITE = StateDictOptions(full_state_dict=True, cpu_offload=True)
READ = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

Parallel = Literal["ddp", "fsdp"]


def make_fabric(device: str, precision: str, processes: int, parallel: Parallel) -> Fabric:
    """Fabric for one process, or for one of several on this machine that torchrun started."""
    strategy: Any = strategy_of(processes, parallel) if processes > 1 else "auto"
    fabric = Fabric(
        accelerator=device, devices=processes, precision=PRECISION[precision], strategy=strategy
    )
    fabric.launch()
    return fabric


def strategy_of(processes: int, parallel: Parallel) -> DDPStrategy | ModelParallelStrategy:
    """Fabric's strategy for processes that share a model."""
    if parallel == "ddp":
        # what buffers there are (masks, indices) never changes
        return DDPStrategy(broadcast_buffers=False)
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(module: Pretrainer, mesh: Any) -> Pretrainer:
    """FSDP2: a shard per process of every block, and of what is left as one more unit."""
    across = mesh["data_parallel"]
    for block in blocks_of(module):
        fully_shard(block, mesh=across)
    fully_shard(module, mesh=across)
    return module


def blocks_of(module: Pretrainer) -> list[nn.Module]:
    """The repeated pieces of the student, which are gathered one after another."""
    backbone: Any = module.student.backbone
    if hasattr(backbone, "layers"):
        return [block for layer in backbone.layers for block in layer.blocks]
    return list(getattr(backbone, "blocks", getattr(backbone, "stages", [])))


def whole_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and state of the optimiser by name; every process asks, process 0 gets them."""
    return {
        "module": get_model_state_dict(module, options=WRITE),
        "optimiser": get_optimizer_state_dict(module, optimiser, options=WRITE),
    }


def load_whole_state(
    module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Give every process its part of what ``whole_state`` gave."""
    set_model_state_dict(module, state["module"], options=_reading())
    set_optimizer_state_dict(module, optimiser, state["optimiser"], options=_reading())


def _reading() -> StateDictOptions:
    return READ if dist.is_initialized() else StateDictOptions(full_state_dict=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all shards of one put together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU by name; every process must ask, and each gets them."""
    return {name: whole(value).cpu() for name, value in module.state_dict().items()}
