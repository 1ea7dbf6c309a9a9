"""Colour jitter: brightness, contrast, saturation and hue, in an order of its own for each view.

| number | decides |
|---|---|
| jitter | whether |
| brightness, contrast, saturation | factors, uniform within the kind's strength of 1 |
| hue | shift, uniform within the kind's strength, of the circle |
| order | which of the 24 orders |
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from dino.views.draws import Numbers, between
from dino.views.ops.augmentation import Augmentation, Draw, Prepared, put
from dino.views.ops.grey import luminance
from dino.views.view import View

CHANGES = ("brightness", "contrast", "saturation", "hue")
CONTRAST, SATURATION, HUE = 1, 2, 3
ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4)


class Jitter(Augmentation):
    """Amount: probability. Images of other than 3 channels have neither saturation nor hue.

    Args:
        name: of the kind.
        strengths: of brightness, contrast, saturation and hue.
    """

    def __init__(self, name: str, strengths: tuple[float, float, float, float]):
        self.name, self.strengths = name, strengths

    def draw(self, numbers: Numbers, amount: np.ndarray) -> Draw:
        brightness, contrast, saturation, hue = self.strengths
        return super().draw(numbers, amount) | {
            "brightness": between(numbers["brightness"], 1 - brightness, 1 + brightness),
            "contrast": between(numbers["contrast"], 1 - contrast, 1 + contrast),
            "saturation": between(numbers["saturation"], 1 - saturation, 1 + saturation),
            "hue": between(numbers["hue"], -hue, hue),
            "order": ORDERS[(numbers["order"] * len(ORDERS)).astype(int)],
        }

    def kinds(self, draw: Draw, view: View) -> np.ndarray:
        return draw["applied"] * (1 + draw["order"] @ np.array([64, 16, 4, 1]))

    def prepare(self, draw: Draw, view: View) -> Draw:
        """For each turn, what all crops change then, or else the blend of each; of hue, only those whose turn it is."""
        prepared: Draw = {}
        for turn, which in enumerate(draw["order"].T):
            rows = np.flatnonzero(which == HUE)
            if len(rows):
                prepared |= {f"turned {turn}": rows, f"hue {turn}": places_of_channels(draw["hue"][rows])}
            if len(rows) == len(which):
                continue
            factor = np.choose(which, [draw["brightness"], draw["contrast"], draw["saturation"], 1.0])
            if (which == which[0]).all():
                prepared[f"{CHANGES[which[0]]} {turn}"] = factor[:, None, None, None]
            else:
                weights = np.stack([1 - factor, which == CONTRAST, which == SATURATION])
                prepared[f"blend {turn}"] = weights[..., None, None, None]
        return prepared

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        """Images of other than 3 channels are taken as a stack of grey ones."""
        for turn in range(4):
            for name, blend in BLENDS.items():
                if f"{name} {turn}" in draw:
                    pixels = blend(pixels, draw[f"{name} {turn}"])
            if f"hue {turn}" in draw and pixels.shape[1] == 3:
                rows, places = draw[f"turned {turn}"], draw[f"hue {turn}"]
                if len(rows) == len(pixels):
                    pixels = turn_hue(pixels, places)
                else:
                    put(pixels, rows, turn_hue(pixels.index_select(0, rows), places))
        return pixels


def blend_each(pixels: Tensor, weights: Tensor) -> Tensor:
    """A blend of each with an image of its own, (n, C, H, W) fp32, overwritten.

    Args:
        weights: (3, n, 1, 1, 1), of that image; and in it, if it is not black, of the mean grey value and of the grey
            image.
    """
    weight, of_mean, of_grey = weights
    grey = luminance(pixels)
    other = (of_grey * grey).add_(of_mean * grey.mean(dim=(2, 3), keepdim=True))
    return pixels.lerp_(other, weight).clamp_(0, 255)


def brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with black: (n, C, H, W) fp32, overwritten, each by its factor (n, 1, 1, 1)."""
    return pixels.mul_(factor).clamp_(0, 255)


def change_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with the mean grey value, overwritten."""
    mean = luminance(pixels.mean(dim=(2, 3), keepdim=True))
    return pixels.mul_(factor).add_((1 - factor) * mean).clamp_(0, 255)


def saturate(pixels: Tensor, factor: Tensor) -> Tensor:
    """A blend with the image in grey, overwritten."""
    return pixels.lerp_(luminance(pixels), 1 - factor).clamp_(0, 255)


BLENDS = {"blend": blend_each, "brightness": brighten, "contrast": change_contrast, "saturation": saturate}


def places_of_channels(shift: np.ndarray) -> np.ndarray:
    """Where red, green and blue lie after a shift (n,) of the hue by fractions of the circle: in sixths, within ±3."""
    places = np.array([0, 2, 4]) - 6 * shift[:, None]
    return ((places + 3) % 6 - 3)[..., None, None]


def turn_hue(pixels: Tensor, places: Tensor) -> Tensor:
    """Shift the hue (HSV) of (n, 3, H, W) fp32, so that the three channels are at `places` (n, 3, 1, 1).

    Without a division: the hue, in sixths of the circle from red, is multiplied by the chroma, and so is how far it is
    from that of a channel, of which the channel's value is a piecewise linear function (Smith 1978's hexcone).
    """
    red, green, blue = pixels.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    from_red = torch.copysign((green - red).add_(blue).add_(value).sub_(least, alpha=2), green - blue)
    distance = torch.addcmul(from_red, chroma, places, value=-1)  # of up to a circle: (n, 3, H, W)
    distance = distance.abs_().sub_(chroma, alpha=3).abs_()  # half a circle less the shorter way round
    return distance.add_(value.sub_(chroma, alpha=2)).clamp_(least, value.add_(chroma, alpha=2))
