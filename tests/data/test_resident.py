"""Images that live on the device are those that `read` gives, whatever their sizes, and however many cannot be read."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from dino.data import ResidentImages, UnreadableImage, estimated_bytes
from dino.data.resident import border_colour
from dino.errors import UserError

CPU = torch.device("cpu")


class Pool:
    """Noise of given sizes; those in `unreadable` cannot be read."""

    kind, labels = "noise", None

    def __init__(self, sizes: list[tuple[int, int]], channels: int = 3, unreadable: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(0)
        self.images = [
            torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator) for size in sizes
        ]
        self.names, self.channels = [str(index) for index in range(len(sizes))], channels
        self.unreadable = unreadable

    def read(self, index: int) -> Tensor:
        if index in self.unreadable:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                raise UnreadableImage(f"{index} is broken")
        return self.images[index]


UNIFORM = [(7, 9)] * 5
RAGGED = [(7, 9), (4, 12), (10, 5), (6, 6), (11, 4)]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("sizes", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_gathered_images_are_the_pools_on_their_background(sizes, channels):
    pool = Pool(sizes, channels)
    resident = ResidentImages(pool, CPU, show_progress=False)
    indices = [3, 0, 2, 3, 4, 1]
    canvas = resident.gather(indices)
    assert canvas.sizes.tolist() == [list(sizes[index]) for index in indices]
    assert canvas.pixels.shape == (6, channels, *np.max([sizes[index] for index in indices], axis=0))
    for pixels, background, index in zip(canvas.pixels, canvas.background, indices, strict=True):
        image = pool.read(index)
        height, width = sizes[index]
        assert torch.equal(pixels[:, :height, :width], image)
        assert torch.equal(background, border_colour(image))
        outside = torch.ones(pixels.shape[1:], dtype=torch.bool)
        outside[:height, :width] = False
        assert (pixels[:, outside] == background[:, None]).all()


def test_gathering_leaves_the_pool_as_it_was():
    resident = ResidentImages(Pool(UNIFORM), CPU, show_progress=False)
    before = resident.pixels.clone()
    resident.gather([0, 1]).pixels.zero_()
    assert torch.equal(resident.pixels, before)


def test_border_colour_by_a_plain_loop():
    image = Pool([(5, 6)]).read(0)
    for channel, found in zip(image, border_colour(image), strict=True):
        border = [*channel[0].tolist(), *channel[-1].tolist(), *channel[:, 0].tolist(), *channel[:, -1].tolist()]
        assert found.item() == sorted(border)[(len(border) - 1) // 2]


@pytest.mark.parametrize("unreadable", [(1,), (0, 1), (4,), (2, 3, 4)])
def test_the_next_readable_image_stands_in(unreadable):
    """As for images that workers read: index + 1, + 2 …, and from the last round to the first."""
    pool = Pool(RAGGED, unreadable=unreadable)
    resident = ResidentImages(pool, CPU, show_progress=False)
    assert resident.unreadable == [(index, f"{index} is broken") for index in unreadable]
    for index in range(5):
        stand_in = next(i % 5 for i in range(index, index + 5) if i % 5 not in unreadable)
        assert torch.equal(resident.gather([index]).pixels[0], pool.images[stand_in])


def test_nothing_readable():
    with pytest.raises(UserError, match=r"no image of 5.*0 is broken"):
        ResidentImages(Pool(UNIFORM, unreadable=(0, 1, 2, 3, 4)), CPU, show_progress=False)


def test_filters_of_warnings_stay():
    before = list(warnings.filters)
    ResidentImages(Pool(RAGGED * 40, unreadable=tuple(range(0, 200, 3))), CPU, show_progress=False)
    assert warnings.filters == before


def test_estimate():
    assert estimated_bytes(Pool(UNIFORM)) == 5 * 3 * 7 * 9
    assert estimated_bytes(Pool([(8, 8)] * 1000, channels=1)) == 64_000
    assert estimated_bytes(Pool(RAGGED)) == sum(3 * height * width for height, width in RAGGED)
    assert estimated_bytes(Pool(UNIFORM, unreadable=(0, 1, 2, 3, 4))) == 0
