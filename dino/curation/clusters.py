"""Clusters of a pool's images, level upon level: the stage around `hierarchical_kmeans`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator

from dino.curation.parts import How, in_parts, save, whole
from dino.curation.points import own_rows
from dino.curation.settings import Clusters as Settings
from dino.curation.stage import Stage
from dino.evaluation.neighbours import Rows

MOST_CLUSTERS = 10_000  # that `auto` chooses


class Clusters(NamedTuple):
    """Clusters of some of N images.

    Attributes:
        levels: (N,) cluster of each image at the first level (−1: none), then (k,) of each cluster one level up.
        distances: (N,) fp32, squared, to the first level's centroid; NaN: none.
        centroids: (k, D) fp32, of the first level.
    """

    levels: list[np.ndarray]
    distances: np.ndarray
    centroids: np.ndarray

    def of_images(self) -> list[np.ndarray]:
        """(N,) cluster of each image at each level; −1: none."""
        labels = self.levels[0]
        labels_of_levels = [labels]
        for parents in self.levels[1:]:
            labels = np.where(labels >= 0, parents[labels], -1)
            labels_of_levels.append(labels)
        return labels_of_levels


def cluster(
    stage: Stage, tokens: np.ndarray, indices: np.ndarray, settings: Settings, seed: int, accelerator: Accelerator
) -> Clusters:
    """Cluster the images `indices` of all that `tokens` (N, D) are of; every process must call this and gets all."""
    counts = settings.counts or default_counts(len(indices))
    file = stage.folder / "clusters.npz"
    if stage.begin():
        how = How(settings, seed, accelerator)
        if settings.parts == 1:
            arrays = whole(Rows(tokens, indices[own_rows(len(indices))]), counts, how, stage.folder)
        else:
            arrays = in_parts(tokens, indices, counts, how, stage)
        save(file, arrays, how)
        stage.finish()
    saved = stage.arrays(file.name)
    labels, distances = np.full(len(tokens), -1), np.full(len(tokens), np.nan, np.float32)
    labels[indices], distances[indices] = saved["labels"], saved["distances"]
    parents = [saved[f"level{number}"] for number in range(2, len(counts) + 1)]
    return Clusters([labels, *parents], distances, saved["centroids"])


def default_counts(images: int) -> Sequence[int]:
    """20 images a cluster, and above them twice the root of as many; at most 10,000."""
    first = min(MOST_CLUSTERS, max(1, images // 20))
    second = round(2 * math.sqrt(first))
    return [first, second] if 1 < second < first else [first]
