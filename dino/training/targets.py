"""What turns the teacher's scores into targets, as `objective.centering` says: of class tokens, and of patches."""

from typing import NamedTuple

from torch import Tensor, nn

from dino.config.read import Config
from dino.methods.losses import Centre, SinkhornKnopp


class TeacherOutput(NamedTuple):
    """What the teacher made of one optimizer step's global views, on this process.

    Attributes:
        tokens: (2, B, D) class tokens.
        logits: (2, B, K) fp32.
        targets: (2, B, K) fp32.
    """

    tokens: Tensor
    logits: Tensor
    targets: Tensor


class Targets(nn.Module):
    """One for each head's scores; its state (centres) is part of a checkpoint.

    Args:
        config: resolved.
    """

    def __init__(self, config: Config):
        super().__init__()
        objective, prototypes = config.objective, int(config.objective.prototypes)
        self.dino = self._build(config, prototypes)
        self.ibot = self._build(config, objective.ibot_prototypes or prototypes) if objective.ibot_weight else None

    @staticmethod
    def _build(config: Config, prototypes: int) -> Centre | SinkhornKnopp:
        objective = config.objective
        if objective.centering == "sinkhorn":
            return SinkhornKnopp(objective.sinkhorn_iterations)
        return Centre(prototypes, objective.center_momentum)
