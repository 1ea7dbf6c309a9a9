"""SwAV (Caron et al. 2020): each view predicts the code of another one, its assignment to prototypes.

Codes are made of the student's own scores, by Sinkhorn-Knopp, which gives every prototype as many images; they are
predicted from all other crops of the image. Batches that are small against the number of prototypes are balanced
together with embeddings of earlier steps (`queue`). The batch is that of all processes; of micro-batches
(`train.accumulation`) each is balanced by itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino.config.auto import PoolFacts, Rule
from dino.config.schema import AUTO, Auto, Config, setting
from dino.distributed import rank_and_size
from dino.methods.averaged import by_view
from dino.methods.heads import SwAVHead, mlp
from dino.methods.losses import dino_loss, sinkhorn_knopp
from dino.methods.method import Batch, Curve, Method, Outside, Seen, drop_gradients
from dino.methods.queue import Queue
from dino.models import Backbone


@dataclass
class Settings:
    """Of SwAV, §3 and appendix A of the paper."""

    name: str = setting("swav", "method of learning; the other settings of this group are its own")
    prototypes: int = setting(3000, "K, to which images are assigned", low=1)
    temperature: float = setting(0.1, "temperature of the student's softmax", above=0)
    epsilon: float = setting(0.05, "smoothness of the codes", above=0)
    sinkhorn_iterations: int = setting(3, "Sinkhorn-Knopp iterations", low=1)
    queue: int = setting(0, "images of earlier steps with which small batches are balanced; 0: none", low=0)
    queue_start: int = setting(0, "when the queue begins to fill", low=0, unit="steps")
    freeze_prototypes_steps: Auto[int] = setting(
        AUTO, "during which the prototypes stand still; auto: 1 epoch, at most 10 % of the run", low=0, unit="steps"
    )
    head_hidden: int = setting(2048, "width of the projector's hidden layer", low=1)
    head_output: int = setting(128, "width of the embeddings", low=1)
    batch_norm: bool = setting(True, "BatchNorm in the projector; false for small micro-batches")


def _freeze_prototypes(config: Config, pool: PoolFacts) -> tuple[int, str]:
    epoch = pool.images // config.train.batch_size
    return min(epoch, config.train.steps // 10), "1 epoch, at most 10 % of the run"


AUTO_RULES: dict[str, Rule] = {"objective.freeze_prototypes_steps": _freeze_prototypes}
REMEDIES = {
    "uniform": "a lower objective.epsilon (0.03), fewer objective.prototypes, a longer "
    "objective.freeze_prototypes_steps, a lower optim.lr; with small batches objective.queue=3840",
    "peaked": "a higher objective.epsilon, more objective.sinkhorn_iterations, at least 2 objective.prototypes",
    "worse": "a lower optim.lr, a later objective.queue_start, milder views",
}


class SwAV(Method):
    """A network with prototypes, and perhaps a queue; see the module."""

    Settings = Settings
    auto_rules = AUTO_RULES
    remedies = REMEDIES

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)
        objective = config.objective

        def make_head(width: int) -> SwAVHead:
            widths = [width, objective.head_hidden, objective.head_output]
            return SwAVHead(mlp(widths, objective.batch_norm), objective.head_output, objective.prototypes)

        self.student = self.result = self.new_network(initial, make_head)
        assert isinstance(self.student.head, SwAVHead)
        self.head = self.student.head
        self.queue = Queue(objective.queue, 2 * objective.head_output) if objective.queue else None
        self.embeddings: list[Tensor] = []  # of this step, for the queue

    def state(self) -> dict[str, nn.Module]:
        return super().state() | ({"queue": self.queue} if self.queue is not None else {})

    def targets(self, batches: list[Batch], step: int) -> list[bool]:
        """Whether the queue takes part: once it is full."""
        objective, self.seen, self.embeddings = self.config.objective, None, []
        images = (step - objective.queue_start) * self.config.train.batch_size
        return [0 < objective.queue <= images] * len(batches)

    def losses(self, batch: Batch, target: bool) -> dict[str, Tensor]:
        objective = self.config.objective
        with self.autocast():
            output = self.forward(batch.crops)
        widths = [objective.prototypes, objective.head_output]
        scores, embeddings = (by_view(part, batch) for part in output.logits.split(widths, dim=1))
        first, second = embeddings[:2].detach()
        self.embeddings.append(torch.cat([first, second], dim=1))
        codes = self._codes(scores[:2].detach(), with_queue=target)
        tokens = by_view(output.tokens[: 2 * len(batch.rows)], batch).detach()
        self.show(Seen(tokens, scores[:2].detach(), codes))
        return {"loss/swav": dino_loss(scores, codes, objective.temperature)}

    @torch.no_grad()
    def _codes(self, scores: Tensor, with_queue: bool) -> Tensor:
        """(2, B, K) scores to codes, those of each view balanced by themselves."""
        objective, images = self.config.objective, scores.shape[1]
        together = list(scores)
        if with_queue and self.queue is not None:
            rank, processes = rank_and_size()  # each brings its share, as all are balanced together
            past = [view @ self.head.prototypes.weight.T for view in self.queue.rows[rank::processes].chunk(2, 1)]
            together = [torch.cat(of_view) for of_view in zip(scores, past, strict=True)]
        codes = [sinkhorn_knopp(view, objective.epsilon, objective.sinkhorn_iterations) for view in together]
        return torch.stack([view[:images] for view in codes])

    def before_update(self, step: int) -> None:
        if step < self.config.objective.freeze_prototypes_steps:
            drop_gradients(self.head.prototypes)

    def after_update(self, step: int) -> None:
        self.head.normalise()
        if self.queue is not None and step >= self.config.objective.queue_start:
            self.queue.add(torch.cat(self.embeddings), step)

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        if config.objective.queue and config.train.fsdp:
            yield "objective.queue needs whole prototypes: leave it out, or train.fsdp"

    @classmethod
    def facts(cls, config: Config) -> dict[str, str]:
        return super().facts(config) | {"targets": f"codes of {config.objective.prototypes} prototypes"}

    @classmethod
    def outputs(cls, config: Config) -> int | None:
        return config.objective.prototypes

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        return {"loss/swav": Curve("loss of swapped codes", blank=math.log(config.objective.prototypes))}
