"""Hierarchical k-means with resampling (Vo et al. 2024): clusters of clusters, spread evenly over the data's support.

k-means puts most centroids where most points are. Clustering the centroids, and within a level clustering anew a few
points of each cluster, evens that out, so that frequent and rare concepts get clusters alike.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino.curation.kmeans import Clustering, kmeans
from dino.curation.points import Points, share
from dino.distributed import gathered_rows, rank_and_size
from dino.errors import UserError


class Level(NamedTuple):
    """k clusters of what the level below has.

    Attributes:
        centroids: (k, D) fp32.
        labels: at the first level (n,) of this process's points; above it (k_below,) of all clusters below.
        distances: squared, to the centroid, of the same.
    """

    centroids: Tensor
    labels: Tensor
    distances: Tensor


def hierarchical_kmeans(
    points: Points,
    clusters: Sequence[int],
    resamplings: int = 0,
    sample: int = 10,
    iterations: int = 50,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    progress: Path | None = None,
) -> list[Level]:
    """Levels from the finest on; every process must call this.

    Args:
        clusters: of each level, fewer from one to the next.
        resamplings: how often each level is clustered anew on a few points of each cluster.
        sample: how many: the nearest to the centroid.
        progress: folder in which a killed call keeps what the next one goes on from.

    Raises:
        UserError: levels that do not get smaller, or more clusters than points.
    """
    if clusters[0] > points.total or any(above >= below for below, above in itertools.pairwise(clusters)):
        raise UserError(
            f"clusters.counts={list(clusters)} of {points.total:,} points: each level must have fewer clusters than "
            "the one below, and the first at most as many as there are points"
        )
    levels: list[Level] = []
    below = points
    for number, count in enumerate(clusters, 1):
        found: Clustering | None = None
        for turn in range(resamplings + 1):
            again = f", resampled {turn}" if turn else ""
            arguments = (
                count, iterations, seed + turn, precision, None,
                progress and progress / f"level{number}-{turn}.safetensors", f"level {number}{again}",
            )  # fmt: skip
            if found is None:
                found = kmeans(below, *arguments)
                continue
            rows = nearest_members(below, found, sample)
            if len(rows) < count:  # equal points: clusters are empty
                break
            some = below.at(rows) + below.mean.float()
            part = Points(some[_mine(len(some))], below.device, below.spherical)
            centroids = kmeans(part, *arguments).centroids
            found = kmeans(below, count, 0, initial=centroids)
        assert found is not None
        whole = number == 1
        levels.append(
            Level(
                found.centroids,
                found.labels if whole else gathered_rows(found.labels),
                found.distances if whole else gathered_rows(found.distances),
            )
        )
        below = Points(found.centroids[_mine(count)], points.device, points.spherical)
    return levels


def nearest_members(points: Points, found: Clustering, count: int) -> Tensor:
    """Of each cluster the `count` points nearest to its centroid, by their numbers among all, in ascending order."""
    order = np.lexsort((found.distances.cpu().numpy(), found.labels.cpu().numpy()))
    own = order[_places_within(found.labels.cpu().numpy()[order]) < count]
    facts = [found.labels[own].double(), found.distances[own].double(), torch.from_numpy(own + points.first).double()]
    candidates = gathered_rows(torch.stack([fact.cpu() for fact in facts], dim=1).to(points.device)).cpu().numpy()
    candidates = candidates[np.lexsort((candidates[:, 2], candidates[:, 1], candidates[:, 0]))]
    chosen = candidates[_places_within(candidates[:, 0]) < count, 2]
    return torch.from_numpy(np.sort(chosen).astype(np.int64)).to(points.device)


def _places_within(sorted_labels: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal labels."""
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=sorted_labels[:1] - 1))
    lengths = np.diff(starts, append=len(sorted_labels))
    return np.arange(len(sorted_labels)) - np.repeat(starts, lengths)


def _mine(points: int) -> slice:
    """This process's share."""
    rows = share(points, *rank_and_size())
    return slice(rows.start, rows.stop)
