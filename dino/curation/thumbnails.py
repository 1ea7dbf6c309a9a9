"""Thumbnails of images, by which copies are confirmed: different images of one thing may lie as close in feature space
as copies do (Oquab et al. 2023, appendix A, look at features alone)."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # pixels of a thumbnail
MIDDLE = 32  # of those by which images are compared as wholes
SHIFT = 3  # pixels of the middle ones by which images may be apart
SAME_GREY = 4  # of 255, by which the greys of two blank images may differ


def thumbnail(image: Tensor) -> Tensor:
    """(C, H, W) uint8 to (64, 64) uint8, the mean of the channels."""
    grey = image.float().mean(dim=0, keepdim=True)[None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return small[0, 0].round().clamp(0, 255).to(torch.uint8)


def smaller(thumbnails: Tensor, side: int) -> Tensor:
    """(n, 64, 64) to (n, side, side) fp32."""
    size = (side, side)
    return F.interpolate(thumbnails[:, None].float(), size, mode="bilinear", antialias=True, align_corners=False)[:, 0]


def similarity(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Greatest correlation of two thumbnails over shifts of up to 3 pixels, whole or not.

    Args:
        first, second: (n, 32, 32).

    Returns:
        (n,) in [−1, 1]; 1 where both are of one and the same grey, 0 where only one is of one grey, or each of another.
        (n, 2) pixels down and right by which the second lies further, of the best whole shift.
    """
    if not len(first):
        return torch.empty(0), torch.empty(0, 2, dtype=torch.int64)
    surface = correlations(first, second, SHIFT)
    length = 2 * SHIFT + 1
    whole = surface.argmax(dim=1)
    shifts = torch.stack([whole // length, whole % length], dim=1) - SHIFT
    # Thin strokes half a pixel apart correlate little; between whole shifts the correlation is smooth.
    fine = 16 * SHIFT + 1
    finer = F.interpolate(surface.view(-1, 1, length, length), (fine, fine), mode="bicubic", align_corners=True)
    best = finer.amax(dim=(1, 2, 3)).clamp(max=1)
    first_deviation, first_mean = torch.std_mean(first.flatten(1).float(), dim=1)
    second_deviation, second_mean = torch.std_mean(second.flatten(1).float(), dim=1)
    first_is_blank, second_is_blank = first_deviation < 1, second_deviation < 1
    best[first_is_blank | second_is_blank] = 0
    best[first_is_blank & second_is_blank & ((first_mean - second_mean).abs() < SAME_GREY)] = 1
    return best, shifts


def correlations(first: Tensor, second: Tensor, most: int) -> Tensor:
    """(n, (2·most + 1)²) correlations of the parts of thumbnails (n, s, s) that lie on each other, over whole shifts.

    One convolution gives the products of all shifts, sums over the parts that lie on each other the rest.
    """
    one, other = (side.float() - side.float().mean(dim=(1, 2), keepdim=True) for side in (first, second))
    products = F.conv2d(F.pad(other, (most,) * 4)[None], one[:, None], groups=len(one))[0]
    place = torch.arange(first.shape[1])
    moved = place + torch.arange(-most, most + 1)[:, None]
    covers = ((moved >= 0) & (moved < len(place))).float()  # (shifts, s), which lines of the first lie on the second
    pixels = covers.sum(dim=1)[:, None] * covers.sum(dim=1)
    sum_of_one, sum_of_other = _over(one, covers), _over(other, covers.flip(0))
    variance = (_over(one**2, covers) - sum_of_one**2 / pixels) * (
        _over(other**2, covers.flip(0)) - sum_of_other**2 / pixels
    )
    covariance = products - sum_of_one * sum_of_other / pixels
    return torch.where(variance > 1, covariance / variance.clamp(min=1).sqrt(), 0.0).flatten(1)


def _over(values: Tensor, covers: Tensor) -> Tensor:
    """(n, shifts, shifts): sums of (n, s, s) over the lines down and across that each shift covers, (shifts, s)."""
    return covers @ values @ covers.T
