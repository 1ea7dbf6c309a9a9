"""Augmentations, one a file. A new one is a file here and a line below: its name is then one of `views.augment`."""

from dino.views.ops.affine import Affine
from dino.views.ops.augmentation import Augmentation, Draw, Stage
from dino.views.ops.blur import Blur
from dino.views.ops.flip import Flip
from dino.views.ops.grey import Grey
from dino.views.ops.jitter import Jitter
from dino.views.ops.solarize import Solarize
from dino.views.ops.stroke import Stroke

AUGMENTATIONS: dict[str, Augmentation] = {  # in the order in which they are applied
    "affine": Affine(),
    "flip": Flip(),
    "stroke": Stroke(),
    "jitter": Jitter(),
    "grey": Grey(),
    "blur": Blur(),
    "solarize": Solarize(),
}

__all__ = ["AUGMENTATIONS", "Augmentation", "Draw", "Stage"]
