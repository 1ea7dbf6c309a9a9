"""What methods share whose targets are made by a moving average of the student (He et al. 2020; Grill et al. 2020)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from dino.config.schema import Config
from dino.methods.ema import update_average
from dino.methods.heads import PredictionHead
from dino.methods.method import Batch, Method, Outside, Pairs, Seen
from dino.methods.network import Network, Outputs
from dino.methods.schedule import Schedule
from dino.models import Backbone


class Averaged(Method):
    """A student, with a predictor in some methods, and its average, without one, which is the result.

    A subclass says what the heads are and what is minimised.
    """

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)

        predictor = self.new_predictor()
        self.has_predictor = predictor is not None
        self.student = self.new_network(initial, lambda width: PredictionHead(self.new_projector(width), predictor))
        self.teacher = self.result = self.new_network(
            None, lambda width: PredictionHead(self.new_projector(width)), drop_path=0.0
        )
        self.teacher.backbone.load_state_dict(self.student.backbone.state_dict())
        projector(self.teacher).load_state_dict(projector(self.student).state_dict())
        self.teacher.requires_grad_(False)

    def new_projector(self, width: int) -> nn.Module:
        """From class tokens of a width to embeddings."""
        raise NotImplementedError

    def new_predictor(self) -> nn.Module | None:
        """From the student's embeddings to predictions of the teacher's; None: they are compared as they are."""
        return None

    def state(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher}

    @torch.no_grad()
    def targets(self, batches: list[Batch], step: int) -> list[Outputs]:
        """What the teacher makes of each micro-batch."""
        self.seen = None
        outputs = []
        for batch in batches:
            with self.autocast():
                outputs.append(self.teacher([self.teacher_crops(batch)]))
        return outputs

    def teacher_crops(self, batch: Batch) -> Tensor:
        """Which crops the teacher sees: both global views."""
        return batch.global_crops

    def crossed(self, batch: Batch, target: Outputs) -> Pairs:
        """The student's embeddings of both global views, each with the teacher's of the other."""
        with self.autocast():
            output = self.forward([batch.global_crops])
        queries, keys = by_view(output.logits, batch), by_view(target.logits, batch).flip(0)
        pairs = Pairs(queries, keys, are_predictions=self.has_predictor)
        self.show(Seen(by_view(target.tokens, batch), pairs=pairs._replace(queries=queries.detach())))
        return pairs

    def after_update(self, step: int) -> None:
        momentum = self.schedules["teacher/momentum"](step)
        update_average(self.teacher.backbone, self.student.backbone, momentum)
        update_average(projector(self.teacher), projector(self.student), momentum)

    @classmethod
    def make_schedules(cls, config: Config) -> dict[str, Schedule]:
        objective = config.objective
        momentum = Schedule(objective.teacher_momentum, objective.teacher_momentum_end, config.train.steps)
        return {"teacher/momentum": momentum}


def projector(network: Network) -> nn.Module:
    """Of its head."""
    assert isinstance(network.head, PredictionHead)
    return network.head.projector


def by_view(outputs: Tensor, batch: Batch) -> Tensor:
    """(V·B, E) of a micro-batch to (V, B, E) fp32."""
    return rearrange(outputs.float(), "(v b) e -> v b e", b=len(batch.rows))
