"""Left-right and upside-down flips of crops.

| number | decides |
|---|---|
| flip, vertical_flip | whether |
"""

from torch import Tensor

from dino.views.ops.augmentation import Augmentation, Prepared, Stage
from dino.views.view import View


class Flip(Augmentation):
    """Amount: probability."""

    name = "flip"
    stage = Stage.CROP

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        return pixels.flip(-1)


class VerticalFlip(Augmentation):
    """Amount: probability."""

    name = "vertical_flip"
    stage = Stage.CROP

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        return pixels.flip(-2)
