"""Images, keys and specifications that the tests of views share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dino.data import Canvas, UnreadableImage
from dino.data.resident import border_colour
from dino.views import MultiCrop, View, device, multi_crop, pipeline
from dino.views.draws import Appearance, Geometry, sample_key

BACKENDS = ("workers", "device")


def preset(name: str, **options) -> MultiCrop:
    """A preset at small sizes with the published scales of DINO."""
    settings = {
        "global_size": 24,
        "global_scale": (0.4, 1.0),
        "local_size": 12,
        "local_scale": (0.05, 0.4),
        "local_crops": 3,
    } | options
    return multi_crop(name, **settings)


def plain(size: int, **options) -> View:
    """All of a square image with nothing done to it but `options`."""
    return View(size, (1.0, 1.0), **options)


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    """The keys of the first images of an epoch."""
    return np.array([sample_key(seed, 0, index) for index in range(count)], dtype=np.uint64)


def noise(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    """Independent pixels, uint8: what rounding and interpolation change most."""
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def canvas_of(images: Sequence[Tensor]) -> Canvas:
    """Images of any sizes in the top left corner of canvases of one size, with their border's median around them."""
    sizes = np.array([image.shape[1:] for image in images])
    background = torch.stack([border_colour(image) for image in images])
    pixels = background[:, :, None, None].repeat(1, 1, *sizes.max(axis=0).tolist())
    for target, image, (height, width) in zip(pixels, images, sizes, strict=True):
        target[:, :height, :width] = image
    return Canvas(pixels, background, sizes)


def still(sizes: Sequence[tuple[int, int]], **changes: Sequence) -> Geometry:
    """Whole images, not moved, but for `changes` of attributes."""
    zeros = np.zeros(len(sizes))
    box = np.array([(0, 0, height, width) for height, width in sizes])
    nothing = Geometry(box, zeros.astype(bool), zeros, zeros, np.zeros((len(sizes), 2)), zeros + 1)
    return nothing._replace(**{name: np.array(value) for name, value in changes.items()})


def untouched(count: int, **changes: Sequence) -> Appearance:
    """Nothing done to the pixels of `count` crops, but for `changes` of attributes."""
    zeros, no = np.zeros(count), np.zeros(count, dtype=bool)
    order = np.tile(np.arange(4), (count, 1))
    nothing = Appearance(zeros, no, zeros + 1, zeros + 1, zeros + 1, zeros, order, no, zeros, no)
    return nothing._replace(**{name: np.array(value) for name, value in changes.items()})


def retouched(backend: str, crops: Tensor, view: View, appearance: Appearance) -> Tensor:
    """Crops (n, C, size, size) uint8 of one kind of view, with what is drawn done to them by a backend."""
    if backend == "device":
        return device.retouch(crops, [view], appearance)
    rows = [Appearance(*(values[place : place + 1] for values in appearance)) for place in range(len(crops))]
    return torch.stack([pipeline.retouch(crop, view, row) for crop, row in zip(crops, rows, strict=True)])


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Pool:
    """Images of noise in memory; those in `unreadable` cannot be read."""

    def __init__(self, images: int = 8, shape: tuple[int, ...] = (3, 20, 24), unreadable: tuple[int, ...] = ()):
        self.pixels = noise(images, *shape)
        self.names = [str(index) for index in range(images)]
        self.unreadable = unreadable

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise UnreadableImage(f"{index} is broken")
        return self.pixels[index]
