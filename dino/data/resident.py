"""A small pool decoded once and kept on the device as uint8."""

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino.data.pool import Pool, read_or_reason
from dino.distributed import cores
from dino.errors import UserError

SAMPLE = 16  # images whose sizes stand for all


class Canvas(NamedTuple):
    """Images of one batch on canvases of one size."""

    # (B, C, H, W) uint8, or fp32 where finer levels are kept, on the device; beyond an image's own size its background
    pixels: Tensor
    background: Tensor  # (B, C) of the same type, the median of each image's border
    sizes: np.ndarray  # (B, 2) height and width of each image


class ResidentImages:
    """All images of a pool, on a device; raises `UserError` where none can be read, or they do not fit.

    An unreadable image is replaced by the next readable one, as where workers read; `unreadable` lists them as
    (index, reason).
    """

    def __init__(self, images: Pool, device: torch.device, show_progress: bool = True):
        count, pixels = len(images.names), Growing(images.levels.dtype)
        sizes, background, readable = [], [], []
        self.unreadable: list[tuple[int, str]] = []
        for index, (image, reason) in enumerate(_read_all(images, show_progress)):
            if image is None:
                self.unreadable.append((index, reason))
            else:
                pixels.append(image.numpy().ravel())
                sizes.append(image.shape[1:])
                background.append(border_colour(image))
                readable.append(index)
        if not readable:
            raise UserError(f"no image of {count} can be read; the first: {self.unreadable[0][1]}")
        self.row = np.searchsorted(readable, np.arange(count)) % len(readable)  # of image i among the readable
        self.sizes, self.channels = np.array(sizes), images.channels
        self.starts = np.cumsum([0, *(self.channels * self.sizes[:-1].prod(axis=1))])
        try:
            self.pixels = torch.from_numpy(pixels.whole()).to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the images do not fit on {device}: set data.cache=none, which decodes them as they are needed"
            ) from error
        self.background = torch.stack(background).to(device)
        self.is_uniform = bool((self.sizes == self.sizes[0]).all())

    def gather(self, indices: Sequence[int]) -> Canvas:
        """Images on canvases as large as the largest of them."""
        rows = self.row[np.asarray(indices)]
        sizes, device = self.sizes[rows], self.pixels.device
        on_device = torch.from_numpy(rows)
        if device.type == "cuda":  # pinned, or the host would wait for the step before
            on_device = on_device.pin_memory()
        on_device = on_device.to(device, non_blocking=True)
        background = self.background[on_device]
        height, width = sizes.max(axis=0).tolist()
        if self.is_uniform:
            stack = self.pixels.view(-1, self.channels, height, width)
            return Canvas(stack[on_device], background, sizes)
        pixels = background[:, :, None, None].repeat(1, 1, height, width)
        for canvas, row, (h, w) in zip(pixels, rows, sizes.tolist(), strict=True):
            start = self.starts[row]
            canvas[:, :h, :w] = self.pixels[start : start + self.channels * h * w].view(self.channels, h, w)
        return Canvas(pixels, background, sizes)


def border_colour(image: Tensor) -> Tensor:
    """The median of an image's border, per channel: (C, H, W) to (C,), of any type."""
    pixels = image.numpy()
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    middle = (border.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(border, middle, axis=1)[:, middle].copy())


class Growing:
    """Pixels that become more, one behind the other; never twice in memory, as where pieces are put together."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer, self._used = torch.empty(1 << 20, dtype=dtype).numpy().copy(), 0

    def append(self, piece: np.ndarray) -> None:
        """(N,) of the type."""
        end = self._used + len(piece)
        if end > len(self._buffer):  # the system moves its pages; what is not used yet takes none
            self._buffer.resize(max(end, 2 * len(self._buffer)), refcheck=False)
        self._buffer[self._used : end] = piece
        self._used = end

    def whole(self) -> np.ndarray:
        """All of them."""
        self._buffer.resize(self._used, refcheck=False)
        return self._buffer


class Decoded(NamedTuple):
    """How large a pool is, decoded.

    Attributes:
        bytes: of all images.
        canvas: bytes of a canvas on which any of them fits.
    """

    bytes: int
    canvas: int


def decoded(images: Pool, room: float = math.inf) -> Decoded:
    """By the headers of all images, unless a few of them tell that they take more than twice the room there is."""
    count = len(images.names)
    few = _decoded(images, range(0, count, -(-count // SAMPLE)))
    return few if few.bytes > 2 * room else _decoded(images, range(count))


def _decoded(images: Pool, indices: range) -> Decoded:
    """By some of its images; those that cannot be read are as large as the others."""
    with ThreadPoolExecutor(cores()) as threads:
        shapes = [shape for shape in threads.map(images.size, indices) if shape is not None]
    if not shapes:
        return Decoded(0, 0)
    sizes = np.array(shapes)
    of_all = int(sizes.prod(axis=1).sum()) * len(images.names) // len(shapes)
    return Decoded(images.levels.dtype.itemsize * of_all, images.levels.dtype.itemsize * int(sizes.max(axis=0).prod()))


def _read_all(images: Pool, show_progress: bool) -> Iterator[tuple[Tensor | None, str]]:
    """Each image, or the reason why it cannot be read."""
    count = len(images.names)
    # Filters of warnings are the process's, not the thread's: set here, those that `decode` sets cannot get mixed up.
    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as threads:
        warnings.simplefilter("ignore")
        ahead: deque[Future] = deque()
        bar = tqdm(range(count), desc="decoding", unit="image", leave=False, disable=not show_progress)
        for index in bar:
            ahead.append(threads.submit(read_or_reason, images, index))
            if len(ahead) >= 2 * cores():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
