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

    @property
    def global_crops(self) -> Tensor:
        """(2·B, C, size, size), the first views of all images, then the second ones."""
        return self.crops[0][: 2 * len(self.rows)]


class Pairs(NamedTuple):
    """Embeddings of one step that are to be alike, of P pairs of views.

    Attributes:
        queries: (P, B, E) fp32, of the student.
        keys: (P, B, E) fp32, what each of them is to be like.
        are_predictions: the queries are what a predictor made.
        queue_age: mean age of a queue's keys, in units of the steps that their network averages over; None: no queue.
    """

    queries: Tensor
    keys: Tensor
    are_predictions: bool = False
    queue_age: Tensor | None = None


class Seen(NamedTuple):
    """What the network that is watched made of one step's two global views, on this process.

    Attributes:
        tokens: (2, B, D) class tokens.
        logits: (2, B, K) fp32; None for a method without.
        targets: (2, B, K) fp32 probabilities; None for a method without.
        pairs: None for a method that compares no embeddings.
    """

    tokens: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None
    pairs: Pairs | None = None

    def joined(self, more: "Seen") -> "Seen":
        """This and what was seen of another micro-batch of the step."""

        def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
            return torch.cat([one, other], dim=1) if one is not None and other is not None else None

        pairs = self.pairs
        if pairs is not None and more.pairs is not None:
            queries, keys = (torch.cat(parts, dim=1) for parts in zip(pairs[:2], more.pairs[:2], strict=True))
            pairs = pairs._replace(queries=queries, keys=keys)
        tokens = torch.cat([self.tokens, more.tokens], dim=1)
        return Seen(tokens, both(self.logits, more.logits), both(self.targets, more.targets), pairs)


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
    def doubts(cls, config: Config) -> Iterator[str]:
        """What in resolved settings keeps runs from learning, though it can be tried: the verdict names it."""
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
        """What each micro-batch is to be compared with; called once, without gradient; `seen` begins anew."""
        self.seen = None
        return [None] * len(batches)

    def show(self, part: Seen) -> None:
        """Add what `losses` made of a micro-batch to what is seen of the step."""
        self.seen = part if self.seen is None else self.seen.joined(part)

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


def unused_crops(config: Config) -> Iterator[str]:
    """What is wrong where a method that looks at two views is given more."""
    if config.views.local_crops:
        yield f"objective.name={config.objective.name} looks at the two global crops only: set views.local_crops=0"


def drop_gradients(module: nn.Module) -> None:
    """Leave this step's gradients of a module out, so that the optimizer passes it over."""
    for parameter in module.parameters():
        parameter.grad = None
