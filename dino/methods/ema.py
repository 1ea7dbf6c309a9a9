"""The teacher: an exponential moving average of the student (Caron et al. 2021, §3.1)."""

import torch
from torch import nn

from dino.distributed import local, mean_over_processes


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_teacher ← m·θ_teacher + (1 − m)·θ_student for every parameter, of shards by shards, in one fused call.

    Buffers are not averaged: a BatchNorm teacher gathers statistics of its own, which fit its own weights.
    """
    torch._foreach_lerp_(local(teacher.parameters()), local(student.parameters()), 1.0 - momentum)


@torch.no_grad()
def synchronise_buffers(teacher: nn.Module) -> None:
    """Average the teacher's floating-point buffers (BatchNorm statistics) over all processes."""
    for buffer in teacher.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean_over_processes(buffer.clone()))
