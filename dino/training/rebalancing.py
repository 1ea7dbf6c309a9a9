"""Rebalancing while training (`data.rebalance_every`): sampling follows clusters of the teacher's own features.

Every so many steps the next sample of the images, in a random order, is embedded by the teacher as it is then and
clustered; its images of small clusters are sampled more often from then on, those of large ones less. Images outside
the sample keep their weight until it is their turn.
"""

import time

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dino.config.schema import Config
from dino.curation.kmeans import kmeans
from dino.curation.points import Points, own_rows
from dino.curation.rebalance import flat
from dino.data import EpochStream, Pool
from dino.data.sampler import effective_number
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.methods.network import Network, as_used
from dino.models import Preprocess
from dino.training.sharding import whole_backbone

IMAGES_PER_EMBEDDING = 20  # trained on for each that is embedded: 5 % of the time, even if decoding is all it takes
SMALLEST_SAMPLE = 1000  # images, or all there are
MEMBERS = 50  # images of the sample for each cluster
MOST_CLUSTERS = 1000
SMOOTHING = 0.5  # clusters are sampled by the root of their size
LARGEST_WEIGHT = 10.0  # where 1 is the mean


class Rebalancer(nn.Module):
    """How often images are sampled; its weights are part of a checkpoint.

    Args:
        images: the pool; a manifest's weights are what it begins with.
    """

    def __init__(self, config: Config, images: Pool, accelerator: Accelerator):
        super().__init__()
        self.config, self.images, self.accelerator = config, images, accelerator
        self.every = config.data.rebalance_every
        count = len(images.names)
        given = np.ones(count) if images.weights is None else images.weights.astype(np.float64)
        self.weights: Tensor
        self.register_buffer("weights", torch.from_numpy(given))
        self.since = time.perf_counter()
        self.sample_size = min(
            count, max(SMALLEST_SAMPLE, self.every * config.train.batch_size // IMAGES_PER_EMBEDDING)
        )
        if self.every and count < 2 * MEMBERS:
            raise UserError(
                f"data.rebalance_every needs at least {2 * MEMBERS} images to cluster, got {count}: set it to 0"
            )

    def is_due(self, steps: int) -> bool:
        """Whether to update after this many steps."""
        return self.every > 0 and steps % self.every == 0

    def steer(self, stream: EpochStream, steps: int) -> None:
        """Let a stream sample by the weights, if they have been updated by then."""
        self.since = time.perf_counter()
        if self.every and steps >= self.every:
            stream.reweigh(self.weights.numpy(), steps // self.every)

    def update(self, network: Network, steps: int) -> dict[str, float]:
        """Embed, cluster, weigh; every process must call this.

        Returns:
            What to log; `time/rebalance` is the fraction of the time since the weights were last applied.
        """
        began = time.perf_counter()
        sample = self.sample(steps)
        tokens, rows = self._embed(network, sample)
        points = Points(tokens[own_rows(len(rows))], self.accelerator.device, spherical=True)
        clusters = min(MOST_CLUSTERS, max(2, len(tokens) // MEMBERS))
        centroids = kmeans(points, clusters, iterations=20, seed=steps).centroids
        labels = (nn.functional.normalize(tokens, dim=1) @ centroids.cpu().T).argmax(dim=1).numpy()
        indices = torch.from_numpy(sample[rows])
        budget = float(self.weights[indices].sum())  # which the sample as a whole keeps
        most = LARGEST_WEIGHT * budget / len(labels)
        self.weights[indices] = torch.from_numpy(flat(labels, clusters, SMOOTHING, budget, most))
        now = time.perf_counter()
        return {
            "time/rebalance": round((now - began) / (now - self.since), 4),
            "data/effective_clusters": effective_number(np.bincount(labels)),
            "data/largest_weight": float(self.weights.max()),
        }

    def sample(self, steps: int) -> np.ndarray:
        """(S,) ascending: whose turn it is after so many steps; every image once before any comes again."""
        count, rounds = len(self.images.names), steps // self.every
        order = np.random.default_rng(self.config.train.seed).permutation(count)
        return np.sort(order[(np.arange(self.sample_size) + (rounds - 1) * self.sample_size) % count])

    def _embed(self, network: Network, sample: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Class tokens (R, D) of the sample's readable images, and their rows in it (R,)."""
        views = self.config.views
        preprocess = Preprocess(views.global_size, views.mean or (), views.std or ())
        backbone = whole_backbone(network, self.accelerator, everywhere=True)
        with as_used(backbone):
            features = extract(
                backbone, self.images, sample, preprocess.of_levels, title="rebalancing", accelerator=self.accelerator
            )
        return torch.from_numpy(features.class_tokens), features.rows
