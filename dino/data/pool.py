"""A pool of images: what the rest of the program sees of a source, whichever it is."""

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor, from_numpy

from dino.data.decode import LIMITS, decode, require_shape, size_of
from dino.data.formats import Limits, UnreadableImage
from dino.data.levels import AS_BYTES, Levels
from dino.data.sources import Source
from dino.data.sources.source import Names, components, first_difference, split_roles, text_of
from dino.errors import UserError

logger = logging.getLogger(__name__)
Transform = Callable[[Tensor], Tensor]
NEIGHBOURS = 1000  # images in a row that `Pool.shards` takes for one shard


class Labels(Sequence[str]):
    """A class name for each image: `classes` are their names, sorted, `codes` (N,) int32 indices in them."""

    def __init__(self, labels: pa.DictionaryArray, indices: np.ndarray | None):
        codes = labels.indices.to_numpy() if indices is None else labels.indices.to_numpy()[indices]
        in_use, code_in_use = np.unique(codes, return_inverse=True)
        # One name may be written in two ways, é as one letter or as two: macOS and Linux differ in that.
        names = [unicodedata.normalize("NFC", name) for name in Names(labels.dictionary, in_use)[:]]
        self.classes = sorted(set(names))
        self.codes = np.searchsorted(self.classes, names).astype(np.int32)[code_in_use]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.classes[code] for code in self.codes[index]]
        return self.classes[self.codes[index]]


class Roles(NamedTuple):
    """Which images of a pool are to learn from and which to test on, as the folders that hold them are called.

    Attributes:
        is_learn: (N,) bool.
        described: both sides in words, by folders.
    """

    is_learn: np.ndarray
    described: tuple[str, str]


@dataclass(eq=False)
class Pool:
    """Images of a source, decoded; `names` (N,) and `labels` (N,), None where there are none.

    An image costs its name in bytes and at most 40 bytes more, in every process.
    """

    source: Source
    kind: str  # what data.kind calls the pool
    channels: int
    indices: np.ndarray | None = None  # (N,) of the source's images that belong to the pool; None: all, in order
    weights: np.ndarray | None = None  # (N,) how often each is visited in an epoch, on average; None: once
    transform: Transform | None = None  # what is done to each image once it is decoded; see `open_images`
    limits: Limits = LIMITS
    levels: Levels = AS_BYTES

    def __post_init__(self) -> None:
        self.names = Names(self.source.names, self.indices)
        self.labels = None if self.source.labels is None else Labels(self.source.labels, self.indices)
        if self.weights is None and self.source.weights is not None:
            self.weights = self.source.weights if self.indices is None else self.source.weights[self.indices]
        pa.default_memory_pool().release_unused()  # reading a table takes several times what is held of it

    @property
    def shards(self) -> np.ndarray:
        """(N,) int32: images that are best read together have the same; where the source knows of none, neighbours."""
        if self.source.shards is None:
            return np.arange(len(self.names), dtype=np.int32) // NEIGHBOURS
        return self.source.shards if self.indices is None else self.source.shards[self.indices]

    @property
    def roles(self) -> Roles | None:
        """By folders such as train/ and val/; None where it has no such."""
        names = self.names.packed()
        level = first_difference(names)
        if level is None:
            return None
        folders = components(names, level)
        roles = split_roles(folders.dictionary)
        if not roles:
            return None
        of_folder = [roles[folder] for folder in folders.dictionary.to_pylist()]
        is_learn = np.array([role == "learn" for role in of_folder])[folders.indices.to_numpy()]
        learn, test = ([text_of(name) for name in sorted(roles) if roles[name] == role] for role in ("learn", "test"))
        return Roles(is_learn, (" and ".join(learn), " and ".join(test)))

    def subset(self, indices: np.ndarray, kind: str, weights: np.ndarray | None = None) -> "Pool":
        """Some of the images, in the order of their indices in this pool."""
        of_source = indices if self.indices is None else self.indices[indices]
        return Pool(self.source, kind, self.channels, of_source, weights, self.transform, self.limits, self.levels)

    def content(self, index: int) -> bytes | Tensor:
        """As the source has it: a file's bytes, or pixels; raises `UnreadableImage`."""
        return self.source.read(int(index if self.indices is None else self.indices[index]))

    def location(self, index: int) -> Path | None:
        """Of an image that is a file of its own on this machine."""
        return self.source.location(int(index if self.indices is None else self.indices[index]))

    def column(self, name: str) -> pa.Array | None:
        """(N,) what the source has of its images under a name of its own; None: nothing."""
        column = self.source.column(name)
        return column if column is None or self.indices is None else column.take(pa.array(self.indices))

    def read(self, index: int, enough: float | None = None) -> Tensor:
        """(channels, H, W) of `levels.dtype`; a large JPEG with as many pixels as are `enough`, see `decode`.

        Raises `UnreadableImage`.
        """
        image = self.content(index)
        if isinstance(image, Tensor):
            require_shape(tuple(image.shape), self.channels)
            if image.dtype != self.levels.dtype or self.levels.bits != "8":
                image = from_numpy(self.levels.of(image.numpy()))
        else:
            enough = enough if self.transform is None else None  # what it does may depend on the size
            image = decode(image, self.channels, self.names[index], enough, self.limits, self.levels)
        return image if self.transform is None else self._transformed(self.transform(image))

    def size(self, index: int) -> tuple[int, int, int] | None:
        """The shape (C, H, W) of what `read` would give, from the file's header where it has one; None if it has not,
        and cannot be read."""
        try:
            image = self.source.read(int(index if self.indices is None else self.indices[index]))
            if self.transform is None and not isinstance(image, Tensor):
                return size_of(image, self.channels, self.names[index], self.limits, self.levels)
            pixels = image if isinstance(image, Tensor) and self.transform is None else self.read(index)
            channels, height, width = pixels.shape
            return channels, height, width
        except UnreadableImage:
            return None

    def _transformed(self, image: Any) -> Tensor:
        dtype = self.levels.dtype
        if isinstance(image, Tensor) and image.dtype == dtype and image.ndim == 3 and len(image) == self.channels:
            return image
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        wanted = str(dtype).removeprefix("torch.")
        raise UserError(
            f"the transform must give {wanted} ({self.channels}, H, W), it gave {what}: leave out what turns images "
            "into fractions or changes their channels"
        )


def samples_per_epoch(images: Pool) -> int:
    """How many images an epoch visits, those visited more than once counted as often."""
    return len(images.names) if images.weights is None else max(1, round(float(images.weights.sum())))


def read_or_reason(images: Pool, index: int, enough: float | None = None) -> tuple[Tensor | None, str]:
    """An image, or None and the reason why it cannot be read."""
    try:
        return images.read(index, enough), ""
    except UnreadableImage as reason:
        return None, str(reason) or "unreadable"


def fingerprint(images: Pool) -> str:
    """A short digest of the images' names, order and weights: a resumed run must see the same pool."""
    digest = hashlib.sha256()
    for name in images.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    if images.weights is not None:
        digest.update(images.weights.tobytes())
    return digest.hexdigest()[:16]


def stamp(images: Pool) -> str:
    """A digest of the content of all images that a pool's source has, as it can tell without reading them all."""
    return images.source.stamp()
