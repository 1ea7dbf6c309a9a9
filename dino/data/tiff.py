"""TIFF of any numbers and any bands, where tifffile is installed: what Pillow would make 8 bits, or not read."""

import io
import math
from importlib.util import find_spec
from typing import Any

import numpy as np

from dino.data.expansion import require_honest
from dino.data.formats import Limits, UnreadableImage, require_memory, require_pixels
from dino.data.levels import Levels
from dino.data.picture import turned

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
ORIENTATION = 274  # TIFF's tag, as EXIF's
MOST_PAGES = 100  # more than there are channels: reduced copies
# By TIFF's numbers; tifffile expands them as far as they go.
EXPANDED = {8: "deflate", 32946: "deflate", 50013: "deflate", 34925: "lzma", 32773: "packbits"}


def is_read(content: bytes) -> bool:
    """Whether it is TIFF, and tifffile is there."""
    return content.startswith(SIGNATURES) and find_spec("tifffile") is not None


def numbers_of(content: bytes, channels: int, limits: Limits, levels: Levels) -> np.ndarray:
    """(H, W, C) of a file with one picture, whose bands may lie in each pixel, in planes, or in pages.

    Raises:
        UnreadableImage: too large, or several pictures.
        Exception: whatever tifffile raises.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        if len(file.pages) > MOST_PAGES + channels:
            raise UnreadableImage(f"it is animated or has several pages ({len(file.pages):,} of them)")
        if len(file.series) != 1:
            raise UnreadableImage(f"it is animated or has several pages ({len(file.series)} pictures)")
        series, page = file.series[0], file.pages.first
        shape, axes = series.shape, series.axes
        require_pixels(page.imagewidth, page.imagelength, limits)
        is_inverted = page.photometric == 0 and series.dtype.kind == "u"  # WhiteIsZero
        needed = series.nbytes * (2 if is_inverted else 1) + math.prod(page.chunks) * series.dtype.itemsize
        require_memory(needed, page.imagewidth, page.imagelength, f"{series.dtype} as TIFF", limits)
        for part in series.pages:
            if part is not None and part.compression in EXPANDED:
                for start, size in zip(part.dataoffsets, part.databytecounts, strict=False):
                    require_honest([memoryview(content)[start : start + size]], EXPANDED[part.compression], limits)
        planes = axes[-2:] == "YX" and (axes[0] in "SC" or channels not in (1, 3))  # else pages of their own
        if len(shape) == 3 and planes and shape[0] == channels:
            numbers = _decoded(series).transpose(1, 2, 0)
        elif axes[:2] == "YX" and len(shape) <= 3:
            numbers = _decoded(series)
        else:
            raise UnreadableImage(f"it is animated or has several pages ({'×'.join(map(str, shape))}, {axes})")
        numbers = numbers if numbers.ndim == 3 else numbers[:, :, None]
        if is_inverted:
            numbers = np.iinfo(numbers.dtype).max - numbers
        if numbers.shape[2] == channels + 1 and page.extrasamples and page.extrasamples[0] in (1, 2):  # alpha
            numbers = numbers[:, :, :channels]
        return turned(numbers, _orientation(page))


def size_of(content: bytes, limits: Limits) -> tuple[int, int]:
    """(H, W) by the first page's header."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        height, width = int(page.imagelength), int(page.imagewidth)
        return (width, height) if _orientation(page) >= 5 else (height, width)


def _orientation(page: Any) -> int:
    tag = page.tags.get(ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _decoded(series: Any) -> np.ndarray:
    try:
        return series.asarray(maxworkers=1)
    except KeyError as error:  # tifffile says which package decompresses
        raise UnreadableImage(f"{error.args[0]}: pip install imagecodecs, or save it without compression") from error
