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
        """(…, C, H, W) levels from 0 to 255, or a PIL image, to (…, C, image_size, image_size) fp32, normalised.

        Raises:
            ValueError: whole numbers of more than 16 bits or with a sign, of which nobody knows what white is.
        """
        if isinstance(images, Image.Image):
            images = torch.from_numpy(picture_array(images, len(self.mean))).permute(2, 0, 1)
        if not images.is_floating_point() and images.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"images are levels from 0 to 255: torch.uint8, or floating-point, not {images.dtype}")
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
