"""From pixels to what a backbone's weights expect."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data.picture import picture_array

LONGEST = 4  # times the shorter side


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise.

    Attributes:
        image_size: side in pixels that the weights expect.
        mean, std: per channel, of pixels in [0, 1].
        resize: to which the shorter side is brought before the crop; None: image_size.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    resize: int | None = None

    def __call__(self, images: Tensor | Image.Image) -> Tensor:
        """(…, C, H, W) uint8, or a PIL image, to (…, C, image_size, image_size) fp32, normalised."""
        if isinstance(images, Image.Image):
            images = torch.from_numpy(picture_array(images, len(self.mean))).permute(2, 0, 1)
        return functional.normalize(
            functional.to_dtype(self.crop(images), torch.float32, scale=True), self.mean, self.std
        )

    def crop(self, images: Tensor) -> Tensor:
        """The shorter side resized by antialiased bicubic resampling, then the centre.

        Of a long strip only the middle is resized, four times as long as it is wide: a side of 60,000 pixels would
        become millions.
        """
        height, width = images.shape[-2:]
        longest = LONGEST * min(height, width)
        if max(height, width) > longest:
            images = functional.center_crop(images, [min(height, longest), min(width, longest)])
        resized = functional.resize(images, [self.resize or self.image_size], InterpolationMode.BICUBIC, antialias=True)
        return functional.center_crop(resized, [self.image_size])
