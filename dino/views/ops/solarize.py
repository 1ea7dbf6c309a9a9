"""Invert the bright pixels, those of 128 and above.

| number | decides |
|---|---|
| solarize | whether |
"""

import torch
from torch import Tensor

from dino.views.ops.augmentation import Augmentation, Prepared
from dino.views.view import View


class Solarize(Augmentation):
    """Amount: probability."""

    name = "solarize"

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        return torch.minimum(pixels, 255 - pixels)
