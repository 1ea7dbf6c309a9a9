"""One image file to pixels, brought to the levels and the channels asked for."""

import warnings
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from dino.data import dicom, npy, tiff
from dino.data.formats import Limits, UnreadableImage, open_picture, reason_of, without_metadata
from dino.data.large import directly, require_coefficients, require_pillows_memory
from dino.data.levels import AS_BYTES, Levels
from dino.data.numbers import deep_numbers, is_deep, levels_of
from dino.data.picture import orientation_of, picture_array

SMALLEST_SIDE = 4
LIMITS = Limits()


class Reader(Protocol):
    """A module that gives the numbers of a file as they stand there."""

    def numbers_of(self, content: bytes, channels: int, limits: Limits, levels: Levels) -> np.ndarray:
        """(H, W, C) upright, of the file's own type; raises `UnreadableImage`, or whatever libraries raise."""
        ...

    def size_of(self, content: bytes, limits: Limits) -> tuple[int, int]:
        """(H, W) by the header."""
        ...


def decode(
    content: bytes,
    channels: int,
    name: str = "",
    enough: float | None = None,
    limits: Limits = LIMITS,
    levels: Levels = AS_BYTES,
) -> Tensor:
    """Decode an image file.

    Upright by its EXIF orientation; transparency is laid on white, or on what leaves more contrast; CMYK, palettes and
    greyscale are converted. An `.npy` file holds an (H, W, C) array of any number of channels. Broken metadata make no
    difference.

    Args:
        channels: 1 (luminance), 3 (RGB), or the number an `.npy` or TIFF file has.
        name: of the file; only its ending matters.
        enough: pixels; a JPEG that has more is reduced to 1/2, 1/4 or 1/8 of its sides, in a fraction of the time, as
            long as it keeps as many.
        limits: on the size that its header tells.
        levels: how many are kept.

    Returns:
        (channels, H, W) of `levels.dtype`, 0 … 255, in memory pixel by pixel; raises `UnreadableImage` with the reason.
    """
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like: the pixels are what counts
            if reader := _reader(content, name, channels, levels):
                numbers = reader.numbers_of(content, channels, limits, levels)
                return to_tensor(levels_of(numbers, channels, limits, levels), channels)
            try:
                return _picture(content, channels, enough, limits, levels)
            except UnreadableImage:
                raise
            except Exception:
                bare = without_metadata(content)
                if bare is None:
                    raise
                return _picture(bare, channels, enough, limits, levels)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever comes up: OSError, SyntaxError, struct.error …
        raise UnreadableImage(reason_of(error)) from error


def size_of(
    content: bytes, channels: int, name: str = "", limits: Limits = LIMITS, levels: Levels = AS_BYTES
) -> tuple[int, int, int] | None:
    """The shape (C, H, W) that `decode` would give, by the file's header; None where that is broken or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if reader := _reader(content, name, channels, levels):
                return channels, *reader.size_of(content, limits)
            with open_picture(content, limits) as image:
                is_turned = image.format in ("JPEG", "MPO") and orientation_of(image) >= 5  # others would be decoded
                return channels, *((image.width, image.height) if is_turned else (image.height, image.width))
    except Exception:  # as above
        return None


def _reader(content: bytes, name: str, channels: int, levels: Levels) -> Reader | None:
    """None for what Pillow opens."""
    if name.lower().endswith(".npy"):
        return npy
    if dicom.is_dicom(content):
        return dicom
    if (levels.bits != "8" or channels not in (1, 3)) and tiff.is_read(content):
        return tiff
    return None


def _picture(content: bytes, channels: int, enough: float | None, limits: Limits, levels: Levels) -> Tensor:
    """What Pillow opens."""
    if levels.bits != "8":
        numbers = _numbers_of_picture(content, channels, enough, limits)
        return to_tensor(levels_of(numbers, channels, limits, levels), channels)
    with open_picture(content, limits) as image:
        return _picture_of_bytes(image, content, channels, enough, limits)


def _numbers_of_picture(content: bytes, channels: int, enough: float | None, limits: Limits) -> np.ndarray:
    """(H, W, C) of what Pillow opens, of 8 bits unless it has more."""
    with open_picture(content, limits) as image:
        if is_deep(image, content):
            return deep_numbers(image, content, channels, limits)
        return _picture_of_bytes(image, content, channels, enough, limits).permute(1, 2, 0).numpy()


def _picture_of_bytes(
    image: Image.Image, content: bytes, channels: int, enough: float | None, limits: Limits
) -> Tensor:
    if image.format in ("JPEG", "MPO"):  # MPO: a camera's JPEG with a preview after it
        require_coefficients(image, channels, limits)
        reduced = enough is not None and reduce_jpeg(image, enough)
        if not reduced and (pixels := plain_jpeg(image, content, channels)) is not None:
            return pixels
    array = directly(image, content, channels, limits)
    if array is None:
        require_pillows_memory(image, content, channels, limits)
        array = picture_array(image, channels)
    return to_tensor(array, channels)


def reduce_jpeg(image: Image.Image, enough: float) -> bool:
    """Have an opened JPEG decoded at a fraction of its size (libjpeg leaves out frequencies), if that is `enough`."""
    width, height = image.size
    factor = max((factor for factor in (1, 2, 4, 8) if width * height >= enough * factor**2), default=1)
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
    return factor > 1


def plain_jpeg(image: Image.Image, content: bytes, channels: int) -> Tensor | None:
    """An opened JPEG by torchvision, which is twice as fast as Pillow; None where it takes more than that."""
    if orientation_of(image) != 1 or image.mode != {1: "L", 3: "RGB"}.get(channels):
        return None
    require_shape((channels, image.height, image.width), channels)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:  # a broken file, of which Pillow tells the reason, or torchvision was built without libjpeg
        return None


def to_tensor(array: np.ndarray, channels: int) -> Tensor:
    """(H, W, C) to (C, H, W), a view; raises `UnreadableImage` for too few pixels or channels."""
    require_shape(array.transpose(2, 0, 1).shape, channels)
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).permute(2, 0, 1)


def require_shape(shape: tuple[int, ...], channels: int) -> None:
    """Raise `UnreadableImage` for a (C, H, W) of too few pixels or of other channels."""
    depth, height, width = shape
    if depth != channels:
        raise UnreadableImage(f"it has {depth} channels, data.channels is {channels}")
    if min(height, width) < SMALLEST_SIDE:
        raise UnreadableImage(f"{width}×{height} pixels are too few: at least {SMALLEST_SIDE} a side are needed")
