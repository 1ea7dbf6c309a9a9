"""MoCo (He et al. 2020) with v2's head and temperature (Chen, Fan, Girshick & He 2020): a queue of keys to differ from.

The student's embedding of an image's first view, the query, is to find the teacher's of the second, its key, among the
keys of earlier steps. The teacher is a slow average of the student, so that these are still of nearly the same network.
The queue does without large batches; it is moved once a step, so that micro-batches give what one batch does. Without
BatchNorm, as in a ViT, a batch tells nothing of which key is whose; that of a ResNet does, which the paper prevents by
shuffling images among GPUs. That is not done here: use a ViT, or `moco_v3`, for which it is not needed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino.config.schema import Config, setting
from dino.methods.averaged import Averaged, by_view
from dino.methods.heads import mlp
from dino.methods.losses import queue_contrast
from dino.methods.method import Batch, Curve, Outside, Pairs, Seen, unused_crops
from dino.methods.network import Outputs
from dino.methods.queue import Queue
from dino.models import Backbone


@dataclass
class Settings:
    """Of MoCo v2, §3 of both papers."""

    name: str = setting("moco", "method of learning; the other settings of this group are its own")
    temperature: float = setting(0.2, "temperature of the softmax over similarities", above=0)
    queue: int = setting(65536, "keys of earlier steps that a query is told from", low=1)
    teacher_momentum: float = setting(0.999, "EMA rate of the teacher at the first step", low=0, high=1)
    teacher_momentum_end: float = setting(0.999, "EMA rate of the teacher at the last step", low=0, high=1)
    head_hidden: int = setting(2048, "width of the projector's hidden layer", low=1)
    head_output: int = setting(128, "width of the embeddings that are compared", low=1)


REMEDIES = {
    "uniform": "a higher objective.teacher_momentum (0.999), a lower optim.lr with a longer optim.warmup_steps",
    "stale": "a shorter objective.queue, a larger train.batch_size, or a higher objective.teacher_momentum, so "
    "that keys are of nearly the network that queries meet",
    "worse": "a lower optim.lr, a higher objective.teacher_momentum, milder views",
}


class MoCo(Averaged):
    """Student, teacher and queue; see the module."""

    Settings = Settings
    remedies = REMEDIES

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)
        self.queue = Queue(config.objective.queue, config.objective.head_output)
        self.keys: list[Tensor] = []  # of this step, from `targets` until `after_update`
        self.step = 0

    def new_projector(self, width: int) -> nn.Module:
        return mlp([width, self.config.objective.head_hidden, self.config.objective.head_output])

    def state(self) -> dict[str, nn.Module]:
        return {**super().state(), "queue": self.queue}

    def teacher_crops(self, batch: Batch) -> Tensor:
        return batch.global_crops[len(batch.rows) :]

    def targets(self, batches: list[Batch], step: int) -> list[Outputs]:
        outputs = super().targets(batches, step)
        self.keys, self.step = [nn.functional.normalize(output.logits.float(), dim=1) for output in outputs], step
        return outputs

    def losses(self, batch: Batch, target: Outputs) -> dict[str, Tensor]:
        with self.autocast():
            output = self.forward([batch.global_crops[: len(batch.rows)]])
        queries, keys = by_view(output.logits, batch), by_view(target.logits, batch)
        changing = 1 - self.schedules["teacher/momentum"](self.step)  # per step
        pairs = Pairs(queries.detach(), keys, queue_age=self.queue.age(self.step) * changing)
        # The teacher does not see the first view, so that is the student's; the watched view is the teacher's.
        tokens = torch.cat([by_view(target.tokens, batch), by_view(output.tokens, batch).detach()])
        self.show(Seen(tokens, pairs=pairs))
        return {"loss/moco": queue_contrast(queries[0], keys[0], self.queue.rows, self.config.objective.temperature)}

    def after_update(self, step: int) -> None:
        super().after_update(step)
        self.queue.add(torch.cat(self.keys), step)

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        yield from unused_crops(config)

    @classmethod
    def facts(cls, config: Config) -> dict[str, str]:
        return super().facts(config) | {"queue": f"{config.objective.queue:,} keys"}

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        return {"loss/moco": Curve("contrastive loss (InfoNCE)", blank=math.log(1 + config.objective.queue))}
