"""SimDINO (Wu et al. 2025): DINO without prototypes, temperatures and centers.

The student's embeddings of all crops are to be the teacher's of the global crops; that these do not become the same for
all images, a coding rate sees to, which is large where the embeddings of a batch fill all directions. The batch is that
of all processes. Of micro-batches (`train.accumulation`) each has a coding rate of its own.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from dino.config.auto import PoolFacts, Rule
from dino.config.schema import AUTO, Auto, Config, setting
from dino.methods.averaged import Averaged, by_view
from dino.methods.heads import mlp
from dino.methods.losses import coding_rate, view_distance
from dino.methods.method import Batch, Curve, Pairs, Seen
from dino.methods.network import Outputs


@dataclass
class Settings:
    """Of SimDINO, §3 of the paper; the head is DINO's up to its bottleneck."""

    name: str = setting("simdino", "method of learning; the other settings of this group are its own")
    coding_rate_weight: Auto[float] = setting(
        AUTO,
        "γ, weight of the coding rate; auto: by batch and width, so that its gradient is about as large as that of "
        "the distance",
        low=0,
        below=math.inf,
    )
    epsilon: float = setting(0.5, "ε, precision of the coding rate", above=0)
    teacher_momentum: float = setting(0.996, "EMA rate of the teacher at the first step", low=0, high=1)
    teacher_momentum_end: float = setting(1.0, "EMA rate of the teacher at the last step (cosine)", low=0, high=1)
    head_layers: int = setting(3, "layers of the head's MLP", low=1)
    head_hidden: int = setting(2048, "width of the head's MLP", low=1)
    head_output: int = setting(256, "width of the embeddings that are compared", low=1)


def _coding_rate_weight(config: Config, pool: PoolFacts) -> tuple[float, str]:
    objective, images = config.objective, config.train.batch_size // config.train.accumulation
    width = objective.head_output
    weight = objective.epsilon * math.sqrt(images / (width * min(width, images)))
    return round(weight, 6), f"ε·√(n / (d·min(d, n))) of n = {images} images and width d = {width}"


AUTO_RULES: dict[str, Rule] = {"objective.coding_rate_weight": _coding_rate_weight}
REMEDIES = {
    "uniform": "a higher objective.coding_rate_weight, a larger train.batch_size, a lower optim.lr with a longer "
    "optim.warmup_steps",
    "worse": "a lower optim.lr, a higher objective.teacher_momentum, milder views",
}


class SimDINO(Averaged):
    """Student and teacher; see the module."""

    Settings = Settings
    auto_rules = AUTO_RULES
    remedies = REMEDIES

    def new_projector(self, width: int) -> nn.Module:
        objective = self.config.objective
        hidden = [objective.head_hidden] * (objective.head_layers - 1)
        return mlp([width, *hidden, objective.head_output], activation=nn.GELU)

    def losses(self, batch: Batch, target: Outputs) -> dict[str, Tensor]:
        objective = self.config.objective
        with self.autocast():
            output = self.forward(batch.crops)
        views, keys = by_view(output.logits, batch), by_view(target.logits, batch)
        pairs = Pairs(views[:2].detach(), keys.flip(0))
        self.show(Seen(by_view(target.tokens, batch), pairs=pairs))
        rate = (coding_rate(views[0], objective.epsilon) + coding_rate(views[1], objective.epsilon)) / 2
        return {
            "loss/distance": view_distance(views, keys),
            "loss/coding_rate": -objective.coding_rate_weight * rate,
        }

    @classmethod
    def watched(cls, config: Config) -> dict[str, Curve]:
        return {"loss/distance": Curve("distance of views"), "loss/coding_rate": Curve("−γ · coding rate")}
