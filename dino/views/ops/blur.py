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
from dino.views.ops.augmentation import Augmentation, Draw, Prepared
from dino.views.view import View

SMALLEST = 1e-6  # of a tap's weight, of the middle one's: what is less, no level of 255 shows
SMALL = 64  # pixels a side of crops up to which matrix products are as fast on a CPU, too


class Blur(Augmentation):
    """Amount: probability."""

    name = "blur"
    sigma = (0.1, 2.0)

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return super().draw(numbers, amount) | {"sigma": between(numbers["sigma"], *self.sigma)}

    def kinds(self, draw: Draw, view: View) -> np.ndarray:
        return draw["applied"] * (reaches(draw["sigma"], view) if view.size > SMALL else 1)

    def prepare(self, draw: Draw, view: View) -> Draw:
        return {"weights": weights_of(draw["sigma"], reaches(draw["sigma"], view).max())}

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        in_sums = pixels.device.type == "cpu" and view.size > SMALL
        return (by_sums if in_sums else by_products)(pixels, draw["weights"])


def reaches(sigma: np.ndarray, view: View) -> np.ndarray:
    """How many pixels to each side of one weigh something in its blur, (n,)."""
    kernel = min(view.blur_kernel, view.size - 1 + view.size % 2)  # odd, and no wider than the crop
    return np.minimum(sigma * np.sqrt(-2 * np.log(SMALLEST)), kernel // 2).astype(int)


def weights_of(sigma: np.ndarray, reach: int) -> np.ndarray:
    """(n, 1 + reach): of the middle pixel, and of each of the two at every distance up to `reach`."""
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma[:, None]) ** 2)
    return weights / (2 * weights.sum(axis=1, keepdims=True) - 1)


def by_sums(pixels: Tensor, weights: Tensor) -> Tensor:
    """Blur (n, C, S, S) fp32, each image with weights of its own, mirrored at the edges: as sums of moved images."""
    size, reach = pixels.shape[-1], weights.shape[1] - 1
    first, *others = weights.mT[:, :, None, None, None]
    pair = torch.empty_like(pixels)
    for dim in (2, 3):
        before, after = pixels.narrow(dim, 1, reach), pixels.narrow(dim, size - 1 - reach, reach)
        padded = torch.cat([before.flip(dim), pixels, after.flip(dim)], dim=dim)
        pixels = pixels * first
        for distance, weight in enumerate(others, start=1):
            torch.add(padded.narrow(dim, reach - distance, size), padded.narrow(dim, reach + distance, size), out=pair)
            pixels.addcmul_(pair, weight)
    return pixels


def by_products(pixels: Tensor, weights: Tensor) -> Tensor:
    """The same as two matrix products: on a GPU far fewer kernels."""
    size, reach, device = pixels.shape[-1], weights.shape[1] - 1, pixels.device
    offsets = torch.arange(-reach, reach + 1, device=device)
    sources = (torch.arange(size, device=device)[:, None] + offsets).abs()  # (S, taps)
    sources = torch.where(sources < size, sources, 2 * (size - 1) - sources)
    blur = torch.zeros(len(pixels), size, size, device=device)
    of_taps = torch.cat([weights[:, 1:].flip(1), weights], dim=1)
    blur.scatter_add_(2, sources.expand(len(pixels), -1, -1), of_taps[:, None].expand(-1, size, -1))
    return blur[:, None] @ pixels @ blur[:, None].mT
