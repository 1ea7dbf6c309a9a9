"""The optimizer's parameter groups, gradient clipping, and a step that a broken gradient cannot pass."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dino.settings import OptimConfig

TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")


def parameter_groups(network: nn.Module, decay_tokens: bool = True) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and without (`decayed` says which).

    Biases, norms and everything else of one dimension are not decayed. Tokens, positions and `weight_g`, which have
    more than one, are, as DINO and DINOv2 published it; `decay_tokens=False` exempts tokens and positions.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rsplit(".", 1)[-1] in TOKENS
        exempt = parameter.ndim <= 1 or name.endswith(".bias") or (is_token and not decay_tokens)
        (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": free, "decayed": False, "weight_decay": 0.0}]


def build_optimizer(network: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW or SGD over the groups of a network; `set_rates` gives it the rates of each step."""
    groups = parameter_groups(network, settings.decay_tokens)
    if settings.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        # From zeros the first step is the same. The fused kernel would leave them uninitialised where that step is
        # broken, and cannot do with only some of them, as when prototypes stand still at first.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.betas[0], settings.betas[1]), fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Put this step's learning rate and weight decay into the groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = weight_decay


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, scope: str) -> Tensor:
    """Scale gradients down to a norm of `largest`, without making the host wait for the device.

    Args:
        parameters: those without a gradient are passed over.
        largest: the greatest norm allowed; 0 leaves gradients as they are.
        scope: `global`: the norm of all gradients together; `parameter`: of each tensor by itself, as DINO does.

    Returns:
        The global norm before clipping, a scalar on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if largest > 0:
        factors = (largest / ((total if scope == "global" else norms) + 1e-6)).clamp(max=1.0)
        scale_each(gradients, factors.expand(len(gradients)))
    return total


def scale_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its own entry of `factors`, in place and in one fused call."""
    torch._foreach_mul_(list(tensors), list(factors.unbind()))


def step_unless(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """Take an optimizer step, unless `broken` (a bool scalar on the device) is true; decided on the device.

    Fused optimizers read the mark that gradient scalers leave (`found_inf`); they then change neither parameters nor
    their state.
    """
    optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
