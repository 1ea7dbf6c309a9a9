"""What decoding a picture takes, in memory and time, and large ones decoded in less memory than Pillow takes."""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png, decode_webp

from dino.data.formats import BYTES, Limits, UnreadableImage, require_memory
from dino.data.picture import orientation_of, require_one_frame, write_opaque

# Bytes a pixel that Pillow holds of a picture at most, measured: by format, or else by mode.
OF_FORMAT = {"WEBP": 16, "JPEG2000": 19, "AVIF": 9}
OF_MODE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
OF_OTHERS = 4
OF_COEFFICIENT = 2  # all of them are kept until a progressive JPEG's last scan
DIRECT: dict[str, Callable[[Tensor, ImageReadMode], Tensor]] = {"PNG": decode_png, "WEBP": decode_webp}
DIRECT_BYTES = {"PNG": 4, "WEBP": 5}  # a pixel
PNG_DEPTH = 24  # where a PNG tells its bits a channel
# What a PNG begins its orientation with; where there is none, Pillow would decode all of it to find that out.
ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
IN_PYTHON = {"qoi", "ppm", "ppm_plain", "bmp_rle", "dds_rgb"}  # Pillow's decoders of a second for a million pixels
MOST_IN_PYTHON = 5_000_000


def require_pillows_memory(image: Image.Image, content: bytes, channels: int, limits: Limits) -> None:
    """Raise `UnreadableImage` for an opened picture that takes Pillow more memory, or far more time, than allowed."""
    pixels = image.width * image.height
    decoders = {tile[0] for tile in getattr(image, "tile", ())}
    if pixels > MOST_IN_PYTHON and decoders & IN_PYTHON:
        raise UnreadableImage(f"{image.format} of {pixels:,} pixels takes Pillow minutes to decode: save it as PNG")
    _require(pixels * _bytes_per_pixel(image, content, channels), image, limits)


def require_coefficients(image: Image.Image, channels: int, limits: Limits) -> None:
    """Raise `UnreadableImage` for an opened JPEG that takes too much memory before its first pixel is there."""
    if image.info.get("progressive"):
        samples = [across * down for _, across, down, _ in getattr(image, "layer", ())]  # a block of each component
        coefficients = OF_COEFFICIENT * sum(samples) / max(samples)
        _require(math.ceil(image.width * image.height * (coefficients + channels)), image, limits)


def _require(needed: int, image: Image.Image, limits: Limits) -> None:
    require_memory(needed, image.width, image.height, f"{image.mode} as {image.format}", limits)


def _bytes_per_pixel(image: Image.Image, content: bytes, channels: int) -> int:
    held = OF_FORMAT.get(image.format or "") or OF_MODE.get(image.mode, OF_OTHERS)
    return held + channels * (2 if _may_be_turned(image, content) else 1)


def _may_be_turned(image: Image.Image, content: bytes) -> bool:
    if image.format == "PNG":
        return any(mark in content for mark in ORIENTATION)
    return orientation_of(image) != 1


def directly(image: Image.Image, content: bytes, channels: int, limits: Limits) -> np.ndarray | None:
    """A large PNG or WebP as (H, W, 1 or 3) uint8, decoded to where it stays; None for what Pillow may as well decode.

    Pixels are those that Pillow gives. Beside them there is at most the transparency.
    """
    if channels not in (1, 3) or image.format not in DIRECT or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    if image.width * image.height * _bytes_per_pixel(image, content, channels) <= BYTES * limits.pixels:
        return None
    if _may_be_turned(image, content) or (image.format == "PNG" and content[PNG_DEPTH] != 8):
        return None
    _require(image.width * image.height * DIRECT_BYTES[image.format], image, limits)
    require_one_frame(image)
    is_transparent = image.has_transparency_data
    mode = ImageReadMode.RGB_ALPHA if is_transparent else ImageReadMode.RGB
    wide = DIRECT[image.format](torch.frombuffer(bytearray(content), dtype=torch.uint8), mode).permute(1, 2, 0).numpy()
    height, width, _ = wide.shape
    # Rows are written before where they were read from, from the first to the last.
    array = wide.reshape(-1)[: height * width * channels].reshape(height, width, channels)
    if is_transparent or channels == 1:
        write_opaque(wide, array, is_transparent)
    return array
