"""Which files are taken for images, and opened: by the bytes they begin with, and no larger than allowed."""

import io
import struct
import zlib
from functools import cache
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# Endings by which images are found, which need not be the right ones.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs", ".heic"),
    *(".heif", ".hif", ".tga", ".pcx", ".sgi", ".qoi", ".dds", ".psd", ".npy", ".dcm", ".dicom"),
)
# What Pillow may take a file for. Others are no pictures, start programs (EPS), or hide a second size (ICO).
FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "MPO", "DIB", "TGA", "PCX", "SGI", "QOI"),
    *("DDS", "PSD"),
)
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
MOST_SCANS = 100  # of a JPEG; each takes as long as decoding it once, and cameras write about ten
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
BYTES = 4  # of memory that decoding may take for each pixel that data.max_pixels allows
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")


class Limits(NamedTuple):
    """How large an image may be, so that no file can take all memory.

    Attributes:
        pixels: of an image.
        bytes: of a file, or of an entry of an archive.
    """

    pixels: int = 64_000_000
    bytes: int = 256 * 2**20


class UnreadableImage(Exception):
    """A file that gives no usable image; the message is the reason."""


def open_picture(content: bytes, limits: Limits) -> Image.Image:
    """Open an image file by its header; nothing is decoded yet.

    Raises:
        UnreadableImage: it is too large.
        Exception: whatever Pillow's plugins raise.
    """
    if Image.MAX_IMAGE_PIXELS is not None and limits.pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limits.pixels  # Pillow's own limit, beyond which it refuses whatever the settings say
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        if content[4:8] == b"ftyp" and content[8:12] in HEIC:
            raise UnreadableImage("it is HEIC, as phones write it, which is not read: export it as JPEG") from None
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"it has more pixels than data.max_pixels={limits.pixels:,} allows") from error
    require_pixels(image.width, image.height, limits)
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MOST_SCANS:
        raise UnreadableImage(f"it is a JPEG of more than {MOST_SCANS} scans, which would take minutes to decode")
    return image


def require_pixels(width: int, height: int, limits: Limits) -> None:
    """Raise `UnreadableImage` for an image of more pixels than allowed."""
    if width * height > limits.pixels:
        raise UnreadableImage(
            f"{width:,}×{height:,} pixels are more than data.max_pixels={limits.pixels:,} allows: make it smaller, "
            "or raise that"
        )


def require_memory(needed: int, width: int, height: int, what: str, limits: Limits) -> None:
    """Raise `UnreadableImage` for an image that takes more bytes to decode, beside its file, than allowed.

    Args:
        what: the image's mode and format, for the message.
    """
    if needed > BYTES * limits.pixels:
        raise UnreadableImage(
            f"{width:,}×{height:,} pixels of {what} take {needed:,} bytes to decode, and "
            f"data.max_pixels={limits.pixels:,} allows {BYTES} for each: make it smaller, or raise that"
        )


@cache
def _formats() -> list[str]:
    """Those that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def without_metadata(content: bytes) -> bytes | None:
    """A PNG without what is no pixels (profiles, texts, whatever is broken in them); None for other files.

    Its EXIF data stay where they are whole: they say which side is up.
    """
    if not content.startswith(PNG_SIGNATURE):
        return None
    parts, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + 12 + length]
        is_whole = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in PNG_PIXELS or (kind == b"eXIf" and is_whole):
            parts.append(chunk)
        start += 12 + length
    return b"".join(parts)


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in one line, from what a library raised."""
    if isinstance(error, UnidentifiedImageError):  # whose own message holds an address in memory
        return "it is no image of a format that Pillow reads"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, RecursionError):
        return "it has parts inside one another without end"
    return " ".join(str(error).split()) or type(error).__name__
