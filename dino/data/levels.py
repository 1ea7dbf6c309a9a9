"""How many grey levels of a file are kept: pixels are levels from 0 to 255 everywhere, whole ones or with fractions.

What is done to pixels (crops, colours, normalisation) thus knows of one range, whatever the files hold.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from dino.data.formats import UnreadableImage

STRIP = 1 << 18  # numbers that are converted at a time, so that what is made on the way is small
TOP = {"8": 255.0, "16": 65535.0}  # the number that becomes level 255 where no range is given


class Levels(NamedTuple):
    """What becomes of the numbers in a file.

    Attributes:
        bits: `8`: whole levels, uint8; `16`: whole numbers from 0 to 65,535, of which those of 8 bits are multiplied by
            257, and `float`: any numbers as the file has them, both as levels with fractions, fp32.
        range: the numbers that become levels 0 and 255, beyond which is cut off; None: all there are, and of `float`
            the numbers themselves, unchanged.
    """

    bits: str = "8"
    range: tuple[float, float] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of decoded images."""
        return torch.uint8 if self.bits == "8" else torch.float32

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Levels, in the shape of the numbers; raises `UnreadableImage` for numbers that these bits cannot hold.

        NaN and infinite numbers are no data: they become level 0; where there is no other number, there is no image.
        """
        levels = np.empty(numbers.shape, np.uint8 if self.bits == "8" else np.float32)
        rows = max(1, STRIP // max(1, math.prod(numbers.shape[1:])))
        is_any = False
        for top in range(0, len(numbers), rows):
            part = numbers[top : top + rows]
            is_any = is_any or bool(np.isfinite(part).any())
            levels[top : top + rows] = self._of(part)
        if not is_any and self.range is not None and numbers.size:
            raise UnreadableImage("it holds no number but NaN and infinite ones")
        return levels

    def _of(self, numbers: np.ndarray) -> np.ndarray:
        if self.bits != "float":
            numbers = as_16_bits(numbers)
            if self.bits == "8":
                return to_8_bits(numbers)
        values = numbers.astype(np.float32)
        if self.range is None and self.bits == "float":
            return values
        low, high = self.range or (0.0, TOP["16"])
        levels = (values - np.float32(low)) * np.float32(255.0 / (high - low))
        return np.nan_to_num(levels, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 255)


AS_BYTES = Levels()


def as_16_bits(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 65,535, cut off beyond; those of 8 bits times 257."""
    if numbers.dtype == np.bool_:
        return numbers.astype(np.uint16) * 65535
    if numbers.dtype == np.uint8:
        return numbers.astype(np.uint16) * 257
    if numbers.dtype.kind == "f":
        raise UnreadableImage(f"its pixels are {numbers.dtype}, fractions of unknown range: set data.bits=float")
    if numbers.dtype != np.uint16 and (numbers.min(initial=0) < 0 or numbers.max(initial=0) > 65535):
        raise UnreadableImage(f"its pixels are {numbers.dtype}, some below 0 or above 65,535: set data.bits=float")
    return numbers.astype(np.uint16, copy=False)


def to_8_bits(array: np.ndarray) -> np.ndarray:
    """0 … 65,535 to 0 … 255, rounded; what is beyond is cut off."""
    # Whole numbers throughout: (v · 255 + 32,767) / 65,535 is v / 257 rounded, and fits 32 bits.
    return ((array.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
