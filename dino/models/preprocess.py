"""From pixels to what a backbone's weights expect."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data.levels import AS_BYTES, Levels
from dino.data.picture import picture_array

LONGEST = 4  # times the shorter side
OVERSHOT = 2.0  # of numbers from 0 to 1, which resampling may have brought above: what is more was never between them


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise.

    Attributes:
        image_size: side in pixels that the weights expect.
        mean, std: per channel, of pixels in [0, 1].
        resize: to which the shorter side is brought before the crop; None: image_size.
        levels: how many grey levels the weights were trained with.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    resize: int | None = None
    levels: Levels = field(default=AS_BYTES, repr=False)

    def __call__(self, images: Tensor | Image.Image) -> Tensor:
        """Images of the user's own to (…, C, image_size, image_size) fp32, normalised.

        Args:
            images: a PIL image, or (…, C, H, W), of which white is as torchvision has it: 255 of uint8, 65,535 of
                uint16, and 1 of floating-point numbers.

        Raises:
            ValueError: whole numbers of more than 16 bits or with a sign, of which nobody knows what white is;
                floating-point numbers far above 1, which are levels from 0 to 255 or were normalised before.
        """
        if isinstance(images, Image.Image):
            images = torch.from_numpy(picture_array(images, len(self.mean))).permute(2, 0, 1)
        if images.dtype == torch.uint16:
            images = images.to(torch.float32) * (255 / 65535)
        elif images.is_floating_point():
            most = float(images.max()) if images.numel() else 0.0
            if most > OVERSHOT:
                raise ValueError(f"floating-point images reach from 0 to 1, these to {most:.4g}: give torch.uint8")
            images = images * 255
        elif images.dtype != torch.uint8:
            raise ValueError(f"images are torch.uint8, torch.uint16 or floating-point from 0 to 1, not {images.dtype}")
        return self.of_levels(images)

    def of_levels(self, images: Tensor) -> Tensor:
        """The same of images as they are read here: levels from 0 to 255, uint8 or fp32 with fractions."""
        pixels = self.crop(images)
        pixels = pixels / 255 if pixels.is_floating_point() else functional.to_dtype(pixels, torch.float32, scale=True)
        return functional.normalize(pixels, self.mean, self.std)

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
        if resized.is_floating_point():  # bicubic weights overshoot
            resized = resized.clamp(0, 255)
        return functional.center_crop(resized, [self.image_size])
