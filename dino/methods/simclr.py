"""SimCLR (Chen et al. 2020): the two views of an image are to be nearer than those of all other images in the batch.

One network, no average, no memory: the batch's other images are what it learns from, so that it wants large ones. With
several processes the batch is that of all of them. Of micro-batches (`train.accumulation`) each is contrasted by
itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dino.config.schema import Config, setting
from dino.methods.averaged import by_view
from dino.methods.heads import mlp
from dino.methods.losses import nt_xent
from dino.methods.method import Batch, Curve, Method, Outside, Pairs, Seen, unused_crops
from dino.models import Backbone


@dataclass
class Settings:
    """Of SimCLR, §3 and §4 of the paper."""

    name: str = setting("simclr", "method of learning; the other settings of this group are its own")
    temperature: float = setting(0.1, "temperature of the softmax over similarities", above=0)
    head_hidden: int = setting(2048, "width of the projector's hidden layer", low=1)
    head_output: int = setting(128, "width of the embeddings that are compared", low=1)


REMEDIES = {
    "uniform": "a lower optim.lr with a longer optim.warmup_steps, a lower objective.temperature (0.1), a larger "
    "train.batch_size",
    "worse": "a lower optim.lr, milder views, a higher objective.temperature (0.5, as published for CIFAR-10)",
}


class SimCLR(Method):
    """A network and its projector; see the module."""

    Settings = Settings
    remedies = REMEDIES

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)
        objective = config.objective
        self.student = self.result = self.new_network(
            initial, lambda width: mlp([width, objective.head_hidden, objective.head_output])
        )

    def losses(self, batch: Batch, target: None) -> dict[str, Tensor]:
        with self.autocast():
            output = self.forward([batch.global_crops])
        embeddings = by_view(output.logits, batch)
        shown = embeddings.detach()
        self.show(Seen(by_view(output.tokens, batch).detach(), pairs=Pairs(shown, shown.flip(0))))
        first, second = embeddings
        return {"loss/nt_xent": nt_xent(first, second, self.config.objective.temperature)}

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        yield from unused_crops(config)
        if config.train.batch_size // config.train.accumulation < 2:
            yield "objective.name=simclr tells an image from others: a micro-batch must have at least 2"

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        others = 2 * (config.train.batch_size // config.train.accumulation) - 1
        return {"loss/nt_xent": Curve("contrastive loss (NT-Xent)", blank=math.log(others))}
