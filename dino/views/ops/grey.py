"""Drop colour: all three channels become the luminance.

| number | decides |
|---|---|
| grey | whether |
"""

import numpy as np
import torch
from torch import Tensor

from dino.views.ops.augmentation import Augmentation, Draw
from dino.views.view import View

LUMINANCE = np.array([0.2989, 0.587, 0.114])  # of torchvision's rgb_to_grayscale (ITU-R 601-2)


class Grey(Augmentation):
    """Amount: probability. Images of other than 3 channels have no colour to lose."""

    name = "grey"

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        if pixels.shape[1] != 3:
            return pixels
        weights = torch.tensor(LUMINANCE, dtype=pixels.dtype, device=pixels.device)
        return torch.einsum("c,nchw->nhw", weights, pixels)[:, None].expand_as(pixels)
