"""Thumbnails of images, by which copies are confirmed: different images of one thing may lie as close in feature space
as copies do (Oquab et al. 2023, appendix A, look at features alone)."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

SIDE = 64  # pixels of a thumbnail
MIDDLE, SMALL = 32, 8  # of those by which images are compared as wholes, and by which most pairs are seen to be none
SHIFT = 3  # pixels of the middle ones by which images may be apart
SAME_GREY = 4  # of 255, by which the greys of two blank images may differ
UNLIKE = 0.7  # correlation of small thumbnails below which images are never copies
PART, PARTS_SHIFT = 16, 2  # pixels of a thumbnail's parts, and by which each part may be apart once the wholes are not
PLAIN = 8  # grey levels, the least deviation within a part that shows something
CHUNK, CACHED = 4096, 256  # pairs at a time: of small thumbnails, and of all else, so that a cache holds them
MAY_DIFFER = 6  # one part in so many: by a watermark, a date


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
    surface = _surface(first, second, SHIFT)
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


def of_parts(first: Tensor, second: Tensor, shifts: Tensor) -> Tensor:
    """How alike two images are in detail: all but a sixth of their parts correlate so much, or more.

    Different things in one frame, such as motorcycles before white, correlate as wholes and not part by part.

    Args:
        first, second: (n, 64, 64).
        shifts: (n, 2) of the middle thumbnails, by `similarity`.

    Returns:
        (n,) in [−1, 1]; parts of which both are plain do not count; 1 where there is no other.
    """
    second, inside = _moved(second.float(), shifts * (SIDE // MIDDLE))
    parts = _parts(second)
    norms = parts.norm(dim=2)
    wider = F.pad(first.float()[:, None], (PARTS_SHIFT,) * 4, mode="replicate")[:, 0]
    wider = wider.unfold(1, PART + 2 * PARTS_SHIFT, PART).unfold(2, PART + 2 * PARTS_SHIFT, PART).flatten(0, 2)
    wider = wider - wider.mean(dim=(1, 2), keepdim=True)
    products = F.conv2d(wider[None], parts.view(-1, 1, PART, PART), groups=len(wider))[0]  # of all shifts
    sums, squares = (F.avg_pool2d(values[:, None], PART, 1)[:, 0] * PART**2 for values in (wider, wider.square()))
    others = (squares - sums.square() / PART**2).clamp(min=0).sqrt()
    least = torch.tensor(float(PLAIN * PART / 2))
    lengths = norms.flatten()[:, None, None].maximum(least) * others.maximum(least)
    best = (products / lengths).amax(dim=(1, 2)).view_as(norms)
    shows = torch.maximum(norms, _parts(first.float()).norm(dim=2)) > PLAIN * PART
    counts = (shows & inside).sum(dim=1)
    ordered = torch.where(shows & inside, best, torch.inf).sort(dim=1).values
    return torch.where(counts > 0, ordered.gather(1, counts[:, None] // MAY_DIFFER)[:, 0], 1.0)


def confirmed(
    pairs: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    least: float,
    least_of_parts: float = 0.0,
    title: str | None = None,
) -> np.ndarray:
    """(m,) bool: whether the thumbnails of pairs (m, 2), indices into `first` and `second`, are similar enough.

    Args:
        first, second: (N, 64, 64) uint8; may be memory maps.
        least: of `similarity`.
        least_of_parts: of `of_parts`; 0: it is not asked.
        title: what the progress bar says; None: there is none.
    """
    enough = np.zeros(len(pairs), dtype=bool)
    asked, offered = np.unique(pairs[:, 0]), np.unique(pairs[:, 1])
    small, other_small = _small(first, asked), _small(second, offered)
    with tqdm(total=len(pairs), desc=title, unit="pair", leave=False, disable=title is None) as bar:
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            of_small = np.searchsorted(asked, part[:, 0]), np.searchsorted(offered, part[:, 1])
            possible = _possible(small[of_small[0]], other_small[of_small[1]], min(least, UNLIKE))
            rows = np.flatnonzero(possible)
            for some in np.split(rows, range(CACHED, len(rows), CACHED)):
                one, other = (torch.from_numpy(side[part[some, n]]) for n, side in enumerate((first, second)))
                enough[start + some] = _are_copies(one, other, least, least_of_parts).numpy()
            bar.update(len(part))
    return enough


def _are_copies(one: Tensor, other: Tensor, least: float, least_of_parts: float) -> Tensor:
    similarities, shifts = similarity(smaller(one, MIDDLE), smaller(other, MIDDLE))
    similar = similarities >= least
    if least_of_parts and similar.any():
        similar[similar.clone()] = of_parts(one[similar], other[similar], shifts[similar]) >= least_of_parts
    return similar


def _small(thumbnails: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, 8, 8) uint8 of some (n,) of the thumbnails (N, 64, 64): most images of a large pool are in no pair."""
    small = np.empty((len(images), SMALL, SMALL), np.uint8)
    for start in range(0, len(images), CHUNK):
        block = torch.from_numpy(np.array(thumbnails[images[start : start + CHUNK]]))
        small[start : start + CHUNK] = smaller(block, SMALL).round().numpy()
    return small


def _possible(first: np.ndarray, second: np.ndarray, least: float) -> np.ndarray:
    """(n,) bool: which thumbnails (n, 8, 8) are similar enough, or too plain at that size to tell."""
    one, other = (torch.from_numpy(side).float() for side in (first, second))
    plain = torch.minimum(one.flatten(1).std(dim=1), other.flatten(1).std(dim=1)) < PLAIN
    return (plain | (_surface(one, other, 1).amax(dim=1) >= least)).numpy()


def _surface(first: Tensor, second: Tensor, most: int) -> Tensor:
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


def _moved(thumbnails: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Thumbnails (n, 64, 64) moved back by shifts (n, 2), and (n, parts) bool, which parts lie inside as a whole."""
    rows, columns = ((torch.arange(SIDE) + shifts[:, axis, None]) for axis in (0, 1))
    images = torch.arange(len(thumbnails))[:, None, None]
    moved = thumbnails[images, rows.clamp(0, SIDE - 1)[:, :, None], columns.clamp(0, SIDE - 1)[:, None, :]]
    inside = [((line >= 0) & (line < SIDE)).view(len(line), SIDE // PART, PART).all(dim=2) for line in (rows, columns)]
    return moved, (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)


def _parts(thumbnails: Tensor) -> Tensor:
    """(n, 64, 64) to (n, 16, 256): parts of 16×16 pixels, each less its mean."""
    parts = rearrange(thumbnails, "n (h y) (w x) -> n (h w) (y x)", y=PART, x=PART)
    return parts - parts.mean(dim=2, keepdim=True)
