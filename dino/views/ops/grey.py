"""Drop colour: all three channels become the luminance.

| number | decides |
|---|---|
| grey | whether |
"""

from torch import Tensor

from dino.views.ops.augmentation import Augmentation, Prepared
from dino.views.view import View

LUMINANCE = (0.2989, 0.587, 0.114)  # of torchvision's rgb_to_grayscale (ITU-R 601-2)


class Grey(Augmentation):
    """Amount: probability. Images of other than 3 channels have no colour to lose."""

    name = "grey"

    def apply(self, pixels: Tensor, draw: Prepared, view: View) -> Tensor:
        return luminance(pixels).expand_as(pixels)


def luminance(pixels: Tensor) -> Tensor:
    """(n, 3, …) to (n, 1, …); of other than 3 channels, each is a grey image already."""
    if pixels.shape[1] != 3:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    return (LUMINANCE[0] * red).add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2])
