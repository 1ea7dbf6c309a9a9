"""Which images make up each step: a pure function of (seed, step), so that any process can resume at any step."""

from collections.abc import Iterator

import numpy as np

REPEAT = 1 << 32  # what the epoch of an image's further samples within one epoch is raised by, for views of their own
RENEWED = 1 << 10  # and samples by new weights within an epoch, as if so many samples had gone before
REMEMBERED = 2  # epochs: around an epoch's end, what is read ahead and what is trained on are in different ones


class EpochStream:
    """All epochs, each of as many samples in a fresh order, divided into global batches without regard to epoch ends.

    Without weights every image comes exactly once an epoch; with them as often as its weight says, rounded up or down
    by systematic sampling. A process takes a contiguous part of each global batch, so the batches of a run do not
    depend on the number of processes, no process keeps to a shard of the data, and the state of the sampler is the step
    (and the weights).

    Args:
        images: size of the pool, N.
        batch_size: of the global batch.
        weights: (N,) in proportion to which images are sampled; None: equal.
        samples_per_epoch: None: N, as it must be without weights.
        shards: (N,) which images lie together: read shard by shard, in a fresh order of shards, and images of
            `window` samples among themselves; None: all images among themselves.
        window: samples.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        weights: np.ndarray | None = None,
        samples_per_epoch: int | None = None,
        shards: np.ndarray | None = None,
        window: int = 1,
    ):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.shards, self.window = shards, window
        self.samples_per_epoch = samples_per_epoch or images
        self.reweigh(weights)

    def reweigh(self, weights: np.ndarray | None, renewals: int = 0) -> None:
        """Sample by other weights from now on; `renewals` counts how often, so that no view of an epoch comes twice."""
        self.weights, self.renewals = weights, renewals
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The global batch of optimizer step `step` (from 0), as (epoch, image index); see `REPEAT`."""
        first = step * self.batch_size
        return [self._sample(position) for position in range(first, first + self.batch_size)]

    def _sample(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.samples_per_epoch)
        if epoch not in self._epochs:
            if len(self._epochs) == REMEMBERED:
                del self._epochs[next(iter(self._epochs))]  # the one that has been there longest
            self._epochs[epoch] = self._samples_of_epoch(epoch)
        image, repeat = self._epochs[epoch][offset].tolist()
        return epoch + repeat * REPEAT, image

    def _samples_of_epoch(self, epoch: int) -> np.ndarray:
        """(samples, 2): image, and which of its samples within the epoch this is, from 0."""
        generator = np.random.default_rng((self.seed, epoch))
        order = self._order(generator)
        if self.weights is None:
            return np.stack([order, np.zeros_like(order)], axis=1).astype(np.int32)
        samples = self.samples_per_epoch
        heights = np.cumsum(self.weights[order], dtype=np.float64)
        ticks = (np.arange(samples) + generator.random()) * (heights[-1] / samples)
        images = order[np.searchsorted(heights, ticks, side="right").clip(max=self.images - 1)]
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        repeats = np.arange(samples) - np.repeat(starts, np.diff(starts, append=samples))
        repeats += self.renewals * RENEWED
        mixed = generator.permutation(samples) if self.shards is None else self._mixed(samples, generator)
        return np.stack([images, repeats], axis=1).astype(np.int32)[mixed]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """(N,) all images: in any order, or shard by shard and mixed within windows."""
        if self.shards is None:
            return generator.permutation(self.images)
        rank = generator.permutation(int(self.shards.max()) + 1)
        by_shard = np.argsort(rank[self.shards], kind="stable")
        # Under weights the samples are mixed, once it is known how many there are of each image.
        return by_shard if self.weights is not None else by_shard[self._mixed(self.images, generator)]

    def _mixed(self, samples: int, generator: np.random.Generator) -> np.ndarray:
        """(samples,) an order in which none is further from its place than a window."""
        order = np.arange(samples)
        for start in range(-int(generator.integers(self.window)), samples, self.window):
            generator.shuffle(order[max(0, start) : start + self.window])
        return order


class MicroBatches:
    """A process's part of an `EpochStream`, micro-batch by micro-batch: what a DataLoader takes as `batch_sampler`.

    It goes from optimizer step `start` to before `stop`, each of `accumulation` micro-batches in each process.
    """

    def __init__(self, stream: EpochStream, start: int, stop: int, process: int, processes: int, accumulation: int):
        self.stream, self.start, self.stop = stream, start, stop
        self.process, self.processes, self.accumulation = process, processes, accumulation
        self.size = stream.batch_size // (processes * accumulation)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            yield from self.of_step(step)

    def of_step(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """This process's micro-batches of one optimizer step."""
        batch = self.stream.batch(step)
        for micro in range(self.accumulation):
            first = (micro * self.processes + self.process) * self.size
            yield batch[first : first + self.size]


def effective_number(sizes: np.ndarray) -> float:
    """exp of the entropy: how many equal clusters would be as diverse."""
    fractions = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(fractions * np.log(fractions)).sum()))
