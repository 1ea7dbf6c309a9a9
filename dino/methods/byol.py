"""BYOL (Grill et al. 2020): predict what a moving average makes of the other view; no image is told from another.

Only the predictor, and that the teacher is a slow average which gets no gradient, keep all images from being given the
same embedding. Micro-batches (`train.accumulation`) give what one batch does, but for BatchNorm.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dino.config.schema import Config, setting
from dino.methods.averaged import Averaged
from dino.methods.heads import mlp
from dino.methods.losses import regression_loss
from dino.methods.method import Batch, Curve, unused_crops
from dino.methods.network import Outputs


@dataclass
class Settings:
    """Of BYOL, §3 of the paper."""

    name: str = setting("byol", "method of learning; the other settings of this group are its own")
    predictor: bool = setting(True, "predict the teacher's embeddings; false: be like them, which collapses")
    teacher_momentum: float = setting(0.996, "EMA rate of the teacher at the first step", low=0, high=1)
    teacher_momentum_end: float = setting(1.0, "EMA rate of the teacher at the last step (cosine)", low=0, high=1)
    head_hidden: int = setting(4096, "width of the hidden layer of projector and predictor", low=1)
    head_output: int = setting(256, "width of the embeddings that are compared", low=1)
    batch_norm: bool = setting(True, "BatchNorm in projector and predictor; false for small micro-batches")


REMEDIES = {
    "uniform": "objective.predictor=true, objective.batch_norm=true, a higher objective.teacher_momentum (0.996), "
    "a lower optim.lr with a longer optim.warmup_steps",
    "worse": "a lower optim.lr, a higher objective.teacher_momentum, milder views",
}


class BYOL(Averaged):
    """Student with a predictor, and teacher; see the module."""

    Settings = Settings
    remedies = REMEDIES

    def new_projector(self, width: int) -> nn.Module:
        objective = self.config.objective
        return mlp([width, objective.head_hidden, objective.head_output], objective.batch_norm)

    def new_predictor(self) -> nn.Module | None:
        objective = self.config.objective
        if not objective.predictor:
            return None
        return mlp([objective.head_output, objective.head_hidden, objective.head_output], objective.batch_norm)

    def losses(self, batch: Batch, target: Outputs) -> dict[str, Tensor]:
        queries, keys, *_ = self.crossed(batch, target)
        of_views = [regression_loss(*pair) for pair in zip(queries, keys, strict=True)]
        return {"loss/byol": of_views[0] + of_views[1]}

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        yield from unused_crops(config)

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        return {"loss/byol": Curve("distance of predictions")}
