"""The points that are clustered: each process holds whole blocks of them, and only sums and counts travel.

What is found depends on the points, not on how many processes share them:

- a process holds whole blocks of `BLOCK` points, so that every matrix product has the same shape and content;
- sums are taken of integers (points times a power of two, rounded) in fp64, where they are exact in any order.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dino.distributed import gathered_rows, rank_and_size, reduced
from dino.errors import UserError
from dino.evaluation.neighbours import as_floats

BLOCK = 16384 if torch.cuda.is_available() else 4096  # points; a GPU wants fewer, larger products
EXACT = 52  # bits of a sum
HELD = 2**29  # bytes of rows that are kept as they are worked with, instead of being made so again and again


def share(points: int, rank: int, processes: int) -> range:
    """The points that process `rank` holds: whole blocks, as many as the others, give or take one."""
    blocks = -(-points // BLOCK)
    first, last = (blocks * place // processes * BLOCK for place in (rank, rank + 1))
    return range(min(first, points), min(last, points))


class Points:
    """This process's share of all points, given out block by block.

    Args:
        rows: (n, D), floating; an array may be a memory map. What `share` says this process holds.
        device: where the work is done.
        spherical: only directions count.

    Raises:
        UserError: a value is not finite.
    """

    def __init__(self, rows: Tensor | np.ndarray, device: torch.device | str = "cpu", spherical: bool = False):
        self.rows, self.device, self.spherical, self.held = rows, torch.device(device), spherical, False
        if 4 * rows.shape[0] * rows.shape[1] <= HELD:
            prepared = [block for _, block in self._blocks()]
            self.rows = torch.cat(prepared) if prepared else torch.zeros(rows.shape, device=self.device)
            self.held = True
        counts = gathered_rows(torch.tensor([len(rows)], device=self.device))
        rank, _ = rank_and_size()
        self.first, self.total = int(counts[:rank].sum()), int(counts.sum())
        self.mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=self.device)
        largest = torch.zeros((), device=self.device)
        for _, block in self._blocks():
            largest = torch.maximum(largest, block.abs().max().nan_to_num(math.inf, math.inf))  # NaN has no maximum
        if not bool(reduced(largest, dist.ReduceOp.MAX).isfinite()):
            raise UserError("some embeddings are NaN or infinite: embed with other weights or train.precision=fp32")
        self.largest = 2 * float(largest)
        self.scale = exact_scale(self.total, self.largest)
        for _, block in self._blocks():
            self.mean += self.integers(block).sum(dim=0)
        self.mean = (reduced(self.mean) / (self.total * self.scale)).float().double()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Places in this share, and the points there less the mean of all, fp32: without it, products would cancel."""
        for place, block in self._blocks():
            yield place, block - self.mean.float()

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rows), BLOCK):
            place = slice(start, min(start + BLOCK, len(self.rows)))
            yield place, self._prepared(self.rows[place])

    def _prepared(self, rows: Tensor | np.ndarray) -> Tensor:
        """As they are worked with: fp32, on the device, of unit length if spherical."""
        if self.held:
            return rows  # type: ignore[return-value]
        block = as_floats(rows).to(self.device)
        return F.normalize(block, dim=1) if self.spherical else block

    def integers(self, block: Tensor) -> Tensor:
        """(n, D) as whole numbers in fp64, whose sums over all points are exact."""
        return (block.double() * self.scale).round_()

    def at(self, rows: Tensor) -> Tensor:
        """Points by their numbers among all, less the mean: (m, D) fp32 in every process."""
        found = torch.zeros(len(rows), self.rows.shape[1], device=self.device)
        mine = ((rows >= self.first) & (rows < self.first + len(self))).nonzero()[:, 0]
        for some in mine.split(BLOCK):
            places = rows[some] - self.first
            chosen = self.rows[places if self.held else places.cpu().numpy()]
            found[some] = self._prepared(chosen) - self.mean.float()
        return reduced(found)


def exact_scale(count: int, largest: float) -> float:
    """The power of two by which numbers up to `largest` become integers whose sum, of `count`, fp64 holds exactly."""
    return 2.0 ** (EXACT - math.ceil(math.log2(max(count * largest, 2**-60))))
