"""Which images make up each step: a pure function of (seed, step), so that any process can resume at any step."""

from collections.abc import Iterator

import numpy as np


class EpochStream:
    """All epochs, each a fresh permutation of all images, cut into global batches without regard to epoch ends.

    Every image is visited exactly once an epoch. A process takes a contiguous share of each global batch, so the
    batches of a run do not depend on the number of processes, no process keeps to a shard of the data, and the state
    of the sampler is the step.

    Args:
        images: size of the pool, N.
        batch_size: global batch, B.
        seed: seed of the permutations.
    """

    def __init__(self, images: int, batch_size: int, seed: int):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The global batch of optimizer step `step` (from 0), as (epoch, image index)."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.images)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        return epoch, int(self._order[offset])


class MicroBatches:
    """A process's share of an `EpochStream`, micro-batch by micro-batch: what a DataLoader takes as `batch_sampler`.

    Args:
        stream: the global batches.
        start: first optimizer step.
        stop: step before which to end.
        process: rank of this process.
        processes: their number.
        accumulation: micro-batches per optimizer step.
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
