"""Random numbers of views, as a function of (seed, epoch, image) alone; `ops/` and `crop.py` say what they decide.

Every number comes from SplitMix64 (Steele, Lea & Flood 2014) at a counter of its own: a view's numbers depend neither
on the number of other views nor on which augmentations are switched on, and a whole batch is drawn at once.
"""

import copy
import hashlib

import numpy as np

STRIDE = 64  # numbers of each view in its image's sequence
SLOTS: dict[str, int | slice] = {  # which of them decides what; other numbers would be other views of the same seed
    "area": slice(0, 10),
    "shape": slice(10, 20),
    "top": 20,
    "left": 21,
    "flip": 22,
    "jitter": 23,
    "brightness": 24,
    "contrast": 25,
    "saturation": 26,
    "hue": 27,
    "order": 28,
    "grey": 29,
    "blur": 30,
    "sigma": 31,
    "solarize": 32,
    "angle": 33,
    "shift": slice(34, 36),
    "zoom": 36,
    "shear": 37,
    "stroke": 38,
}


class Numbers:
    """Uniform numbers in [0, 1) for some views of a batch of images, by the name of what they decide.

    Args:
        keys: (B,) uint64, one an image; see `sample_key`.
        views: which of an image's views.
    """

    def __init__(self, keys: np.ndarray, views: range):
        self.keys, self.views = keys, views
        sequence = uniforms(keys, views.stop * STRIDE).reshape(len(keys), views.stop, STRIDE)
        self.table = sequence.swapaxes(0, 1)[views.start :]  # (V, B, STRIDE)

    def of(self, views: range) -> "Numbers":
        """Those of some of the views."""
        part = copy.copy(self)
        part.views, part.table = views, self.table[views.start - self.views.start : views.stop - self.views.start]
        return part

    def __getitem__(self, name: str) -> np.ndarray:
        """(V, B) numbers, or (V, B, n) for a slot of n. A name without a slot has a sequence of its own."""
        if name in SLOTS:
            return self.table[..., SLOTS[name]]
        salt = np.uint64(_digest(name))  # of the name alone: whatever else is registered, the numbers are the same
        return uniforms(self.keys ^ salt, self.views.stop).T[self.views.start :]


def sample_key(seed: int, epoch: int, index: int) -> int:
    """64 well-mixed bits of (seed, epoch, index)."""
    return _digest(f"{seed}/{epoch}/{index}")


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """(B,) uint64 keys to (B, count) numbers in [0, 1)."""
    z = keys.astype(np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def between(u: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) stretched to [low, high)."""
    return low + (high - low) * u


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
