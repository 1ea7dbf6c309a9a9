"""What is minimised: pure functions and small modules of tensors that know no optimizer, logger or accelerator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dino.methods.losses.dino import Center, SinkhornKnopp, dino_loss, sinkhorn_knopp
from dino.methods.losses.ibot import ibot_loss
from dino.methods.losses.koleo import koleo_loss

# Of what student and teacher made of a micro-batch (`Outputs` with patches, the teacher's of global crops only), and
# of the micro-batch itself (`Batch`).
Term = Callable[[Any, Any, Any], Tensor]
TERMS: dict[str, Term] = {
    # name: function; what `objective.terms` can add to DINO
}

__all__ = [
    "TERMS",
    "Center",
    "SinkhornKnopp",
    "Term",
    "dino_loss",
    "ibot_loss",
    "koleo_loss",
    "sinkhorn_knopp",
]
