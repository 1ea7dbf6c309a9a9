"""Muon (Jordan et al. 2024) for the matrices of transformer blocks, AdamW for everything else; one optimizer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: small singular values grow fast, all end between 0.7 and 1.2
ADAMW_SIZE = 0.2  # root mean square of AdamW's updates


class Muon(torch.optim.AdamW):
    """Momentum whose singular values are made equal (Nesterov's, 0.95), in place of Adam's division by element.

    Updates are as large as AdamW's (Liu et al. 2025, §2.2: 0.2·√max(rows, columns) times an orthogonal matrix), so that
    a recipe's learning rate and weight decay stay. `torch.optim.Muon` with `match_rms_adamw` does the same; here equal
    shapes go through in one product, and a step that is marked broken (`found_inf`, see
    `dino.training.optimizer.step_unless`) changes nothing, which the device decides.

    Args:
        groups: of `dino.training.optimizer.parameter_groups`.
        matrices: those of the parameters, all of two dimensions, that are Muon's.
        betas: AdamW's.
    """

    def __init__(self, groups: list[dict], matrices: Iterable[nn.Parameter], betas: tuple[float, float]):
        apart, matrices = [], set(matrices)
        for group in groups:
            for orthogonal in (False, True):
                members = [parameter for parameter in group["params"] if (parameter in matrices) == orthogonal]
                if members:
                    apart.append({**group, "params": members, "orthogonal": orthogonal})
        super().__init__(apart, lr=0.0, betas=betas, fused=True)

    def __setstate__(self, state: dict) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own asks every parameter for the step count of Adam

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        of_shape: dict[torch.Size, list[tuple[nn.Parameter, dict]]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape, []).append((parameter, group))
        for members in of_shape.values():
            self._step_matrices(*zip(*members, strict=True))
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, parameters: tuple[nn.Parameter, ...], groups: tuple[dict, ...]) -> None:
        """Matrices of one shape, each with the rate and the decay of its group."""
        for parameter in parameters:
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = torch.stack([parameter.grad for parameter in parameters])  # type: ignore[misc]
        moving = torch.ones((), device=gradients.device)
        if (broken := getattr(self, "found_inf", None)) is not None:
            moving = 1 - broken
            gradients = gradients.where(moving > 0, 0.0)  # what is not finite would outlive the factor of 0

        momentum = torch.stack(buffers)
        change = (gradients - momentum) * (1 - MOMENTUM)
        torch._foreach_add_(buffers, list((change * moving).unbind()))
        updates = orthogonal(gradients.lerp(momentum + change, MOMENTUM)).to(gradients.dtype)

        size = ADAMW_SIZE * math.sqrt(max(parameters[0].shape))
        steps = torch._foreach_mul(list((updates * moving).unbind()), [-size * group["lr"] for group in groups])
        shrinking = torch._foreach_mul(parameters, [-group["lr"] * group["weight_decay"] for group in groups])
        torch._foreach_mul_(shrinking, moving)
        torch._foreach_add_(steps, shrinking)
        torch._foreach_add_(parameters, steps)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U·Vᵀ of matrices U·S·Vᵀ, by Newton–Schulz iterations: singular values between about 0.7 and 1.2.

    In bf16 on CUDA; elsewhere in fp32, which is faster on most CPUs (20 times on one without instructions for bf16).

    Args:
        matrices: (n, rows, columns).

    Returns:
        As many of the same shape, in the type of the computation.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.mT if tall else matrices
    result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=1e-7)
    result = result.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    for _ in range(ITERATIONS):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.mT if tall else result
