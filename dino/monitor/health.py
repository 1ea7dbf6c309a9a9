"""Is the run healthy? Indicators of the teacher while it trains, and one plain verdict."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from dino.config.read import Config
from dino.distributed import is_distributed, mean_over_processes
from dino.monitor.indicators import (
    feature_deviation,
    neighbour_agreement,
    rank_me,
    target_statistics,
    weighted_knn,
)
from dino.training.targets import TeacherOutput

if TYPE_CHECKING:
    from dino.training.loader import Batches
    from dino.training.step import Step

QUEUE = 2048  # newest class tokens, of this process, that rank and neighbours are taken from
QUERIES = 512  # of them, the newest, whose neighbours are asked for their class
FEWEST = 64  # tokens, below which they say nothing


class Health:
    """Watches the teacher's outputs; nothing of it flows back into training.

    Args:
        labels: class name of each image of the pool, or None; with labels, neighbours are asked for the class.
        start: step from which this process goes on.
    """

    def __init__(self, accelerator: Accelerator, config: Config, labels: Sequence[str] | None, start: int):
        self.accelerator, self.config, self.measured = accelerator, config, start
        device, self.prototypes = accelerator.device, int(config.objective.prototypes)
        self.labels, self.classes = None, 0
        if labels is not None:
            names, numbers = np.unique(np.asarray(labels), return_inverse=True)
            self.labels, self.classes = torch.from_numpy(numbers).to(device), len(names)
        self.used = torch.zeros(self.prototypes, dtype=torch.bool, device=device)
        self.used_of = 0
        self.tokens = torch.empty(0, device=device)
        self.indices = torch.empty(0, dtype=torch.long, device=device)
        self.latest: TeacherOutput | None = None

    def is_due(self, taken: int) -> bool:
        """Whether to measure after this many steps."""
        every = int(self.config.monitor.health_every)
        return every > 0 and (taken // every > self.measured // every or taken == int(self.config.train.steps))

    def observe(self, output: TeacherOutput, indices: Sequence[int]) -> None:
        """Take note of a step's outputs for the images at `indices`; the host does not wait for the device."""
        self.latest = output
        self.used.index_fill_(0, output.targets.flatten(0, 1).argmax(dim=1), True)
        self.used_of += 2 * len(indices) * self.accelerator.num_processes
        place = torch.as_tensor(indices).to(self.tokens.device, non_blocking=True)
        self.tokens = torch.cat([self.tokens.view(-1, output.tokens.shape[-1]), output.tokens[0].float()])[-QUEUE:]
        self.indices = torch.cat([self.indices, place])[-QUEUE:]

    def of_start(self, take_step: "Step", batches: "Batches") -> dict[str, float]:
        """Indicators before the first step, of a teacher that begins with trained weights; nothing is learned."""
        needed = -(-QUEUE // max(1, len(batches.indices(batches.start))))
        for step, micro_batches in batches.first(needed):
            take_step.look(step, micro_batches)
            self.observe(take_step.teacher_output, batches.indices(step))
        return self.measure(0)

    @torch.no_grad()
    def measure(self, taken: int) -> dict[str, float]:
        """Indicators after `taken` steps, by the names of the metrics; every process must call this.

        Means over processes. Rank and neighbours are those of the newest 2,048 images of each process, statistics of
        targets those of the last step.
        """
        if self.latest is None:
            return {}
        tokens, logits, targets = self.latest
        targets = targets.flatten(0, 1)
        statistics = target_statistics(targets, mean_over_processes(targets.mean(dim=0)))
        if is_distributed():
            used = self.used.to(torch.int32)
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
            self.used = used > 0
        values = {
            "health/teacher_entropy": statistics.entropy,
            "health/entropy_ratio": statistics.entropy / math.log(self.prototypes),
            "health/kl_to_centre": statistics.kl_to_centre,
            "health/prototypes_in_use": self.used.sum() / min(self.prototypes, self.used_of),
            "health/centre_norm": mean_over_processes(logits.flatten(0, 1).mean(dim=0)).norm(),
        }
        if len(self.tokens) >= FEWEST:
            values["health/rank_me"] = rank_me(self.tokens)
            values["health/feature_std"] = feature_deviation(self.tokens)
            values |= self._classes() if self.labels is not None else self._agreement(tokens)
        self.used.zero_()
        self.used_of, self.measured = 0, taken
        names = list(values)
        means = self.accelerator.reduce(torch.stack([values[name].float() for name in names]), "mean")
        return dict(zip(names, means.tolist(), strict=True))

    def _classes(self) -> dict[str, Tensor]:
        """How often the neighbours of the newest images, other images of the queue, name the right class."""
        assert self.labels is not None
        newest, labels = self.indices[-QUERIES:], self.labels[self.indices]
        allowed = self.indices != newest[:, None]
        predicted = weighted_knn(self.tokens[-QUERIES:], self.tokens, labels, self.classes, allowed)
        return {"health/knn": (predicted == labels[-QUERIES:]).float().mean()}

    def _agreement(self, tokens: Tensor) -> dict[str, Tensor]:
        """Whether the two views of the last step's images have the same neighbours in the queue."""
        newest = self.indices[-tokens.shape[1] :]
        first, second = tokens[:, -len(newest) :]
        return {
            "health/neighbour_agreement": neighbour_agreement(
                first, second, self.tokens, self.indices != newest[:, None]
            )
        }
