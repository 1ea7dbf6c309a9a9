"""One image file to pixels, brought to the levels and the channels asked for."""

import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from dino.data.formats import Limits, UnreadableImage, open_picture, reason_of, without_metadata
from dino.data.large import directly, require_coefficients, require_memory
from dino.data.levels import AS_BYTES, Levels
from dino.data.numbers import is_only_numbers, numbers_of, shape_of
from dino.data.picture import orientation_of, picture_array

SMALLEST_SIDE = 4
LIMITS = Limits()


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
            if levels.bits != "8" or name.lower().endswith(".npy") or is_only_numbers(content, channels):
                numbers = numbers_of(content, name, channels, limits, windowed=levels.bits != "float")
                require_shape(numbers.transpose(2, 0, 1).shape, channels)
                return to_tensor(levels.of(numbers), channels)
            try:
                return _picture(content, channels, enough, limits)
            except UnreadableImage:
                raise
            except Exception:
                bare = without_metadata(content)
                if bare is None:
                    raise
                return _picture(bare, channels, enough, limits)
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
            is_numbers = levels.bits != "8" or name.lower().endswith(".npy") or is_only_numbers(content, channels)
            if is_numbers and (shape := shape_of(content, name, channels, limits)) is not None:
                return shape
            with open_picture(content, limits) as image:
                is_turned = image.format in ("JPEG", "MPO") and orientation_of(image) >= 5  # others would be decoded
                return channels, *((image.width, image.height) if is_turned else (image.height, image.width))
    except Exception:  # as above
        return None


def _picture(content: bytes, channels: int, enough: float | None, limits: Limits) -> Tensor:
    with open_picture(content, limits) as image:
        if image.format in ("JPEG", "MPO"):  # MPO: a camera's JPEG with a preview after it
            require_coefficients(image, channels, limits)
            reduced = enough is not None and reduce_jpeg(image, enough)
            if not reduced and (pixels := plain_jpeg(image, content, channels)) is not None:
                return pixels
        array = directly(image, content, channels, limits)
        if array is None:
            require_memory(image, content, channels, limits)
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
