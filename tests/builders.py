"""What tests of several rooms build: a method with its step, a batch's views, weights on disk, images in memory."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dino.config.auto import PoolFacts, resolve
from dino.config.read import assign
from dino.config.schema import Config
from dino.data import UnreadableImage
from dino.methods import METHODS, Outside
from dino.models import Backbone, ResNet, ResNetSpec, VisionTransformer, ViTSpec, save_backbone
from dino.training import launch
from dino.training.normalise import Normalise
from dino.training.optimizer import build_optimizer
from dino.training.schedules import optimizer_schedules
from dino.training.step import Step

MEAN, STD = {1: [0.25], 3: [0.25, 0.5, 0.75]}, {1: [0.125], 3: [0.125, 0.25, 0.5]}  # by channels

DINOV2 = {
    "objective.ibot_weight": 0.8,
    "objective.koleo_weight": 0.3,
    "optim.layer_decay": 0.8,
    "optim.patch_embed_lr": 0.2,
    "train.batch_size": 4,
}
SEPARATE = {
    "objective.ibot_head": "separate",
    "objective.ibot_prototypes": 20,
    "objective.ibot_head_hidden": 16,
    "objective.ibot_head_bottleneck": 6,
}
SINKHORN = {"objective.centering": "sinkhorn"}


class Built(NamedTuple):
    """A method, and what takes part in its steps."""

    step: Step
    method: Any
    optimizer: torch.optim.Optimizer

    def take(self, *numbers: int) -> dict[str, float]:
        """Take these steps, each with views of its own; gives what the last one logs."""
        for number in numbers:
            config = self.step.config
            logged = self.step(number, packed(views_of_batch(config, number), config.train.accumulation))
        return {name: value.item() for name, value in logged.items()}


def build(
    accelerator: Accelerator,
    config: Config,
    initial: Backbone | None = None,
    outside: Outside | None = None,
    images: Any = None,
    exact: bool = False,
) -> Built:
    """A method and its step as a run builds them.

    Args:
        exact: in double precision, so that what should be equal differs by less than what Adam could blow up; and with
            a student that has left its teacher.
    """
    torch.manual_seed(0)
    method: Any = METHODS[config.objective.name](config, initial, outside)
    normalise = Normalise(config.views.mean or (), config.views.std or ())
    if exact:
        normalise.double()
        method.student.double()
        method.result.double()
        add_noise(method.student, 0.05)
    optimizer = build_optimizer(method.student, config.optim)
    method.prepare(images, accelerator.device)
    if exact:
        method.target_network.double()
    prepared = launch.prepare(accelerator, method, optimizer)
    step = Step(accelerator, config, method, prepared, normalise, optimizer_schedules(config))
    return Built(step, method, optimizer)


def views_of_batch(config: Config, seed: int) -> list[Tensor]:
    """Two global views and the local ones, each (B, C, size, size) uint8."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [config.views.global_size] * 2 + [config.views.local_size] * config.views.local_crops
    shapes = [(config.train.batch_size, config.data.channels, size, size) for size in sizes]
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


def packed(views: list[Tensor], parts: int = 1) -> list[list[Tensor]]:
    """Views as micro-batches: each a list of crops by size, view by view."""
    micro_batches = []
    for part in range(parts):
        by_size: dict[int, list[Tensor]] = {}
        for view in views:
            by_size.setdefault(view.shape[-1], []).append(view.chunk(parts)[part])
        micro_batches.append([torch.cat(crops) for crops in by_size.values()])
    return micro_batches


def normalised(config: Config, view: Tensor) -> Tensor:
    """A view as networks take it, by the textbook."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.views.mean, config.views.std))
    return (view / 255 - mean) / std


def weights(*modules: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is saved of them."""
    return {
        f"{index}.{name}": tensor.clone()
        for index, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Names whose tensors are not the same, bit by bit."""
    assert one.keys() == other.keys()
    return {name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    """The same names, and nearly the same tensors."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@torch.no_grad()
def add_noise(module: nn.Module, size: float) -> None:
    """Move every parameter, so that none is at a value which a new one could have, too."""
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


def random_backbone(spec: ViTSpec | ResNetSpec) -> Backbone:
    """In evaluation mode."""
    backbone: Backbone = ResNet(spec) if isinstance(spec, ResNetSpec) else VisionTransformer(spec)
    add_noise(backbone, 0.1)
    return backbone.eval()


def write_own(folder: Path, backbone: Backbone) -> Path:
    """A run directory with nothing but its backbone."""
    folder.mkdir(exist_ok=True)
    channels = backbone.spec.in_chans
    preprocessing = {"image_size": 12, "mean": MEAN[channels], "std": STD[channels]}
    save_backbone(folder / "backbone.safetensors", backbone, preprocessing, {})
    return folder


def write_release(file: Path, backbone: Backbone) -> Path:
    """A state dict alone; a ViT's parameter names are DINOv2's."""
    torch.save(backbone.state_dict(), file)
    return file


def with_settings(values: dict[str, Any]) -> Config:
    """Not checked: what depends on weights is not known before they are read."""
    config = Config()
    for key, value in values.items():
        assign(config, key, copy.deepcopy(value))
    return config


def resolved(config: Config, images: int = 1000) -> Config:
    """For a folder of so many images."""
    channels = 3 if config.data.channels == "auto" else config.data.channels
    return resolve(config, PoolFacts(images, channels, "folder"))[0]


class Pictures:
    """16×16 pixels of noise in memory; those in `unreadable` cannot be read."""

    channels, kind, labels, weights = 3, "folder", None, None

    def __init__(self, count: int, unreadable: range = range(0)):
        generator = torch.Generator().manual_seed(3)
        self.pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
        self.names = [str(index) for index in range(count)]
        self.unreadable = unreadable

    def read(self, index: int, enough: float | None = None) -> Tensor:
        """(3, 16, 16) uint8."""
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]
