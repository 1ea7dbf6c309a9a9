"""Image files of every kind come out as the pixels a viewer shows, and unusable ones are refused with the reason."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data import picture
from dino.data.decode import decode
from dino.data.formats import EXTENSIONS, Limits, UnreadableImage


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pixels(content: bytes, channels: int = 3, name: str = "") -> np.ndarray:
    """(H, W, C), as decoded."""
    image = decode(content, channels, name)
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    return image.permute(1, 2, 0).numpy()


def pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def frames(format: str) -> bytes:
    return encode(noise(8, 8, 3), format, save_all=True, append_images=[Image.fromarray(noise(8, 8, 3, seed=1))])


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha.astype(np.float64)[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def in_colour(grey: np.ndarray) -> np.ndarray:
    """(H, W, 1) to (H, W, 3)."""
    return grey.repeat(3, axis=-1)


RGB, GREY, BITS = noise(7, 11, 3), noise(6, 9, 1), noise(6, 9, 1) > 127
SMOOTH = np.linspace(0, 255, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)
RGBA, GREY_ALPHA = noise(16, 16, 4), noise(16, 16, 2)
RGBA[:, :8, 3] = 0  # fully transparent: white, whatever colour hides there
RGBA[:4, :, 3] = 255
PALETTE, INDICES, PALETTE_ALPHA = noise(16, 3), noise(6, 9, seed=1) % 16, noise(16, seed=2)
INDEXED = Image.frombytes("P", (9, 6), INDICES.tobytes())
INDEXED.putpalette(PALETTE.tobytes())
KEY = RGB[2, 3]  # the colour that stands for transparency
BLACK_OR_WHITE, LUMINANCE = np.where(BITS, 255, 0), RGB @ np.array([[0.299], [0.587], [0.114]])  # ITU-R BT.601
KEYED, INDEX_5_IS_WHITE = (RGB == KEY).all(axis=-1, keepdims=True), np.where(INDICES == 5, 0, 255)
PALETTE_ON_WHITE = on_white(PALETTE[INDICES], PALETTE_ALPHA[INDICES])
RGB_ON_WHITE = on_white(RGBA[..., :3], RGBA[..., 3])
GREY_ON_WHITE = on_white(GREY_ALPHA[..., :1], GREY_ALPHA[..., 1])
# name: file, what is expected (H, W, C), tolerance
PICTURES = {
    "png": (encode(RGB, "PNG"), RGB, 0),
    "bmp": (encode(RGB, "BMP"), RGB, 0),
    "tiff": (encode(RGB, "TIFF"), RGB, 0),
    "tiff lzw": (encode(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "jpeg": (encode(SMOOTH, "JPEG", quality=80), SMOOTH, 40),
    "progressive jpeg": (encode(SMOOTH, "JPEG", progressive=True), SMOOTH, 40),
    "webp": (encode(SMOOTH, "WEBP", quality=80), SMOOTH, 40),
    "grey": (encode(GREY[..., 0], "PNG"), GREY, 0),
    "grey as colour": (encode(GREY[..., 0], "PNG"), in_colour(GREY), 0),
    "colour as grey": (encode(RGB, "PNG"), LUMINANCE, 1),
    "one bit": (encode(BITS[..., 0], "PNG"), BLACK_OR_WHITE, 0),
    "one bit as colour": (encode(BITS[..., 0], "PNG"), in_colour(BLACK_OR_WHITE), 0),
    "palette": (encode(INDEXED, "PNG"), PALETTE[INDICES], 0),
    "palette, one transparent": (
        encode(INDEXED, "PNG", transparency=5),
        on_white(PALETTE[INDICES], INDEX_5_IS_WHITE),
        0,
    ),
    "palette with alpha": (encode(INDEXED, "PNG", transparency=PALETTE_ALPHA.tobytes()), PALETTE_ON_WHITE, 1),
    "transparent colour": (encode(RGB, "PNG", transparency=tuple(KEY.tolist())), np.where(KEYED, 255, RGB), 0),
    "rgba": (encode(RGBA, "PNG"), RGB_ON_WHITE, 1),
    "rgba tiff": (encode(RGBA, "TIFF"), RGB_ON_WHITE, 1),
    "rgba webp": (encode(RGBA, "WEBP", lossless=True, exact=True), RGB_ON_WHITE, 1),
    "grey with alpha": (encode(GREY_ALPHA, "PNG"), GREY_ON_WHITE, 1),
    "grey with alpha as colour": (encode(GREY_ALPHA, "PNG"), in_colour(GREY_ON_WHITE), 1),
    "broken exif": (encode(RGB, "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01"), RGB, 0),
    # Cameras append a preview or a gain map (multi-picture format): that is no animation.
    "jpeg with a preview": (frames("MPO"), pillow(encode(noise(8, 8, 3), "JPEG")), 0),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    content, expected, tolerance = PICTURES[name]
    decoded = pixels(content, expected.shape[-1], "photo.JPG")  # the content counts, not the name
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected.astype(np.float64)).max() <= tolerance
    if tolerance == 40:  # a lossy format
        assert np.array_equal(decoded, pillow(content))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Against Pillow's conversion; ink that covers nothing is white, all of it is black."""
    array = np.zeros((16, 16, 4), dtype=np.uint8)
    array[:, 8:, 3] = 255
    array[8:, :8] = (255, 0, 0, 0)  # cyan ink absorbs red
    content = encode(Image.frombytes("CMYK", (16, 16), array.tobytes()), format)
    decoded = pixels(content)
    assert np.array_equal(decoded, pillow(content))
    for at, colour in (((2, 2), 255), ((2, 13), 0), ((13, 2), (0, 255, 255))):
        assert np.abs(decoded[at].astype(int) - colour).max() <= 4


ALL_16_BITS = np.arange(65536, dtype=np.int64).reshape(256, 256, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("format", "dtype", "mode"),
    [
        ("PNG", "<u2", "I;16"),
        ("TIFF", "<u2", "I;16"),
        ("TIFF", ">u2", "I;16B"),
        *[("npy", "<u2", order) for order in "CF"],
    ],
)
def test_16_bits_are_scaled_exactly(format, dtype, mode, channels):
    """All 65,536 values: v · 255 / 65,535, rounded, by integer arithmetic."""
    expected = ((2 * ALL_16_BITS * 255 + 65535) // (2 * 65535)).repeat(channels, axis=-1)
    values = ALL_16_BITS.astype(dtype)
    if format == "npy":
        content = npy(np.array(values.repeat(channels, axis=-1), order=mode))
    else:
        content = encode(Image.frombytes(mode, (256, 256), values.tobytes()), format)
    assert np.array_equal(pixels(content, channels, f"x.{format}"), expected)


STORED = in_colour(noise(2, 3, 1).repeat(16, axis=0).repeat(16, axis=1))  # squares of 16 pixels survive JPEG
COLUMNS_AS_ROWS = STORED.transpose(1, 0, 2)
UPRIGHT = {  # by the orientation tag (Exif 2.3, table 6): at which visual side row 0 and column 0 lie
    1: STORED,  # top, left
    2: STORED[:, ::-1],  # top, right
    3: STORED[::-1, ::-1],  # bottom, right
    4: STORED[::-1],  # bottom, left
    5: COLUMNS_AS_ROWS,  # left, top
    6: COLUMNS_AS_ROWS[:, ::-1],  # right, top
    7: COLUMNS_AS_ROWS[::-1, ::-1],  # right, bottom
    8: COLUMNS_AS_ROWS[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "tolerance"), [("PNG", 0), ("JPEG", 6), ("TIFF", 0)])
def test_images_come_out_upright(orientation, format, tolerance):
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = pixels(encode(STORED, format, exif=exif))
    assert decoded.shape == UPRIGHT[orientation].shape
    assert np.abs(decoded.astype(int) - UPRIGHT[orientation]).max() <= tolerance


@pytest.mark.parametrize("array", [noise(6, 9), *[noise(6, 9, channels) for channels in (1, 2, 3, 5, 12)]])
def test_arrays_of_any_number_of_channels(array):
    expected = array.reshape(6, 9, -1)
    assert np.array_equal(pixels(npy(array), expected.shape[-1], "x.NPY"), expected)


def test_pickled_objects_are_refused_unopened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(UnreadableImage):
            decode(content, 1, "x.npy")
    assert not (tmp_path / "executed").exists()


WHOLE = encode(noise(64, 64, 3), "PNG")


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
        (npy(np.full((8, 8, 3), -1, np.int16)), "x.npy", "int16, some below 0"),
        (npy(np.zeros((2, 8, 8, 3), np.uint8)), "x.npy", r"\(2, 8, 8, 3\)"),
        (npy(np.zeros(64, np.uint8)), "x.npy", r"\(64,\)"),
        (npy(noise(8, 8, 2)), "x.npy", r"2 channels, data\.channels is 3"),
        (npy(noise(8, 8, 3))[:-20], "x.npy", r"\w"),
        (WHOLE[:2000] + bytes(100) + WHOLE[2100:], "x.png", r"\w"),
    ],
)
def test_the_reason_is_told_in_one_line(content, name, reason):
    with pytest.raises(UnreadableImage, match=reason) as refused:
        decode(content, 3, name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_unreadable(format):
    content = encode(noise(64, 64, 3), format)
    decode(content, 3)
    for fraction in (0.1, 0.5, 0.9):
        with pytest.raises(UnreadableImage, match=r"\w"):
            decode(content[: int(fraction * len(content))], 3)


def test_smallest_and_largest_that_are_read():
    assert decode(encode(noise(4, 4, 3), "PNG"), 3).shape == (3, 4, 4)
    for content, name in ((WHOLE, ""), (encode(noise(64, 64, 3), "JPEG"), ""), (npy(noise(64, 64, 3)), "x.npy")):
        assert decode(content, 3, name, limits=Limits(pixels=64 * 64)).shape == (3, 64, 64)
        with pytest.raises(UnreadableImage, match=r"64×64 pixels are more than data\.max_pixels=4,095"):
            decode(content, 3, name, limits=Limits(pixels=64 * 64 - 1))


def with_chunk(kind: bytes, data: bytes, crc: int | None = None, last: bool = False) -> bytes:
    """A PNG of RGB with a chunk before or after its pixels."""
    png, body = encode(RGB, "PNG"), kind + data
    at = len(png) - 12 if last else 33
    return png[:at] + struct.pack(">I", len(data)) + body + struct.pack(">I", crc or zlib.crc32(body)) + png[at:]


TEXT = zlib.compress(b"a" * 3_000_000)


class TestMetadata:
    @pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize(
        ("kind", "data", "crc"),
        [
            (b"zTXt", b"note\0\0" + TEXT, None),
            (b"iTXt", b"note\0\1\0\0\0" + TEXT, None),
            (b"iCCP", b"profile\0\0" + TEXT, None),
            (b"iCCP", b"profile\0\0nonsense", None),
            (b"iCCP", b"profile\0\7" + TEXT, None),
            (b"zTXt", b"note\0\7" + TEXT, None),
            (b"eXIf", b"nonsense", None),
            (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff", None),
            (b"tEXt", b"a\0bc", 1),
            (b"gAMA", b"", None),
            (b"cHRM", b"12", None),
            (b"pHYs", b"", None),
            (b"sRGB", b"", None),
            (b"tIME", b"1", 1),
            (b"abCd", b"what only one program knows", 1),
        ],
    )
    def test_of_a_png_may_be_broken_in_any_way(self, kind, data, crc, last):
        assert np.array_equal(pixels(with_chunk(kind, data, crc, last)), RGB)

    def test_of_other_files_may_be_broken_too(self):
        jpeg, webp = encode(SMOOTH, "JPEG"), encode(SMOOTH, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1")
        for marker in (0xE1, 0xE2, 0xED, 0xEE, 0xFE):
            for start in (b"Exif\0\0", b"MPF\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0", b"Adobe", b""):
                segment = start + b"nonsense" * 20
                head = bytes([0xFF, marker]) + struct.pack(">H", 2 + len(segment)) + segment
                image = pixels(jpeg[:2] + head + jpeg[2:])
                if start != b"Adobe":  # which tells how colours are kept
                    assert np.array_equal(image, pixels(jpeg))
        assert np.array_equal(pixels(webp), pillow(encode(SMOOTH, "WEBP")))

    def test_which_side_is_up_is_known_though_a_text_is_broken(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        png = encode(RGB, "PNG", exif=exif)
        broken = struct.pack(">I", 4) + b"tEXta\0bc" + bytes(4)
        assert np.array_equal(pixels(png[:33] + broken + png[33:]), RGB.transpose(1, 0, 2)[:, ::-1])


def glyph(level: int, alpha: int = 255, mode: str = "RGBA") -> Image.Image:
    """A bar on nothing."""
    image = Image.new("RGBA", (16, 16), (255 - level,) * 3 + (0,))
    image.paste((level, level, level, alpha), (4, 2, 12, 5))
    return image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("level", [0, 60, 128, 180, 230, 250, 255])
@pytest.mark.parametrize("alpha", [255, 160])
def test_what_lies_on_nothing_can_be_seen(channels, mode, level, alpha):
    image = pixels(encode(glyph(level, alpha, mode), "PNG"), channels).astype(int)
    assert abs(image[3, 8] - image[10, 10]).min() >= 32
    if level <= 200:
        assert (image[10, 10] == 255).all()  # white, wherever that does


def test_white_and_black_ink_are_seen_together():
    both = glyph(255)
    both.paste((0, 0, 0, 255), (4, 10, 12, 12))
    image = pixels(encode(both, "PNG")).astype(int)
    assert len({*image[3, 8], *image[11, 8], *image[7, 7]}) == 3


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "L", "P", "I;16"])
def test_in_strips_pictures_are_the_same(mode, monkeypatch):
    image = Image.fromarray(RGBA).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 250)
    content = encode(image, "PNG")
    whole = pixels(content)
    monkeypatch.setattr(picture, "STRIP", 50)
    assert np.array_equal(pixels(content), whole)


FORMATS_BY_ENDING = {
    "ppm": "PPM",
    "gif": "GIF",
    "jfif": "JPEG",
    "jp2": "JPEG2000",
    "avif": "AVIF",
    "tga": "TGA",
    "pcx": "PCX",
    "dib": "DIB",
    "sgi": "SGI",
    "qoi": "QOI",
    "dds": "DDS",
}


@pytest.mark.parametrize("ending", FORMATS_BY_ENDING)
def test_what_pillow_reads_is_read(ending):
    content = encode(SMOOTH, FORMATS_BY_ENDING[ending])
    assert f".{ending}" in EXTENSIONS
    assert np.array_equal(pixels(content, name=f"x.{ending}"), pillow(content))


def test_files_that_start_programs_or_take_minutes_are_no_images():
    with pytest.raises(UnreadableImage, match="no image of a format"):
        decode(encode(RGB, "EPS"), 3, "x.png")
    jpeg = encode(SMOOTH, "JPEG", progressive=True)
    start, end = jpeg.rindex(b"\xff\xda"), len(jpeg) - 2
    with pytest.raises(UnreadableImage, match="100 scans"):
        decode(jpeg[:end] + 200 * jpeg[start:end] + jpeg[end:], 3)


class TestLargeJpegs:
    """Of which less is decoded than there is, as long as what is left is enough."""

    CONTENT = encode(np.asarray(Image.fromarray(noise(6, 8, 3)).resize((320, 240), Image.Resampling.BICUBIC)), "JPEG")

    @pytest.mark.parametrize(
        ("enough", "size"),
        [
            (None, (240, 320)),
            (240 * 320, (240, 320)),
            (120 * 160 + 1, (240, 320)),
            (120 * 160, (120, 160)),
            (60 * 80, (60, 80)),
            (100, (30, 40)),  # 1/8 is the least there is
        ],
    )
    def test_sides_are_a_half_a_quarter_or_an_eighth(self, enough, size):
        image = decode(self.CONTENT, 3, enough=enough)
        assert image.shape == (3, *size)
        whole = decode(self.CONTENT, 3).float()
        smaller = torch.nn.functional.interpolate(whole[None], size, mode="area")[0]
        assert (image - smaller).abs().mean() <= 1  # levels

    def test_images_that_are_not_reduced_are_bit_for_bit_what_they_were(self):
        assert torch.equal(decode(self.CONTENT, 3, enough=40000), decode(self.CONTENT, 3))
        png = encode(noise(64, 64, 3), "PNG")
        assert torch.equal(decode(png, 3, enough=1), decode(png, 3))

    def test_grey_and_turned_ones(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = encode(Image.open(io.BytesIO(self.CONTENT)), "JPEG", exif=exif)
        assert decode(turned, 3, enough=60 * 80).shape == (3, 80, 60)
        assert decode(self.CONTENT, 1, enough=60 * 80).shape == (1, 60, 80)
