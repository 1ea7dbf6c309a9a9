"""Views by torchvision, one image at a time: crops by its kernel for bytes, what follows in double precision."""

import numpy as np
import torch
from material import drawn
from scipy import ndimage
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data.resident import border_colour
from dino.views import MultiCrop, View
from dino.views.crop import draw_boxes
from dino.views.draws import Numbers
from dino.views.ops import Draw

MOST = (ndimage.maximum_filter, ndimage.minimum_filter)
COLOURS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
COLOURS += (functional.adjust_hue,)


def oracle_crops(spec: MultiCrop, image: Tensor, key: int) -> list[Tensor]:
    """Of one image (C, H, W) uint8: each (C, size, size) uint8."""
    crops, keys = [], np.array([key], dtype=np.uint64)
    for index, view in enumerate(spec.views):
        draws = draws_of_view(spec, index, key)
        box = draw_boxes(Numbers(keys, range(index, index + 1)), [view], np.array([image.shape[1:]]))[0, 0]
        pixels = moved(image, border_colour(image), draws["affine"]).round().byte() if "affine" in draws else image
        size = [view.size, view.size]
        crop = functional.resized_crop(pixels, *box.tolist(), size, InterpolationMode.BICUBIC, antialias=True)
        happens = {name for name, draw in draws.items() if draw.get("applied", [False])[0]}
        crop = functional.horizontal_flip(crop) if "flip" in happens else crop
        crop = functional.vertical_flip(crop) if "vertical_flip" in happens else crop
        crops.append(functional.rotate(crop, 90 * int(draws["rotate"]["turns"][0])) if "rotate" in happens else crop)
    return crops


def oracle_views(spec: MultiCrop, image: Tensor, key: int) -> list[Tensor]:
    """Of one image (C, H, W) uint8: each (C, size, size) in double precision, rounded nowhere after the crop."""
    views = []
    for index, crop in enumerate(oracle_crops(spec, image, key)):
        views.append(photometric(crop, spec.views[index], draws_of_view(spec, index, key)))
    return views


def draws_of_view(spec: MultiCrop, index: int, key: int) -> dict[str, Draw]:
    """What is drawn for one view of an image, each (1, …)."""
    of_all = drawn([spec.views[index]] * (index + 1), np.array([key], dtype=np.uint64))
    return {name: row(draw, index) for name, draw in of_all.items()}


def row(draw: Draw, index: int) -> Draw:
    return {name: values[index : index + 1] for name, values in draw.items()}


def moved(image: Tensor, background: Tensor, draw: Draw) -> Tensor:
    """torchvision's affine change, in double precision, of an image in the middle of much background."""
    height, width = image.shape[1:]
    margin = max(height, width)
    page = background[:, None, None].repeat(1, height + 2 * margin, width + 2 * margin).double()
    page[:, margin:-margin, margin:-margin] = image
    down, right = draw["shift"][0]
    shift, shear = [float(right * width), float(down * height)], [float(np.degrees(draw["shear"][0])), 0.0]
    angle, zoom = float(np.degrees(draw["angle"][0])), float(draw["zoom"][0])
    changed = functional.affine(page, angle, shift, zoom, shear, InterpolationMode.BILINEAR)
    return changed[:, margin : margin + height, margin : margin + width]


def photometric(crop: Tensor, view: View, draws: dict[str, Draw]) -> Tensor:
    """What is drawn done to one crop (C, size, size) uint8, in double precision: 0 … 255."""
    pixels = crop.double() / 255
    if "stroke" in draws:
        stroke = float(draws["stroke"]["stroke"][0])
        most = MOST[stroke < 0](pixels.numpy(), (1, 3, 3), mode="nearest")
        pixels = torch.lerp(pixels, torch.from_numpy(most), abs(stroke))
    if len(crop) in (1, 3):
        return 255 * _colours(pixels, view, draws)
    return 255 * torch.cat([_colours(channel[None], view, draws) for channel in pixels])


def _colours(pixels: Tensor, view: View, draws: dict[str, Draw]) -> Tensor:
    happens = {name for name, draw in draws.items() if draw.get("applied", [False])[0]}
    if "jitter" in happens:
        amounts = [float(draws["jitter"][name][0]) for name in ("brightness", "contrast", "saturation", "hue")]
        for which in draws["jitter"]["order"][0]:
            pixels = COLOURS[which](pixels, amounts[which]).double()
    if "grey" in happens and len(pixels) == 3:
        pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
    if "blur" in happens:
        kernel = min(view.blur_kernel, view.size - 1 + view.size % 2)
        pixels = functional.gaussian_blur(pixels, [kernel] * 2, [float(draws["blur"]["sigma"][0])] * 2)
    return functional.solarize(pixels, threshold=127.5 / 255) if "solarize" in happens else pixels
