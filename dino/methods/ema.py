"""The teacher: an exponential moving average of the student (Caron et al. 2021, §3.1)."""

import torch
from torch import nn

from dino.distributed import local, mean_over_processes


@torch.no_grad()
def update_average(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_average ← m·θ_average + (1 − m)·θ_student for every parameter, of shards by shards, in one fused call.

    Buffers are not averaged: a BatchNorm teacher gathers statistics of its own, which fit its own weights.
    """
    torch._foreach_lerp_(local(average.parameters()), local(student.parameters()), 1.0 - momentum)


@torch.no_grad()
def synchronise_buffers(network: nn.Module) -> None:
    """Average a network's floating-point buffers (BatchNorm statistics) over all processes."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean_over_processes(buffer.clone()))
