"""Views made by worker processes: torchvision's operations on uint8 tensors of one image, exact to the pixel."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data.resident import border_colour
from dino.views.draws import Appearance, Geometry, draw_appearance, draw_geometry
from dino.views.operations import change_stroke, small_affine
from dino.views.spec import MultiCrop, View


def make_views(image: Tensor, spec: MultiCrop, key: int) -> list[Tensor]:
    """All views of one image (C, H, W) uint8, by its key alone: each (C, size, size) uint8, globals first."""
    appearance = draw_appearance(spec.views, np.array([key], dtype=np.uint64))
    crops = cut_views(image, spec, key)
    return [
        retouch(crop, view, appearance.flat(slice(index, index + 1)))
        for index, (crop, view) in enumerate(zip(crops, spec.views, strict=True))
    ]


def cut_views(image: Tensor, spec: MultiCrop, key: int) -> list[Tensor]:
    """The crops of all views, without what changes their pixels: (C, H, W) uint8 to (C, size, size) uint8 each."""
    geometry = draw_geometry(spec.views, np.array([key], dtype=np.uint64), np.array([image.shape[1:]]))
    return [cut(image, view, geometry.flat(slice(index, index + 1))) for index, view in enumerate(spec.views)]


def cut(image: Tensor, view: View, geometry: Geometry) -> Tensor:
    """One crop of an image, bicubic with antialiasing."""
    if view.affine:
        background, sizes = border_colour(image).float()[None], torch.tensor([image.shape[1:]], dtype=torch.float32)
        image = to_bytes(small_affine(image.float()[None], background, geometry, sizes)[0])
    box, size = geometry.box[0].tolist(), [view.size, view.size]
    crop = functional.resized_crop(image, *box, size, InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if geometry.flip[0] else crop


def retouch(crop: Tensor, view: View, appearance: Appearance) -> Tensor:
    """Strokes, colours, blur and solarisation of one crop (C, size, size) uint8."""
    if view.stroke:
        crop = to_bytes(change_stroke(crop.float()[None], torch.from_numpy(appearance.stroke))[0])
    # torchvision's colour operations know 1 and 3 channels; as a stack of grey images any number goes through
    # (saturation, hue and greyscale then change nothing).
    as_greys = crop.shape[0] not in (1, 3)
    crop = crop[:, None] if as_greys else crop
    if appearance.jitter[0]:
        crop = _jitter(crop, appearance)
    if appearance.grey[0] and crop.shape[-3] == 3:
        crop = functional.rgb_to_grayscale(crop, num_output_channels=3)
    if sigma := float(appearance.sigma[0]):
        crop = functional.gaussian_blur(crop, [blur_kernel(view)] * 2, [sigma, sigma])
    if appearance.solarize[0]:
        crop = functional.solarize(crop, threshold=128)
    return crop[:, 0] if as_greys else crop


def _jitter(crop: Tensor, appearance: Appearance) -> Tensor:
    adjustments = (
        (functional.adjust_brightness, appearance.brightness[0]),
        (functional.adjust_contrast, appearance.contrast[0]),
        (functional.adjust_saturation, appearance.saturation[0]),
        (functional.adjust_hue, appearance.hue[0]),
    )
    for position in appearance.order[0]:
        adjust, amount = adjustments[position]
        crop = adjust(crop, float(amount))
    return crop


def blur_kernel(view: View) -> int:
    """Side of the blur's kernel: the view's, but odd and no wider than the crop."""
    return min(view.blur_kernel, view.size - 1 + view.size % 2)


def to_bytes(pixels: Tensor) -> Tensor:
    """Grey values in fp32 to uint8."""
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
