"""MoCo v3 (Chen, Xie & He 2021): the batch instead of the queue, a predictor, and Vision Transformers.

The student's prediction of each global view is to find the teacher's embedding of the other one among those of the
whole batch, of all processes. Of micro-batches (`train.accumulation`) each is contrasted by itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dino.config.schema import Config, setting
from dino.methods.averaged import Averaged
from dino.methods.heads import mlp
from dino.methods.losses import batch_contrast
from dino.methods.method import Batch, Curve, Outside, unused_crops
from dino.methods.network import Outputs
from dino.models import BACKBONES, Backbone


@dataclass
class Settings:
    """Of MoCo v3, §3 and §4 of the paper."""

    name: str = setting("moco_v3", "method of learning; the other settings of this group are its own")
    temperature: float = setting(0.2, "temperature of the softmax over similarities", above=0)
    teacher_momentum: float = setting(0.99, "EMA rate of the teacher at the first step", low=0, high=1)
    teacher_momentum_end: float = setting(1.0, "EMA rate of the teacher at the last step (cosine)", low=0, high=1)
    head_hidden: int = setting(4096, "width of the hidden layers of projector and predictor", low=1)
    head_output: int = setting(256, "width of the embeddings that are compared", low=1)
    batch_norm: bool = setting(True, "BatchNorm in projector and predictor; false for small micro-batches")
    freeze_patch_projection: bool = setting(
        False, "leave a ViT's patch projection random: gradients of it are what makes training unsteady (§4.1)"
    )


REMEDIES = {
    "uniform": "objective.freeze_patch_projection=true, a lower optim.lr with a longer optim.warmup_steps, a "
    "higher objective.teacher_momentum (0.99)",
    "worse": "objective.freeze_patch_projection=true, a lower optim.lr, a higher objective.teacher_momentum",
}


class MoCoV3(Averaged):
    """Student with a predictor, and teacher; see the module."""

    Settings = Settings
    remedies = REMEDIES

    def __init__(self, config: Config, initial: Backbone | None = None, outside: Outside | None = None):
        super().__init__(config, initial, outside)
        if config.objective.freeze_patch_projection:
            self.student.backbone.patch_embed.requires_grad_(False)

    def new_projector(self, width: int) -> nn.Module:
        objective = self.config.objective
        widths = [width, objective.head_hidden, objective.head_hidden, objective.head_output]
        return mlp(widths, objective.batch_norm, norm_output=True)

    def new_predictor(self) -> nn.Module:
        objective = self.config.objective
        widths = [objective.head_output, objective.head_hidden, objective.head_output]
        return mlp(widths, objective.batch_norm, norm_output=True)

    def losses(self, batch: Batch, target: Outputs) -> dict[str, Tensor]:
        queries, keys, *_ = self.crossed(batch, target)
        temperature = self.config.objective.temperature
        of_views = [batch_contrast(*pair, temperature) for pair in zip(queries, keys, strict=True)]
        return {"loss/moco_v3": of_views[0] + of_views[1]}

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        yield from unused_crops(config)
        arch = config.model.arch
        if config.objective.freeze_patch_projection and arch in BACKBONES and not BACKBONES[arch].has_patches:
            yield f"objective.freeze_patch_projection is for a ViT's patches, which model.arch={arch} has not"
        if config.train.batch_size // config.train.accumulation < 2:
            yield "objective.name=moco_v3 tells an image from others: a micro-batch must have at least 2"

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        images = config.train.batch_size // config.train.accumulation
        blank = 4 * config.objective.temperature * math.log(images)  # of two views, each with the factor 2τ
        return {"loss/moco_v3": Curve("contrastive loss (InfoNCE)", blank=blank)}
