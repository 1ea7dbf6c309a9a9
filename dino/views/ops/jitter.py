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
from dino.views.ops.augmentation import Augmentation, Draw, Prepared
from dino.views.ops.grey import luminance
from dino.views.view import View

CHANGES, HUE = ("brightness", "contrast", "saturation", "hue"), 3
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

    def kinds(self, draw: Draw, view: View) -> np.ndarray:
        return draw["applied"] * (1 + draw["order"] @ np.array([64, 16, 4, 1]))

    def prepare(self, draw: Draw, view: View) -> Draw:
        """For each turn, by how much: 1 for crops whose turn it is not; of hue, only those, by row."""
        prepared = {}
        for turn, which in enumerate(draw["order"].T):
            for change in {*which.tolist()} - {HUE}:
                factors = np.where(which == change, draw[CHANGES[change]], 1.0)
                prepared[f"{CHANGES[change]} {turn}"] = factors[:, None, None, None]
            rows = np.flatnonzero(which == HUE)
            if len(rows):
                prepared[f"hue {turn}"] = draw["hue"][rows, None, None, None]
                prepared[f"turned {turn}"] = rows
        return prepared

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        """Images of other than 3 channels are taken as a stack of grey ones."""
        for turn in range(4):
            if f"brightness {turn}" in draw:
                pixels = brighten(pixels, draw[f"brightness {turn}"])
            if f"contrast {turn}" in draw:
                pixels = change_contrast(pixels, draw[f"contrast {turn}"])
            if pixels.shape[1] != 3:
                continue
            if f"saturation {turn}" in draw:
                pixels = saturate(pixels, draw[f"saturation {turn}"])
            if f"hue {turn}" in draw:
                rows, shift = draw[f"turned {turn}"], draw[f"hue {turn}"]
                if len(rows) == len(pixels):
                    pixels = turn_hue(pixels, shift)
                else:
                    pixels.index_copy_(0, rows, turn_hue(pixels.index_select(0, rows), shift))
        return pixels


def brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with black: (n, C, H, W) fp32, overwritten, each by its factor (n, 1, 1, 1)."""
    return pixels.mul_(factor).clamp_(0, 255)


def change_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with the mean grey value, overwritten."""
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    mean = luminance(mean) if pixels.shape[1] == 3 else mean
    return pixels.mul_(factor).add_((1 - factor) * mean).clamp_(0, 255)


def saturate(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with the image in grey, overwritten."""
    return pixels.lerp_(luminance(pixels), 1 - factor).clamp_(0, 255)


def turn_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue (HSV) of (n, 3, H, W) fp32 by `shift` (n, 1, 1, 1), fractions of the circle.

    Without a division: the hue, in sixths of the circle from red, is multiplied by the chroma, and so is how far it is
    from that of a channel, of which the channel's value is a piecewise linear function (Smith 1978's hexcone).
    """
    red, green, blue = pixels.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    from_red = torch.copysign((green - red).add_(blue).add_(value).sub_(least, alpha=2), green - blue)
    channels = torch.arange(0, 6, 2, device=pixels.device).view(1, 3, 1, 1)
    places = (channels - 6 * shift + 3).remainder_(6) - 3  # of red, green and blue, within half a circle
    distance = torch.addcmul(from_red, chroma, places, value=-1)  # of up to a circle: (n, 3, H, W)
    distance = distance.abs_().sub_(chroma, alpha=3).abs_()  # half a circle less the shorter way round
    return distance.add_(value.sub_(chroma, alpha=2)).clamp_(least, value.add_(chroma, alpha=2))
