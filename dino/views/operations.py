"""Operations that both backends share, on batches with a value for each image."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.views.draws import Geometry


def small_affine(pixels: Tensor, background: Tensor, geometry: Geometry, sizes: Tensor) -> Tensor:
    """Rotate, shear, shift and scale images about their centres, bilinear; what comes in is background.

    Args:
        pixels: (B, C, H, W) fp32; where images are smaller than the canvas, the rest holds background.
        background: (B, C), as in `Canvas`.
        geometry: of V·B views, view by view (only the affine part is read).
        sizes: (B, 2) fp32, height and width of each image on its canvas.

    Returns:
        (V·B, C, H, W) fp32.
    """
    height, width = pixels.shape[-2:]
    device, views = pixels.device, len(geometry.angle) // len(pixels)
    (xx, xy), (yx, yy) = torch.from_numpy(_inverse_affine(geometry)).to(device, torch.float32)  # (2, 2, n)
    centre_y, centre_x = sizes.repeat(views, 1).mT / 2
    shift_y, shift_x = torch.from_numpy(geometry.shift).to(device, torch.float32).mT * 2
    rows = torch.arange(height, device=device) + 0.5 - (centre_y * (1 + shift_y))[:, None]  # (n, H)
    columns = torch.arange(width, device=device) + 0.5 - (centre_x * (1 + shift_x))[:, None]
    grid = torch.empty(len(rows), height, width, 2, device=device)  # in −1 … 1 over the canvas
    along, across = xx[:, None] * columns, xy[:, None] * rows + centre_x[:, None]
    torch.add((2 / width) * along[:, None, :], (2 / width) * across[:, :, None] - 1, out=grid[..., 0])
    along, across = yx[:, None] * columns, yy[:, None] * rows + centre_y[:, None]
    torch.add((2 / height) * along[:, None, :], (2 / height) * across[:, :, None] - 1, out=grid[..., 1])
    # Moved as the difference from the background: a fill by zeros would leave a dark seam where the image ends.
    canvas = background[:, :, None, None]
    difference = (pixels - canvas).repeat(views, 1, 1, 1)
    moved = F.grid_sample(difference, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.add_(canvas.repeat(views, 1, 1, 1))


def _inverse_affine(geometry: Geometry) -> np.ndarray:
    """(2, 2, n): from a place in the result, as (x, y), to its source. Images are sheared, rotated, then scaled."""
    sine, cosine, slope = np.sin(geometry.angle), np.cos(geometry.angle), np.tan(geometry.shear)
    rows = [[cosine - slope * sine, sine + slope * cosine], [-sine, cosine]]
    return np.array(rows) / geometry.zoom


def change_stroke(pixels: Tensor, amount: Tensor) -> Tensor:
    """Make dark strokes thinner (amount > 0) or thicker (< 0), light ones the other way round.

    A blend of the image with its 3×3 maximum or minimum, so that a fraction of a pixel is possible.

    Args:
        pixels: (n, C, H, W) fp32.
        amount: (n,), −1 … 1, in pixels at each side of a stroke.
    """
    amount = amount.to(pixels)[:, None, None, None]
    sign = torch.where(amount >= 0, 1.0, -1.0)
    extreme = sign * F.max_pool2d(sign * pixels, kernel_size=3, stride=1, padding=1)
    return torch.lerp(pixels, extreme, amount.abs())
