"""The DINO objective (Caron et al. 2021): the student's class tokens predict the teacher's across views.

Shapes: V student views, of which the first G are the global ones that the teacher sees too, B images, K prototypes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino.distributed import is_distributed

CACHED = 2**20  # logits that a CPU takes at once


def dino_loss(student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every (teacher view, other student view) pair, averaged over pairs and images.

    L = mean over g < G, v < V, v ≠ g of −Σ_k q_g[k] · log softmax(z_v / τ)[k]      (Caron et al. 2021, eq. 3)

    A student view meets several teacher views, whose targets are added up first: one pass over the student's logits
    instead of one per pair. The gradient, softmax less targets, is made on the way.

    Args:
        student_logits: (V, B, K), any floating type; global views first.
        teacher_probabilities: (G, B, K), each row sums to 1.
        temperature: the student's τ.

    Returns:
        Scalar, fp32.

    Raises:
        ValueError: no pair of different views.
    """
    views, globals_ = student_logits.shape[0], teacher_probabilities.shape[0]
    pairs = globals_ * views - globals_
    if pairs < 1:
        raise ValueError(f"{views} student and {globals_} teacher view(s) leave no pair of different views")
    total = _CrossEntropy.apply(student_logits, teacher_probabilities.detach().float(), temperature)
    return total / (pairs * student_logits.shape[1])


class _CrossEntropy(torch.autograd.Function):
    """The sum over pairs and images."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        globals_, total = len(targets), torch.zeros((), device=logits.device)
        # Not in fp16, in which so small numbers are 0 before a scaler's factor comes.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros_like(logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        all_targets = targets.sum(dim=0)  # (B, K)
        for start, stop in _portions(logits, globals_):
            others = all_targets - targets[start] if start < globals_ else all_targets
            count = globals_ - 1 if start < globals_ else globals_
            if count == 0:
                continue
            log_probabilities = (logits[start:stop].float() / temperature).log_softmax(dim=-1)
            total = total - (others * log_probabilities).sum()
            if gradient is not None:
                gradient[start:stop] = log_probabilities.exp_().mul_(count).sub_(others).div_(temperature)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_total).to(ctx.dtype), None, None


def _portions(logits: Tensor, globals_: int) -> Iterator[tuple[int, int]]:
    """Views (start, stop) that meet the same targets: local ones together, as many as a CPU's cache holds."""
    views, images, prototypes = logits.shape
    yield from ((view, view + 1) for view in range(globals_))
    most = max(1, CACHED // (images * prototypes)) if logits.device.type == "cpu" else views
    yield from ((start, min(start + most, views)) for start in range(globals_, views, most))


class Center(nn.Module):
    """Teacher softmax, centered by an EMA of the teacher's logits (Caron et al. 2021, eq. 4).

    The targets of optimizer step t use the center of the steps before it: `probabilities` reads the center, `update`
    moves it afterwards, once per optimizer step, by the mean over all processes.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) logits to probabilities of the same shape, fp32."""
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the center towards the mean of this step's logits (N, K), N of this process, which may be 0.

        A mean that is not finite is ignored.
        """
        total = torch.cat([logits.float().sum(dim=0), logits.new_full((1,), len(logits), dtype=torch.float32)])
        if is_distributed():
            dist.all_reduce(total)
        mean = (total[:-1] / total[-1])[None]
        moved = torch.lerp(mean, self.center, self.momentum)
        # On the device, so that a broken step can neither reach the center nor make the host wait.
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))


class SinkhornKnopp(nn.Module):
    """Teacher targets spread evenly over the prototypes (Caron et al. 2020, SwAV; Oquab et al. 2023). No state."""

    def __init__(self, iterations: int = 3):
        super().__init__()
        self.iterations = iterations

    def probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) logits, all leading dimensions one batch, to probabilities of the same shape, fp32."""
        return sinkhorn_knopp(logits.flatten(0, -2), temperature, self.iterations).view(logits.shape)

    def update(self, logits: Tensor) -> None:
        """Nothing: every batch is balanced by itself."""


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Scale exp(logits / τ), in turn, to equal mass per prototype and to unit mass per sample.

    Only two vectors of factors move, one of prototypes and one of samples (Cuturi 2013, algorithm 1); the matrix is
    computed once. Its logarithms are first lowered by each prototype's maximum and then by each sample's, after which
    every row and column holds a 1 and nothing above it: whatever the logits, no sum overflows or is 0. The batch is
    that of all processes together.

    Args:
        logits: (N, K), this process's samples.
        temperature: the teacher's τ.
        iterations: rounds; 3 as published.

    Returns:
        (N, K) fp32, each row sums to 1.
    """
    logits = logits.float()
    masses = logits - _highest_of_samples(logits)
    highest = masses.amax(dim=1, keepdim=True)
    to_base_2 = 1 / (temperature * math.log(2))  # as exp2 takes a third of exp's time on a CPU
    masses.sub_(highest).mul_(to_base_2).exp2_()  # (N, K) in [0, 1]
    of_samples = (highest[:, 0] / temperature).exp_()  # what lowering by a sample's maximum has taken from it
    of_prototypes = of_samples.new_ones(logits.shape[1])
    for _ in range(iterations):
        totals = of_samples @ masses
        if is_distributed():
            dist.all_reduce(totals)
        of_prototypes = totals.reciprocal_()
        of_samples = (masses @ of_prototypes).reciprocal_()
    return masses.mul_(of_prototypes).mul_(of_samples[:, None])


def _highest_of_samples(logits: Tensor) -> Tensor:
    """(N, K) to (K,): the maximum over the samples of all processes, of which some may have none."""
    highest = logits.amax(dim=0) if len(logits) else logits.new_full(logits.shape[1:], -torch.inf)
    if is_distributed():
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest
