"""What is minimised: pure functions and small modules of tensors that know no optimizer, logger or accelerator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dino.methods.losses.coding_rate import coding_rate, view_distance
from dino.methods.losses.dino import Center, SinkhornKnopp, dino_loss, sinkhorn_knopp
from dino.methods.losses.ibot import ibot_loss
from dino.methods.losses.info_nce import batch_contrast, queue_contrast
from dino.methods.losses.koleo import koleo_loss
from dino.methods.losses.nt_xent import nt_xent
from dino.methods.losses.regression import regression_loss

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
    "batch_contrast",
    "coding_rate",
    "dino_loss",
    "ibot_loss",
    "koleo_loss",
    "nt_xent",
    "queue_contrast",
    "regression_loss",
    "sinkhorn_knopp",
    "view_distance",
]
