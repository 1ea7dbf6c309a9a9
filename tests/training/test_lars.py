"""LARS against its algorithm, parameter by parameter."""

import math

import torch
from torch import nn

from dino.config.schema import OptimConfig
from dino.training.optimizer import build_optimizer, set_rates, step_unless


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    nn.init.zeros_(made[2].weight)  # of no length: λ is 1
    return made


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_are_those_of_the_algorithm():
    ours, plain = network(), network()
    optimizer, velocity = build_optimizer(ours, OptimConfig(name="lars")), {}
    for step, (rate, decay) in enumerate([(0.5, 0.1), (2.0, 0.2), (1.0, 0.0)]):
        for module in (ours, plain):
            gradients(module, step)
        set_rates(optimizer, rate, decay)
        optimizer.step()
        for name, parameter in plain.named_parameters():
            weights, gradient = parameter.detach().flatten().tolist(), parameter.grad.flatten().tolist()
            beta = decay if parameter.ndim > 1 else 0.0
            length, slope = math.hypot(*weights), math.hypot(*gradient)
            trust = 0.001 * length / (slope + beta * length) if parameter.ndim > 1 and length else 1.0
            old = velocity.get(name, [0.0] * len(weights))
            velocity[name] = [
                0.9 * v + rate * trust * (g + beta * w) for v, g, w in zip(old, gradient, weights, strict=True)
            ]
            moved = [w - v for w, v in zip(weights, velocity[name], strict=True)]
            parameter.data.copy_(torch.tensor(moved).view(parameter.shape))
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_broken_step_changes_nothing():
    module = network()
    optimizer = build_optimizer(module, OptimConfig(name="lars"))
    set_rates(optimizer, 1.0, 0.1)
    gradients(module, 0)
    step_unless(optimizer, torch.tensor(False))
    before = [
        value.clone() for value in (*module.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values()))
    ]
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_unless(optimizer, torch.tensor(True))
    after = [*module.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
