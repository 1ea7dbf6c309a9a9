"""What each method of the family collapses by is told by the verdict, and runs that learn are not called ill."""

import pytest
import torch
from accelerate import Accelerator
from builders import build, packed
from torch import Tensor

from dino.config.schema import Config
from dino.monitor.health import Health
from dino.monitor.verdict import judge

pytestmark = pytest.mark.slow

STEPS = 60
LEARNING = {
    "views.local_crops": 0,
    "objective.head_hidden": 64,
    "objective.head_output": 16,
    "train.batch_size": 32,
    "train.steps": STEPS,
    "optim.lr": 0.002,
    "optim.weight_decay_end": 0.04,
    "monitor.health_every": 10,
    "model.weight_init": "fan_in",
}
FAST = {"objective.teacher_momentum": 0.9, "objective.teacher_momentum_end": 0.9}
HEALTHY = {
    "simclr": {},
    "moco": FAST | {"objective.queue": 64},
    "moco_v3": FAST,
    "byol": FAST,
    "swav": {"objective.prototypes": 16},
    "simdino": FAST,
}
AT_ONCE = {"objective.teacher_momentum": 0.0, "objective.teacher_momentum_end": 0.0}
PLAIN = {"optim.lr": 0.01, "objective.batch_norm": False}
COLLAPSES = {  # what provokes it: (method, settings, state)
    "no predictor": ("byol", PLAIN | AT_ONCE | {"objective.predictor": False}, "collapsed"),
    "no coding rate": ("simdino", FAST | {"objective.coding_rate_weight": 0.0, "optim.lr": 0.01}, "collapsed"),
    "one prototype": ("swav", {"objective.prototypes": 1}, "collapsed: constant"),
    "a temperature at which nothing counts": ("simclr", {"objective.temperature": 1000.0}, "stuck"),
    "a queue of another network's keys": ("moco", AT_ONCE | {"objective.queue": 512}, "stale queue"),
    "a temperature at which no other image counts": ("moco_v3", FAST | {"objective.temperature": 1000.0}, "stuck"),
}


def views_of_patterns(number: int, batch: int) -> list[Tensor]:
    """Two noisy views (B, 3, 16, 16) of images that differ."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randint(0, 256, (batch, 3, 4, 4), generator=generator).float()
    images = torch.nn.functional.interpolate(coarse, size=16)
    noise = 40 * torch.randn(2, batch, 3, 16, 16, generator=generator)
    return list((images + noise).clamp(0, 255).to(torch.uint8))


def states(config: Config) -> list[str]:
    """The verdicts on a run, from the first to the last."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    built = build(accelerator, config)
    health, lines, verdicts = Health(accelerator, config, built.method, None), [], []
    for number in range(STEPS):
        batch = config.train.batch_size
        logged = built.step(number, packed(views_of_patterns(number, batch)))
        health.observe(range(number * batch, (number + 1) * batch))
        if health.is_due(number + 1):
            losses = {name: value.item() for name, value in logged.items()}
            lines.append({"step": number + 1, **losses, **health.measure(number + 1)})
            verdicts.append(judge(lines, config, width=16).state)
    return verdicts


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_learns_is_healthy(name, fresh_accelerate, tiny):
    assert set(states(tiny(LEARNING | {"objective.name": name} | HEALTHY[name]))) <= {"warming up", "healthy"}


@pytest.mark.parametrize("cause", COLLAPSES)
def test_a_collapse_is_named(cause, fresh_accelerate, tiny):
    name, settings, state = COLLAPSES[cause]
    assert states(tiny(LEARNING | {"objective.name": name} | settings))[-1].startswith(state)
