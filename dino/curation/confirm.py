"""Which pairs that features propose are copies: at 8×8 pixels most are seen not to be, then as wholes and in detail."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino.curation.details import of_parts
from dino.curation.thumbnails import MIDDLE, SIDE, correlations, similarity, smaller

SMALL = 8  # pixels of thumbnails by which most pairs are seen to be none
UNLIKE = 0.7  # correlation of these below which images are never copies
PLAIN = 8  # grey levels, the deviation below which they say nothing
CHUNK, CACHED = 4096, 256  # pairs at a time: of small thumbnails, and of all else, so that a cache holds them


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
    # Of those in a pair only: most images of a large pool are in none.
    asked, offered = np.unique(pairs[:, 0]), np.unique(pairs[:, 1])
    small, other_small = small_thumbnails(first, asked), small_thumbnails(second, offered)
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
    rows = similar.nonzero()[:, 0]
    if least_of_parts and len(rows):
        similar[rows] = of_parts(one[rows], other[rows], shifts[rows] * (SIDE // MIDDLE)) >= least_of_parts
    return similar


def small_thumbnails(thumbnails: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, 8, 8) uint8 of some (n,) of the thumbnails (N, 64, 64)."""
    small = np.empty((len(images), SMALL, SMALL), np.uint8)
    for start in range(0, len(images), CHUNK):
        block = torch.from_numpy(np.array(thumbnails[images[start : start + CHUNK]]))
        small[start : start + CHUNK] = smaller(block, SMALL).round().numpy()
    return small


def _possible(first: np.ndarray, second: np.ndarray, least: float) -> np.ndarray:
    """(n,) bool: which thumbnails (n, 8, 8) are similar enough, or too plain at that size to tell."""
    one, other = (torch.from_numpy(side).float() for side in (first, second))
    plain = torch.minimum(one.flatten(1).std(dim=1), other.flatten(1).std(dim=1)) < PLAIN
    return (plain | (correlations(one, other, 1).amax(dim=1) >= least)).numpy()
