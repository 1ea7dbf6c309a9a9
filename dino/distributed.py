"""The processes of a run and what they tell each other; the same calls do for one process alone."""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def local_processes() -> int:
    """Processes of this run on this machine, as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def allowed_cores() -> int:
    """CPU cores that this process may run on: a container, Slurm or taskset may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """This process's share of them, where the run has several processes on this machine."""
    return max(1, allowed_cores() // local_processes())


def forget_earlier_runs() -> None:
    """Let a new Accelerator be as it is told: a run before it, in this process, may have had another precision."""
    if PartialState._shared_state and not is_distributed():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def reduced(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    """Summed (or as `how` says) over all processes, in place; every process must call this."""
    if is_distributed():
        dist.all_reduce(tensor, op=how)
    return tensor


def mean_over_processes(value: Tensor) -> Tensor:
    """`value` averaged over all processes, in place; itself where there is one."""
    if is_distributed():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def gathered_rows(tensor: Tensor, equally_many: bool = False) -> Tensor:
    """(n, …) of each process, one after the other; every process must call this.

    Args:
        equally_many: n is known to be the same everywhere; the host then does not wait for the device.
    """
    if not is_distributed():
        return tensor
    if equally_many:
        rows = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, tensor.contiguous())
        return torch.cat(rows)
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(count) for count in counts)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shard of each, in the same memory; itself where it is not sharded."""
    # By what a sharded tensor can do: to import its class takes longer than a short command.
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
