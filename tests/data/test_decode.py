"""Image files of every kind come out as the pixels a viewer shows, and unusable ones are refused with the reason."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data.decode import UnreadableImage, decode


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
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
    share = alpha.astype(np.float64)[..., None] / 255
    return colour * share + 255 * (1 - share)


class TestFormats:
    @pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
    def test_lossless_formats_give_the_pixels_back(self, format):
        array = noise(7, 11, 3)
        assert np.array_equal(pixels(decode(encode(Image.fromarray(array), format), 3)), array)

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
    def test_compressed_tiff(self, compression):
        array = noise(8, 9, 3)
        content = encode(Image.fromarray(array), "TIFF", compression=compression)
        assert np.array_equal(pixels(decode(content, 3)), array)

    @pytest.mark.parametrize(
        ("format", "options"),
        [("JPEG", {"quality": 80}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 80})],
    )
    def test_lossy_formats_give_what_pillow_gives(self, format, options):
        smooth = np.linspace(0, 255, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)
        content = encode(Image.fromarray(smooth), format, **options)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(pixels(decode(content, 3)), expected)
        assert np.abs(expected.astype(int) - smooth).mean() < 10

    def test_the_content_counts_and_not_the_name(self):
        array = noise(6, 6, 3)
        assert np.array_equal(pixels(decode(encode(Image.fromarray(array), "PNG"), 3, "photo.JPG")), array)


class TestModes:
    def test_greyscale(self):
        array = noise(6, 9)
        content = encode(Image.fromarray(array), "PNG")
        assert np.array_equal(pixels(decode(content, 1))[..., 0], array)
        assert np.array_equal(pixels(decode(content, 3)), np.stack([array] * 3, axis=-1))

    def test_colour_as_one_channel_is_its_luminance(self):
        array = noise(6, 9, 3)
        luminance = array @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
        result = pixels(decode(encode(Image.fromarray(array), "PNG"), 1))[..., 0]
        assert np.abs(result - luminance).max() <= 1

    @pytest.mark.parametrize("channels", [1, 3])
    def test_one_bit_is_black_and_white(self, channels):
        bits = noise(6, 9) > 127
        result = pixels(decode(encode(Image.fromarray(bits), "PNG"), channels))
        assert np.array_equal(result, np.repeat(np.where(bits, 255, 0)[..., None], channels, axis=-1))

    def test_palette(self):
        palette, indices = noise(16, 3), noise(6, 9, seed=1) % 16
        image = Image.frombytes("P", (9, 6), indices.tobytes())
        image.putpalette(palette.tobytes())
        assert np.array_equal(pixels(decode(encode(image, "PNG"), 3)), palette[indices])

    def test_transparent_colour_of_a_palette_is_white(self):
        palette, indices = noise(16, 3), noise(6, 9, seed=1) % 16
        image = Image.frombytes("P", (9, 6), indices.tobytes())
        image.putpalette(palette.tobytes())
        expected = palette[indices]
        expected[indices == 5] = 255
        assert (indices == 5).any()
        assert np.array_equal(pixels(decode(encode(image, "PNG", transparency=5), 3)), expected)

    def test_palette_with_alpha_of_its_own(self):
        palette, indices, alpha = noise(16, 3), noise(6, 9, seed=1) % 16, noise(16, seed=2)
        image = Image.frombytes("P", (9, 6), indices.tobytes())
        image.putpalette(palette.tobytes())
        result = pixels(decode(encode(image, "PNG", transparency=alpha.tobytes()), 3))
        assert np.abs(result - on_white(palette[indices], alpha[indices])).max() <= 1

    def test_transparent_colour_of_rgb_is_white(self):
        array = noise(6, 9, 3)
        expected = array.copy()
        expected[2, 3] = 255
        content = encode(Image.fromarray(array), "PNG", transparency=tuple(map(int, array[2, 3])))
        assert np.array_equal(pixels(decode(content, 3)), expected)

    @pytest.mark.parametrize("format", ["PNG", "TIFF"])
    def test_rgba_is_laid_on_white(self, format):
        array = noise(16, 16, 4)
        array[:, :8, 3] = 0  # fully transparent: white, whatever colour hides there
        array[:4, :, 3] = 255
        result = pixels(decode(encode(Image.fromarray(array), format), 3))
        assert np.abs(result - on_white(array[..., :3], array[..., 3])).max() <= 1
        assert (result[4:, :8] == 255).all()
        assert np.array_equal(result[:4], array[:4, :, :3])

    def test_lossless_webp_with_alpha_is_laid_on_white(self):
        array = noise(8, 8, 4)
        content = encode(Image.fromarray(array), "WEBP", lossless=True, exact=True)
        assert np.abs(pixels(decode(content, 3)) - on_white(array[..., :3], array[..., 3])).max() <= 1

    @pytest.mark.parametrize("channels", [1, 3])
    def test_grey_with_alpha_is_laid_on_white(self, channels):
        array = noise(16, 16, 2)
        result = pixels(decode(encode(Image.fromarray(array), "PNG"), channels))
        expected = on_white(array[..., :1], array[..., 1])
        assert np.abs(result - np.repeat(expected, channels, axis=-1)).max() <= 1

    @pytest.mark.parametrize("format", ["JPEG", "TIFF"])
    def test_cmyk(self, format):
        """Against Pillow's conversion; ink that covers nothing is white, all of it is black."""
        array = np.zeros((16, 16, 4), dtype=np.uint8)
        array[:, 8:, 3] = 255
        array[8:, :8] = (255, 0, 0, 0)  # cyan ink absorbs red
        content = encode(Image.frombytes("CMYK", (16, 16), array.tobytes()), format)
        result = pixels(decode(content, 3))
        assert np.array_equal(result, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        assert np.abs(result[2, 2].astype(int) - 255).max() <= 4
        assert result[2, 13].max() <= 4
        assert np.abs(result[13, 2].astype(int) - (0, 255, 255)).max() <= 4

    @pytest.mark.parametrize(("format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bit_grey_is_scaled_exactly(self, format, dtype, channels):
        """All 65,536 values: v · 255 / 65,535, rounded, by integer arithmetic."""
        values = np.arange(65536, dtype=np.int64).reshape(256, 256)
        mode = "I;16" if dtype == "<u2" else "I;16B"
        image = Image.frombytes(mode, (256, 256), values.astype(dtype).tobytes())
        result = pixels(decode(encode(image, format), channels))
        expected = (2 * values * 255 + 65535) // (2 * 65535)
        for channel in range(channels):
            assert np.array_equal(result[..., channel], expected)


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


class TestOrientation:
    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
    def test_images_come_out_upright(self, orientation, format):
        coarse = noise(2, 3)  # squares of 16 pixels survive JPEG
        stored = np.repeat(coarse.repeat(16, axis=0).repeat(16, axis=1)[..., None], 3, axis=-1)
        height, width, _ = stored.shape
        expected = np.zeros((height, width, 3) if orientation < 5 else (width, height, 3), dtype=np.uint8)
        for row in range(height):
            for column in range(width):
                expected[UPRIGHT[orientation](row, column, height, width)] = stored[row, column]
        exif = Image.Exif()
        exif[0x0112] = orientation
        result = pixels(decode(encode(Image.fromarray(stored), format, exif=exif), 3))
        assert result.shape == expected.shape
        assert np.abs(result.astype(int) - expected).max() <= (6 if format == "JPEG" else 0)

    def test_a_broken_exif_block_does_not_cost_the_image(self):
        array = noise(8, 8, 3)
        content = encode(Image.fromarray(array), "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
        assert np.array_equal(pixels(decode(content, 3)), array)


class TestArrays:
    @pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
    def test_any_number_of_channels(self, channels):
        array = noise(6, 9, channels)
        assert np.array_equal(pixels(decode(npy(array), channels, "x.NPY")), array)

    def test_two_dimensions_are_one_channel(self):
        array = noise(6, 9)
        assert np.array_equal(pixels(decode(npy(array), 1, "x.npy"))[..., 0], array)

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

    @pytest.mark.parametrize(
        ("array", "reason"),
        [
            (np.zeros((8, 8, 3), np.float32), "float32"),
            (np.zeros((8, 8, 3), np.int16), "int16"),
            (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
            (np.zeros(64, np.uint8), r"\(64,\)"),
        ],
    )
    def test_other_arrays_are_refused(self, array, reason):
        with pytest.raises(UnreadableImage, match=reason):
            decode(npy(array), 3, "x.npy")

    def test_other_channels_are_refused_naming_both_numbers(self):
        with pytest.raises(UnreadableImage, match=r"2 channels, data\.channels is 3"):
            decode(npy(noise(8, 8, 2)), 3, "x.npy")

    def test_truncated_array_is_refused(self):
        with pytest.raises(UnreadableImage):
            decode(npy(noise(8, 8, 3))[:-20], 3, "x.npy")


def frames(format: str) -> bytes:
    first, second = Image.fromarray(noise(8, 8, 3)), Image.fromarray(noise(8, 8, 3, seed=1))
    return encode(first, format, save_all=True, append_images=[second])


class TestUnreadable:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
    def test_truncated(self, format):
        content = encode(Image.fromarray(noise(64, 64, 3)), format)
        decode(content, 3)
        for share in (0.1, 0.5, 0.9):
            with pytest.raises(UnreadableImage, match=r"\w"):
                decode(content[: int(share * len(content))], 3)

    def test_damaged_in_the_middle(self):
        content = bytearray(encode(Image.fromarray(noise(64, 64, 3)), "PNG"))
        content[2000:2100] = bytes(100)
        with pytest.raises(UnreadableImage):
            decode(bytes(content), 3)

    def test_no_image_at_all(self):
        with pytest.raises(UnreadableImage) as caught:
            decode(b"<html>\n404\n</html>\n" * 20, 3, "photo.png")
        assert "\n" not in str(caught.value)
        assert str(caught.value)

    def test_empty(self):
        for name in ("photo.png", "photo.npy"):
            with pytest.raises(UnreadableImage, match="empty"):
                decode(b"", 3, name)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 100), (100, 3)])
    def test_too_small(self, height, width):
        with pytest.raises(UnreadableImage, match=f"{width}×{height} pixels are too few"):
            decode(encode(Image.fromarray(noise(height, width, 3)), "PNG"), 3)

    def test_smallest_side_that_is_read(self):
        assert decode(encode(Image.fromarray(noise(4, 4, 3)), "PNG"), 3).shape == (3, 4, 4)

    @pytest.mark.parametrize("format", ["WEBP", "PNG", "TIFF"])
    def test_animated_or_of_several_pages(self, format):
        with pytest.raises(UnreadableImage, match="2 frames"):
            decode(frames(format), 3)

    def test_a_camera_jpeg_with_a_preview_is_its_photograph(self):
        """Phones and cameras append a preview or a gain map (multi-picture format): not an animation."""
        expected = np.asarray(Image.open(io.BytesIO(encode(Image.fromarray(noise(8, 8, 3)), "JPEG"))))
        assert np.array_equal(pixels(decode(frames("MPO"), 3)), expected)

    def test_pixels_that_are_fractions(self):
        with pytest.raises(UnreadableImage, match="fractions"):
            decode(encode(Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)), "TIFF"), 1)

    def test_decompression_bomb(self, monkeypatch):
        content = encode(Image.new("RGB", (100, 100)), "PNG")
        decode(content, 3)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            decode(content, 3)
