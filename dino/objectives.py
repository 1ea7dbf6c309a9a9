"""The losses by the names of earlier versions; they live in dino.methods.losses."""

from dino.methods.losses import Center as Centre
from dino.methods.losses import SinkhornKnopp, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp

__all__ = ["Centre", "SinkhornKnopp", "dino_loss", "ibot_loss", "koleo_loss", "sinkhorn_knopp"]
