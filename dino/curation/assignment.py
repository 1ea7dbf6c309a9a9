"""Which centroid is nearest to each point, again and again while centroids come to rest.

A centroid that has not moved is as near as it was, and after some iterations of k-means most have not: points are
compared with those that have moved, and with all only where that does not settle it (Kaukoranta, Fränti & Nevalainen
2000). Labels are those that comparing all would give, so they depend on the centroids alone and not on how these came.
In bf16 only clear cases are decided; the rest is compared in fp32.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.curation.points import Points
from dino.distributed import reduced

ROWS = 64  # products have a multiple of as many, as libraries round those of a few rows otherwise
WORTHWHILE = 0.9  # fraction of the centroids: where more have moved, all are compared
ROUNDING = 2e-6  # of fp32 scores, relative to the squares that they come from
BF16_STEP = 2**-7  # from one bf16 number to the next, at most, relative to it


class Assignment:
    """Labels of this process's points, and the sums over clusters, brought up to date whenever centroids move.

    Args:
        clusters: k.
        precision: of the comparison: fp32 or bf16.

    Attributes:
        labels: (n,) int64, the nearest centroid of each point; the first of equals.
        own_score: (n,) of each point with that centroid; see `_Scores`.
        runner_up: (n,) what no other centroid's score exceeds.
        sums: (k, D) fp64, of the points of each cluster as `Points.integers`; of this process.
    """

    def __init__(self, points: Points, clusters: int, precision: torch.dtype = torch.float32):
        self.points, self.precision = points, precision
        self.labels = torch.full((len(points),), -1, device=points.device)
        self.own_score, self.runner_up = torch.full((2, len(points)), math.inf, device=points.device)
        self.squares = torch.zeros(len(points), device=points.device)
        for rows, block in points:
            self.squares[rows] = block.square().sum(dim=1)
        self.sums = torch.zeros(clusters, points.mean.numel(), dtype=torch.float64, device=points.device)
        self.centroids: Tensor | None = None

    def update(self, centroids: Tensor) -> int:
        """How many of all points have another nearest centroid than before; centroids (k, D), less the mean of all."""
        moved = torch.ones(len(centroids), dtype=torch.bool, device=centroids.device)
        if self.centroids is not None:
            moved = (centroids != self.centroids).any(dim=1)
        self.centroids = centroids
        moved_fraction = float(moved.float().mean())
        if not moved_fraction:
            return 0
        compare_all = moved_fraction > WORTHWHILE
        with_all, with_all_exactly = _Scores(centroids, self.precision), _Scores(centroids, torch.float32)
        with_moved = with_all if compare_all else _Scores(centroids[moved], self.precision)
        changed = torch.zeros((), dtype=torch.int64, device=centroids.device)
        for rows, block in self.points:
            old = self.labels[rows].clone()
            scores = with_moved(block)
            ambiguous = (
                self._set(rows, scores, with_all) if compare_all else self._revise(rows, scores, moved, with_all)
            )
            if len(ambiguous):
                self._set(ambiguous + rows.start, with_all_exactly(block[ambiguous]), with_all_exactly)
            switched = (self.labels[rows] != old).nonzero()[:, 0]
            changed += len(switched)
            if len(switched):
                self._move(block[switched], old[switched], self.labels[rows][switched])
        return int(reduced(changed))

    def settle(self, centroids: Tensor) -> None:
        """Update in fp32, whatever the precision was before."""
        if self.precision != torch.float32:
            self.precision, self.centroids = torch.float32, None
        self.update(centroids)

    def _set(self, rows: slice | Tensor, scores: Tensor, with_all: "_Scores") -> Tensor:
        """Take over what scores (m, k) with all centroids say of these points.

        Returns:
            The indices among them of those that need fp32.
        """
        best, labels, second = _two_best(scores)
        self.own_score[rows], self.labels[rows], self.runner_up[rows] = best, labels, second
        if with_all.precision == torch.float32:
            return torch.empty(0, dtype=torch.int64)
        return (best - second <= with_all.error(best, self.squares[rows], labels, labels)).nonzero()[:, 0]

    def _revise(self, rows: slice, scores: Tensor, moved: Tensor, with_all: "_Scores") -> Tensor:
        """Take over what scores (b, m) with the centroids that have moved (k,) say of a block's points.

        Returns:
            The indices in the block of those that this does not settle.
        """
        own, own_score, runner_up = self.labels[rows], self.own_score[rows], self.runner_up[rows]
        best, column, second = _two_best(scores)
        candidate = moved.nonzero()[:, 0][column]
        # Where the own centroid has moved, its old score says nothing any more: the best of the moved ones is nearest
        # if it beats those at rest, none of which exceeds the runner-up. Elsewhere it has to beat the own score.
        own_moved = moved[own]
        to_beat = torch.where(own_moved, runner_up, own_score)
        error = with_all.error(to_beat, self.squares[rows], own, candidate)
        ambiguous = torch.where(own_moved, best <= to_beat + error, (best - to_beat).abs() <= error)
        switches = own_moved | (best > own_score)
        ambiguous |= switches & (best - second <= error)
        next_if_switched = torch.where(own_moved, second, torch.maximum(second, own_score))
        self.labels[rows] = torch.where(switches, candidate, own)
        self.own_score[rows] = torch.where(switches, best, own_score)
        self.runner_up[rows] = torch.maximum(runner_up, torch.where(switches, next_if_switched, best))
        return ambiguous.nonzero()[:, 0]

    def _move(self, block: Tensor, old: Tensor, new: Tensor) -> None:
        """Take points out of the sums of their old clusters and add them to the new ones, without any drift."""
        integers = self.points.integers(block)
        self.sums.index_add_(0, new, integers)
        if int(old[0]) >= 0:
            self.sums.index_add_(0, old, integers, alpha=-1)


class _Scores:
    """How near centroids (k, D) are: x·c − ‖c‖²/2, highest for the nearest, as ‖x−c‖² = ‖x‖² − 2(x·c − ‖c‖²/2).

    Directions have the same nearest centroids by distance as by cosine, both being of unit length.
    """

    def __init__(self, centroids: Tensor, precision: torch.dtype):
        self.precision, self.bias = precision, -0.5 * centroids.square().sum(dim=1)
        self.centroids = centroids.to(precision)
        if precision != torch.float32:
            # The bias goes through the product as three columns, each the rest of the one before: so it keeps 24 bits.
            rest, columns = self.bias, []
            for _ in range(3):
                columns.append(rest.to(precision))
                rest = rest - columns[-1].float()
            self.centroids = torch.cat([self.centroids, torch.stack(columns, dim=1)], dim=1)

    def __call__(self, block: Tensor) -> Tensor:
        """(n, k), of points (n, D)."""
        spare = -len(block) % ROWS
        if self.precision == torch.float32:
            return torch.addmm(self.bias, F.pad(block, (0, 0, 0, spare)), self.centroids.T)[: len(block)]
        wide = F.pad(block.to(self.precision), (0, 3, 0, spare), value=1.0)
        return F.linear(wide, self.centroids)[: len(block)]

    def error(self, score: Tensor, squares: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """What rounding may do to the difference of two centroids' scores (n,), one of which is `score`.

        In bf16, scores themselves are rounded, and so are the D coordinates before, by which products err each way.
        """
        centroid_squares = -(self.bias[one] + self.bias[other])
        if self.precision == torch.float32:
            return ROUNDING * (squares + centroid_squares)
        of_coordinates = min(1.0, 4 / math.sqrt(self.centroids.shape[1]))
        return BF16_STEP * (score.abs() + of_coordinates / 2 * (squares * centroid_squares).sqrt())


def _two_best(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (n, k): the highest score, its column, and the second highest (−∞ if k is 1); `scores` is used up.

    On a CPU by NumPy, which is several times as fast as torch here.
    """
    if scores.device.type != "cpu":
        best, labels = scores.max(dim=1)
        second = scores.scatter_(1, labels[:, None], -math.inf).amax(dim=1)
        return best.float(), labels, second.float()
    values = scores.float().numpy()
    labels, rows = values.argmax(axis=1), np.arange(len(values))
    best = values[rows, labels]
    values[rows, labels] = -math.inf
    return torch.from_numpy(best), torch.from_numpy(labels), torch.from_numpy(values.max(axis=1))
