"""Invert the bright pixels, those of 128 and above.

| number | decides |
|---|---|
| solarize | whether |
"""

import numpy as np
import torch
from torch import Tensor

from dino.views.draws import Numbers
from dino.views.ops.augmentation import Augmentation, Draw
from dino.views.view import View


class Solarize(Augmentation):
    """Amount: probability."""

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return {"applied": numbers["solarize"] < amount}

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        return torch.where(pixels.round_() >= 128, 255 - pixels, pixels)
