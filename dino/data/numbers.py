"""Images as the numbers that their files hold, of any type and any number of channels: what Pillow would make 8 bits.

`.npy` files; PNG of 16 bits; TIFF of any bands, by tifffile where that is installed; DICOM, see `dicom.py`.
"""

import io
import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from dino.data import dicom
from dino.data.formats import PNG_SIGNATURE, Limits, UnreadableImage, open_picture, require_pixels
from dino.data.picture import background_of, orientation_of, picture_array, require_one_frame, upright

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
ORIENTATION = 274  # TIFF's tag, as EXIF's
WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in the luminance (ITU-R 601-2)


def numbers_of(content: bytes, name: str, channels: int, limits: Limits, windowed: bool) -> np.ndarray:
    """(H, W, C) of the file's own type, upright; alpha is laid on a background.

    Args:
        channels: C; grey is repeated for 3, and of colour the luminance taken for 1.
        windowed: whether of DICOM the window is taken, as on a screen, or the values that it tells of.

    Raises:
        UnreadableImage: too large, animated, or of other channels.
        Exception: whatever libraries raise.
    """
    if name.lower().endswith(".npy"):
        numbers = _npy(content, limits)
    elif dicom.is_dicom(content):
        numbers = dicom.numbers_of(content, limits, windowed)
    elif content.startswith(TIFF_SIGNATURES) and find_spec("tifffile") is not None:
        numbers = _tiff(content, channels, limits)
    else:
        with open_picture(content, limits) as image:
            numbers = _picture(image, content, channels)
    if numbers.dtype.kind not in "buif":
        raise UnreadableImage(f"its pixels are {numbers.dtype}, which are no numbers")
    return in_channels(numbers if numbers.ndim == 3 else numbers[:, :, None], channels)


def shape_of(content: bytes, name: str, channels: int, limits: Limits) -> tuple[int, int, int] | None:
    """(C, H, W) by the header of a file whose numbers are asked for; None where that tells nothing."""
    if name.lower().endswith(".npy"):
        shape = npy_header(content, limits).shape
        return channels, shape[0], shape[1]
    if dicom.is_dicom(content):
        return channels, *dicom.size_of(content)
    if content.startswith(TIFF_SIGNATURES) and find_spec("tifffile") is not None:
        import tifffile

        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            size = int(page.imagelength), int(page.imagewidth)
            return channels, *(reversed(size) if _orientation(page) >= 5 else size)
    return None


def is_only_numbers(content: bytes, channels: int) -> bool:
    """Whether Pillow cannot give an image of so many channels from such a file, at 8 bits either."""
    return dicom.is_dicom(content) or (channels not in (1, 3) and content.startswith(TIFF_SIGNATURES))


def in_channels(numbers: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) as grey or colour where that is asked for; other numbers of channels stay what they are."""
    depth = numbers.shape[2]
    if depth == 1 and channels == 3:
        return numbers.repeat(3, axis=2)
    if depth == 3 and channels == 1:
        grey = numbers.astype(np.float32) @ WEIGHTS
        return (grey if numbers.dtype.kind == "f" else grey.round().astype(numbers.dtype))[:, :, None]
    return numbers


def _picture(image: Image.Image, content: bytes, channels: int) -> np.ndarray:
    """What Pillow opens: of 16 bits or fractions as the file has it, else 8 bits as everywhere."""
    require_one_frame(image)
    if content.startswith(PNG_SIGNATURE) and content[24:25] == b"\x10":  # bits of a sample, in IHDR
        return _png_16(image, content, channels)
    if image.mode == "F" or image.mode.startswith("I"):
        return upright(np.asarray(image)[:, :, None], orientation_of(image))
    return picture_array(image, channels if channels in (1, 3) else len(image.getbands()))


def _png_16(image: Image.Image, content: bytes, channels: int) -> np.ndarray:
    """(H, W, 1 or 3) uint16, which Pillow gives for grey without alpha alone."""
    pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    numbers = pixels.numpy().transpose(1, 2, 0)
    if numbers.shape[2] in (2, 4):
        background = background_of(image, "L" if channels == 1 else "RGB") * 257.0
        alpha = numbers[:, :, -1:].astype(np.float32) / 65535
        numbers = (alpha * numbers[:, :, :-1] + (1 - alpha) * background).round().astype(np.uint16)
    return upright(numbers, orientation_of(image))


def _tiff(content: bytes, channels: int, limits: Limits) -> np.ndarray:
    """(H, W, C) of a file with one picture, whose bands may lie in each pixel, in planes, or in pages."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series
        if len(series) != 1:
            raise UnreadableImage(f"it is animated or has several pages ({len(series)} pictures)")
        shape, axes, page = series[0].shape, series[0].axes, file.pages.first
        require_pixels(math.prod(shape), 1, limits)
        planes = axes[-2:] == "YX" and (axes[0] in "SC" or channels not in (1, 3))  # else pages of their own
        if len(shape) == 3 and planes and shape[0] == channels:
            numbers = _decoded(series[0]).transpose(1, 2, 0)
        elif axes[:2] == "YX" and len(shape) <= 3:
            numbers = _decoded(series[0])
        else:
            raise UnreadableImage(f"it is animated or has several pages ({'×'.join(map(str, shape))}, {axes})")
        numbers = numbers if numbers.ndim == 3 else numbers[:, :, None]
        if page.photometric == 0 and numbers.dtype.kind == "u":  # WhiteIsZero
            numbers = np.iinfo(numbers.dtype).max - numbers
        if numbers.shape[2] == channels + 1 and page.extrasamples and page.extrasamples[0] in (1, 2):  # alpha
            numbers = numbers[:, :, :channels]
        return upright(numbers, _orientation(page))


def _orientation(page: Any) -> int:
    tag = page.tags.get(ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _decoded(series: Any) -> np.ndarray:
    try:
        return series.asarray()
    except KeyError as error:  # tifffile says which package decompresses
        raise UnreadableImage(f"{error.args[0]}: pip install imagecodecs, or save it without compression") from error


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


def npy_header(content: bytes, limits: Limits) -> Header:
    """Raises `UnreadableImage` for what is no image."""
    file = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    reader = readers.get(np.lib.format.read_magic(file))
    if reader is None:
        raise UnreadableImage("it is an .npy file of a version that is not read")
    shape, by_columns, dtype = reader(file)
    if len(shape) not in (2, 3) or dtype.kind not in "buif":
        raise UnreadableImage(f"an .npy image is (H, W, C) of numbers, this is {shape} of {dtype}")
    require_pixels(shape[1], shape[0], limits)
    height, width, depth = (*shape, 1)[:3]
    return Header((height, width, depth), by_columns, dtype, file.tell())


def _npy(content: bytes, limits: Limits) -> np.ndarray:
    header = npy_header(content, limits)
    numbers = np.frombuffer(content, header.dtype, count=math.prod(header.shape), offset=header.start)
    numbers = numbers.reshape(header.shape, order="F" if header.by_columns else "C")
    return numbers.astype(header.dtype.newbyteorder("="))
