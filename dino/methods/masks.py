"""Which patches of the global crops are hidden from the student (iBOT, Zhou et al. 2022; Oquab et al. 2023).

As views, masks are a function of (seed, step, row of the global batch): neither processes nor micro-batches matter.
"""

from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dino.views.draws import sample_key, uniforms

ROUNDS = 16  # blocks tried for a crop; what is then missing is filled in patch by patch
SMALLEST = 4  # patches of a block
SHAPE = 0.3  # a block is at most 1 / 0.3 times as high as wide, or as wide as high


class Masks(NamedTuple):
    """The masked patches of C global crops of N patches, M in all.

    Attributes:
        hidden: (C, N) bool, true where a patch is masked.
        rows: (M,) their indices among the C·N patches.
        weights: (M,) fp32, one over the number of masked patches of the crop.
    """

    hidden: Tensor
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, hidden: np.ndarray) -> Self:
        """From (C, N) bool."""
        per_crop = hidden.sum(axis=1)
        rows = np.flatnonzero(hidden)
        weights = 1 / per_crop[rows // hidden.shape[1]]
        return cls(torch.from_numpy(hidden), torch.from_numpy(rows), torch.from_numpy(weights).float())

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in self))


class MaskDraw:
    """Masks of any part of a step's global batch.

    A fraction of the 2·B global crops is masked. `ratio` is cut into as many parts, equally wide, which are dealt to
    these crops at random, and each draws its own ratio within its part: a batch has every ratio. A crop has exactly as
    many masked patches as that comes to, at least one.

    Args:
        seed: of the run.
        batch_size: images of the global batch, B.
        fraction: of the crops that are masked; at least one is.
        ratio: least and greatest fraction of a crop's patches.
    """

    def __init__(self, seed: int, batch_size: int, fraction: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)):
        self.seed, self.batch_size, self.fraction, self.ratio = seed, batch_size, fraction, ratio

    def __call__(self, step: int, images: range, grid: tuple[int, int]) -> Masks:
        """Masks of some images' global crops in an optimizer step: all first crops, then all second ones.

        Args:
            images: rows of the global batch.
            grid: rows and columns of a crop's patches.
        """
        crops = np.concatenate([np.arange(images.start, images.stop) + view * self.batch_size for view in (0, 1)])
        patches = grid[0] * grid[1]
        counts = self.counts(step, patches)[crops]
        masked = np.flatnonzero(counts)
        keys = np.array([sample_key(self.seed, step, int(crop)) for crop in crops[masked]], dtype=np.uint64) ^ MASKS
        hidden = np.zeros((len(crops), patches), dtype=bool)
        hidden[masked] = block_masks(keys, counts[masked], grid)
        return Masks.of(hidden)

    def counts(self, step: int, patches: int) -> np.ndarray:
        """(2·B,) masked patches of every global crop of an optimizer step, 0 for those that are not masked."""
        crops, (low, high) = 2 * self.batch_size, self.ratio
        masked = max(1, int(crops * self.fraction))
        generator = np.random.default_rng((self.seed, step, int(MASKS)))
        part, within = generator.permutation(crops), generator.random(crops)
        ratios = low + (high - low) * (part + within) / masked
        return np.where(part < masked, np.maximum(1, (ratios * patches).astype(int)), 0)


MASKS = np.uint64(0x6D61736B73)  # so that masks draw other numbers than crops


def block_masks(keys: np.ndarray, counts: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Masks of exactly `counts` patches, made of rectangles (BEiT, Bao et al. 2022, algorithm 1), all at once.

    A rectangle's area is uniform between 4 patches and as many as are still missing, the logarithm of its shape too; it
    is taken if it fits, adds something and does not overshoot. Patches that are still missing after 16 of them are
    drawn singly.

    Args:
        keys: (C,) uint64.
        counts: (C,) patches to mask, at most all.
        grid: rows and columns, h and w.

    Returns:
        (C, h·w) bool.
    """
    h, w = grid
    crops, patches = len(keys), h * w
    u = uniforms(keys, 4 * ROUNDS + patches)
    rows, columns = np.arange(h)[:, None], np.arange(w)
    hidden = np.zeros((crops, h, w), dtype=bool)
    missing = counts.astype(int)
    for area, shape, down, right in np.moveaxis(u[:, : 4 * ROUNDS].reshape(crops, ROUNDS, 4), (1, 2), (0, 1)):
        least = np.minimum(SMALLEST, missing)
        size = least + area * (missing - least)
        aspect = np.exp((2 * shape - 1) * np.log(1 / SHAPE))
        high, wide = np.round(np.sqrt(size * aspect)).astype(int), np.round(np.sqrt(size / aspect)).astype(int)
        top, first = (down * (h - high + 1)).astype(int), (right * (w - wide + 1)).astype(int)
        in_rows = (rows >= top[:, None, None]) & (rows < (top + high)[:, None, None])
        in_columns = (columns >= first[:, None, None]) & (columns < (first + wide)[:, None, None])
        block = in_rows & in_columns  # (C, h, w)
        added = (block & ~hidden).sum(axis=(1, 2))
        fits = (added <= missing) & (high <= h) & (wide <= w)
        hidden |= block & fits[:, None, None]
        missing = missing - np.where(fits, added, 0)
    flat = hidden.reshape(crops, patches)
    order = np.where(flat, 2.0, u[:, 4 * ROUNDS :]).argsort(axis=1, kind="stable")
    singly = np.zeros_like(flat)
    np.put_along_axis(singly, order, np.arange(patches) < missing[:, None], axis=1)
    return flat | singly
