"""What a method is to everything else: what it trains, what it minimises, what it shows. One file a method.

The trainer, the monitor, reports and checkpoints know a method only by this interface.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dino.config.auto import Rule
from dino.config.schema import CHOICES, Config
from dino.data import Pool
from dino.methods.network import Network, Outputs
from dino.methods.schedule import Schedule
from dino.models import Backbone, build_backbone, copy_weights


class Batch(NamedTuple):
    """A micro-batch of B images of this process.

    Attributes:
        crops: by size, (V·B, C, size, size) fp32, normalised, view by view; the two global views first.
        rows: of these images in the global batch.
    """

    crops: list[Tensor]
    rows: range


class Seen(NamedTuple):
    """What the network that is watched made of one step's two global views, on this process.

    Attributes:
        tokens: (2, B, D) class tokens.
        logits: (2, B, K) fp32; None for a method without.
        targets: (2, B, K) fp32 probabilities; None for a method without.
    """

    tokens: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None


class Curve(NamedTuple):
    """A number of the metrics that a method shows.

    Attributes:
        title: of its panel in the report.
        blank: its value for a student that predicts nothing, by which "stuck" is told; None: not known.
    """

    title: str
    blank: float | None = None


class Outside(NamedTuple):
    """Weights besides the student's own that a method learns from.

    Attributes:
        settings: those that these weights decide.
        source: the setting that names them, for messages.
        weights: the method's own affair.
    """

    settings: dict[str, object]
    source: str
    weights: Any


METHODS: dict[str, type["Method"]] = {}  # by `objective.name`; a subclass of Method with Settings puts itself here
CHOICES["objective.name"] = METHODS


class Method:
    """A method of self-supervised learning; one that is defined, in a notebook too, can be trained by its name.

    Attributes:
        student: what the optimizer trains.
        result: whose backbone the run is for: an average of the student, or the student.
        forward: the student as the trainer has wrapped it; the losses go through it, so that gradients are exchanged.
        autocast: the precision that networks are to run in.
        seen: of the newest step, for the monitor; None before the first.
    """

    Settings: ClassVar[Any]  # a dataclass of its settings; the default of `name` is the method's
    auto_rules: ClassVar[Mapping[str, Rule]] = {}
    remedies: ClassVar[Mapping[str, str]] = {}  # state of the verdict to the remedies published for it

    student: Network
    result: Network
    forward: Callable[..., Outputs]
    autocast: Callable[[], contextlib.AbstractContextManager]

    def __init_subclass__(cls) -> None:
        if "Settings" in vars(cls):
            METHODS[cls.Settings.name] = cls

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        """Build the networks from torch's random state; a subclass goes on from here.

        Args:
            config: resolved.
            initial: the backbone that the student begins with; None: random weights.
            outside: what the method's own `outside` gave.
        """
        self.config = config
        self.seen: Seen | None = None
        self.schedules = self.make_schedules(config)
        self.autocast = contextlib.nullcontext

    def new_network(
        self, initial: Backbone | None, make_head: Callable[[int], nn.Module], drop_path: float | None = None
    ) -> Network:
        """A backbone as the settings describe it, with a head.

        Args:
            initial: whose weights it begins with; None: random ones.
            make_head: a head for tokens of a width.
            drop_path: rate of stochastic depth; None: as set for the student.
        """
        rate = self.config.model.drop_path if drop_path is None else drop_path
        backbone = build_backbone(self.config, rate)
        if initial is not None:
            copy_weights(initial, backbone, str(self.config.model.init))
        return Network(backbone, make_head(backbone.embed_dim))

    # Before there is a method.

    @classmethod
    def outside(cls, config: Config) -> Outside | None:
        """Weights besides the student's own that the settings ask for; None: there are none."""
        return None

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """What cannot work in these settings, whatever the data set."""
        return iter(())

    @classmethod
    def describe(cls, config: Config) -> str:
        """What is minimised, in words."""
        return config.objective.name

    @classmethod
    def facts(cls, config: Config) -> dict[str, str]:
        """What a run's first block and its report say of the method."""
        return {"objective": cls.describe(config)}

    @classmethod
    def outputs(cls, config: Config) -> int | None:
        """K of the logits and targets that `seen` holds; None: it holds none."""
        return None

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        """Which of the metrics are the method's losses, the main one first."""
        raise NotImplementedError

    @classmethod
    def make_schedules(cls, config: Config) -> dict[str, Schedule]:
        """What changes with the step besides learning rate and weight decay, by the names of the metrics."""
        return {}

    # Once, when networks are on their device.

    def prepare(self, images: Pool, device: torch.device) -> None:
        """Make what needs the images or the device."""

    def state(self) -> dict[str, nn.Module]:
        """What checkpoints keep, by the names of their files."""
        return {"student": self.student}

    def check_state(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise a `UserError` if a checkpoint that has `facts` cannot be gone on from."""

    def checkpoint_facts(self) -> dict[str, Any]:
        """JSON values that `check_state` of a later start is given back."""
        return {}

    # In every optimizer step, in this order.

    def targets(self, batches: list[Batch], step: int) -> list[Any]:
        """What each micro-batch is to be compared with; called once, without gradient."""
        return [None] * len(batches)

    def losses(self, batch: Batch, target: Any) -> dict[str, Tensor]:
        """What is minimised on a micro-batch, each with its weight, by the names of the metrics; their sum counts."""
        raise NotImplementedError

    def before_update(self, step: int) -> None:
        """Drop gradients that are not to count."""

    def after_update(self, step: int) -> None:
        """Move what is no parameter of the student: averages, centers, queues."""

    @torch.no_grad()
    def look(self, batches: list[Batch], step: int) -> None:
        """Let the method see a step's images, for `seen`, without learning anything; networks as they are used."""
        networks = (self.student, self.result)
        for network in networks:
            network.eval()
        for batch, target in zip(batches, self.targets(batches, step), strict=True):
            self.losses(batch, target)
        for network in networks:
            network.train()


def drop_gradients(module: nn.Module) -> None:
    """Leave this step's gradients of a module out, so that the optimizer passes it over."""
    for parameter in module.parameters():
        parameter.grad = None
