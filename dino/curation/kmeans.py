"""k-means over all processes: each holds a shard of the points, and only sums and counts travel.

The result depends on the points, the number of clusters and the seed, not on how many processes hold the points.
"""

import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dino.curation.assignment import Assignment
from dino.curation.points import Points, exact_scale
from dino.distributed import gathered_rows, rank_and_size, reduced
from dino.errors import UserError
from dino.files import replacing

logger = logging.getLogger(__name__)
SAMPLE = 16  # points a cluster, among which k-means++ looks for the first centroids
SAMPLE_BYTES = 2**31  # of these points, in every process: of more clusters than a million or so, fewer points of each


class Clustering(NamedTuple):
    """k clusters of n points (of this process).

    Attributes:
        centroids: (k, D) fp32, the same in all processes; of unit length if spherical.
        labels: (n,) int64, the nearest centroid of each point.
        distances: (n,) fp32, squared, to it; if spherical 2 − 2·cosine.
        sizes: (k,) int64, points of all processes.
        objective: mean squared distance of all points.
        iterations: until no point changed its cluster, or until the limit.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor
    sizes: Tensor
    objective: float
    iterations: int


class _Progress(NamedTuple):
    """Where a call stands: centroids (k, D) less the mean of all points, before and after its latest iteration."""

    iteration: int
    before: Tensor
    centroids: Tensor
    converged: bool = False


def kmeans(
    points: Points,
    clusters: int,
    iterations: int = 50,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    initial: Tensor | None = None,
    progress: Path | None = None,
    title: str = "k-means",
    bar: tqdm | None = None,
) -> Clustering:
    """Lloyd's algorithm from k-means++ (Arthur & Vassilvitskii 2007) on a sample of 16 points a cluster, if it fits.

    An empty cluster is put where the point is that lies farthest from its own. Every process must call this.

    Args:
        iterations: at most; fewer where no point changes its cluster any more.
        precision: of the comparison with centroids: fp32, or bf16, which is faster and all but as good.
        initial: (k, D) centroids to begin with instead.
        progress: file in which the centroids are kept after each iteration; a later call goes on from there.
        title: what the progress bar says.
        bar: one that several calls share, whose total has all of this one's iterations; None: it has its own.

    Raises:
        UserError: more clusters than points.
    """
    if not 1 <= clusters <= points.total:
        raise UserError(f"{clusters:,} clusters of {points.total:,} points: there must be at least as many points")
    assignment = Assignment(points, clusters, precision)
    state = _load(progress, (clusters, points.values.shape[1]), points.device)
    if state is None:
        first = seeds(points, clusters, seed) if initial is None else initial.to(points.device) - points.mean.float()
        state = _Progress(0, first, first)
    elif not state.converged:
        assignment.update(state.before)  # so that it is known what changes next
    rank, _ = rank_and_size()
    hidden = rank > 0 or not iterations or bar is not None
    with tqdm(total=iterations, desc=title, unit="iteration", leave=False, disable=hidden) as own_bar:
        shown = own_bar if bar is None else bar
        shown.update(state.iteration)
        while state.iteration < iterations and not state.converged:
            changed = assignment.update(state.centroids)
            shown.set_postfix_str(f"{changed / points.total:.2%} changed", refresh=False)
            shown.update()
            moved = _moved_centroids(points, assignment, state.centroids) if changed else state.centroids
            state = _Progress(state.iteration + 1, state.centroids, moved, converged=not changed)
            if progress is not None and rank == 0:
                _save(progress, state)
    if bar is not None and bar.total:
        bar.total -= max(0, iterations - state.iteration)  # those that were not needed: what is left is less
    assignment.settle(state.centroids)
    return _clustering(points, assignment.labels, state)


def _clustering(points: Points, labels: Tensor, state: _Progress) -> Clustering:
    """What is known of the clusters in the end."""
    distances = _distances(points, state.centroids, labels)
    largest = distances.max() if len(distances) else torch.zeros((), device=points.device)
    scale = exact_scale(points.total, float(reduced(largest.clone(), dist.ReduceOp.MAX)))
    total = reduced((distances.double() * scale).round().sum())
    centroids = state.centroids + points.mean.float()
    return Clustering(
        centroids=F.normalize(centroids, dim=1) if points.spherical else centroids,
        labels=labels,
        distances=distances,
        sizes=reduced(torch.bincount(labels, minlength=len(centroids))),
        objective=float(total) / scale / points.total,
        iterations=state.iteration,
    )


def seeds(points: Points, clusters: int, seed: int) -> Tensor:
    """k-means++ on a sample: each next centroid is a point drawn by its squared distance to those before.

    Returns:
        (k, D), less the mean of all points; the same in every process.
    """
    generator = np.random.default_rng((seed, clusters))
    that_fit = SAMPLE_BYTES // (4 * points.values.shape[1])
    sampled = min(points.total, max(clusters, min(SAMPLE * clusters, that_fit)))
    indices = np.sort(generator.choice(points.total, sampled, replace=False))
    sample = points.at(torch.from_numpy(indices).to(points.device))
    squares = sample.square().sum(dim=1)
    rows = [int(generator.integers(len(sample)))]
    nearest = torch.full_like(squares, math.inf)
    for number in generator.random(clusters - 1):
        newest = sample[rows[-1]]
        nearest = torch.minimum(nearest, (squares - 2 * (sample @ newest) + squares[rows[-1]]).clamp(min=0))
        nearest[rows[-1]] = 0
        heights = nearest.double().cumsum(dim=0)
        row = torch.searchsorted(heights, number * heights[-1], right=True)
        rows.append(int(row.clamp(max=len(sample) - 1)))
    return sample[rows]


def _moved_centroids(points: Points, assignment: Assignment, before: Tensor) -> Tensor:
    """The means (k, D) of the clusters of all processes, less the mean of all points."""
    sizes = reduced(torch.bincount(assignment.labels, minlength=len(before)))
    sums = reduced(assignment.sums.clone())
    means = (sums / (sizes.clamp(min=1)[:, None] * points.scale)).float()
    if points.spherical:
        means = F.normalize(means + points.mean.float(), dim=1) - points.mean.float()
    empty = (sizes == 0).nonzero()[:, 0].tolist()
    if empty:
        farthest = _farthest(points, before, means, assignment.labels, len(empty))
        means[empty] = before[empty]
        means[empty[: len(farthest)]] = farthest
    return means


def _farthest(points: Points, before: Tensor, means: Tensor, labels: Tensor, count: int) -> Tensor:
    """The points, at most `count`, that lay farthest from their centroids and are not on them; the first of equals."""
    on_centroid = _distances(points, means, labels) <= 1e-13 * points.largest**2
    distances = _distances(points, before, labels).masked_fill(on_centroid, 0.0)
    own = distances.sort(descending=True, stable=True)
    distances = gathered_rows(own.values[:count])
    indices = gathered_rows(own.indices[:count] + points.first)
    by_index = indices.argsort()
    distances, indices = distances[by_index], indices[by_index]
    order = distances.argsort(descending=True, stable=True)[:count]
    return points.at(indices[order][distances[order] > 0])


def _distances(points: Points, centroids: Tensor, labels: Tensor) -> Tensor:
    """(n,) squared distance of each point to its centroid, from the difference: near ones keep their digits."""
    distances = torch.zeros(len(points), device=points.device)
    for rows, block in points:
        distances[rows] = (block - centroids[labels[rows]]).square().sum(dim=1)
    return distances


def _load(file: Path | None, shape: tuple[int, int], device: torch.device) -> _Progress | None:
    """Where an earlier call stood, if there was one; it wrote (k, D) centroids of this `shape`."""
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            facts = opened.metadata()
            before, centroids = opened.get_tensor("before").to(device), opened.get_tensor("centroids").to(device)
        progress = _Progress(int(facts["iteration"]), before, centroids, facts["converged"] == "True")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): the clusters are sought anew", file, error)
        return None
    return progress if before.shape == centroids.shape == shape else None


def _save(file: Path, state: _Progress) -> None:
    facts = {"iteration": str(state.iteration), "converged": str(state.converged)}
    tensors = {"before": state.before.cpu().clone(), "centroids": state.centroids.cpu().clone()}
    with replacing(file, durable=False) as partial:
        save_file(tensors, partial, metadata=facts)
