"""Random crops, resized to the size of a view: where they lie, and two ways to make them.

| number | decides |
|---|---|
| area × 10 | fraction of the image's area, uniform in `view.scale` |
| shape × 10 | width to height, its logarithm uniform between 3:4 and 4:3 |
| top, left | where in the image, uniform |

The first of ten areas and shapes that fits is taken; where none does, the largest centred crop of a permitted shape
(torchvision's RandomResizedCrop).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dino.views.draws import Numbers, between
from dino.views.view import SHAPES, View


def draw_boxes(numbers: Numbers, views: Sequence[View], sizes: np.ndarray) -> np.ndarray:
    """(B, 2) heights and widths of images to (V, B, 4) crops: top, left, height and width in pixels."""
    scale = np.array([view.scale for view in views])[:, None]
    height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
    area = (height * width)[:, None] * between(numbers["area"], scale[..., :1], scale[..., 1:])
    shape = np.exp(between(numbers["shape"], np.log(SHAPES[0]), np.log(SHAPES[1])))
    heights, widths = np.round(np.sqrt(area / shape)), np.round(np.sqrt(area * shape))
    fits = (heights >= 1) & (heights <= height[:, None]) & (widths >= 1) & (widths <= width[:, None])
    first = fits.argmax(axis=-1).ravel() + np.arange(fits[..., 0].size) * fits.shape[-1]
    h, w = (lengths.ravel()[first].reshape(fits.shape[:-1]) for lengths in (heights, widths))
    top, left = np.floor(numbers["top"] * (height - h + 1)), np.floor(numbers["left"] * (width - w + 1))

    limited = np.clip(width / height, *SHAPES)  # shape of the largest centred crop
    tall, wide = np.round(np.minimum(height, width / limited)), np.round(np.minimum(width, height * limited))
    centred = np.stack([np.floor((height - tall) / 2), np.floor((width - wide) / 2), tall, wide], axis=-1)
    random = np.stack([top, left, h, w], axis=-1)
    return np.where(fits.any(axis=-1)[..., None], random, centred).astype(int)


def crop_singly(pixels: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """As `crop_batch`, in the type of `pixels`, image by image with torch's kernel: on a CPU several times faster."""
    images, crops = pixels.split(1), []
    interleaved = pixels.shape[1] > 1 and pixels.stride(1) == 1
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        part = images[n % len(images)].narrow(2, top, height).narrow(3, left, width)
        part = part if interleaved else part.contiguous()  # the kernel is fast with pixels, and with whole planes
        crops.append(F.interpolate(part, (size, size), mode="bicubic", antialias=True))
    return torch.cat(crops).contiguous()


class Resampling(NamedTuple):
    """Matrices that crop and resize lines of images: (V·B, size, H) for columns, (V·B, size, W) for rows."""

    vertical: Tensor
    horizontal: Tensor


def crop_batch(pixels: Tensor, resampling: Resampling) -> Tensor:
    """Bicubic crops with antialiasing, as two matrix products.

    Args:
        pixels: (B, C, H, W) fp32; B images for V·B crops, or an image for each.
        resampling: of the V·B crops, view by view.

    Returns:
        (V·B, C, size, size) fp32; bicubic weights overshoot, so values may leave the range of `pixels`.
    """
    vertical, horizontal = resampling
    images, width, size = len(pixels), pixels.shape[-1], vertical.shape[1]
    views = len(vertical) // images
    rows = rearrange(vertical, "(v b) s h -> b (v s) h", b=images) @ rearrange(pixels, "b c h w -> b h (c w)")
    rows = rearrange(rows, "b (v s) (c w) -> (v b) (c s) w", v=views, w=width)
    return rearrange(rows @ horizontal.mT, "n (c s) t -> n c s t", s=size)


def resampling_of(boxes: Tensor, size: int, taps: int, height: int, width: int) -> Resampling:
    """Of crops (n, 4) fp32, top, left, height and width in pixels, of images that are all of one size.

    Args:
        taps: as `taps_of` gives them; on the host, so that nothing waits for the device.
    """
    top, left, tall, wide = boxes.mT
    return Resampling(line_weights(top, tall, size, height, taps), line_weights(left, wide, size, width, taps))


def taps_of(boxes: np.ndarray, size: int) -> int:
    """How many pixels of a line the widest kernel may reach."""
    return int(np.ceil(4 * max(1.0, boxes[:, 2:].max() / size))) + 1


def line_weights(start: Tensor, length: Tensor, size: int, pixels: int, taps: int) -> Tensor:
    """Matrices that crop `length` from `start` on out of a line of `pixels` and resize it to `size`: (n, size, pixels).

    Keys' cubic with a = −1/2, widened by the factor of reduction and normalised within the crop: what PIL and torch do
    for bicubic with antialiasing.
    """
    first, extent, device = start[:, None, None], length[:, None, None], start.device
    factor = extent / size
    reach = factor.clamp(min=1)
    centres = first + (torch.arange(size, device=device)[:, None] + 0.5) * factor  # (n, size, 1)
    sources = (centres - 2 * reach).floor() + torch.arange(taps, device=device)
    weights = _cubic((sources + 0.5 - centres) / reach)
    weights = weights * ((sources >= first) & (sources < first + extent))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    matrices = torch.zeros(len(start), size, pixels, device=device)
    return matrices.scatter_add_(2, sources.long().clamp_(0, pixels - 1), weights)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    x = x.clamp(max=2)  # where the other piece ends, at 0
    return torch.where(x < 1, near, ((-0.5 * x + 2.5) * x - 4) * x + 2)
