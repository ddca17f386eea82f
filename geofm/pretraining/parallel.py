"""Threads, reproducibility and processes of a run.

- ``cpu_threads``, ``threads_per_process``: how many threads a run uses.
- ``reproducible_torch``: seeds and deterministic algorithms while a run lasts.
- ``make_fabric``: Lightning Fabric for one process, for DDP, or for FSDP2.
- ``gather_state``, ``load_gathered_state``, ``gather_weights``: state of a run as whole tensors.

Under DDP every process holds the whole model; under FSDP2 each holds a shard of every parameter. A
checkpoint always holds whole tensors by name, so a run resumes with any number of processes.
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

ParallelMode = Literal["ddp", "fsdp"]

#: Fabric's name of each precision.
PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}
#: Gather whole tensors on the CPU of process 0.
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
#: Process 0 holds whole tensors and sends them to the others.
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def device_name(device: str) -> str:
    """Name of a device in the run record."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def cpu_threads() -> int:
    """Number of CPU threads: ``OMP_NUM_THREADS``, or all cores that this process may use."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdecimal() and int(setting) > 0:
        return int(setting)
    return cores()


def threads_per_process(processes: int) -> int:
    """Number of CPU threads of each process if several share the CPU."""
    return max(1, cpu_threads() // processes)


@contextmanager
def reproducible_torch(device: str, seed: int, threads: int) -> Iterator[None]:
    """Make torch reproducible in this block, and restore its settings afterwards.

    Sets the number of threads and the seed; on the CPU also deterministic algorithms.
    """
    memory: Any = deterministic
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    fill_before = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):  # every step seeds the GPU anew
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        if device == "cpu":
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic_before)
            memory.fill_uninitialized_memory = fill_before
            torch.set_num_threads(threads_before)


def make_fabric(device: str, precision: str, processes: int, parallel: ParallelMode) -> Fabric:
    """Launch Fabric for a single process, or for one of several that torchrun has started here."""
    strategy: Any = make_strategy(processes, parallel) if processes > 1 else "auto"
    fabric = Fabric(
        accelerator=device, devices=processes, precision=PRECISION[precision], strategy=strategy
    )
    fabric.launch()
    return fabric


def make_strategy(processes: int, parallel: ParallelMode) -> DDPStrategy | ModelParallelStrategy:
    """Fabric's strategy for processes that train one model."""
    if parallel == "ddp":
        # The only buffers (masks, indices) never change.
        return DDPStrategy(broadcast_buffers=False)
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(module: Pretrainer, mesh: Any) -> Pretrainer:
    """Apply FSDP2: each block is a unit, and all other parameters form one more unit."""
    data_parallel = mesh["data_parallel"]
    for block in repeated_blocks(module):
        fully_shard(block, mesh=data_parallel)
    fully_shard(module, mesh=data_parallel)
    return module


def repeated_blocks(module: Pretrainer) -> list[nn.Module]:
    """The student's repeated blocks; FSDP2 gathers their parameters one block at a time."""
    backbone: Any = module.student.backbone
    if hasattr(backbone, "layers"):
        return [block for layer in backbone.layers for block in layer.blocks]
    return list(getattr(backbone, "blocks", getattr(backbone, "stages", [])))


def gather_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Gather weights and optimiser state as whole tensors by name.

    Every process must call this; only process 0 gets the tensors.
    """
    return {
        "module": get_model_state_dict(module, options=GATHER),
        "optimiser": get_optimizer_state_dict(module, optimiser, options=GATHER),
    }


def load_gathered_state(
    module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Load a state that ``gather_state`` returned; every process gets its part."""
    options = BROADCAST if dist.is_initialized() else StateDictOptions(full_state_dict=True)
    set_model_state_dict(module, state["module"], options=options)
    set_optimizer_state_dict(module, optimiser, state["optimiser"], options=options)


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor, or the whole of a sharded tensor."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the CPU, by name; every process must call this and gets them."""
    return {name: gather_tensor(value).cpu() for name, value in module.state_dict().items()}
