"""Files of 16 bits, of fractions and of many bands: which levels from 0 to 255 their numbers become."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dino.data import Levels, UnreadableImage, mean_and_std, measured_range, open_images
from dino.data.decode import decode, size_of

GENERATOR = np.random.default_rng(0)
SIXTEEN = Levels("16")


def png(array: np.ndarray) -> bytes:
    """(H, W, 1 … 4) uint16 as a PNG, which Pillow cannot write."""
    height, width, bands = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def numbers(*shape: int, dtype: type = np.uint16) -> np.ndarray:
    return GENERATOR.integers(0, 65536, shape).astype(dtype)


def levels_of(content: bytes, channels: int, levels: Levels, name: str = "") -> np.ndarray:
    """(H, W, C); what the header tells is what is there."""
    pixels = decode(content, channels, name, levels=levels)
    assert pixels.dtype == levels.dtype
    assert size_of(content, channels, name, levels=levels) in (tuple(pixels.shape), None)
    return pixels.permute(1, 2, 0).numpy()


GREY, COLOUR, ALPHA = numbers(9, 7, 1), numbers(9, 7, 3), numbers(9, 7, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (png(GREY), "a.png", GREY),
        (npy(GREY), "a.npy", GREY),
        (npy(GREY[:, :, 0].astype(">u2")), "a.npy", GREY),
        (npy(GREY.astype(np.int32)), "a.npy", GREY),
        (png(COLOUR), "a.png", COLOUR),
        (npy(COLOUR), "a.npy", COLOUR),
    ],
)
def test_16_bits_are_kept(content, name, expected, channels):
    expected = expected / 65535 * 255
    if expected.shape[2] < channels:
        expected = expected.repeat(3, axis=2)
    elif expected.shape[2] > channels:
        expected = expected @ [[0.299], [0.587], [0.114]]
    assert np.abs(levels_of(content, channels, SIXTEEN, name) - expected).max() < 0.005


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bits_are_the_same_levels_at_16(channels):
    for mode in ("RGB", "L", "P", "RGBA", "LA", "1"):
        buffer = io.BytesIO()
        Image.fromarray(GENERATOR.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode).save(buffer, "PNG")
        whole = levels_of(buffer.getvalue(), channels, Levels())
        assert np.array_equal(levels_of(buffer.getvalue(), channels, SIXTEEN), whole), mode


@pytest.mark.parametrize("bands", [GREY, COLOUR])
def test_transparent_pictures_of_16_bits_are_laid_on_what_8_bits_are_laid_on(bands):
    content = png(np.concatenate([bands, ALPHA], axis=2))
    assert np.abs(levels_of(content, 3, SIXTEEN) - levels_of(content, 3, Levels()).astype(float)).max() <= 2


def test_a_range_becomes_all_levels_and_what_is_beyond_is_cut_off():
    values = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)
    expected = np.clip((values - -160) / 400, 0, 1)[:, :, None] * 255
    assert np.allclose(levels_of(npy(values), 1, Levels("float", (-160, 240)), "a.npy"), expected, atol=1e-3)
    twelve_bits = (GREY % 4096).astype(np.uint16)
    assert np.allclose(levels_of(png(twelve_bits), 1, Levels("16", (0, 4095))), twelve_bits / 4095 * 255, atol=1e-3)


def test_what_is_no_number_is_black_and_where_there_is_none_there_is_no_image():
    values = np.full((8, 8), 5.0)
    values[0, :3] = np.nan, np.inf, -np.inf
    levels = levels_of(npy(values), 1, Levels("float", (0, 10)), "a.npy")
    assert levels[0, :3, 0].tolist() == [0, 0, 0]
    assert (levels[1:] == 127.5).all()
    with pytest.raises(UnreadableImage, match="no number but NaN"):
        decode(npy(np.full((8, 8), np.nan)), 1, "a.npy", levels=Levels("float", (0, 10)))


FRACTIONS = GENERATOR.normal(size=(9, 7, 5)).astype(np.float32)
PLANES = FRACTIONS.transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (FRACTIONS, {"photometric": "minisblack", "planarconfig": "contig"}),
        (PLANES, {"photometric": "minisblack", "planarconfig": "separate"}),
        (PLANES, {"photometric": "minisblack"}),
        (FRACTIONS, {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}),
        (FRACTIONS, {"photometric": "minisblack", "planarconfig": "contig", "bigtiff": True, "byteorder": ">"}),
    ],
)
def test_bands_of_a_tiff_may_lie_in_pixels_planes_or_pages(array, options):
    content = tiff(array, **options)
    levels = levels_of(content, 5, Levels("float", (-4, 4)))
    assert np.allclose(levels, np.clip((FRACTIONS + 4) / 8, 0, 1) * 255, atol=1e-3)
    with pytest.raises(UnreadableImage, match=r"several pages|5 channels, data\.channels is 3"):
        decode(content, 3, levels=Levels("float", (-4, 4)))


def test_a_tiff_of_many_bands_at_8_bits():
    bands = numbers(9, 7, 6)
    content = tiff(bands, photometric="minisblack", planarconfig="contig")
    assert np.abs(levels_of(content, 6, Levels()) - bands / 257).max() <= 0.5


def test_a_tiff_with_alpha_of_light_on_dark_and_turned():
    colours = numbers(9, 7, 4)
    content = tiff(colours, photometric="rgb", extrasamples=["unassalpha"], extratags=[(274, "H", 1, 6, True)])
    turned = np.rot90(colours[:, :, :3], -1)
    assert np.allclose(levels_of(content, 3, SIXTEEN), turned / 257, atol=1e-3)
    content = tiff(GREY, photometric="miniswhite")
    assert np.allclose(levels_of(content, 1, SIXTEEN), (65535 - GREY.astype(float)) / 257, atol=1e-3)


@pytest.mark.parametrize(
    ("content", "levels", "reason"),
    [
        (npy(np.full((8, 8), 0.5)), SIXTEEN, "float64, fractions of unknown range: set data.bits=float"),
        (npy(np.full((8, 8), -1, np.int16)), SIXTEEN, "some below 0"),
        (npy(np.full((8, 8), 1j)), Levels("float"), "of numbers, this is"),
        (npy(np.full((8, 8), "x")), Levels("float"), "of numbers, this is"),
        (npy(np.zeros((2, 8, 8, 1), np.float32)), Levels("float"), r"\(2, 8, 8, 1\)"),
        (npy(np.zeros((8, 8, 4), np.float32)), Levels("float"), r"4 channels, data\.channels is 1"),
        (npy(np.zeros((8, 8), np.float32))[:-9], Levels("float"), r"\w"),
        (npy(np.zeros((0, 8), np.float32)), Levels("float"), "too few"),
        (png(GREY)[:-30], SIXTEEN, r"\w"),
    ],
)
def test_why_there_is_no_image(content, levels, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(content, 1, "x.npy" if content.startswith(b"\x93NUMPY") else "x.png", levels=levels)


def test_a_damaged_tiff_is_read_or_refused():
    whole = tiff(numbers(64, 64, 5), photometric="minisblack", planarconfig="contig")
    refused = 0
    for place in range(0, 400, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        try:
            image = decode(bytes(damaged), 5, levels=SIXTEEN)
        except UnreadableImage:  # and nothing else
            refused += 1
        else:
            assert image.shape[0] == 5
            assert image.isfinite().all()
            assert 0 <= image.min() <= image.max() <= 255
    assert 0 < refused < 134  # some damage is harmless, some is not


@pytest.fixture
def bands(tmp_path):
    """Images of 4 bands, each of its own mean and deviation, with a few numbers far off."""
    means, deviations = np.array([0, 10, -5, 2]), np.array([1, 2, 0.5, 4])
    for number in range(40):
        image = GENERATOR.normal(means, deviations, (32, 32, 4)).astype(np.float32)
        image[0, 0] = [np.nan, 1e9, -1e9, 0]
        np.save(tmp_path / f"{number}.npy", image)
    return tmp_path


def test_range_means_and_deviations_are_measured(bands):
    pool = open_images(bands, channels=4, levels=Levels("float"))
    low, high = measured_range(pool)
    assert -20 < low < -8
    assert 14 < high < 25
    pool.levels = Levels("float", (low, high))
    mean, std = mean_and_std(pool)
    numbers = np.array(mean) * (high - low) + low, np.array(std) * (high - low)
    assert np.allclose(numbers[0], [0, 10, -5, 2], atol=0.3)
    assert np.allclose(numbers[1], [1, 2, 0.5, 4], atol=0.5)
