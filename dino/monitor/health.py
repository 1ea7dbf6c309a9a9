"""Is the run healthy? What indicators look at while it trains, and when they are asked."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from dino.config.schema import Config
from dino.data import Pool, read_or_reason
from dino.data.pool import Labels
from dino.methods.method import Method, Seen
from dino.monitor.indicators import INDICATORS, Indicator, Observed
from dino.monitor.verdict import DISTINCT

QUEUE = 2048  # newest class tokens, of this process, that rank and neighbours are taken from
LOOKED_AT = 16  # images, whether they differ
ALIKE = 0.5  # fraction of different ones, from which on it is said
FEWEST = 64  # tokens, below which they say nothing


def distinct_images(images: Pool) -> float:
    """Which fraction of some images, spread over a pool, differ in a pixel; 1 where too few can be read to say so."""
    count = len(images.names)
    sample = [read_or_reason(images, index)[0] for index in range(0, count, -(-count // LOOKED_AT))]
    contents = [(tuple(image.shape), image.numpy().tobytes()) for image in sample if image is not None]
    return len(set(contents)) / len(contents) if len(contents) >= LOOKED_AT // 2 else 1.0


class Health:
    """Watches what a method has seen; nothing of it flows back into training.

    Args:
        method: `seen` is read from it.
        labels: class name of each image of the pool, or None; with labels, neighbours are asked for the class.
    """

    def __init__(self, accelerator: Accelerator, config: Config, method: Method, labels: Labels | None):
        self.accelerator, self.config, self.method = accelerator, config, method
        self.measured = 0  # step of the newest measurement
        self.views = 0  # of all processes since then
        self.distinct = 1.0  # fraction of the images that differ from each other, as `distinct_images` finds it
        device = accelerator.device
        self.labels, self.classes = None, 0
        if labels is not None:
            self.labels, self.classes = torch.from_numpy(labels.codes).long().to(device), len(labels.classes)
        self.used = torch.zeros(method.outputs(config) or 0, dtype=torch.bool, device=device)
        self.tokens = torch.empty(0, device=device)
        self.indices = torch.empty(0, dtype=torch.long, device=device)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this process, so that a run that goes on measures what an uninterrupted one does.

        `measured` and `views`, which are the same in all processes, are kept apart.
        """
        return {"tokens": self.tokens, "indices": self.indices, "used": self.used}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        device = self.tokens.device
        self.tokens, self.indices, self.used = (state[name].to(device) for name in ("tokens", "indices", "used"))

    def is_due(self, steps: int) -> bool:
        """Whether to measure after this many steps."""
        every = self.config.monitor.health_every
        return every > 0 and (steps // every > self.measured // every or steps == self.config.train.steps)

    def observe(self, indices: Sequence[int]) -> None:
        """Take note of what the method saw of the images at `indices`; the host does not wait for the device."""
        seen = self.method.seen
        if seen is None:
            return
        if seen.targets is not None:
            self.used.index_fill_(0, seen.targets.flatten(0, 1).argmax(dim=1), True)
        self.views += 2 * len(indices) * self.accelerator.num_processes
        numbers = torch.as_tensor(indices).to(self.tokens.device, non_blocking=True)
        self.tokens = torch.cat([self.tokens.view(-1, seen.tokens.shape[-1]), seen.tokens[0].float()])[-QUEUE:]
        self.indices = torch.cat([self.indices, numbers])[-QUEUE:]

    @torch.no_grad()
    def measure(self, steps: int) -> dict[str, float]:
        """Indicators after `steps` steps, by the names of the metrics; every process must call this.

        Means over processes. Rank and neighbours are those of the newest 2,048 images of each process, statistics of
        targets those of the last step.
        """
        seen = self.method.seen
        if seen is None:
            return {}
        observed = Observed(seen, self.tokens, self.indices, self.used, self.views, self.labels, self.classes)
        measured = self._measured(seen, len(self.tokens) >= FEWEST)
        values = {indicator.name: indicator.measure(observed) for indicator in measured}
        self.used.zero_()
        self.views, self.measured = 0, steps
        if not values:
            return {}
        means = self.accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean")
        alike = {DISTINCT: self.distinct} if self.distinct <= ALIKE else {}
        return {**dict(zip(values, means.tolist(), strict=True)), **alike}

    def names(self) -> list[str]:
        """The indicators of this run, by the names of the metrics, once enough was seen for all of them."""
        if self.method.seen is None or not self.config.monitor.health_every:
            return []
        return [indicator.name for indicator in self._measured(self.method.seen, has_tokens=True)]

    def _measured(self, seen: Seen, has_tokens: bool) -> list[Indicator]:
        """Those for which there is what they look at; the same in all processes."""
        available = {"no labels" if self.labels is None else "labels"}
        if seen.targets is not None:
            available.add("targets")
        if seen.pairs is not None:
            available.add("pairs")
            available.update(["predictor"] * seen.pairs.are_predictions)
            available.update(["queue"] * (seen.pairs.queue_age is not None))
        if has_tokens:
            available.add("tokens")
        return [indicator for indicator in INDICATORS if available.issuperset(indicator.needs)]
