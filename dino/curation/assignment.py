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
WORTHWHILE = 0.9  # of the centroids: where more have moved, all are compared
ROUNDING = 2e-6  # of fp32 scores, relative to the squares that they come from
BF16_STEP = 2**-7  # from one bf16 number to the next, at most, relative to it


class Assignment:
    """Labels of this process's points, and the sums over clusters, brought up to date whenever centroids move.

    Args:
        clusters: k.
        precision: of the comparison: fp32 or bf16.

    Attributes:
        labels: (n,) int64, the nearest centroid of each point; the first of equals.
        sums: (k, D) fp64, of the points of each cluster as `Points.integers`; of this process.
    """

    def __init__(self, points: Points, clusters: int, precision: torch.dtype = torch.float32):
        self.points, self.precision = points, precision
        self.labels = torch.full((len(points),), -1, device=points.device)
        # Of each point the score of its centroid, and what no other centroid's exceeds.
        self.best, self.others = torch.full((2, len(points)), math.inf, device=points.device)
        self.squares = torch.zeros(len(points), device=points.device)
        for place, block in points:
            self.squares[place] = block.square().sum(dim=1)
        self.sums = torch.zeros(clusters, points.mean.numel(), dtype=torch.float64, device=points.device)
        self.centroids: Tensor | None = None

    def update(self, centroids: Tensor) -> int:
        """How many of all points have another nearest centroid than before; centroids (k, D), less the mean of all."""
        moved = torch.ones(len(centroids), dtype=torch.bool, device=centroids.device)
        if self.centroids is not None:
            moved = (centroids != self.centroids).any(dim=1)
        self.centroids = centroids
        share = float(moved.float().mean())
        if not share:
            return 0
        every, exact = (_Scores(centroids, precision) for precision in (self.precision, torch.float32))
        some = every if share > WORTHWHILE else _Scores(centroids[moved], self.precision)
        changed = torch.zeros((), dtype=torch.int64, device=centroids.device)
        for place, block in self.points:
            old, scores = self.labels[place].clone(), some(block)
            doubtful = self._set(place, scores, every) if some is every else self._revise(place, scores, moved, every)
            if len(doubtful):
                self._set(doubtful + place.start, exact(block[doubtful]), exact)
            rows = (self.labels[place] != old).nonzero()[:, 0]
            changed += len(rows)
            if len(rows):
                self._carry(block[rows], old[rows], self.labels[place][rows])
        return int(reduced(changed))

    def settle(self, centroids: Tensor) -> None:
        """Update in fp32, whatever the precision was before."""
        if self.precision != torch.float32:
            self.precision, self.centroids = torch.float32, None
        self.update(centroids)

    def _set(self, rows: slice | Tensor, scores: Tensor, every: "_Scores") -> Tensor:
        """Take what scores (m, k) with all centroids say of these points; gives places among them that need fp32."""
        best, labels, second = _two_best(scores)
        self.best[rows], self.labels[rows], self.others[rows] = best, labels, second
        if every.precision == torch.float32:
            return torch.empty(0, dtype=torch.int64)
        return (best - second <= every.error(best, self.squares[rows], labels, labels)).nonzero()[:, 0]

    def _revise(self, place: slice, scores: Tensor, moved: Tensor, every: "_Scores") -> Tensor:
        """Take what scores (b, m) with the centroids that have moved (k,) say of a block's points.

        Returns:
            The places in the block that this does not settle.
        """
        old, held, others = self.labels[place], self.best[place], self.others[place]
        score, column, next_ = _two_best(scores)
        label = moved.nonzero()[:, 0][column]
        left = moved[old]  # points whose own centroid moved: those that did not score `others` at most
        known = torch.where(left, others, held)
        error = every.error(known, self.squares[place], old, label)
        doubtful = torch.where(left, score <= known + error, (score - known).abs() <= error)
        taken = left | (score > held)
        doubtful |= taken & (score - next_ <= error)
        rivals = torch.where(taken, torch.where(left, next_, torch.maximum(next_, held)), score)
        self.labels[place] = torch.where(taken, label, old)
        self.best[place] = torch.where(taken, score, held)
        self.others[place] = torch.maximum(others, rivals)
        return doubtful.nonzero()[:, 0]

    def _carry(self, block: Tensor, old: Tensor, new: Tensor) -> None:
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
        of_centroids = -(self.bias[one] + self.bias[other])  # squares
        if self.precision == torch.float32:
            return ROUNDING * (squares + of_centroids)
        together = min(1.0, 4 / math.sqrt(self.centroids.shape[1]))
        return BF16_STEP * (score.abs() + together / 2 * (squares * of_centroids).sqrt())


def _two_best(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (n, k): the highest score, its place, and the highest of the others (−∞ if k is 1); `scores` is used up.

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
