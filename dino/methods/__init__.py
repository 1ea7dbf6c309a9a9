"""What is learned, and how: one file a method; everything else knows a method only by its interface (method.py).

A new method is one file beside dino.py and one line here: its import, by which it can be named in `objective.name`.
"""

from dino.methods.byol import BYOL
from dino.methods.dino import DINO
from dino.methods.method import METHODS, Batch, Curve, Method, Outside, Seen
from dino.methods.moco import MoCo
from dino.methods.moco_v3 import MoCoV3
from dino.methods.simclr import SimCLR
from dino.methods.simdino import SimDINO
from dino.methods.swav import SwAV

__all__ = [
    "BYOL",
    "DINO",
    "METHODS",
    "Batch",
    "Curve",
    "Method",
    "MoCo",
    "MoCoV3",
    "Outside",
    "Seen",
    "SimCLR",
    "SimDINO",
    "SwAV",
]
