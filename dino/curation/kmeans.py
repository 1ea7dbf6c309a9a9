"""k-means over all processes: each holds a share of the points, and only sums and counts travel.

The result depends on the points, the number of clusters and the seed, not on how many processes share the points:

- a process holds whole blocks of `BLOCK` points, so that every matrix product has the same shape and content;
- sums are taken of integers (points times a power of two, rounded) in fp64, where they are exact in any order.

As sums are exact, only points that change their cluster are added and taken away, without drift. A point whose two
nearest centroids lie further apart than any centroid has moved since is not compared again (Hamerly 2010).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dino.errors import UserError
from dino.objectives.dino import is_distributed

BLOCK = 4096  # points
SAMPLE = 16  # points a cluster, among which k-means++ looks for the first centroids
EXACT = 52  # bits of a sum
ROUNDING = 4e-6  # of squared distances, relative to the squares they come from


class Clustering(NamedTuple):
    """k clusters of n points (of this process).

    Attributes:
        centroids: (k, D) fp32, the same in all processes; of unit length if spherical.
        labels: (n,) int64, the nearest centroid of each point.
        distances: (n,) fp32, squared, to it; if spherical 2 − 2·cosine.
        sizes: (k,) int64, points of all processes.
        objective: mean squared distance of all points.
        iterations: taken until no point changed its cluster, or until the limit.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor
    sizes: Tensor
    objective: float
    iterations: int


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
        self.rows, self.device, self.spherical = rows, torch.device(device), spherical
        counts = gathered_rows(torch.tensor([len(rows)], device=self.device))
        rank, _ = process()
        self.first, self.total = int(counts[:rank].sum()), int(counts.sum())
        self.mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=self.device)
        largest = torch.zeros((), device=self.device)
        for _, block in self._blocks():
            largest = torch.maximum(largest, block.abs().max().nan_to_num(math.inf, math.inf))  # NaN has no maximum
        if not bool(_reduced(largest, dist.ReduceOp.MAX).isfinite()):
            raise UserError("some embeddings are NaN or infinite: embed with other weights or train.precision=fp32")
        self.largest = 2 * float(largest)
        self.scale = exact_scale(self.total, self.largest)
        for _, block in self._blocks():
            self.mean += self.integers(block).sum(dim=0)
        self.mean = (_reduced(self.mean) / (self.total * self.scale)).float().double()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Places in this share, and the points there less the mean of all, fp32: without it, products would cancel."""
        for place, block in self._blocks():
            yield place, block - self.mean.float()

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rows), BLOCK):
            place = slice(start, min(start + BLOCK, len(self.rows)))
            block = as_floats(self.rows[place]).to(self.device)
            yield place, F.normalize(block, dim=1) if self.spherical else block

    def integers(self, block: Tensor) -> Tensor:
        """(n, D) as whole numbers in fp64, whose sums over all points are exact."""
        return (block.double() * self.scale).round_()

    def at(self, rows: Tensor) -> Tensor:
        """Points by their numbers among all, less the mean: (m, D) fp32 in every process."""
        found = torch.zeros(len(rows), self.rows.shape[1], device=self.device)
        mine = (rows >= self.first) & (rows < self.first + len(self))
        if mine.any():
            chosen = self.rows[(rows[mine] - self.first).cpu().numpy()]
            block = as_floats(chosen).to(self.device)
            found[mine.to(self.device)] = (F.normalize(block, dim=1) if self.spherical else block) - self.mean.float()
        return _reduced(found)


def exact_scale(count: int, largest: float) -> float:
    """The power of two by which numbers up to `largest` become integers whose sum, of `count`, fp64 holds exactly."""
    return 2.0 ** (EXACT - math.ceil(math.log2(max(count * largest, 2**-60))))


class _Centroids:
    """Centroids (k, D), less the mean of all points, ready to be compared with blocks: ‖x−c‖² = ‖x‖² − 2(x·c − ‖c‖²/2).

    Directions have the same nearest centroids by distance as by cosine, both being of unit length.
    """

    def __init__(self, centroids: Tensor, precision: torch.dtype = torch.float32):
        self.centroids, self.precision = centroids, precision
        self.bias = -0.5 * centroids.square().sum(dim=1)
        if precision != torch.float32:
            # The bias goes through the product as three columns, each the rest of the one before: so it keeps 24 bits.
            rest, columns = self.bias, []
            for _ in range(3):
                columns.append(rest.to(precision))
                rest = rest - columns[-1].float()
            self.wide = torch.cat([centroids.to(precision), torch.stack(columns, dim=1)], dim=1)

    def nearest(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of each point, and how much farther the second is, less what rounding may do: (n,)."""
        if self.precision == torch.float32:
            scores = torch.addmm(self.bias, block, self.centroids.T)
        else:
            scores = F.linear(F.pad(block.to(self.precision), (0, 3), value=1.0), self.wide)
        best, labels, second = _two_best(scores)
        squares = block.square().sum(dim=1)
        near, far = ((squares - 2 * score).clamp(min=0).sqrt() for score in (best, second))
        error = ROUNDING * (squares - 2 * self.bias[labels])
        return labels, far - near - error / near.clamp(min=1e-20).maximum(error.sqrt())


def kmeans(
    points: Points,
    clusters: int,
    iterations: int = 50,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    initial: Tensor | None = None,
    progress: Path | None = None,
    title: str = "k-means",
) -> Clustering:
    """Lloyd's algorithm from k-means++ (Arthur & Vassilvitskii 2007) on a sample of 16 points a cluster.

    An empty cluster is put where the point is that lies farthest from its own. Every process must call this.

    Args:
        iterations: at most; fewer where no point changes its cluster any more.
        precision: of the comparison with centroids: fp32, or bf16, which is faster and all but as good.
        initial: (k, D) centroids to begin with instead.
        progress: file in which the centroids are kept after each iteration; a later call goes on from there.
        title: what the progress bar says.

    Raises:
        UserError: more clusters than points.
    """
    if not 1 <= clusters <= points.total:
        raise UserError(f"{clusters:,} clusters of {points.total:,} points: there must be at least as many points")
    begin, centroids, ended = _earlier(progress, points.device)
    if centroids is None:
        centroids = (
            seeds(points, clusters, seed) if initial is None else initial.to(points.device) - points.mean.float()
        )
    labels = torch.full((len(points),), -1, device=points.device)
    gaps = torch.full((len(points),), -math.inf, device=points.device)
    sums = torch.zeros(clusters, centroids.shape[1], dtype=torch.float64, device=points.device)
    rank, _ = process()
    taken = begin
    with tqdm(
        total=iterations, initial=begin, desc=title, unit="iteration", leave=False, disable=rank > 0 or not iterations
    ) as bar:
        for taken in range(begin + 1, begin if ended else iterations + 1):
            changed = _assign(points, _Centroids(centroids, precision), labels, gaps, sums)
            bar.set_postfix_str(f"{changed / points.total:.2%} changed", refresh=False)
            bar.update()
            if not changed:
                _keep(progress, taken, centroids, rank, ended=True)
                break
            sizes = _reduced(torch.bincount(labels, minlength=clusters))
            before = centroids
            centroids = _means(points, _reduced(sums.clone()), sizes, before, labels)
            moves = (centroids - before).norm(dim=1)
            gaps -= moves[labels] + moves.max()
            _keep(progress, taken, centroids, rank)
    if precision != torch.float32:
        gaps.fill_(-math.inf)
    _assign(points, _Centroids(centroids), labels, gaps, sums)
    distances = _distances(points, centroids, labels)
    largest = distances.max() if len(distances) else torch.zeros((), device=points.device)
    scale = exact_scale(points.total, float(_reduced(largest.clone(), dist.ReduceOp.MAX)))
    total = _reduced((distances.double() * scale).round().sum())
    whole = centroids + points.mean.float()
    return Clustering(
        F.normalize(whole, dim=1) if points.spherical else whole,
        labels,
        distances,
        _reduced(torch.bincount(labels, minlength=clusters)),
        float(total) / scale / points.total,
        taken,
    )


def seeds(points: Points, clusters: int, seed: int) -> Tensor:
    """k-means++ on a sample: each next centroid is a point drawn by its squared distance to those before.

    Returns:
        (k, D), less the mean of all points; the same in every process.
    """
    generator = np.random.default_rng((seed, clusters))
    drawn = np.sort(generator.choice(points.total, min(points.total, SAMPLE * clusters), replace=False))
    sample = points.at(torch.from_numpy(drawn).to(points.device))
    squares = sample.square().sum(dim=1)
    chosen = [int(generator.integers(len(sample)))]
    nearest = torch.full_like(squares, math.inf)
    for draw in generator.random(clusters - 1):
        newest = sample[chosen[-1]]
        nearest = torch.minimum(nearest, (squares - 2 * (sample @ newest) + squares[chosen[-1]]).clamp(min=0))
        nearest[chosen[-1]] = 0
        heights = nearest.double().cumsum(dim=0)
        place = torch.searchsorted(heights, draw * heights[-1], right=True)
        chosen.append(int(place.clamp(max=len(sample) - 1)))
    return sample[chosen]


def _assign(points: Points, centroids: _Centroids, labels: Tensor, gaps: Tensor, sums: Tensor) -> int:
    """Bring labels, gaps and this process's sums up to date; how many of all points changed.

    Args:
        gaps: (n,) how far the centroids may move, in sum, before a point's nearest can be another; −∞: unknown.
    """
    changed = torch.zeros((), dtype=torch.int64, device=points.device)
    for place, block in points:
        open_ = (gaps[place] <= 0).nonzero()[:, 0]
        if not len(open_):
            continue
        if len(open_) < len(block):
            block = block[open_]
        old = labels[place][open_]
        new, gaps[place][open_] = centroids.nearest(block)
        moved = (new != old).nonzero()[:, 0]
        changed += len(moved)
        if not len(moved):
            continue
        integers, old, new = points.integers(block[moved]), old[moved], new[moved]
        sums.index_add_(0, new, integers)
        if int(old[0]) >= 0:
            sums.index_add_(0, old, integers, alpha=-1)
        labels[place][open_[moved]] = new
    return int(_reduced(changed))


def _means(points: Points, sums: Tensor, sizes: Tensor, before: Tensor, labels: Tensor) -> Tensor:
    """Centroids (k, D) less the mean, from the sums of all processes."""
    means = (sums / (sizes.clamp(min=1)[:, None] * points.scale)).float()
    if points.spherical:
        means = F.normalize(means + points.mean.float(), dim=1) - points.mean.float()
    if empty := (sizes == 0).nonzero()[:, 0].tolist():
        farthest = _farthest(points, before, means, labels, len(empty))
        means[empty] = before[empty]
        means[empty[: len(farthest)]] = farthest
    return means


def _farthest(points: Points, before: Tensor, means: Tensor, labels: Tensor, count: int) -> Tensor:
    """The points, at most `count`, that lay farthest from their centroids and are not on them; the first of equals."""
    placed = _distances(points, means, labels) <= 1e-13 * points.largest**2
    distances = _distances(points, before, labels).double().masked_fill(placed, 0.0)
    best = distances.sort(descending=True, stable=True)
    some = slice(0, min(count, len(distances)))
    found = torch.full((count, 2), -1.0, dtype=torch.float64, device=points.device)
    found[some, 0], found[some, 1] = best.values[some], (best.indices[some] + points.first).double()
    of_all = gathered_rows(found)
    order = of_all[of_all[:, 1].argsort()]
    order = order[order[:, 0].argsort(descending=True, stable=True)][:count]
    return points.at(order[order[:, 0] > 0, 1].long())


def _distances(points: Points, centroids: Tensor, labels: Tensor) -> Tensor:
    """(n,) squared distance of each point to its centroid, from the difference: near ones keep their digits."""
    found = torch.zeros(len(points), device=points.device)
    for place, block in points:
        found[place] = (block - centroids[labels[place]]).square().sum(dim=1)
    return found


def as_floats(rows: Tensor | np.ndarray) -> Tensor:
    """As an fp32 tensor; what a memory map shows is copied."""
    return rows.float() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, dtype=np.float32))


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


def _reduced(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    """Summed (or as `how` says) over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor, op=how)
    return tensor


def process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def gathered_rows(tensor: Tensor) -> Tensor:
    """(n, …) of each process, one after the other; every process must call this, n may differ."""
    if not is_distributed():
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(count) for count in counts)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _earlier(progress: Path | None, device: torch.device) -> tuple[int, Tensor | None, bool]:
    """Iterations taken, centroids, and whether no point changed any more."""
    if progress is None or not progress.exists():
        return 0, None, False
    with safe_open(progress, framework="pt") as file:
        facts = file.metadata()
        return int(facts["iteration"]), file.get_tensor("centroids").to(device), facts["ended"] == "True"


def _keep(progress: Path | None, iteration: int, centroids: Tensor, rank: int, ended: bool = False) -> None:
    if progress is None or rank:
        return
    partial = progress.with_name(f".{progress.name}.partial")
    facts = {"iteration": str(iteration), "ended": str(ended)}
    save_file({"centroids": centroids.cpu()}, partial, metadata=facts)
    partial.replace(progress)
