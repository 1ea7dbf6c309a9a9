"""Real pictures, and copies of them."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from dino.curation.thumbnails import thumbnail


def photographs() -> list[Image.Image]:
    """Two whole ones, and six cuts of each as other pictures."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return whole + [one.crop((x, y, x + 213, y + 213)) for one in whole for y in (0, 213) for x in (0, 213, 426)]


def digits(count: int = 40) -> tuple[list[Image.Image], np.ndarray]:
    found = load_digits()
    pixels = (found.images[:count] * 15.9).astype(np.uint8)
    return [Image.fromarray(one).resize((96, 96), Image.Resampling.BICUBIC) for one in pixels], found.target[:count]


def small(image: Image.Image) -> Tensor:
    pixels = np.array(image)  # (H, W) or (H, W, 3)
    return thumbnail(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1))


def thumbnails(images: list[Image.Image]) -> Tensor:
    return torch.stack([small(image) for image in images])


def encoded(image: Image.Image, kind: str = "JPEG", **settings) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(file)


def cut(image: Image.Image, left: float, top: float, right: float = 0, bottom: float = 0) -> Image.Image:
    """Without these parts of its width and height."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


COPIES = {
    "JPEG of quality 90": lambda image: encoded(image, quality=90),
    "JPEG of quality 30": lambda image: encoded(image, quality=30),
    "WebP": lambda image: encoded(image, "WEBP", quality=50),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice as large": lambda image: image.resize((image.width * 2, image.height * 2)),
    "another shape": lambda image: image.resize((150, 220)),
    "darker": lambda image: image.point(lambda value: value * 0.7),
    "of less contrast": lambda image: image.point(lambda value: 60 + value * 0.5),
    "grey": lambda image: image.convert("L"),
    "without its left 3 %": lambda image: cut(image, 0.03, 0),
    "without its upper and right 2 %": lambda image: cut(image, 0, 0.02, 0.02),
    "without a frame of 1 %, encoded": lambda image: encoded(cut(image, 0.01, 0.01, 0.01, 0.01), quality=50),
    "without a frame of 2 %": lambda image: cut(image, 0.02, 0.02, 0.02, 0.02),
    "in a frame of 1 %": lambda image: ImageOps.expand(image, max(1, image.width // 100)),
}
