"""A pool of images as batches of views: what the DataLoader's worker processes run."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dino.data import Images, UnreadableImage
from dino.views.pipeline import MultiCropViews
from dino.views.spec import MultiCrop


class Sample(NamedTuple):
    """The views of one image, and the unreadable images that were passed over to find it: (index, reason)."""

    views: list[Tensor]
    skipped: list[tuple[int, str]]


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        crops: one tensor per crop size, (views·B, C, size, size) uint8, view by view; global crops first.
        skipped: unreadable images met on the way, (index, reason).
    """

    crops: list[Tensor]
    skipped: list[tuple[int, str]]

    def pin_memory(self) -> "Batch":
        """For the DataLoader's pinning thread."""
        return Batch([crop.pin_memory() for crop in self.crops], self.skipped)


class ViewsDataset(Dataset):
    """Views of the image at (epoch, index); their randomness is a function of (seed, epoch, index) alone.

    An unreadable image is replaced by the next readable one in the pool, so that batches keep their size and a run that
    is repeated or resumed sees the same images.
    """

    def __init__(self, images: Images, spec: MultiCrop, seed: int):
        self.images, self.seed = images, seed
        self.views = MultiCropViews(spec)

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        """Raises `UnreadableImage` if no image of the pool can be read."""
        epoch, index = position
        skipped: list[tuple[int, str]] = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                image = self.images.read(candidate)
            except UnreadableImage as reason:
                skipped.append((candidate, str(reason)))
                continue
            return Sample(self.views(image, sample_seed(self.seed, epoch, index)), skipped)
        raise UnreadableImage(f"no image of {len(self)} can be read; the first: {skipped[0][1]}")


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """63 well-mixed bits of (seed, epoch, index)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collate(samples: list[Sample]) -> Batch:
    """Samples of one micro-batch to a `Batch`."""
    crops, first = [], 0
    shapes = [view.shape for view in samples[0].views]
    while first < len(shapes):
        same = next((i for i in range(first, len(shapes)) if shapes[i] != shapes[first]), len(shapes))
        crops.append(torch.stack([sample.views[view] for view in range(first, same) for sample in samples]))
        first = same
    return Batch(crops, [entry for sample in samples for entry in sample.skipped])
