"""Colour jitter: brightness, contrast, saturation and hue, in an order of its own for each view.

| number | decides |
|---|---|
| jitter | whether |
| brightness, contrast | factors, uniform between 0.6 and 1.4 |
| saturation | factor, uniform between 0.8 and 1.2 |
| hue | shift, uniform within ±0.1 of the circle |
| order | which of the 24 orders |
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from dino.views.draws import Numbers, between
from dino.views.ops.augmentation import Augmentation, Draw
from dino.views.ops.grey import LUMINANCE
from dino.views.view import View

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4)


class Jitter(Augmentation):
    """Amount: probability. Images of other than 3 channels have neither saturation nor hue."""

    name = "jitter"

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        return super().draw(numbers, amount) | {
            "brightness": between(numbers["brightness"], 0.6, 1.4),
            "contrast": between(numbers["contrast"], 0.6, 1.4),
            "saturation": between(numbers["saturation"], 0.8, 1.2),
            "hue": between(numbers["hue"], -0.1, 0.1),
            "order": ORDERS[(numbers["order"] * len(ORDERS)).astype(int)],
        }

    def apply(self, pixels: Tensor, draw: Draw, view: View) -> Tensor:
        channels = pixels.shape[1]
        if channels not in (1, 3):  # taken as a stack of grey images
            repeated = {name: np.repeat(values, channels, axis=0) for name, values in draw.items()}
            return self.apply(pixels.view(-1, 1, *pixels.shape[2:]), repeated, view).view_as(pixels)
        for which in draw["order"].T:
            pixels = _blend(pixels, which, draw)
            indices = np.flatnonzero(which == HUE)
            if channels == 3 and len(indices):
                rows = torch.from_numpy(indices).to(pixels.device)
                shift = torch.from_numpy(draw["hue"][indices]).to(pixels)
                pixels = pixels.index_copy_(0, rows, turn_hue(pixels[rows], shift))
        return pixels


def _blend(pixels: Tensor, which: np.ndarray, draw: Draw) -> Tensor:
    """Change brightness, contrast or saturation, as `which` (n,) says of each image; for hue, leave it as it is.

    Each is a blend with another image: black, the mean grey value, or the image in grey.
    """
    colours = pixels.shape[1]
    to_grey = np.tile(LUMINANCE, (3, 1)) if colours == 3 else np.ones((1, 1))
    factor = np.choose(which, [draw["brightness"], draw["contrast"], draw["saturation"], 1.0])[:, None, None]
    which = which[:, None, None]
    of_pixel = factor * np.eye(colours) + (which == SATURATION) * (1 - factor) * to_grey
    of_mean = (which == CONTRAST) * (1 - factor) * to_grey
    pixel_weights, mean_weights = torch.from_numpy(of_pixel).to(pixels), torch.from_numpy(of_mean).to(pixels)
    flat = pixels.flatten(2)
    constant = mean_weights @ flat.mean(dim=2, keepdim=True)
    return torch.baddbmm(constant, pixel_weights, flat).clamp_(0, 255).view_as(pixels)


def turn_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of (n, 3, H, W) fp32 by `shift` (n,), fractions of the circle; value and saturation stay (HSV)."""
    red, green, blue = pixels.unbind(dim=1)
    value = pixels.amax(dim=1)
    chroma = value - pixels.amin(dim=1)
    scale = 1 / chroma.clamp(min=1e-6)
    from_green, from_blue = 2 + (blue - red) * scale, 4 + (red - green) * scale
    hue = torch.where(value == red, (green - blue) * scale, torch.where(value == green, from_green, from_blue))
    hue = hue + 6 * shift[:, None, None]
    sector = (hue[:, None] + torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(3, 1, 1)).remainder(6)
    fall = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return torch.addcmul(value[:, None], fall, chroma[:, None], value=-1)
