"""How alike two thumbnails are in detail, once the second is laid upon the first.

Different things in one frame, such as motorcycles before white or faces in a dark room, correlate as wholes and not
part by part, once light and shade are taken away; a copy whose edges were cut off correlates part by part only after
it has been moved and scaled back.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dino.curation.thumbnails import SIDE

PART, APART = 16, 2  # pixels of a thumbnail's parts, and by which each may be apart
SHADE = 2.0  # pixels, deviation of the blur that is taken away
PLAIN = 5  # grey levels, the least deviation within a part that then shows something
MAY_DIFFER = 6  # one part in so many: by a logo, a date
REGISTRATIONS = 2  # how often the second is moved by what its parts are apart


def of_parts(first: Tensor, second: Tensor, shifts: Tensor) -> Tensor:
    """How alike two images are in detail: all but a sixth of their parts correlate so much, or more.

    Args:
        first, second: (n, 64, 64).
        shifts: (n, 2) pixels down and right by which the second lies further, as far as is known.

    Returns:
        (n,) in [−1, 1]; parts of which both are plain do not count; 1 where there is no other.
    """
    first, second = _without_shade(first), _without_shade(second)
    affine = F.pad(shifts[:, :, None].float(), (0, 2))
    likeness = torch.full((len(first),), -1.0)
    for remaining in reversed(range(REGISTRATIONS + 1)):
        moved, inside = _moved(second, affine)
        correlations = _correlations(first, moved)
        counts = inside & _shows(first, moved)
        likeness = likeness.maximum(_least(correlations.amax(dim=(2, 3)), counts))
        if remaining:
            affine = affine + _still_apart(correlations, counts)
    return likeness


def _without_shade(images: Tensor) -> Tensor:
    """(n, 64, 64) fp32, less itself blurred by a Gaussian, whose weights add up to one at the border, too."""
    place = torch.arange(SIDE)
    blur = torch.exp(-(((place - place[:, None]) / SHADE) ** 2) / 2)
    blur = blur / blur.sum(dim=1, keepdim=True)
    return images.float() - blur @ images.float() @ blur.T


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """(n, parts, 5, 5) of each part of the second with what lies there in the first, up to 2 pixels apart."""
    parts = _parts(second)
    norms = parts.norm(dim=2)
    wide = PART + 2 * APART
    around = F.pad(first[:, None], (APART,) * 4, mode="replicate")[:, 0].unfold(1, wide, PART).unfold(2, wide, PART)
    around = around.flatten(0, 2)
    around = around - around.mean(dim=(1, 2), keepdim=True)
    products = F.conv2d(around[None], parts.view(-1, 1, PART, PART), groups=len(around))[0]
    sums, squares = (F.avg_pool2d(values[:, None], PART, 1)[:, 0] * PART**2 for values in (around, around.square()))
    others = (squares - sums.square() / PART**2).clamp(min=0).sqrt()
    least = torch.tensor(float(PLAIN * PART / 2))
    lengths = norms.flatten()[:, None, None].maximum(least) * others.maximum(least)
    return (products / lengths).view(*norms.shape, 2 * APART + 1, 2 * APART + 1)


def _least(best: Tensor, counts: Tensor) -> Tensor:
    """(n,) the best correlations of parts (n, parts) that all but a sixth reach, of the parts that count."""
    number = counts.sum(dim=1)
    ordered = torch.where(counts, best, torch.inf).sort(dim=1).values
    return torch.where(number > 0, ordered.gather(1, number[:, None] // MAY_DIFFER)[:, 0], 1.0)


def _shows(first: Tensor, second: Tensor) -> Tensor:
    """(n, parts) bool: which parts show something in either."""
    return torch.maximum(_parts(first).norm(dim=2), _parts(second).norm(dim=2)) > PLAIN * PART


def _still_apart(correlations: Tensor, counts: Tensor) -> Tensor:
    """(n, 2, 3) the affine displacement that fits best how far the parts are apart, for `_moved`.

    Least squares over the parts that count, each by the fourth power of its correlation: parts that differ say nothing.
    """
    parts, length = correlations.shape[1:3]
    best, place = correlations.flatten(2).max(dim=2)
    row, column = place // length, place % length
    down = correlations.gather(3, column[:, :, None, None].expand(-1, -1, length, 1))[..., 0]
    right = correlations.gather(2, row[:, :, None, None].expand(-1, -1, 1, length))[:, :, 0]
    apart = torch.stack([_peak(down, row), _peak(right, column)], dim=2) - APART
    side = SIDE // PART
    centres = torch.arange(side) * PART - (SIDE - PART) / 2
    ones = torch.ones(parts)
    terms = torch.stack([ones, centres.repeat_interleave(side), centres.repeat(side)], dim=1)  # (parts, 3)
    weighted = terms.T * (counts * best.clamp(min=0) ** 4)[:, None]  # (n, 3, parts)
    little = torch.diag(torch.tensor([1e-3, 1.0, 1.0]))  # of a pixel squared: where few parts count, nothing is scaled
    return -torch.linalg.solve(weighted @ terms + little, weighted @ apart).transpose(1, 2)


def _peak(values: Tensor, best: Tensor) -> Tensor:
    """(…,) where the parabola through the greatest of the values (…, 5) and its neighbours has its summit."""
    inner = best.clamp(1, values.shape[-1] - 2)
    before, at, after = (values.gather(-1, (inner + step)[..., None])[..., 0] for step in (-1, 0, 1))
    curvature = (2 * at - before - after).clamp(min=1e-6)
    return torch.where(inner == best, best + (0.5 * (after - before) / curvature).clamp(-1, 1), best.float())


def _moved(images: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 64, 64) read where an affine displacement leads from each pixel, and which parts (n, parts) are there.

    Args:
        affine: (n, 2, 3) pixels down and right: everywhere, and more by each pixel from the middle down and right.
    """
    line = torch.arange(SIDE) - (SIDE - 1) / 2
    down, right = torch.meshgrid(line, line, indexing="ij")
    terms = torch.stack([torch.ones_like(down), down, right]).flatten(1)
    displaced = (affine @ terms).view(-1, 2, SIDE, SIDE)
    places = torch.stack([right + displaced[:, 1], down + displaced[:, 0]], dim=3) / (SIDE / 2)
    moved = F.grid_sample(images[:, None], places, "bicubic", "border", align_corners=False)[:, 0]
    is_inside = (places.abs() <= 1).all(dim=3).float()
    return moved, F.avg_pool2d(is_inside[:, None], PART)[:, 0].flatten(1) == 1


def _parts(thumbnails: Tensor) -> Tensor:
    """(n, 64, 64) to (n, 16, 256): parts of 16×16 pixels, each less its mean."""
    parts = rearrange(thumbnails, "n (h y) (w x) -> n (h w) (y x)", y=PART, x=PART)
    return parts - parts.mean(dim=2, keepdim=True)
