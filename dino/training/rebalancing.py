"""Rebalancing while training (`data.rebalance_every`): the draws follow clusters of the teacher's own features.

Every so many steps the next sample of the images, in a drawn order, is embedded by the teacher as it is then and
clustered; its images of small clusters are drawn more often from there on, those of large ones less. Images outside the
sample keep their weight until it is their turn.
"""

import time

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dino.config.read import Config
from dino.curation.kmeans import kmeans
from dino.curation.points import Points, share
from dino.curation.rebalance import effective_number, flat
from dino.data import EpochStream, Images
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.methods.network import Network, as_used
from dino.models import Preprocess
from dino.training.sharding import whole_backbone

SHARE = 20  # images trained on for each that is embedded: 5 % of the time, even if decoding is all that takes any
LEAST = 1000  # images of a sample, or all there are
MEMBERS = 50  # images of the sample a cluster
MOST_CLUSTERS = 1000
SMOOTHING = 0.5  # clusters are drawn by the root of their size
MOST = 10.0  # the greatest weight, where 1 is the mean


class Draws(nn.Module):
    """How often images are drawn; part of a checkpoint.

    Args:
        images: the pool; a manifest's weights are what they begin with.
    """

    def __init__(self, config: Config, images: Images, accelerator: Accelerator):
        super().__init__()
        self.config, self.images, self.accelerator = config, images, accelerator
        count, every = len(images.names), int(config.data.rebalance_every)
        given = np.ones(count) if images.weights is None else images.weights.astype(np.float64)
        self.weights: Tensor
        self.register_buffer("weights", torch.from_numpy(given))
        self.since = time.perf_counter()
        self.sample = min(count, max(LEAST, every * config.train.batch_size // SHARE))
        if every and count < 2 * MEMBERS:
            raise UserError(
                f"data.rebalance_every needs at least {2 * MEMBERS} images to cluster, got {count}: set it to 0"
            )

    def are_due(self, taken: int) -> bool:
        """Whether to rebalance after this many steps."""
        every = int(self.config.data.rebalance_every)
        return every > 0 and taken % every == 0

    def steer(self, stream: EpochStream, taken: int) -> None:
        """Let a stream draw by the weights, if they have been renewed by then."""
        every = int(self.config.data.rebalance_every)
        self.since = time.perf_counter()
        if every and taken >= every:
            stream.reweigh(self.weights.numpy(), taken // every)

    def renew(self, teacher: Network, taken: int) -> dict[str, float]:
        """Embed, cluster, weigh; every process must call this.

        Returns:
            What to log; `time/rebalance` is the share of the time since the draws were last changed.
        """
        began = time.perf_counter()
        chosen = self.turn(taken)
        views = self.config.views
        preprocess = Preprocess(views.global_size, views.mean or (), views.std or ())
        backbone = whole_backbone(teacher, self.accelerator, everywhere=True)
        with as_used(backbone):
            found = extract(
                backbone, self.images, chosen, preprocess, title="rebalancing", accelerator=self.accelerator
            )
        rows = share(len(found.rows), self.accelerator.process_index, self.accelerator.num_processes)
        tokens = torch.from_numpy(found.class_tokens)
        points = Points(tokens[rows.start : rows.stop], self.accelerator.device, spherical=True)
        clusters = min(MOST_CLUSTERS, max(2, len(tokens) // MEMBERS))
        centroids = kmeans(points, clusters, 20, taken).centroids
        labels = (nn.functional.normalize(tokens, dim=1) @ centroids.cpu().T).argmax(dim=1).numpy()
        rows_of = torch.from_numpy(chosen[found.rows])
        draws = float(self.weights[rows_of].sum())  # which the sample as a whole keeps
        self.weights[rows_of] = torch.from_numpy(flat(labels, clusters, SMOOTHING, draws, MOST * draws / len(labels)))
        took, elapsed = (time.perf_counter() - moment for moment in (began, self.since))
        return {
            "time/rebalance": round(took / elapsed, 4),
            "data/effective_clusters": effective_number(np.bincount(labels)),
            "data/largest_weight": float(self.weights.max()),
        }

    def turn(self, taken: int) -> np.ndarray:
        """(S,) ascending: whose turn it is after so many steps; every image once before any comes again."""
        count, rounds = len(self.images.names), taken // int(self.config.data.rebalance_every)
        order = np.random.default_rng(self.config.train.seed).permutation(count)
        return np.sort(order[(np.arange(self.sample) + (rounds - 1) * self.sample) % count])
