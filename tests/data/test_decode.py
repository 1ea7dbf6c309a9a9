"""Image files of every kind come out as the pixels a viewer shows, and unusable ones are refused with the reason."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data.decode import UnreadableImage, decode


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """(C, H, W) to (H, W, C)."""
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha.astype(np.float64)[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


RGB, GREY, BITS = noise(7, 11, 3), noise(6, 9), noise(6, 9) > 127
SMOOTH = np.linspace(0, 255, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)
RGBA, GREY_ALPHA = noise(16, 16, 4), noise(16, 16, 2)
RGBA[:, :8, 3] = 0  # fully transparent: white, whatever colour hides there
RGBA[:4, :, 3] = 255
PALETTE, INDICES, PALETTE_ALPHA = noise(16, 3), noise(6, 9, seed=1) % 16, noise(16, seed=2)
INDEXED = Image.frombytes("P", (9, 6), INDICES.tobytes())
INDEXED.putpalette(PALETTE.tobytes())
LUMINANCE = RGB @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# name: file, channels asked for, what is expected (H, W, C), tolerance
PICTURES = {
    "png": (encode(RGB, "PNG"), 3, RGB, 0),
    "bmp": (encode(RGB, "BMP"), 3, RGB, 0),
    "tiff": (encode(RGB, "TIFF"), 3, RGB, 0),
    "tiff lzw": (encode(RGB, "TIFF", compression="tiff_lzw"), 3, RGB, 0),
    "tiff deflate": (encode(RGB, "TIFF", compression="tiff_adobe_deflate"), 3, RGB, 0),
    "tiff packbits": (encode(RGB, "TIFF", compression="packbits"), 3, RGB, 0),
    "jpeg": (encode(SMOOTH, "JPEG", quality=80), 3, SMOOTH, 40),
    "progressive jpeg": (encode(SMOOTH, "JPEG", progressive=True), 3, SMOOTH, 40),
    "webp": (encode(SMOOTH, "WEBP", quality=80), 3, SMOOTH, 40),
    "grey": (encode(GREY, "PNG"), 1, GREY[..., None], 0),
    "grey as colour": (encode(GREY, "PNG"), 3, np.stack([GREY] * 3, axis=-1), 0),
    "colour as grey": (encode(RGB, "PNG"), 1, LUMINANCE[..., None], 1),
    "one bit": (encode(BITS, "PNG"), 1, np.where(BITS, 255, 0)[..., None], 0),
    "one bit as colour": (encode(BITS, "PNG"), 3, np.stack([np.where(BITS, 255, 0)] * 3, axis=-1), 0),
    "palette": (encode(INDEXED, "PNG"), 3, PALETTE[INDICES], 0),
    "palette's transparent colour": (
        encode(INDEXED, "PNG", transparency=5),
        3,
        np.where((INDICES == 5)[..., None], 255, PALETTE[INDICES]),
        0,
    ),
    "palette with alpha": (
        encode(INDEXED, "PNG", transparency=PALETTE_ALPHA.tobytes()),
        3,
        on_white(PALETTE[INDICES], PALETTE_ALPHA[INDICES]),
        1,
    ),
    "transparent colour": (
        encode(RGB, "PNG", transparency=tuple(RGB[2, 3].tolist())),
        3,
        np.where((RGB[2, 3] == RGB).all(axis=-1, keepdims=True), 255, RGB),
        0,
    ),
    "rgba": (encode(RGBA, "PNG"), 3, on_white(RGBA[..., :3], RGBA[..., 3]), 1),
    "rgba tiff": (encode(RGBA, "TIFF"), 3, on_white(RGBA[..., :3], RGBA[..., 3]), 1),
    "rgba webp": (encode(RGBA, "WEBP", lossless=True, exact=True), 3, on_white(RGBA[..., :3], RGBA[..., 3]), 1),
    "grey with alpha": (encode(GREY_ALPHA, "PNG"), 1, on_white(GREY_ALPHA[..., :1], GREY_ALPHA[..., 1]), 1),
    "grey with alpha as colour": (
        encode(GREY_ALPHA, "PNG"),
        3,
        on_white(GREY_ALPHA[..., :1], GREY_ALPHA[..., 1]).repeat(3, axis=-1),
        1,
    ),
}


class TestPictures:
    @pytest.mark.parametrize("name", PICTURES)
    def test_pixels(self, name):
        content, channels, expected, tolerance = PICTURES[name]
        decoded = pixels(decode(content, channels, "photo.JPG"))  # the content counts, not the name
        assert decoded.shape == expected.shape
        assert np.abs(decoded - expected.astype(np.float64)).max() <= tolerance

    @pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "webp"])
    def test_lossy_formats_give_what_pillow_gives(self, name):
        content = PICTURES[name][0]
        assert np.array_equal(pixels(decode(content, 3)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))

    @pytest.mark.parametrize("format", ["JPEG", "TIFF"])
    def test_cmyk(self, format):
        """Against Pillow's conversion; ink that covers nothing is white, all of it is black."""
        array = np.zeros((16, 16, 4), dtype=np.uint8)
        array[:, 8:, 3] = 255
        array[8:, :8] = (255, 0, 0, 0)  # cyan ink absorbs red
        content = encode(Image.frombytes("CMYK", (16, 16), array.tobytes()), format)
        decoded = pixels(decode(content, 3))
        assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        for at, colour in (((2, 2), 255), ((2, 13), 0), ((13, 2), (0, 255, 255))):
            assert np.abs(decoded[at].astype(int) - colour).max() <= 4

    @pytest.mark.parametrize(("format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bit_grey_is_scaled_exactly(self, format, dtype, channels):
        """All 65,536 values: v · 255 / 65,535, rounded, by integer arithmetic."""
        values = np.arange(65536, dtype=np.int64).reshape(256, 256)
        image = Image.frombytes("I;16" if dtype == "<u2" else "I;16B", (256, 256), values.astype(dtype).tobytes())
        expected = (2 * values * 255 + 65535) // (2 * 65535)
        assert np.array_equal(pixels(decode(encode(image, format), channels)), np.stack([expected] * channels, axis=-1))

    def test_a_camera_jpeg_with_a_preview_is_its_photograph(self):
        """Phones and cameras append a preview or a gain map (multi-picture format): not an animation."""
        expected = np.asarray(Image.open(io.BytesIO(encode(noise(8, 8, 3), "JPEG"))))
        assert np.array_equal(pixels(decode(frames("MPO"), 3)), expected)

    def test_a_broken_exif_block_does_not_cost_the_image(self):
        content = encode(RGB, "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
        assert np.array_equal(pixels(decode(content, 3)), RGB)


# Where the stored pixel (row, column) of an H×W image belongs, by the definition of the orientation tag (Exif 2.3,
# table 6: at which visual side row 0 and column 0 lie).
UPRIGHT = {
    1: lambda r, c, h, w: (r, c),  # top, left
    2: lambda r, c, h, w: (r, w - 1 - c),  # top, right
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),  # bottom, right
    4: lambda r, c, h, w: (h - 1 - r, c),  # bottom, left
    5: lambda r, c, h, w: (c, r),  # left, top
    6: lambda r, c, h, w: (c, h - 1 - r),  # right, top
    7: lambda r, c, h, w: (w - 1 - c, h - 1 - r),  # right, bottom
    8: lambda r, c, h, w: (w - 1 - c, r),  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_images_come_out_upright(orientation, format):
    squares = noise(2, 3).repeat(16, axis=0).repeat(16, axis=1)  # of 16 pixels, which survive JPEG
    stored = np.stack([squares] * 3, axis=-1)
    height, width, _ = stored.shape
    expected = np.zeros((height, width, 3) if orientation < 5 else (width, height, 3), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            expected[UPRIGHT[orientation](row, column, height, width)] = stored[row, column]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = pixels(decode(encode(stored, format, exif=exif), 3))
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() <= (6 if format == "JPEG" else 0)


class TestArrays:
    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
    def test_any_number_of_channels(self, channels):
        array = noise(6, 9, channels)
        assert np.array_equal(pixels(decode(npy(array), channels, "x.NPY")), array)

    def test_two_dimensions_are_one_channel(self):
        assert np.array_equal(pixels(decode(npy(GREY), 1, "x.npy"))[..., 0], GREY)

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_16_bits_are_scaled_exactly(self, order):
        values = np.arange(65536, dtype=np.int64).reshape(128, 256, 2)
        content = npy(np.array(values, dtype=np.uint16, order=order))
        expected = (2 * values * 255 + 65535) // (2 * 65535)
        assert np.array_equal(pixels(decode(content, 2, "x.npy")), expected)

    def test_pickled_objects_are_refused_unopened(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
        for content in (buffer.getvalue(), pickle.dumps(Evil())):
            with pytest.raises(UnreadableImage):
                decode(content, 1, "x.npy")
        assert not (tmp_path / "executed").exists()


def frames(format: str) -> bytes:
    return encode(noise(8, 8, 3), format, save_all=True, append_images=[Image.fromarray(noise(8, 8, 3, seed=1))])


class TestUnreadable:
    @pytest.mark.parametrize(
        ("content", "name", "reason"),
        [
            (b"", "x.png", "empty"),
            (b"", "x.npy", "empty"),
            (b"<html>\n404\n</html>\n" * 20, "x.png", "no image of a format that Pillow reads"),
            (encode(noise(1, 1, 3), "PNG"), "x.png", "1×1 pixels are too few"),
            (encode(noise(3, 100, 3), "PNG"), "x.png", "100×3 pixels are too few"),
            (encode(noise(100, 3, 3), "PNG"), "x.png", "3×100 pixels are too few"),
            (frames("WEBP"), "x.webp", "2 frames"),
            (frames("PNG"), "x.png", "2 frames"),
            (frames("TIFF"), "x.tif", "2 frames"),
            (encode(np.random.default_rng(0).random((8, 8), np.float32), "TIFF"), "x.tif", "fractions"),
            (npy(np.zeros((8, 8, 3), np.float32)), "x.npy", "float32"),
            (npy(np.zeros((8, 8, 3), np.int16)), "x.npy", "int16"),
            (npy(np.zeros((2, 8, 8, 3), np.uint8)), "x.npy", r"\(2, 8, 8, 3\)"),
            (npy(np.zeros(64, np.uint8)), "x.npy", r"\(64,\)"),
            (npy(noise(8, 8, 2)), "x.npy", r"2 channels, data\.channels is 3"),
            (npy(noise(8, 8, 3))[:-20], "x.npy", r"\w"),
        ],
    )
    def test_the_reason_is_told_in_one_line(self, content, name, reason):
        with pytest.raises(UnreadableImage, match=reason) as refused:
            decode(content, 3, name)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
    def test_truncated(self, format):
        content = encode(noise(64, 64, 3), format)
        decode(content, 3)
        for fraction in (0.1, 0.5, 0.9):
            with pytest.raises(UnreadableImage, match=r"\w"):
                decode(content[: int(fraction * len(content))], 3)

    def test_damaged_in_the_middle(self):
        content = bytearray(encode(noise(64, 64, 3), "PNG"))
        content[2000:2100] = bytes(100)
        with pytest.raises(UnreadableImage):
            decode(bytes(content), 3)

    def test_smallest_side_that_is_read(self):
        assert decode(encode(noise(4, 4, 3), "PNG"), 3).shape == (3, 4, 4)

    def test_decompression_bomb(self, monkeypatch):
        content = encode(noise(100, 100, 3), "PNG")
        decode(content, 3)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            decode(content, 3)
