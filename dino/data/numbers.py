"""Pictures of 16 bits or fractions that Pillow opens, and numbers of any kind to levels of the channels asked for."""

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from dino.data.formats import PNG_SIGNATURE, Limits, UnreadableImage, require_memory
from dino.data.levels import STRIP, Levels
from dino.data.picture import background_of, orientation_of, require_one_frame, turned

WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in the luminance (ITU-R 601-2)


def levels_of(numbers: np.ndarray, channels: int, limits: Limits, levels: Levels) -> np.ndarray:
    """(H, W, C) numbers of a file as levels; raises `UnreadableImage` where they are none, or take too much memory.

    Args:
        channels: grey is repeated for 3, and of colour the luminance taken for 1.
    """
    if numbers.dtype.kind not in "buif":
        raise UnreadableImage(f"its pixels are {numbers.dtype}, which are no numbers")
    height, width, depth = numbers.shape
    needed = height * width * max(depth, channels) * levels.dtype.itemsize
    if numbers.flags.writeable:  # else they are a part of the file
        needed += numbers.nbytes
    require_memory(needed, width, height, f"{depth} channels of {numbers.dtype} with data.bits={levels.bits}", limits)
    if depth == 1 and channels == 3:
        numbers = np.broadcast_to(numbers, (height, width, 3))
    if depth == 3 and channels == 1:
        numbers = _luminance(numbers)
    return levels.of(numbers)


def _luminance(numbers: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H, W, 1), of the same type where they are whole."""
    grey = np.empty((*numbers.shape[:2], 1), np.float32 if numbers.dtype.kind == "f" else numbers.dtype)
    rows = max(1, STRIP // max(1, numbers.shape[1]))
    for top in range(0, len(numbers), rows):
        part = numbers[top : top + rows].astype(np.float32) @ WEIGHTS
        grey[top : top + rows, :, 0] = part if numbers.dtype.kind == "f" else part.round()
    return grey


def is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether an opened picture has more than 8 bits a channel, of which Pillow gives 8, or fractions."""
    return image.mode == "F" or image.mode.startswith("I") or _is_png_16(content)


def deep_numbers(image: Image.Image, content: bytes, channels: int, limits: Limits) -> np.ndarray:
    """(H, W, C) of such a picture, as the file has them; alpha is laid on a background."""
    require_one_frame(image)
    what = f"{image.mode} as {image.format}"
    if not _is_png_16(content):
        held = 2 if image.mode.startswith("I;16") else 4
        require_memory(3 * held * image.width * image.height, image.width, image.height, what, limits)
        return turned(np.asarray(image)[:, :, None], orientation_of(image))
    bands = len(image.getbands())  # Pillow too decodes one with alpha: it is asked where the ink is
    require_memory((2 * bands + 4) * image.width * image.height, image.width, image.height, what, limits)
    pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    numbers = pixels.numpy().transpose(1, 2, 0)
    if numbers.shape[2] in (2, 4):
        numbers = _laid_on(numbers, background_of(image, "L" if channels == 1 else "RGB") * 257.0)
    return turned(numbers, orientation_of(image))


def _laid_on(numbers: np.ndarray, background: float) -> np.ndarray:
    """(H, W, 2 or 4) uint16 without its alpha, of which the colours are written anew."""
    rows = max(1, STRIP // max(1, numbers.shape[1]))
    for top in range(0, len(numbers), rows):
        part = numbers[top : top + rows]
        alpha = part[:, :, -1:].astype(np.float32) / 65535
        part[:, :, :-1] = (alpha * part[:, :, :-1] + (1 - alpha) * background).round()
    return numbers[:, :, :-1]


def _is_png_16(content: bytes) -> bool:
    return content.startswith(PNG_SIGNATURE) and content[24:25] == b"\x10"  # bits of a sample, in IHDR
