"""Augmentations, one a file. A new one is a file here and a line below: its name is then one of `views.augment`."""

from dino.views.ops.affine import Affine
from dino.views.ops.augmentation import Augmentation, Draw, Prepared, Stage
from dino.views.ops.blur import Blur
from dino.views.ops.flip import Flip, VerticalFlip
from dino.views.ops.grey import Grey
from dino.views.ops.jitter import Jitter
from dino.views.ops.rotate import Rotate
from dino.views.ops.solarize import Solarize
from dino.views.ops.stroke import Stroke

IN_ORDER: tuple[Augmentation, ...] = (
    Affine(),
    Flip(),
    VerticalFlip(),
    Rotate(),
    Stroke(),
    Jitter("jitter", (0.4, 0.4, 0.2, 0.1)),  # BYOL's and DINO's
    Jitter("jitter_moco", (0.4, 0.4, 0.4, 0.1)),
    Jitter("jitter_strong", (0.8, 0.8, 0.8, 0.2)),  # SimCLR's
    Grey(),
    Blur(),
    Solarize(),
)
AUGMENTATIONS = {augmentation.name: augmentation for augmentation in IN_ORDER}

__all__ = ["AUGMENTATIONS", "Augmentation", "Draw", "Prepared", "Stage"]
