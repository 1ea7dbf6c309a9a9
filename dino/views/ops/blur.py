"""Gaussian blur.

| number | decides |
|---|---|
| blur | whether |
| sigma | in pixels, uniform between 0.1 and 2 |
"""

import numpy as np
import torch
from torch import Tensor

from dino.views.draws import Numbers, between
from dino.views.ops.augmentation import Augmentation, Draw
from dino.views.view import View


class Blur(Augmentation):
    """Amount: probability."""

    name = "blur"
    sigma = (0.1, 2.0)

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return super().draw(numbers, amount) | {"sigma": between(numbers["sigma"], *self.sigma)}

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        kernel = min(view.blur_kernel, view.size - 1 + view.size % 2)  # odd, and no wider than the crop
        return gaussian_blur(pixels, torch.from_numpy(draw["sigma"]).to(pixels), kernel)


def gaussian_blur(pixels: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur (n, C, S, S) fp32, each image with its own sigma (n,), mirrored at the edges: as two matrix products."""
    size, half, device = pixels.shape[-1], kernel // 2, pixels.device
    taps = torch.arange(-half, half + 1, device=device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (n, kernel)
    sources = (torch.arange(size, device=device)[:, None] + taps).abs()  # (S, kernel)
    sources = torch.where(sources < size, sources, 2 * (size - 1) - sources)
    blur = torch.zeros(len(pixels), size, size, device=device)
    blur.scatter_add_(2, sources.expand(len(pixels), -1, -1), weights[:, None].expand(-1, size, -1))
    return blur[:, None] @ pixels @ blur[:, None].mT
