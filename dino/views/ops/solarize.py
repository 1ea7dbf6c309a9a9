"""Invert the bright pixels, those of 128 and above.

| number | decides |
|---|---|
| solarize | whether |
"""

import torch
from torch import Tensor

from dino.views.ops.augmentation import Augmentation, Draw
from dino.views.view import View


class Solarize(Augmentation):
    """Amount: probability."""

    name = "solarize"

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        return torch.where(pixels.round_() >= 128, 255 - pixels, pixels)
