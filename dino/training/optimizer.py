"""The optimizer's parameter groups, gradient clipping, and a step that a broken gradient cannot pass."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dino.config.schema import OptimConfig
from dino.distributed import local
from dino.training.lars import LARS
from dino.training.muon import Muon
from dino.training.sharding import norms

TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")


def parameter_groups(
    network: nn.Module, decay_tokens: bool = True, layer_decay: float = 1.0, patch_embed_lr: float = 1.0
) -> list[dict]:
    """Trainable parameters in groups: with weight decay or without (`decayed`), for each factor of the rate (`factor`).

    Biases, norms and everything else of one dimension are not decayed. Tokens, positions and `weight_g`, which have
    more than one, are, as DINO and DINOv2 published it; `decay_tokens=False` exempts tokens and positions. For the
    factors see `rate_factor`.
    """
    depth = 1 + max(
        (int(block[1]) for name, _ in network.named_parameters() if (block := BLOCK.match(name))), default=-1
    )
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rsplit(".", 1)[-1] in TOKENS
        exempt = parameter.ndim <= 1 or name.endswith(".bias") or (is_token and not decay_tokens)
        factor = rate_factor(name, depth, layer_decay, patch_embed_lr)
        groups.setdefault((not exempt, factor), []).append(parameter)
    return [
        {"params": parameters, "decayed": decayed, "factor": factor, **({} if decayed else {"weight_decay": 0.0})}
        for (decayed, factor), parameters in groups.items()
        if parameters
    ]


BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def rate_factor(name: str, depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    """Layer-wise decay of the learning rate (Bao et al. 2022): 1 for the heads and the last norm.

    The last block has `layer_decay`, each before it once more, tokens, positions and patch embedding once more than the
    first; the patch embedding has `patch_embed_lr` besides (DINOv2).
    """
    if block := BLOCK.match(name):
        return layer_decay ** (depth - int(block[1]))
    if name.startswith("backbone.patch_embed."):
        return layer_decay ** (depth + 1) * patch_embed_lr
    return layer_decay ** (depth + 1) if name.rsplit(".", 1)[-1] in TOKENS else 1.0


def build_optimizer(network: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW, SGD, Muon or LARS over the groups of a network; `set_rates` gives it the rates of each step."""
    groups = parameter_groups(network, settings.decay_tokens, settings.layer_decay, settings.patch_embed_lr)
    if settings.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        # From zeros the first step is the same. The fused kernel would leave them uninitialised where that step is
        # broken, and cannot do with only some of them, as when prototypes stand still at first.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    betas = (settings.betas[0], settings.betas[1])
    if settings.name == "lars":
        return LARS(groups)
    if settings.name == "muon":
        named = network.named_parameters()
        return Muon(groups, [value for name, value in named if BLOCK.match(name) and value.ndim == 2], betas)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Put this step's learning rate and weight decay into the groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
        if group["decayed"]:
            group["weight_decay"] = weight_decay


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, scope: str) -> Tensor:
    """Scale gradients down to a norm of `largest`, without making the host wait for the device.

    Args:
        parameters: those without a gradient are passed over.
        largest: the greatest norm allowed; 0 leaves gradients as they are.
        scope: `parameter`: the norm of each tensor by itself, as DINO does; else of all gradients together.

    Returns:
        The global norm before clipping, a scalar on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    each = norms(gradients)
    total = torch.linalg.vector_norm(each)
    if largest > 0:
        factors = (largest / ((each if scope == "parameter" else total) + 1e-6)).clamp(max=1.0)
        if scope == "parameter":
            torch._foreach_mul_(local(gradients), list(factors.unbind()))
        else:
            torch._foreach_mul_(local(gradients), factors)  # one factor for all: a few launches instead of one a tensor
    return total


def step_unless(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """Take an optimizer step, unless `broken` (a bool scalar on the device) is true; decided on the device.

    Fused optimizers read the mark that gradient scalers leave (`found_inf`); they then change neither parameters nor
    their state.
    """
    optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
