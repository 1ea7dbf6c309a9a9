"""The points that are clustered: each process holds whole blocks of them, and only sums and counts travel.

The result depends on the points, not on how many processes hold them:

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
from dino.evaluation.neighbours import Rows, as_floats

BLOCK = 16384 if torch.cuda.is_available() else 4096  # points; a GPU wants fewer, larger products
EXACT = 52  # bits of a sum
HELD = 2**29  # bytes of points that are kept as they are worked with, instead of being prepared again and again


def shard(points: int, rank: int, processes: int) -> slice:
    """The points that process `rank` holds: whole blocks, as many as each other process, give or take one."""
    blocks = -(-points // BLOCK)
    first, last = blocks * rank // processes * BLOCK, blocks * (rank + 1) // processes * BLOCK
    return slice(min(first, points), min(last, points))


def own_rows(points: int) -> slice:
    """The shard of this process."""
    rank, processes = rank_and_size()
    return shard(points, rank, processes)


class Points:
    """This process's shard of all points, given out block by block.

    Args:
        values: (n, D), floating; an array may be a memory map, or `Rows` of one. Those that `own_rows` says this
            process holds.
        device: where the work is done.
        spherical: only directions count.

    Attributes:
        first: index, among the points of all processes, of the first one here.
        total: points of all processes.
        mean: (D,) fp64, of all points.
        scale: what points are multiplied with to become integers.

    Raises:
        UserError: a value is not finite.
    """

    def __init__(self, values: Tensor | np.ndarray | Rows, device: torch.device | str = "cpu", spherical: bool = False):
        self.values, self.device, self.spherical, self.prepared = values, torch.device(device), spherical, False
        if 4 * values.shape[0] * values.shape[1] <= HELD:
            blocks = [block for _, block in self._blocks()]
            self.values = torch.cat(blocks) if blocks else torch.zeros(values.shape, device=self.device)
            self.prepared = True
        counts = gathered_rows(torch.tensor([len(values)], device=self.device))
        rank, _ = rank_and_size()
        self.first, self.total = int(counts[:rank].sum()), int(counts.sum())
        largest = torch.zeros((), device=self.device)
        for _, block in self._blocks():
            largest = torch.maximum(largest, block.abs().max().nan_to_num(math.inf, math.inf))  # NaN has no maximum
        if not bool(reduced(largest, dist.ReduceOp.MAX).isfinite()):
            raise UserError("some embeddings are NaN or infinite: embed with other weights or train.precision=fp32")
        self.largest = 2 * float(largest)
        self.scale = exact_scale(self.total, self.largest)
        total = torch.zeros(values.shape[1], dtype=torch.float64, device=self.device)
        for _, block in self._blocks():
            total += self.integers(block).sum(dim=0)
        self.mean = (reduced(total) / (self.total * self.scale)).float().double()

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of this shard, and the points there less the mean of all, fp32: without it, products would cancel."""
        for rows, block in self._blocks():
            yield rows, block - self.mean.float()

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.values), BLOCK):
            rows = slice(start, min(start + BLOCK, len(self.values)))
            yield rows, self._prepare(self.values[rows])

    def _prepare(self, values: Tensor | np.ndarray) -> Tensor:
        """As they are worked with: fp32, on the device, of unit length if spherical."""
        if self.prepared:
            return values  # type: ignore[return-value]
        block = as_floats(values).to(self.device)
        return F.normalize(block, dim=1) if self.spherical else block

    def integers(self, block: Tensor) -> Tensor:
        """(n, D) as whole numbers in fp64, whose sums over all points are exact."""
        return (block.double() * self.scale).round_()

    def at(self, indices: Tensor) -> Tensor:
        """Points by their indices among all, less the mean: (m, D) fp32 in every process."""
        points = torch.zeros(len(indices), self.values.shape[1], device=self.device)
        own = ((indices >= self.first) & (indices < self.first + len(self))).nonzero()[:, 0]
        for some in own.split(BLOCK):
            rows = indices[some] - self.first
            values: Tensor | np.ndarray
            if isinstance(self.values, Tensor):
                values = self.values[rows.to(self.values.device)]
            else:
                values = self.values[rows.cpu().numpy()]
            points[some] = self._prepare(values) - self.mean.float()
        return reduced(points)


def exact_scale(count: int, largest: float) -> float:
    """The power of two by which numbers up to `largest` become integers whose sum, of `count`, fp64 holds exactly."""
    return 2.0 ** (EXACT - math.ceil(math.log2(max(count * largest, 2**-60))))
