"""LARS (You, Gitman & Ginsburg 2017), for the large batches of SimCLR, BYOL and SwAV."""

import torch
from torch import Tensor

MOMENTUM = 0.9
TRUST = 0.001  # η, as published


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which each matrix moves by a fraction of its own length (algorithm 1).

    v ← m·v + γ·λ·(g + β·w), w ← w − v, with λ = η·‖w‖ / (‖g‖ + β·‖w‖) for what is decayed; biases and norms have λ = 1
    and β = 0, as SimCLR, BYOL and SwAV do. A step that is marked broken (`found_inf`, see
    `dino.training.optimizer.step_unless`) changes nothing, which the device decides.

    Args:
        groups: of `dino.training.optimizer.parameter_groups`.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict) -> None:
        assert parameter.grad is not None
        velocity = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        gradient, decay = parameter.grad, group["weight_decay"]
        change = group["lr"] * (gradient + decay * parameter)
        if group["decayed"]:
            length, slope = parameter.norm(), gradient.norm()
            trust = TRUST * length / (slope + decay * length)
            change = change * torch.where((length > 0) & (slope > 0), trust, 1.0)
        moved = MOMENTUM * velocity + change
        broken = getattr(self, "found_inf", None)
        if broken is not None:
            moved = torch.where(broken > 0, velocity, moved)
            parameter.sub_(torch.where(broken > 0, 0.0, moved))
        else:
            parameter.sub_(moved)
        velocity.copy_(moved)
