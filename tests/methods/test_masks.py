"""Masked patches: exact numbers, every ratio in a batch, blocks as BEiT's, the same however a batch is divided."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from dino.methods.masks import MaskDraw, Masks, block_masks

TINY = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 7), (2, 5)]
GRIDS = [*TINY, (7, 7), (6, 4), (16, 14)]


def some_keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_exactly_as_many_patches_as_asked_for(grid):
    patches = math.prod(grid)
    counts = np.repeat(np.arange(1, patches + 1), 20)
    hidden = block_masks(some_keys(len(counts)), counts, grid)
    assert hidden.shape == (len(counts), patches)
    assert hidden.dtype == bool
    assert hidden.sum(axis=1).tolist() == counts.tolist()


CASES = [  # images, fraction, ratio
    (8, 0.5, (0.1, 0.5)),  # as published
    (3, 0.5, (0.1, 0.5)),
    (5, 1.0, (0.1, 0.5)),
    (5, 0.33, (0.0, 1.0)),
    (64, 0.7, (0.3, 0.45)),
    (1, 0.5, (0.1, 0.5)),
]


class TestCounts:
    @pytest.mark.parametrize(("images", "fraction", "ratio"), CASES)
    def test_a_fraction_of_the_crops_with_one_ratio_from_each_part(self, images, fraction, ratio):
        """DINOv2's collate: floor(2B · fraction) crops, the k-th ratio between the k-th and the next of equal steps."""
        masked = math.floor(2 * images * fraction)
        edges = np.linspace(*ratio, masked + 1)
        for step in range(20):
            counts = MaskDraw(0, images, fraction, ratio).counts(step, 10_000)
            assert counts.shape == (2 * images,)
            ratios = np.sort(counts[counts > 0]) / 10_000
            assert len(ratios) == masked
            assert (edges[:-1] - 1e-4 <= ratios).all()
            assert (ratios <= np.maximum(edges[1:], 1e-4)).all()

    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    @pytest.mark.parametrize("ratio", [(0.0, 0.0), (1.0, 1.0), (0.1, 0.5), (0.4, 0.4)])
    def test_patches_are_the_ratios_rounded_down_but_one_at_least(self, grid, ratio):
        patches = math.prod(grid)
        hidden = MaskDraw(0, 6, 1.0, ratio)(0, range(6), grid).hidden
        counts = hidden.sum(dim=1)
        assert counts.min() >= max(1, math.floor(ratio[0] * patches))
        assert counts.max() <= max(1, math.floor(ratio[1] * patches))

    @pytest.mark.parametrize(("images", "fraction"), [(1, 0.01), (4, 0.1), (1, 1.0)])
    def test_one_crop_at_least_is_masked(self, images, fraction):
        """Else a step of a tiny batch would have no masked patch, and no mean of them."""
        for step in range(10):
            masks = MaskDraw(0, images, fraction)(step, range(images), (2, 2))
            assert len(masks.rows) >= 1
            assert masks.hidden.any(dim=1).sum() == max(1, math.floor(2 * images * fraction))

    def test_ratios_are_uniform(self):
        """Over steps: of one masked crop a step (of any part), and of all crops within their parts."""
        draw, patches, low, high, masked = MaskDraw(0, 8, 0.5, (0.1, 0.5)), 10**6, 0.1, 0.5, 8
        steps = [draw.counts(step, patches) for step in range(400)]
        first = [counts[counts > 0][0] / patches for counts in steps]
        assert stats.kstest(first, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        ratios = np.array([counts[counts > 0] for counts in steps]) / patches
        within = (ratios - low) / (high - low) * masked % 1
        assert stats.kstest(within.ravel(), stats.uniform.cdf).pvalue > 1e-3

    def test_every_crop_is_masked_as_often_and_with_every_ratio(self):
        """Of 400 steps 200, give or take five deviations of √(400 / 4); mean ratio 0.3 ± 5 · 0.4 / √(12 · 200)."""
        draw = MaskDraw(0, 8, 0.5, (0.1, 0.5))
        counts = np.array([draw.counts(step, 10_000) for step in range(400)])
        often = (counts > 0).sum(axis=0)
        assert (abs(often - 200) < 50).all()
        means = counts.sum(axis=0) / often / 10_000
        assert (abs(means - 0.3) < 0.041).all()


class TestRows:
    """A mask is a function of seed, step and row in the global batch."""

    BATCH, GRID = 12, (7, 6)

    def hidden(self, step: int, images: range, seed: int = 0) -> torch.Tensor:
        """(2, images, patches): by view."""
        hidden = MaskDraw(seed, self.BATCH)(step, images, self.GRID).hidden
        return hidden.view(2, len(images), -1)

    @pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 12])
    def test_however_a_batch_is_divided(self, parts):
        whole, size = self.hidden(5, range(self.BATCH)), self.BATCH // parts
        divided = [self.hidden(5, range(first, first + size)) for first in range(0, self.BATCH, size)]
        assert torch.equal(torch.cat(divided, dim=1), whole)

    def test_parts_may_be_unequal_and_empty_of_masks(self):
        whole = self.hidden(5, range(self.BATCH))
        for start in range(self.BATCH):
            for stop in (start + 1, self.BATCH):
                assert torch.equal(self.hidden(5, range(start, stop)), whole[:, start:stop])
        unmasked = next(image for image in range(self.BATCH) if not whole[:, image].any())
        masks = MaskDraw(0, self.BATCH)(5, range(unmasked, unmasked + 1), self.GRID)
        assert [tuple(value.shape) for value in masks] == [(2, 42), (0,), (0,)]

    def test_every_step_and_seed_differs(self):
        samples = [self.hidden(step, range(self.BATCH), seed) for step in range(30) for seed in range(3)]
        assert len({mask.numpy().tobytes() for mask in samples}) == len(samples)

    def test_crops_differ(self):
        """Also where all have as many patches: whether of one image or of several."""
        hidden = MaskDraw(0, 16, 1.0, (0.5, 0.5))(0, range(16), (14, 14)).hidden
        assert len({mask.numpy().tobytes() for mask in hidden}) == 32


def beits_mask(chance: random.Random, height: int, width: int, count: int) -> list[list[bool]]:
    """Bao et al. 2022, algorithm 1, as BEiT and DINOv2 run it; patches it then lacks are drawn singly."""
    mask, missing = [[False] * width for _ in range(height)], count
    while missing:
        for _ in range(10):
            area = chance.uniform(4, missing)
            aspect = math.exp(chance.uniform(math.log(0.3), math.log(1 / 0.3)))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high >= height or wide >= width:
                continue
            top, left = chance.randint(0, height - high), chance.randint(0, width - wide)
            block = [(i, j) for i in range(top, top + high) for j in range(left, left + wide) if not mask[i][j]]
            if 0 < len(block) <= missing:
                break
        else:
            free = [(i, j) for i in range(height) for j in range(width) if not mask[i][j]]
            block = chance.sample(free, missing)
        for i, j in block:
            mask[i][j] = True
        missing -= len(block)
    return mask


def masked_neighbours(masks: np.ndarray) -> float:
    """Of the four neighbours of a masked patch, how many are masked; mean over patches and (n, h, w) masks."""
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return 2 * float(pairs) / float(masks.sum())


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 20), ((14, 14), 58), ((8, 12), 30), ((7, 7), 12)])
def test_masks_are_blocks_as_beits(grid, count):
    """Each position's frequency within five standard errors of the difference, √(2 · p(1−p) / n) at most 0.0129.

    Neighbours within 4 %: BEiT takes no block as high or wide as the grid, which tells on small ones, and never gives
    up after a number of blocks; random patches have less than 60 % of them.
    """
    number, chance = 3000, random.Random(0)
    masks = block_masks(some_keys(number), np.full(number, count), grid).reshape(number, *grid)
    beit = np.array([beits_mask(chance, *grid, count) for _ in range(number)])
    scattered = np.random.default_rng(0).random((number, math.prod(grid))).argsort(axis=1) < count
    assert masked_neighbours(masks) == pytest.approx(masked_neighbours(beit), rel=0.04)
    assert masked_neighbours(scattered.reshape(beit.shape)) < 0.6 * masked_neighbours(masks)
    assert abs(masks.mean(axis=0) - beit.mean(axis=0)).max() < 5 * math.sqrt(2 * 0.25 / number)


@pytest.mark.parametrize("shape", [(4, 9), (1, 1), (6, 1)], ids=str)
def test_rows_and_weights(shape):
    """Patch by patch: its place among all, and one over its crop's number; a masked crop's weights sum to 1."""
    hidden = np.random.default_rng(0).random(shape) < 0.4
    hidden[0] = True
    hidden[1:2] = False
    masks = Masks.of(hidden)
    expected = [
        (crop * shape[1] + patch, 1 / hidden[crop].sum())
        for crop in range(shape[0])
        for patch in range(shape[1])
        if hidden[crop, patch]
    ]
    assert masks.hidden.numpy().tolist() == hidden.tolist()
    assert masks.rows.tolist() == [row for row, _ in expected]
    assert masks.weights.tolist() == pytest.approx([weight for _, weight in expected])
    assert (masks.rows.dtype, masks.weights.dtype, masks.hidden.dtype) == (torch.int64, torch.float32, torch.bool)
    sums = torch.zeros(shape[0]).index_add(0, masks.rows // shape[1], masks.weights)
    assert sums.tolist() == pytest.approx(hidden.any(axis=1).astype(float).tolist())
