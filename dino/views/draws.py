"""What chance decides of each view, as a function of (seed, epoch, image) alone; how it is done is for the backends.

Every number comes from SplitMix64 (Steele, Lea & Flood 2014) at a counter of its own: a view's numbers depend neither
on the number of other views nor on which of its augmentations are switched on, and a whole batch is drawn at once.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from dino.views.spec import View

ATTEMPTS = 10  # to place a crop of the drawn area and shape inside the image
SLOTS = 64  # numbers a view; those from 39 on are unused
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue


class Geometry(NamedTuple):
    """Where views are cut. Each array is (V, B), `box` (V, B, 4); `flat` makes it (V·B).

    Attributes:
        box: top, left, height, width of the crop, in pixels of the image.
        flip: left to right, after the crop.
        angle, shear: radians, of the whole image before the crop.
        shift: (…, 2), down and right, as shares of the image's height and width.
        zoom: factor.
    """

    box: np.ndarray
    flip: np.ndarray
    angle: np.ndarray
    shear: np.ndarray
    shift: np.ndarray
    zoom: np.ndarray

    def flat(self, views: slice) -> Self:
        """Some of the views, (V, B, …) to (V·B, …)."""
        return type(self)(*(_flat(values, views) for values in self))


class Appearance(NamedTuple):
    """What is done to the pixels of views. Each array is (V, B); `flat` makes it (V·B).

    Attributes:
        stroke: change of stroke width, in pixels at each side.
        jitter: whether colours are changed, by the next five.
        brightness, contrast, saturation: factors.
        hue: shift, as a share of the circle.
        order: (…, 4), in which order brightness (0), contrast (1), saturation (2) and hue (3) are changed.
        grey: whether colour is dropped.
        sigma: of the blur in pixels; 0: no blur.
        solarize: whether pixels of 128 and above are inverted.
    """

    stroke: np.ndarray
    jitter: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    order: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray

    def flat(self, views: slice) -> Self:
        """Some of the views, (V, B, …) to (V·B, …)."""
        return type(self)(*(_flat(values, views) for values in self))


def draw_geometry(views: Sequence[View], keys: np.ndarray, sizes: np.ndarray) -> Geometry:
    """Crops (and small affine changes) of B images.

    A crop's area is uniform in `view.scale`, the logarithm of its shape uniform between 3:4 and 4:3, its place uniform;
    after ten that do not fit, the largest centred crop of a permitted shape (torchvision's RandomResizedCrop).

    Args:
        keys: (B,) uint64, one an image; see `sample_key`.
        sizes: (B, 2), height and width in pixels.
    """
    u = _uniforms(keys, len(views))
    strength = _column(views, "affine")
    return Geometry(
        box=_boxes(u, np.array([view.scale for view in views])[:, None], sizes),
        flip=u[..., 22] < _column(views, "flip"),
        angle=strength * np.radians(_between(u[..., 33], -10, 10)),
        shear=strength * np.radians(_between(u[..., 37], -10, 10)),
        shift=strength[..., None] * _between(u[..., 34:36], -0.05, 0.05),
        zoom=1 + strength * _between(u[..., 36], -0.1, 0.1),
    )


def draw_appearance(views: Sequence[View], keys: np.ndarray) -> Appearance:
    """Strokes, colours, blur and solarisation of B images; `keys` as for `draw_geometry`."""
    u = _uniforms(keys, len(views))
    stroke, sigmas = _column(views, "stroke"), np.array([view.blur_sigma for view in views])[:, None]
    return Appearance(
        stroke=stroke * _between(u[..., 38], -1, 1),
        jitter=u[..., 23] < _column(views, "jitter"),
        brightness=_between(u[..., 24], 0.6, 1.4),
        contrast=_between(u[..., 25], 0.6, 1.4),
        saturation=_between(u[..., 26], 0.8, 1.2),
        hue=_between(u[..., 27], -0.1, 0.1),
        order=ORDERS[(u[..., 28] * len(ORDERS)).astype(int)],
        grey=u[..., 29] < _column(views, "grey"),
        sigma=np.where(u[..., 30] < _column(views, "blur"), _between(u[..., 31], sigmas[..., 0], sigmas[..., 1]), 0.0),
        solarize=u[..., 32] < _column(views, "solarize"),
    )


def sample_key(seed: int, epoch: int, index: int) -> int:
    """64 well-mixed bits of (seed, epoch, index)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest(), "little")


def _boxes(u: np.ndarray, scale: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(V, B, SLOTS) numbers, (V, 1, 2) shares of the area and (B, 2) sizes to (V, B, 4) crops."""
    height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
    area = (height * width)[:, None] * _between(u[..., 0:ATTEMPTS], scale[..., :1], scale[..., 1:])
    shape = np.exp(_between(u[..., ATTEMPTS : 2 * ATTEMPTS], np.log(3 / 4), np.log(4 / 3)))
    heights, widths = np.round(np.sqrt(area / shape)), np.round(np.sqrt(area * shape))
    fits = (heights >= 1) & (heights <= height[:, None]) & (widths >= 1) & (widths <= width[:, None])
    first = fits.argmax(axis=-1)[..., None]
    h, w = (np.take_along_axis(values, first, axis=-1)[..., 0] for values in (heights, widths))
    top, left = np.floor(u[..., 20] * (height - h + 1)), np.floor(u[..., 21] * (width - w + 1))

    limited = np.clip(width / height, 3 / 4, 4 / 3)  # of the largest centred crop
    tall, wide = np.round(np.minimum(height, width / limited)), np.round(np.minimum(width, height * limited))
    centred = np.stack([np.floor((height - tall) / 2), np.floor((width - wide) / 2), tall, wide], axis=-1)
    drawn = np.stack([top, left, h, w], axis=-1)
    return np.where(fits.any(axis=-1)[..., None], drawn, centred).astype(int)


def _uniforms(keys: np.ndarray, views: int) -> np.ndarray:
    """(B,) keys to (V, B, SLOTS) numbers in [0, 1)."""
    return uniforms(keys, views * SLOTS).reshape(len(keys), views, SLOTS).swapaxes(0, 1)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """(B,) uint64 keys to (B, count) numbers in [0, 1)."""
    z = keys.astype(np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _between(u: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    return low + (high - low) * u


def _column(views: Sequence[View], name: str) -> np.ndarray:
    """(V, 1) values of one attribute."""
    return np.array([float(getattr(view, name)) for view in views])[:, None]


def _flat(values: np.ndarray, views: slice) -> np.ndarray:
    return values[views].reshape(-1, *values.shape[2:])
