"""k-means over all processes: each holds a share of the points, and only sums and counts travel.

The result depends on the points, the number of clusters and the seed, not on how many processes share the points.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dino.curation.assignment import Assignment
from dino.curation.points import Points, exact_scale
from dino.distributed import gathered_rows, rank_and_size, reduced
from dino.errors import UserError

SAMPLE = 16  # points a cluster, among which k-means++ looks for the first centroids


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
    begin, before, centroids, ended = _earlier(progress, points.device)
    assignment = Assignment(points, clusters, precision)
    if before is not None and not ended:
        assignment.update(before)  # so that it is known what changes next
    if centroids is None:
        centroids = (
            seeds(points, clusters, seed) if initial is None else initial.to(points.device) - points.mean.float()
        )
    rank, _ = rank_and_size()
    taken = begin
    with tqdm(
        total=iterations, initial=begin, desc=title, unit="iteration", leave=False, disable=rank > 0 or not iterations
    ) as bar:
        for taken in range(begin + 1, begin if ended else iterations + 1):
            changed = assignment.update(centroids)
            bar.set_postfix_str(f"{changed / points.total:.2%} changed", refresh=False)
            bar.update()
            if not changed:
                _keep(progress, taken, centroids, centroids, rank, ended=True)
                break
            sizes, before = reduced(torch.bincount(assignment.labels, minlength=clusters)), centroids
            centroids = _means(points, reduced(assignment.sums.clone()), sizes, before, assignment.labels)
            _keep(progress, taken, before, centroids, rank)
    assignment.settle(centroids)
    labels = assignment.labels
    distances = _distances(points, centroids, labels)
    largest = distances.max() if len(distances) else torch.zeros((), device=points.device)
    scale = exact_scale(points.total, float(reduced(largest.clone(), dist.ReduceOp.MAX)))
    total = reduced((distances.double() * scale).round().sum())
    whole = centroids + points.mean.float()
    return Clustering(
        F.normalize(whole, dim=1) if points.spherical else whole,
        labels,
        distances,
        reduced(torch.bincount(labels, minlength=clusters)),
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


def _earlier(progress: Path | None, device: torch.device) -> tuple[int, Tensor | None, Tensor | None, bool]:
    """Iterations taken, centroids of the last and of the next, and whether no point changed any more."""
    if progress is None or not progress.exists():
        return 0, None, None, False
    with safe_open(progress, framework="pt") as file:
        facts = file.metadata()
        before, centroids = (file.get_tensor(name).to(device) for name in ("before", "centroids"))
        return int(facts["iteration"]), before, centroids, facts["ended"] == "True"


def _keep(
    progress: Path | None, iteration: int, before: Tensor, centroids: Tensor, rank: int, ended: bool = False
) -> None:
    if progress is None or rank:
        return
    partial = progress.with_name(f".{progress.name}.partial")
    facts = {"iteration": str(iteration), "ended": str(ended)}
    save_file({"before": before.cpu().clone(), "centroids": centroids.cpu().clone()}, partial, metadata=facts)
    partial.replace(progress)
