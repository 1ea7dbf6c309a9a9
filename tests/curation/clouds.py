"""Points to cluster, and what clusterings are compared by."""

import torch
from torch import Tensor

from dino.curation.kmeans import Clustering
from dino.curation.points import Points, shard


def normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def mixture(rows: int, width: int, of: int, seed: int = 0) -> Tensor:
    """Groups of unequal size, near enough to overlap."""
    centers = normal(of, width, seed + 1) * 2
    group = (torch.rand(rows, generator=torch.Generator().manual_seed(seed + 2)) ** 2 * of).long()
    return centers[group] + normal(rows, width, seed)


def held(data: Tensor, rank: int, processes: int, spherical: bool = False) -> Points:
    """The points of one of several processes."""
    return Points(data[shard(len(data), rank, processes)], spherical=spherical)


def assert_same(one: Clustering, other: Clustering) -> None:
    """To the last bit."""
    for name in ("centroids", "labels", "distances", "sizes"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.objective, one.iterations) == (other.objective, other.iterations)
