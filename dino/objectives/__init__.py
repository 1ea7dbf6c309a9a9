"""What is minimised: pure functions and small modules of tensors that know no optimizer, logger or accelerator."""

from dino.objectives.dino import Centre, SinkhornKnopp, dino_loss, sinkhorn_knopp

__all__ = ["Centre", "SinkhornKnopp", "dino_loss", "sinkhorn_knopp"]
