"""What is minimised: pure functions and small modules of tensors that know no optimizer, logger or accelerator."""

from dino.methods.losses.dino import Center, SinkhornKnopp, dino_loss, sinkhorn_knopp
from dino.methods.losses.ibot import ibot_loss
from dino.methods.losses.koleo import koleo_loss

__all__ = ["Center", "SinkhornKnopp", "dino_loss", "ibot_loss", "koleo_loss", "sinkhorn_knopp"]
