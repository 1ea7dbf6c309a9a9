"""What the DataLoader's worker processes do: decode an image and crop its views; the device does the rest."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino.data import Canvas, Pool, read_or_reason
from dino.data.resident import border_colour
from dino.views.device import DeviceViews
from dino.views.draws import sample_key
from dino.views.view import MultiCrop


class Sample(NamedTuple):
    """The crops of one image by size, each (V, C, size, size) uint8, and its key; see `Batch` for the rest."""

    crops: list[Tensor]
    key: int
    skipped: list[tuple[int, str]]
    unreadable: str = ""


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        crops: one tensor per crop size, (V·B, C, size, size) uint8, view by view; global crops first.
        keys: (B,) uint64, from which the views are drawn.
        skipped: unreadable images that were passed over, (index, reason).
        unreadable: why there are no crops: no image of the pool can be read. Not an error here, whose text a worker
            process would wrap up in its own.
    """

    crops: list[Tensor]
    keys: np.ndarray
    skipped: list[tuple[int, str]]
    unreadable: str = ""

    def pin_memory(self) -> "Batch":
        """For the DataLoader's pinning thread."""
        return self._replace(crops=[crop.pin_memory() for crop in self.crops])


class ViewsDataset(Dataset):
    """Crops of the image at (epoch, index); their randomness is a function of (seed, epoch, index) alone.

    An unreadable image is replaced by the next readable one in the pool, so that batches keep their size and a run that
    is repeated or resumed sees the same images.
    """

    def __init__(self, images: Pool, spec: MultiCrop, seed: int):
        self.images, self.enough, self.seed = images, spec.enough, seed
        self.views = DeviceViews(spec, singly=True)

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        epoch, index = position
        key = sample_key(self.seed, epoch, index)
        skipped: list[tuple[int, str]] = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            image, reason = read_or_reason(self.images, candidate, self.enough)
            if image is not None:
                return Sample(self.views.crop(canvas_of(image), np.array([key], dtype=np.uint64)), key, skipped)
            skipped.append((candidate, reason))
        return Sample([], key, skipped, f"no image of {len(self)} can be read; the first: {skipped[0][1]}")


def canvas_of(image: Tensor) -> Canvas:
    """One image (C, H, W) uint8 as a batch."""
    return Canvas(image[None], border_colour(image)[None], np.array([image.shape[1:]]))


def collate(samples: list[Sample]) -> Batch:
    """Samples of one micro-batch to a `Batch`."""
    crops = []
    for of_one_size in zip(*(sample.crops for sample in samples), strict=True):
        crops.append(torch.stack(of_one_size, dim=1).flatten(0, 1))  # (V, B, …), view by view
    keys = np.array([sample.key for sample in samples], dtype=np.uint64)
    skipped = [entry for sample in samples for entry in sample.skipped]
    return Batch(crops, keys, skipped, samples[0].unreadable)
