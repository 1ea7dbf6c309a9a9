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
from tqdm import tqdm

from dino.curation.kmeans import Clustering, kmeans
from dino.curation.points import Points, own_rows
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
    title: str = "",
) -> list[Level]:
    """Levels from the finest on; every process must call this.

    Args:
        clusters: of each level, fewer from one to the next.
        resamplings: how often each level is clustered anew on a few points of each cluster.
        sample: points of each cluster that this takes: the nearest to its centroid.
        progress: folder in which a killed call keeps what the next one goes on from.
        title: what progress bars say before the level.

    Raises:
        UserError: levels that do not get smaller, or more clusters than points.
    """
    if clusters[0] > points.total or any(above >= below for below, above in itertools.pairwise(clusters)):
        raise UserError(
            f"clusters.counts={list(clusters)} of {points.total:,} points: each level must have fewer clusters than "
            "the one below, and the first at most as many as there are points"
        )
    levels: list[Level] = []
    below, hidden = points, rank_and_size()[0] > 0
    most = len(clusters) * (resamplings + 1) * iterations
    bar = tqdm(total=most, desc=f"{title}clusters", unit="iteration", leave=False, disable=hidden)
    for number, count in enumerate(clusters, 1):
        clustering: Clustering | None = None
        for turn in range(resamplings + 1):
            part = below if clustering is None else _central_points(below, clustering, sample)
            if part.total < count:  # equal points: clusters are empty
                break
            bar.set_description(
                f"{title}clusters, level {number} of {len(clusters)}, pass {turn + 1} of {resamplings + 1}"
            )
            clustering = kmeans(
                part,
                count,
                iterations=iterations,
                seed=seed + turn,
                precision=precision,
                progress=None if progress is None else progress / f"level{number}-{turn}.safetensors",
                bar=bar,
            )
            if turn:
                clustering = kmeans(below, count, iterations=0, initial=clustering.centroids)
        assert clustering is not None
        labels = clustering.labels if number == 1 else gathered_rows(clustering.labels)
        distances = clustering.distances if number == 1 else gathered_rows(clustering.distances)
        levels.append(Level(clustering.centroids, labels, distances))
        below = Points(clustering.centroids[own_rows(count)], points.device, points.spherical)
    bar.close()
    return levels


def _central_points(points: Points, clustering: Clustering, count: int) -> Points:
    """The `count` points of each cluster that are nearest to its centroid."""
    members = points.at(nearest_members(points, clustering, count)) + points.mean.float()
    return Points(members[own_rows(len(members))], points.device, points.spherical)


def nearest_members(points: Points, clustering: Clustering, count: int) -> Tensor:
    """Of each cluster the `count` points nearest to its centroid, by their indices among all, in ascending order."""
    own_labels, own_distances = clustering.labels.cpu().numpy(), clustering.distances.cpu().numpy()
    order = np.lexsort((own_distances, own_labels))
    candidates = torch.from_numpy(order[rank_within(own_labels[order]) < count]).to(points.device)
    labels = gathered_rows(clustering.labels[candidates]).cpu().numpy()
    distances = gathered_rows(clustering.distances[candidates]).cpu().numpy()
    indices = gathered_rows(candidates + points.first).cpu().numpy()
    order = np.lexsort((indices, distances, labels))
    nearest = indices[order[rank_within(labels[order]) < count]]
    return torch.from_numpy(np.sort(nearest)).to(points.device)


def rank_within(sorted_labels: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each run of equal labels."""
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=sorted_labels[:1] - 1))
    lengths = np.diff(starts, append=len(sorted_labels))
    return np.arange(len(sorted_labels)) - np.repeat(starts, lengths)
