"""A pool of images as batches of views: what the DataLoader's worker processes run."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino.data import Images, UnreadableImage
from dino.views.draws import sample_key
from dino.views.pipeline import cut_views, make_views
from dino.views.spec import MultiCrop


class Sample(NamedTuple):
    """The views of one image, its key, and the unreadable images that were passed over to find it: (index, reason)."""

    views: list[Tensor]
    key: int
    skipped: list[tuple[int, str]]


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        crops: one tensor per crop size, (views·B, C, size, size) uint8, view by view; global crops first.
        keys: (B,) uint64, from which the views were drawn.
        skipped: unreadable images met on the way, (index, reason).
    """

    crops: list[Tensor]
    keys: np.ndarray
    skipped: list[tuple[int, str]]
    unreadable: str = ""

    def pin_memory(self) -> "Batch":
        """For the DataLoader's pinning thread."""
        return self._replace(crops=[crop.pin_memory() for crop in self.crops])


class ViewsDataset(Dataset):
    """Views of the image at (epoch, index); their randomness is a function of (seed, epoch, index) alone.

    An unreadable image is replaced by the next readable one in the pool, so that batches keep their size and a run that
    is repeated or resumed sees the same images.

    Args:
        finished: whole views; otherwise only crops, which `DeviceViews.retouch` finishes on the device.
    """

    def __init__(self, images: Images, spec: MultiCrop, seed: int, finished: bool = False):
        self.images, self.spec, self.seed = images, spec, seed
        self.make = make_views if finished else cut_views

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        """Raises `UnreadableImage` if no image of the pool can be read."""
        epoch, index = position
        key = sample_key(self.seed, epoch, index)
        skipped: list[tuple[int, str]] = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                image = self.images.read(candidate)
            except UnreadableImage as reason:
                skipped.append((candidate, str(reason)))
                continue
            return Sample(self.make(image, self.spec, key), key, skipped)
        raise UnreadableImage(f"no image of {len(self)} can be read; the first: {skipped[0][1]}")


def collate(samples: list[Sample]) -> Batch:
    """Samples of one micro-batch to a `Batch`."""
    shapes = [view.shape for view in samples[0].views]
    edges = [0, *(v for v in range(1, len(shapes)) if shapes[v] != shapes[v - 1]), len(shapes)]
    crops = [
        torch.stack([sample.views[view] for view in range(first, last) for sample in samples])
        for first, last in pairwise(edges)
    ]
    keys = np.array([sample.key for sample in samples], dtype=np.uint64)
    return Batch(crops, keys, [entry for sample in samples for entry in sample.skipped])
