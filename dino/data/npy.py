"""`.npy` files: arrays of any numbers, of any number of channels."""

import io
import math
from typing import NamedTuple

import numpy as np

from dino.data.formats import Limits, UnreadableImage, require_pixels
from dino.data.levels import Levels


class Header(NamedTuple):
    """Of an `.npy` file.

    Attributes:
        shape: (H, W, C).
        by_columns: Fortran's order.
        start: where its numbers begin.
    """

    shape: tuple[int, int, int]
    by_columns: bool
    dtype: np.dtype
    start: int


def numbers_of(content: bytes, channels: int, limits: Limits, levels: Levels) -> np.ndarray:
    """(H, W, C) as it stands in the file, of which nothing is copied; raises as `decode` does."""
    header = _header(content, limits)
    count = math.prod(header.shape)
    if header.start + count * header.dtype.itemsize > len(content):
        raise UnreadableImage(f"it is cut off: its header tells of {count:,} numbers")
    numbers = np.frombuffer(content, header.dtype, count, header.start)
    return numbers.reshape(header.shape, order="F" if header.by_columns else "C")


def size_of(content: bytes, limits: Limits) -> tuple[int, int]:
    """(H, W) by the header."""
    return _header(content, limits).shape[:2]


def _header(content: bytes, limits: Limits) -> Header:
    """Raises `UnreadableImage` for what is no image."""
    file = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    reader = readers.get(np.lib.format.read_magic(file))
    if reader is None:
        raise UnreadableImage("it is an .npy file of a version that is not read")
    shape, by_columns, dtype = reader(file)
    if len(shape) not in (2, 3) or min(shape) < 0 or dtype.kind not in "buif":
        raise UnreadableImage(f"an .npy image is (H, W, C) of numbers, this is {shape} of {dtype}")
    require_pixels(shape[1], shape[0], limits)
    height, width, depth = (*shape, 1)[:3]
    return Header((height, width, depth), by_columns, dtype, file.tell())
