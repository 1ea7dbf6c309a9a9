"""Thumbnails of images, by which copies are confirmed: different images of one thing may lie as close in feature space
as copies do (Oquab et al. 2023, appendix A, look at features alone)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels of a thumbnail
SHIFT = 3  # pixels by which thumbnails may be apart
SAME_GREY = 4  # of 255, by which the greys of two blank images may differ


def thumbnail(image: Tensor) -> Tensor:
    """(C, H, W) uint8 to (32, 32) uint8, the mean of the channels."""
    grey = image.float().mean(dim=0, keepdim=True)[None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return small[0, 0].round().clamp(0, 255).to(torch.uint8)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Greatest correlation of two thumbnails over shifts of up to 3 pixels, whole or not.

    Args:
        first, second: (n, 32, 32) uint8.

    Returns:
        (n,) in [−1, 1]; 1 where both are of one and the same grey, 0 where only one is of one grey, or each of another.
    """
    if not len(first):
        return torch.empty(0)
    shifts = range(-SHIFT, SHIFT + 1)
    correlations = [_correlation(first, second, down, right) for down in shifts for right in shifts]
    surface = torch.stack(correlations, dim=1).view(-1, 1, len(shifts), len(shifts))
    # Thin strokes half a pixel apart correlate little; between whole shifts the correlation is smooth.
    finer = F.interpolate(surface, (16 * SHIFT + 1, 16 * SHIFT + 1), mode="bicubic", align_corners=True)
    best = finer.amax(dim=(1, 2, 3)).clamp(max=1)
    first_deviation, first_mean = torch.std_mean(first.flatten(1).float(), dim=1)
    second_deviation, second_mean = torch.std_mean(second.flatten(1).float(), dim=1)
    first_is_blank, second_is_blank = first_deviation < 1, second_deviation < 1
    best[first_is_blank | second_is_blank] = 0
    best[first_is_blank & second_is_blank & ((first_mean - second_mean).abs() < SAME_GREY)] = 1
    return best


def confirmed(pairs: np.ndarray, first: np.ndarray, second: np.ndarray, least: float, chunk: int = 4096) -> np.ndarray:
    """(m,) bool: whether the thumbnails of pairs (m, 2), indices into `first` and `second`, are similar enough."""
    chunks = np.array_split(pairs, max(1, -(-len(pairs) // chunk)))
    enough = []
    for part in chunks:
        similarities = similarity(torch.from_numpy(first[part[:, 0]]), torch.from_numpy(second[part[:, 1]]))
        enough.append(similarities.numpy() >= least)
    return np.concatenate(enough)


def _correlation(first: Tensor, second: Tensor, down: int, right: int) -> Tensor:
    """(n,) of what the two have in common when the first is moved."""
    one = _standardised(_overlap(first, -down, -right).float())
    other = _standardised(_overlap(second, down, right).float())
    return (one * other).sum(dim=(1, 2))


def _overlap(pixels: Tensor, down: int, right: int) -> Tensor:
    """The part of thumbnails that lies inside one that is moved."""
    return pixels[:, max(0, down) : SIDE + min(0, down), max(0, right) : SIDE + min(0, right)]


def _standardised(pixels: Tensor) -> Tensor:
    """(n, h, w) less its mean, of length 1."""
    centered = pixels - pixels.mean(dim=(1, 2), keepdim=True)
    return F.normalize(centered.flatten(1), dim=1).view_as(centered)
