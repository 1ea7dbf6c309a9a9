"""Pixels as networks take them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 pixels to floating point with the mean and deviation the weights are trained for."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        deviations = torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviations))
        self.register_buffer("shift", torch.tensor(mean).view(-1, 1, 1) / deviations)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to fp32."""
        return pixels.float() * self.scale - self.shift
