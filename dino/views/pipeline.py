"""Views made by worker processes: torchvision's v2 operations on uint8 tensors of one image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from dino.views.spec import MultiCrop, View


class Augment:
    """Cuts and augments one view of an image, from torch's global random state."""

    def __init__(self, view: View):
        self.view = view
        self.crop = v2.RandomResizedCrop(
            view.size, scale=view.scale, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self.colour = colour_steps(view)

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) uint8 to (C, size, size) uint8."""
        if self.view.affine:
            image = small_affine(image)
        crop = self.crop(image)
        if self.view.stroke:
            crop = change_stroke(crop, uniform(-self.view.stroke, self.view.stroke))
        # torchvision's colour operations know 1 and 3 channels; as a stack of grey images any number goes through, with
        # the same draw for all (saturation, hue and greyscale then change nothing).
        as_greys = crop.shape[0] not in (1, 3)
        crop = crop[:, None] if as_greys else crop
        for step in self.colour:
            crop = step(crop)
        return crop[:, 0] if as_greys else crop


def colour_steps(view: View) -> list[nn.Module]:
    """Flip, jitter, greyscale, blur and solarisation, those that the view asks for."""
    kernel = min(view.blur_kernel, view.size - 1 + view.size % 2)  # odd, and no wider than the crop
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    steps = [
        (view.flip, v2.RandomHorizontalFlip(view.flip)),
        (view.jitter, v2.RandomApply([jitter], p=view.jitter)),
        (view.grey, v2.RandomGrayscale(view.grey)),
        (view.blur, v2.RandomApply([v2.GaussianBlur(kernel, sigma=view.blur_sigma)], p=view.blur)),
        (view.solarize, v2.RandomSolarize(threshold=128, p=view.solarize)),
    ]
    return [step for probability, step in steps if probability > 0]


class MultiCropViews:
    """All views of one image, as a function of a seed alone."""

    def __init__(self, spec: MultiCrop):
        augments = {view: Augment(view) for view in {*spec.globals_, *spec.locals_}}
        self.augments = [augments[view] for view in (*spec.globals_, *spec.locals_)]

    def __call__(self, image: Tensor, seed: int) -> list[Tensor]:
        """(C, H, W) uint8 to the views, each (C, size, size) uint8, global ones first.

        Torch's random state is put back afterwards: no other draw of the process depends on the views.
        """
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            return [augment(image) for augment in self.augments]
        finally:
            torch.set_rng_state(state)


def small_affine(image: Tensor) -> Tensor:
    """Rotate and shear by up to 10°, shift by up to 5 %, scale by up to 10 %; what comes in is background.

    The background is the median of the image's border, per channel.
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    background = border.median(dim=1).values[:, None, None].float()
    height, width = image.shape[1:]
    # Moved as the difference from the background: torchvision's own `fill` leaves a dark seam where the image ends.
    moved = functional.affine(
        image.float() - background,
        angle=uniform(-10, 10),
        translate=[round(uniform(-0.05, 0.05) * width), round(uniform(-0.05, 0.05) * height)],
        scale=uniform(0.9, 1.1),
        shear=[uniform(-10, 10), 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    return (moved + background).round().clamp(0, 255).to(torch.uint8)


def change_stroke(image: Tensor, amount: float) -> Tensor:
    """Make dark strokes thinner (amount > 0) or thicker (< 0), light ones the other way round.

    A blend of the image with its 3×3 maximum or minimum, so that a fraction of a pixel is possible.

    Args:
        image: (C, H, W) uint8.
        amount: −1 … 1, in pixels at each side of a stroke.
    """
    pixels = image.float()
    sign = 1.0 if amount >= 0 else -1.0
    extreme = sign * F.max_pool2d(sign * pixels, kernel_size=3, stride=1, padding=1)
    return torch.lerp(pixels, extreme, abs(amount)).round().to(torch.uint8)


def uniform(low: float, high: float) -> float:
    """One number from torch's global random state."""
    return float(torch.empty(()).uniform_(low, high))
