"""Pictures that take Pillow more memory, or time, than `data.max_pixels` allows: decoded otherwise, or refused."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data.decode import decode
from dino.data.formats import Limits, UnreadableImage
from dino.data.picture import STRIP

SIZE = (1500, 1200)  # more than a strip
PIXELS = SIZE[0] * SIZE[1]
assert PIXELS > STRIP
ROOMY, TIGHT = Limits(64_000_000), Limits(PIXELS)


def picture(mode: str) -> Image.Image:
    """Of colours, and where the mode has it transparency, that differ from pixel to pixel."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (SIZE[1] // 4, SIZE[0] // 4, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    bands = [Image.fromarray(noise[..., band]).resize(SIZE) for band in range(noise.shape[2])]
    return Image.merge(mode, bands)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_decoded_directly_has_the_pixels_that_pillow_gives(kind, mode, channels):
    options = {"lossless": True, "method": 0, "exact": True} if kind == "WEBP" else {"compress_level": 1}
    content = encoded(picture(mode), kind, **options)
    tight = decode(content, channels, limits=TIGHT if kind == "PNG" else Limits(PIXELS * 5 // 4))
    assert torch.equal(tight, decode(content, channels, limits=ROOMY))
    assert tight.stride() == (1, channels * SIZE[0], channels)


REFUSED = {
    "turned": ("PNG", "RGBA", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
    "CMYK": ("JPEG", "CMYK", {}),
    "progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "TIFF": ("TIFF", "RGBA", {}),
    "JPEG2000": ("JPEG2000", "L", {}),
    "AVIF": ("AVIF", "RGB", {"speed": 10}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_more_memory_than_allowed_is_refused_with_the_reason(name):
    kind, mode, options = REFUSED[name]
    content = encoded(Image.new(mode, SIZE), kind, **options)
    assert decode(content, 3, limits=ROOMY).shape[0] == 3
    with pytest.raises(UnreadableImage, match=rf"{SIZE[0]:,}×{SIZE[1]:,} pixels .* data\.max_pixels="):
        decode(content, 3, limits=TIGHT)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_a_byte_a_pixel_may_have_as_many_as_are_allowed(mode):
    assert decode(encoded(Image.new(mode, SIZE), "PNG"), 3, limits=TIGHT).shape == (3, SIZE[1], SIZE[0])


SIDE = 4000
IN_PYTHON = {
    "qoi": b"qoif" + struct.pack(">IIBB", SIDE, SIDE, 3, 0) + b"\x6a" * SIDE * SIDE + bytes(7) + b"\1",
    "scaled": b"P5 4000 4000 1000\n" + bytes(2 * SIDE * SIDE),
    "text": b"P2 4000 4000 255\n" + b"0 " * SIDE * SIDE,
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_what_pillow_would_decode_for_minutes_is_refused(name):
    with pytest.raises(UnreadableImage, match="save it as PNG"):
        decode(IN_PYTHON[name], 3)
