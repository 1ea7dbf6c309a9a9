"""Pictures as Pillow has them to pixels: upright, opaque, 8 bits, in little more memory than the pixels take."""

from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

from dino.data.formats import UnreadableImage
from dino.data.levels import to_8_bits

STRIP = 1 << 18  # pixels that are converted at a time
BACKGROUNDS = (255, 0, 128)
CONTRAST = 32  # levels by which ink differs from what it lies on, or it is lost


def picture_array(image: Image.Image, channels: int) -> np.ndarray:
    """A picture, upright and opaque, as (H, W, 1 or 3) uint8 in memory of its own."""
    require_one_frame(image)
    image.load()
    if image.mode == "F":
        raise UnreadableImage("its pixels are 32-bit fractions of unknown range: set data.bits=float")
    array = np.empty((image.height, image.width, 1 if channels == 1 else 3), np.uint8)
    write_opaque(image, array, image.has_transparency_data)
    return upright(array, orientation_of(image))


def write_opaque(picture: Image.Image | np.ndarray, array: np.ndarray, is_transparent: bool) -> None:
    """Write a picture's pixels to `array`, (H, W, 1 or 3); an (H, W, 3 or 4) picture may begin where `array` does."""
    mode = "L" if array.shape[2] == 1 else "RGB"
    background = background_of(picture, mode) if is_transparent else None
    for rows, strip in _strips(picture):
        if strip.mode.startswith("I"):
            strip = Image.fromarray(to_8_bits(np.asarray(strip)))
        if background is not None:
            canvas = Image.new("RGBA", strip.size, (background, background, background))
            strip = Image.alpha_composite(canvas, strip.convert("RGBA"))
        pixels = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        array[rows] = pixels.reshape(array[rows].shape)


def require_one_frame(image: Image.Image) -> None:
    """Raise `UnreadableImage` for a film, or a document of several pages."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview or gain map after it
        raise UnreadableImage(f"it is animated or has several pages ({frames} frames)")


def orientation_of(image: Image.Image) -> int:
    """By EXIF's tag, 1 … 8; 1, upright, where it is missing or broken."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever broken EXIF data raise; the pixels are what counts
        return 1


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) turned and mirrored as EXIF's orientation says where its rows and columns lie, pixel by pixel."""
    return np.ascontiguousarray(turned(array, orientation))


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """As `upright`, a view."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def background_of(picture: Image.Image | np.ndarray, mode: str) -> int:
    """The grey level on which a transparent picture is laid: white, unless most of its ink would be lost on it.

    Ink is lost where it differs from the background by less than 32 levels in every channel; then it is black or a
    middle grey, whichever loses less.
    """
    ink, lost = 0.0, np.zeros(len(BACKGROUNDS))
    for rows, strip in _strips(picture):
        colours = strip.convert("RGBA")
        alpha = np.asarray(colours.getchannel("A"), dtype=np.float32)
        if alpha.min() == 255 and rows == slice(None):
            return BACKGROUNDS[0]
        levels = np.asarray(colours.convert(mode)).reshape(*alpha.shape, -1)
        darkest, lightest = levels.min(axis=-1), levels.max(axis=-1)
        ink += float(alpha.sum())
        for number, level in enumerate(BACKGROUNDS):
            is_lost = (darkest > level - CONTRAST) & (lightest < level + CONTRAST)
            lost[number] += float(alpha[is_lost].sum())
    return BACKGROUNDS[0] if lost[0] <= ink / 2 else BACKGROUNDS[int(lost.argmin())]


def _strips(picture: Image.Image | np.ndarray) -> Iterator[tuple[slice, Image.Image]]:
    """A picture's rows, some at a time, so that what is made of them on the way is small."""
    width, height = picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size
    step = max(1, STRIP // width)
    if step >= height:
        yield slice(None), Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        return
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        if isinstance(picture, np.ndarray):
            yield rows, Image.fromarray(picture[rows])
        else:
            yield rows, picture.crop((0, top, width, rows.stop))
