"""What is measured of a pool once, on a sample: which numbers it holds, and means and deviations of its levels."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dino.data.levels import Levels
from dino.data.pool import Pool, read_or_reason
from dino.errors import UserError

SAMPLE = 512  # images, spread over the pool
ENDS = (0.1, 99.9)  # per cent of an image's numbers, beyond which they are no matter: hot pixels, a burnt-in mark


def measured_range(images: Pool, show_progress: bool = True) -> tuple[float, float]:
    """The least and the greatest number of a pool of `data.bits=float`, but for a thousandth of each image's at an end.

    Raises:
        UserError: no image can be read, or all hold one and the same number.
    """
    images.levels = Levels("float")
    low, high = np.inf, -np.inf
    for image in _sample(images, "measuring the range", show_progress):
        numbers = image.numpy()
        numbers = numbers[np.isfinite(numbers)]
        if len(numbers):
            ends = np.percentile(numbers, ENDS)
            low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    if not low < high:
        what = "hold no number but NaN and infinite ones" if low > high else f"hold nothing but {low:g}"
        raise UserError(f"the images looked at {what}: give data.range=[least, greatest], if others do not")
    return low, high


def mean_and_std(images: Pool, show_progress: bool = True) -> tuple[list[float], list[float]]:
    """Of each channel, in fractions of the levels' range, every image weighing the same."""
    means, squares = [], []
    for image in _sample(images, "measuring means and deviations", show_progress):
        pixels = image.numpy().reshape(len(image), -1).astype(np.float64) / 255
        means.append(pixels.mean(axis=1))
        squares.append((pixels**2).mean(axis=1))
    mean = np.mean(means, axis=0)
    std = np.sqrt((np.mean(squares, axis=0) - mean**2).clip(min=(1 / 255) ** 2))  # of a channel that is always the same
    return mean.round(4).tolist(), std.round(4).tolist()


def _sample(images: Pool, title: str, show_progress: bool) -> Iterator[Tensor]:
    """Some of the images that can be read, spread over all; the same whoever asks; raises `UserError` for none."""
    count, reason, is_any = len(images.names), "", False
    rows = np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).astype(int)).tolist()
    for index in tqdm(rows, desc=title, unit="image", leave=False, delay=1, disable=not show_progress):
        image, reason_of_it = read_or_reason(images, index)
        if image is not None:
            is_any = True
            yield image
        reason = reason or reason_of_it
    if not is_any:
        raise UserError(f"no image of {len(rows)} looked at can be read; the first: {reason}")
