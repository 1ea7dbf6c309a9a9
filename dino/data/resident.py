"""A small pool decoded once and kept on the device as uint8."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

    pixels: Tensor  # (B, C, H, W) uint8 on the device; beyond an image's own size its canvas holds its background
    background: Tensor  # (B, C) uint8 on the device, the median of each image's border
    sizes: np.ndarray  # (B, 2) height and width of each image


class ResidentImages:
    """All images of a pool, on a device; raises `UserError` where none can be read, or they do not fit.

    An unreadable image is replaced by the next readable one, as where workers read; `unreadable` lists them as
    (index, reason).
    """

    def __init__(self, images: Pool, device: torch.device, show_progress: bool = True):
        decoded, self.unreadable = _decode_all(images, show_progress)
        pixels = [image for image in decoded if image is not None]
        if not pixels:
            raise UserError(f"no image of {len(decoded)} can be read; the first: {self.unreadable[0][1]}")
        readable = [index for index, image in enumerate(decoded) if image is not None]
        self.row = np.searchsorted(readable, np.arange(len(decoded))) % len(readable)  # of image i among the readable
        self.sizes = np.array([image.shape[1:] for image in pixels])
        self.channels = pixels[0].shape[0]
        self.starts = np.cumsum([0, *(image.numel() for image in pixels[:-1])])
        try:
            self.pixels = torch.cat([image.flatten() for image in pixels]).to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the images do not fit on {device}: set data.cache=none, which decodes them as they are needed"
            ) from error
        self.background = torch.stack([border_colour(image) for image in pixels]).to(device)
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
    """The median of an image's border, per channel: (C, H, W) uint8 to (C,) uint8."""
    pixels = image.numpy()
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    middle = (border.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(border, middle, axis=1)[:, middle].copy())


def estimated_bytes(images: Pool) -> int:
    """What the decoded pool takes, judged by a few of its images."""
    count = len(images.names)
    sample = [read_or_reason(images, index)[0] for index in range(0, count, -(-count // SAMPLE))]
    sizes = [image.numel() for image in sample if image is not None]
    return sum(sizes) * count // max(1, len(sizes))


def _decode_all(images: Pool, show_progress: bool) -> tuple[list[Tensor | None], list[tuple[int, str]]]:
    """Each image, and (index, reason) of those that cannot be read."""
    count = len(images.names)
    # Filters of warnings are the process's, not the thread's: set here, those that `decode` sets cannot get mixed up.
    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as threads:
        warnings.simplefilter("ignore")
        reads = threads.map(partial(read_or_reason, images), range(count))
        bar = tqdm(reads, total=count, desc="decoding", unit="image", leave=False, disable=not show_progress)
        results = list(bar)
    unreadable = [(index, reason) for index, (image, reason) in enumerate(results) if image is None]
    return [image for image, _ in results], unreadable
