"""Duplicates: images of equal pixels, and near copies, of which one is kept (Oquab et al. 2023, appendix A).

Features bring forward candidates; near ones are confirmed at image level, as different images of one thing may lie as
close in feature space as copies do.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

SIDE = 32  # pixels of a thumbnail
SHIFT = 3  # pixels by which thumbnails may be apart
SAME_GREY = 4  # of 255, by which the greys of two blank images may differ


def thumbnail(image: Tensor) -> Tensor:
    """(C, H, W) uint8 to (32, 32) uint8, the mean of the channels: what copies are confirmed by."""
    grey = image.float().mean(dim=0, keepdim=True)[None]
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return small[0, 0].round().clamp(0, 255).to(torch.uint8)


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """Greatest correlation of two thumbnails over shifts of up to 3 pixels, whole or not.

    Args:
        first, second: (n, 32, 32) uint8.

    Returns:
        (n,) in [−1, 1]; 1 where both are of one and the same grey, 0 where only one is of one grey, or each of another.
    """
    if not len(first):
        return torch.empty(0)
    shifts = range(-SHIFT, SHIFT + 1)
    surface = torch.stack(
        [_correlation(first, second, down, right) for down in shifts for right in shifts], dim=1
    ).view(-1, 1, len(shifts), len(shifts))
    # Thin strokes half a pixel apart correlate little; between whole shifts the correlation is smooth.
    finer = F.interpolate(surface, (16 * SHIFT + 1, 16 * SHIFT + 1), mode="bicubic", align_corners=True)
    best = finer.amax(dim=(1, 2, 3)).clamp(max=1)
    spread, mean = zip(*(torch.std_mean(pixels.flatten(1).float(), dim=1) for pixels in (first, second)), strict=True)
    flat = [deviation < 1 for deviation in spread]
    best[flat[0] | flat[1]] = 0
    best[flat[0] & flat[1] & ((mean[0] - mean[1]).abs() < SAME_GREY)] = 1
    return best


def _correlation(first: Tensor, second: Tensor, down: int, right: int) -> Tensor:
    """(n,) of what the two have in common when the first is moved."""

    def part(pixels: Tensor, rows: int, columns: int) -> Tensor:
        return pixels[:, max(0, rows) : SIDE + min(0, rows), max(0, columns) : SIDE + min(0, columns)]

    return (_standard(part(first, -down, -right).float()) * _standard(part(second, down, right).float())).sum(
        dim=(1, 2)
    )


def _standard(pixels: Tensor) -> Tensor:
    """(n, h, w) less its mean, of length 1."""
    centred = pixels - pixels.mean(dim=(1, 2), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1).view_as(centred)


def groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) the number of each image's connected component, of `pairs` (m, 2)."""
    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def originals(group: np.ndarray, pixels: np.ndarray, names: np.ndarray) -> np.ndarray:
    """(count,) which image of its group stands for each: the one of most pixels, of these the first by name."""
    order = np.lexsort((names, -pixels, group))
    firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
    of_group = np.empty(group.max(initial=-1) + 1, dtype=np.int64)
    of_group[group[order][firsts]] = order[firsts]
    return of_group[group]


def same_pixels(hashes: np.ndarray) -> np.ndarray:
    """(m, 2) pairs that join images of equal hash; empty hashes are of images that could not be read."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    equal = (ordered[1:] == ordered[:-1]) & (ordered[1:] != "")
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1)


def distinct(hashes: np.ndarray) -> np.ndarray:
    """Places, ascending, of the first image of each hash; images that could not be read are none."""
    found, firsts = np.unique(hashes, return_index=True)
    return np.sort(firsts[found != ""])


def confirmed(pairs: np.ndarray, first: np.ndarray, second: np.ndarray, least: float, chunk: int = 4096) -> np.ndarray:
    """(m,) bool: whether the thumbnails of pairs (m, 2), places among `first` and `second`, are alike enough."""
    alike = [
        likeness(torch.from_numpy(first[part[:, 0]]), torch.from_numpy(second[part[:, 1]])).numpy() >= least
        for part in np.array_split(pairs, max(1, -(-len(pairs) // chunk)))
    ]
    return np.concatenate(alike)
