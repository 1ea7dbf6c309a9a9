"""Left-right flip of crops.

| number | decides |
|---|---|
| flip | whether |
"""

import numpy as np
from torch import Tensor

from dino.views.draws import Numbers
from dino.views.ops.augmentation import Augmentation, Draw, Stage
from dino.views.view import View


class Flip(Augmentation):
    """Amount: probability."""

    stage = Stage.CROP

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return {"applied": numbers["flip"] < amount}

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        return pixels.flip(-1)
