"""One image file to pixels: every format Pillow reads, brought to 8 bits and the channels asked for."""

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".npy")
SMALLEST_SIDE = 4


class UnreadableImage(Exception):
    """A file that gives no usable image; the message is the reason."""


def decode(content: bytes, channels: int, name: str = "", enough: float | None = None) -> Tensor:
    """Decode an image file.

    Upright by its EXIF orientation; transparency is laid on white; CMYK, palettes and greyscale are converted; 16 bits
    are scaled to 8. An `.npy` file holds an (H, W, C) array of uint8 or uint16, for images of any number of channels.

    Args:
        channels: 1 (luminance), 3 (RGB), or the number an `.npy` file has.
        name: of the file; only its ending matters.
        enough: pixels; a JPEG that has more is reduced to 1/2, 1/4 or 1/8 of its sides, in a fraction of the time, as
            long as it keeps as many.

    Returns:
        (channels, H, W) uint8, in memory pixel by pixel; raises `UnreadableImage` with the reason.
    """
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like: the pixels are what counts
            if name.lower().endswith(".npy"):
                return to_tensor(_file_array(content), channels)
            with Image.open(io.BytesIO(content)) as image:
                if image.format in ("JPEG", "MPO"):  # MPO: a camera's JPEG with a preview after it
                    reduced = enough is not None and reduce_jpeg(image, enough)
                    if not reduced and (pixels := plain_jpeg(image, content, channels)) is not None:
                        return pixels
                return to_tensor(picture_array(image, channels), channels)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever comes up: OSError, SyntaxError, struct.error …
        raise UnreadableImage(reason_of(error)) from error


def reduce_jpeg(image: Image.Image, enough: float) -> bool:
    """Have an opened JPEG decoded at a fraction of its size (libjpeg leaves out frequencies), if that is `enough`."""
    width, height = image.size
    factor = max((factor for factor in (1, 2, 4, 8) if width * height >= enough * factor**2), default=1)
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
    return factor > 1


def plain_jpeg(image: Image.Image, content: bytes, channels: int) -> Tensor | None:
    """An opened JPEG by torchvision, which is twice as fast as Pillow; None where it takes more than that."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if not upright or image.mode != {1: "L", 3: "RGB"}.get(channels):
        return None
    require_shape((channels, image.height, image.width), channels)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:  # a broken file, of which Pillow tells the reason, or torchvision was built without libjpeg
        return None


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in one line, from what a library raised."""
    if isinstance(error, UnidentifiedImageError):  # whose own message holds an address in memory
        return "it is no image of a format that Pillow reads"
    return str(error).replace("\n", " ") or type(error).__name__


def to_tensor(array: np.ndarray, channels: int) -> Tensor:
    """(H, W, C) to (C, H, W), a view of memory of its own; raises `UnreadableImage` for too few pixels or channels."""
    require_shape(array.transpose(2, 0, 1).shape, channels)
    return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)


def require_shape(shape: tuple[int, ...], channels: int) -> None:
    """Raise `UnreadableImage` for a (C, H, W) of too few pixels or of other channels."""
    depth, height, width = shape
    if depth != channels:
        raise UnreadableImage(f"it has {depth} channels, data.channels is {channels}")
    if min(height, width) < SMALLEST_SIDE:
        raise UnreadableImage(f"{width}×{height} pixels are too few: at least {SMALLEST_SIDE} a side are needed")


def picture_array(image: Image.Image, channels: int) -> np.ndarray:
    """A picture, upright and opaque, as (H, W, 1 or 3) uint8."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview or gain map after it
        raise UnreadableImage(f"it is animated or has several pages ({frames} frames)")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise UnreadableImage("its pixels are 32-bit fractions of unknown range: save it with 8 or 16 bits")
    if upright.mode.startswith("I"):
        upright = Image.fromarray(_to_8_bits(np.asarray(upright)))
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    return array[:, :, None] if channels == 1 else array


def _file_array(content: bytes) -> np.ndarray:
    """What an `.npy` file holds, as (H, W, C) uint8."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.dtype not in (np.uint8, np.uint16):
        raise UnreadableImage(f"an .npy image is (H, W, C) of uint8 or uint16, this is {array.shape} of {array.dtype}")
    return array if array.dtype == np.uint8 else _to_8_bits(array)


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    """0 … 65,535 to 0 … 255, rounded."""
    return ((array.astype(np.float64).clip(0, 65535)) / 257).round().astype(np.uint8)
