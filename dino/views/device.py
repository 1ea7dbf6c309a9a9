"""Views made on the device, for a whole batch at once, from the same draws as those of the worker processes.

Every operation is that of the workers up to rounding: crops by antialiased bicubic weights, colours in the drawn order
with values clamped after each change, hue in HSV. tests/views/test_device.py measures what rounding leaves.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.data import Canvas
from dino.views.draws import Appearance, Geometry, draw_appearance, draw_geometry
from dino.views.operations import change_stroke, small_affine
from dino.views.pipeline import blur_kernel, to_bytes
from dino.views.spec import MultiCrop, View

GREY = np.array([0.2989, 0.587, 0.114])  # of torchvision's rgb_to_grayscale (ITU-R 601-2)


class DeviceViews:
    """All views of a batch of images, as a function of one key an image."""

    def __init__(self, spec: MultiCrop):
        self.spec = spec
        sizes = [view.size for view in spec.views]
        edges = [0, *(v for v in range(1, len(sizes)) if sizes[v] != sizes[v - 1]), len(sizes)]
        self.groups = [slice(first, last) for first, last in pairwise(edges)]

    def crop(self, canvas: Canvas, keys: np.ndarray) -> list[Tensor]:
        """Crops by size, (V·B, C, size, size) uint8, view by view; nothing else is done to their pixels."""
        geometry = draw_geometry(self.spec.views, keys, canvas.sizes)
        return [self._cut(canvas, geometry, group) for group in self.groups]

    def photometric(self, crops: Sequence[Tensor], keys: np.ndarray) -> list[Tensor]:
        """Strokes, colours, blur and solarisation of crops by size, as `cut` or the workers make them."""
        appearance = draw_appearance(self.spec.views, keys)
        return [
            retouch(pixels, self.spec.views[group], appearance.flat(group))
            for pixels, group in zip(crops, self.groups, strict=True)
        ]

    def _cut(self, canvas: Canvas, geometry: Geometry, group: slice) -> Tensor:
        views, chosen = self.spec.views[group], geometry.flat(group)
        if canvas.pixels.device.type == "cpu" and not any(view.affine for view in views):
            return crop_resize_singly(canvas.pixels, chosen.box, chosen.flip, views[0].size)
        pixels, sizes = canvas.pixels.float(), torch.from_numpy(canvas.sizes)
        if any(view.affine for view in views):
            pixels = small_affine(pixels, canvas.background.float(), chosen, sizes.to(pixels)).round_()
        return to_bytes(crop_resize(pixels, chosen.box, chosen.flip, views[0].size))


def crop_resize_singly(pixels: Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> Tensor:
    """As `crop_resize`, uint8 to uint8, image by image with torch's own kernel: on a CPU several times faster."""
    crops = [
        functional.resized_crop(pixels[n % len(pixels)], *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        for n, box in enumerate(boxes.tolist())
    ]
    mirrored = torch.from_numpy(flips)[:, None, None, None]
    stacked = torch.stack(crops)
    return torch.where(mirrored, stacked.flip(-1), stacked)


def crop_resize(pixels: Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> Tensor:
    """Bicubic crops with antialiasing, as two matrix products.

    Args:
        pixels: (B, C, H, W) fp32.
        boxes: (V·B, 4), top, left, height and width in pixels, view by view.
        flips: (V·B,), left to right.
        size: side of the crops.

    Returns:
        (V·B, C, size, size) fp32; bicubic weights overshoot, so values may leave the range of `pixels`.
    """
    images, (height, width) = pixels.shape[0], pixels.shape[-2:]
    vertical = resampling(boxes[:, 0], boxes[:, 2], size, height, pixels.device)  # (V·B, size, H)
    horizontal = resampling(boxes[:, 1], boxes[:, 3], size, width, pixels.device)
    mirrored = torch.from_numpy(flips).to(pixels.device)[:, None, None]
    horizontal = torch.where(mirrored, horizontal.flip(1), horizontal)
    views = len(boxes) // images
    rows = rearrange(vertical, "(v b) s h -> b (v s) h", b=images) @ rearrange(pixels, "b c h w -> b h (c w)")
    rows = rearrange(rows, "b (v s) (c w) -> (v b) (c s) w", v=views, w=width)
    return rearrange(rows @ horizontal.mT, "n (c s) t -> n c s t", s=size)


def resampling(start: np.ndarray, length: np.ndarray, size: int, pixels: int, device: torch.device) -> Tensor:
    """Matrices that cut `length` from `start` on out of a line of `pixels` and resize it to `size`: (n, size, pixels).

    Keys' cubic with a = −1/2, widened by the factor of reduction and normalised within the crop: what PIL and torch do
    for bicubic with antialiasing.
    """
    taps = int(np.ceil(4 * max(1.0, length.max() / size))) + 1  # that the widest kernel may reach
    first, extent = (torch.from_numpy(values).to(device, torch.float32)[:, None, None] for values in (start, length))
    factor = extent / size
    reach = factor.clamp(min=1)
    centres = first + (torch.arange(size, device=device)[:, None] + 0.5) * factor  # (n, size, 1)
    places = (centres - 2 * reach).floor() + torch.arange(taps, device=device)
    weights = _cubic((places + 0.5 - centres) / reach)
    weights = weights * ((places >= first) & (places < first + extent))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    matrices = torch.zeros(len(start), size, pixels, device=device)
    return matrices.scatter_add_(2, places.long().clamp_(0, pixels - 1), weights)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def retouch(crops: Tensor, views: Sequence[View], appearance: Appearance) -> Tensor:
    """Strokes, colours, blur and solarisation of crops (V·B, C, size, size) uint8, as drawn."""
    if not any(view.stroke or view.jitter or view.grey or view.blur or view.solarize for view in views):
        return crops
    pixels, device = crops.float(), crops.device
    if any(view.stroke for view in views):
        pixels = change_stroke(pixels, torch.from_numpy(appearance.stroke).to(device))
    kernel = blur_kernel(views[0])
    changes = (  # which images, and what is done to them; the draws are on the host, which waits for nothing
        (appearance.jitter, lambda some, drawn: jitter(some, drawn)),
        (appearance.grey & (pixels.shape[1] == 3), lambda some, _: to_grey(some)),
        (appearance.sigma > 0, lambda some, drawn: gaussian_blur(some, torch.from_numpy(drawn.sigma).to(some), kernel)),
        (appearance.solarize, lambda some, _: torch.where(some.round_() >= 128, 255 - some, some)),
    )
    for chosen, change in changes:
        if len(places := np.flatnonzero(chosen)):
            index, drawn = torch.from_numpy(places).to(device), Appearance(*(values[places] for values in appearance))
            pixels = pixels.index_copy_(0, index, change(pixels[index], drawn))
    return to_bytes(pixels)


def to_grey(pixels: Tensor) -> Tensor:
    """(n, 3, H, W) fp32 to its luminance in all three channels."""
    weights = torch.tensor(GREY, dtype=pixels.dtype, device=pixels.device)
    return torch.einsum("c,nchw->nhw", weights, pixels)[:, None].expand_as(pixels)


def jitter(pixels: Tensor, appearance: Appearance) -> Tensor:
    """Brightness, contrast, saturation and hue of (n, C, H, W) fp32, each image by its own amounts in its own order."""
    channels = pixels.shape[1]
    if channels not in (1, 3):  # taken as a stack of grey images
        repeated = Appearance(*(np.repeat(values, channels, axis=0) for values in appearance))
        return jitter(pixels.view(-1, 1, *pixels.shape[2:]), repeated).view_as(pixels)
    for which in appearance.order.T:
        pixels = _blend(pixels, which, appearance)
        if channels == 3 and len(turned := np.flatnonzero(which == 3)):
            chosen = torch.from_numpy(turned).to(pixels.device)
            shift = torch.from_numpy(appearance.hue[turned]).to(pixels)
            pixels = pixels.index_copy_(0, chosen, turn_hue(pixels[chosen], shift))
    return pixels


def _blend(pixels: Tensor, which: np.ndarray, appearance: Appearance) -> Tensor:
    """Brightness (0), contrast (1) or saturation (2), as `which` says of each image; others stay as they are.

    Each is a blend with another image: black, the mean grey value, or the image in grey.
    """
    colours = pixels.shape[1]
    to_grey = np.tile(GREY, (3, 1)) if colours == 3 else np.ones((1, 1))
    factor = np.choose(which, [appearance.brightness, appearance.contrast, appearance.saturation, 1.0])[:, None, None]
    which = which[:, None, None]
    of_pixel = factor * np.eye(colours) + (which == 2) * (1 - factor) * to_grey
    of_mean = (which == 1) * (1 - factor) * to_grey
    of_pixel, of_mean = (torch.from_numpy(matrix).to(pixels) for matrix in (of_pixel, of_mean))
    flat = pixels.flatten(2)
    return torch.baddbmm(of_mean @ flat.mean(dim=2, keepdim=True), of_pixel, flat).clamp_(0, 255).view_as(pixels)


def turn_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of (n, 3, H, W) fp32 by `shift` (n,), shares of the circle; value and saturation stay (HSV)."""
    red, green, blue = pixels.unbind(dim=1)
    value = pixels.amax(dim=1)
    chroma = value - pixels.amin(dim=1)
    scale = 1 / chroma.clamp(min=1e-6)
    from_green, from_blue = 2 + (blue - red) * scale, 4 + (red - green) * scale
    hue = torch.where(value == red, (green - blue) * scale, torch.where(value == green, from_green, from_blue))
    hue = hue + 6 * shift[:, None, None]
    sector = (hue[:, None] + torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(3, 1, 1)).remainder(6)
    fall = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return torch.addcmul(value[:, None], fall, chroma[:, None], value=-1)


def gaussian_blur(pixels: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur (n, C, S, S) fp32, each image with its own sigma (n,), mirrored at the edges: as two matrix products."""
    size, half, device = pixels.shape[-1], kernel // 2, pixels.device
    taps = torch.arange(-half, half + 1, device=device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (n, kernel)
    places = (torch.arange(size, device=device)[:, None] + taps).abs()  # (S, kernel)
    places = torch.where(places < size, places, 2 * (size - 1) - places)
    blur = torch.zeros(len(pixels), size, size, device=device)
    blur.scatter_add_(2, places.expand(len(pixels), -1, -1), weights[:, None].expand(-1, size, -1))
    return blur[:, None] @ pixels @ blur[:, None].mT
