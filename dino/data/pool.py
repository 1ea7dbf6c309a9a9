"""A pool of images: what the rest of the program sees of a source, whichever it is."""

import difflib
import hashlib
import logging
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor, uint8

from dino.data.decode import LIMITS, decode, require_shape, size_of
from dino.data.formats import Limits, UnreadableImage
from dino.data.manifest import is_manifest, read_manifest, rows_of
from dino.data.sources import SOURCES, DatasetSource, MapStyle, Source
from dino.data.sources.several import SeveralSource, as_root, roots_of
from dino.data.sources.source import FileSource, Names, components, first_difference, split_roles, text_of
from dino.data.sources.storage import is_pattern, is_remote, storage_of
from dino.distributed import rank_and_size
from dino.errors import UserError
from dino.files import shown

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

    def __post_init__(self) -> None:
        self.names = Names(self.source.names, self.indices)
        self.labels = None if self.source.labels is None else Labels(self.source.labels, self.indices)
        if self.weights is None and self.source.weights is not None:
            self.weights = self.source.weights if self.indices is None else self.source.weights[self.indices]

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
        return Pool(self.source, kind, self.channels, of_source, weights, self.transform, self.limits)

    def content(self, index: int) -> bytes | Tensor:
        """As the source has it: a file's bytes, or pixels; raises `UnreadableImage`."""
        return self.source.read(int(index if self.indices is None else self.indices[index]))

    def read(self, index: int, enough: float | None = None) -> Tensor:
        """(channels, H, W) uint8; a large JPEG with as many pixels as are `enough`, see `decode`.

        Raises `UnreadableImage`.
        """
        image = self.content(index)
        if isinstance(image, Tensor):
            require_shape(tuple(image.shape), self.channels)
        else:
            whole = self.transform is not None  # what it does may depend on the size
            image = decode(image, self.channels, self.names[index], None if whole else enough, self.limits)
        return image if self.transform is None else self._transformed(self.transform(image))

    def size(self, index: int) -> tuple[int, int, int] | None:
        """The shape (C, H, W) of what `read` would give, from the file's header where it has one; None if it has not,
        and cannot be read."""
        try:
            image = self.source.read(int(index if self.indices is None else self.indices[index]))
            if self.transform is None and not isinstance(image, Tensor):
                return size_of(image, self.channels, self.names[index], self.limits)
            pixels = image if isinstance(image, Tensor) and self.transform is None else self.read(index)
            channels, height, width = pixels.shape
            return channels, height, width
        except UnreadableImage:
            return None

    def _transformed(self, image: Any) -> Tensor:
        if isinstance(image, Tensor) and image.dtype == uint8 and image.ndim == 3 and len(image) == self.channels:
            return image
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise UserError(
            f"the transform must give uint8 ({self.channels}, H, W), it gave {what}: leave out what turns images into "
            "fractions or changes their channels"
        )


def open_images(
    root: str | os.PathLike | MapStyle,
    kind: str = "auto",
    channels: int | str = "auto",
    transform: Transform | None = None,
    limits: Limits = LIMITS,
    manifests: tuple[str, ...] = (),
) -> Pool:
    """Open a pool of images.

    Args:
        root: a folder, an archive, a list, a manifest or whatever else docs/data.md tells of; several of them as a
            list, also as text, `[a, b]`; or a data set of the caller's own (see `MapStyle`).
        kind: a name of `SOURCES`, `manifest`, or `auto`: by what root is.
        channels: of the images given back; `auto`: 1 for Omniglot and digits, else 3.
        transform: uint8 (C, H, W) to uint8 (C, H, W), done to every image that is read: cropping, resizing. What it
            gives must not differ from time to time, or no run can be repeated; augmentation is what views are for.
        limits: on an image's pixels, and on a file's bytes.
        manifests: by which it was come here; none of them is opened again.

    Raises:
        UserError: nothing there, or no image in it.
    """
    if isinstance(root, list | tuple) and all(isinstance(part, str | os.PathLike) for part in root):
        root = as_root([os.fspath(part) for part in root])
    if not isinstance(root, str | os.PathLike):
        dataset = DatasetSource(root, channels)
        return Pool(dataset, "dataset", dataset.channels, transform=transform)
    root = os.path.expanduser(os.fspath(root))
    roots = roots_of(root)
    if len(roots) > 1 or roots[0] != root:
        kind = "auto" if kind == "several" else kind
        pools = [open_images(part, kind, channels, limits=limits, manifests=manifests) for part in roots]
        if len({pool.channels for pool in pools}) > 1:
            raise UserError(f"{root}: images of 1 and of 3 channels: say which to make of them with data.channels")
        return Pool(SeveralSource(roots, pools), "several", pools[0].channels, transform=transform, limits=limits)
    if kind == "manifest" or (kind == "auto" and is_manifest(root)):
        _require_root(root)
        if os.path.realpath(root) in manifests:
            raise UserError(f"{root} is a manifest that leads to itself: curate its images anew")
        manifest, manifests = read_manifest(root), (*manifests, os.path.realpath(root))
        pool = open_images(manifest.root, manifest.kind, channels, transform, limits, manifests)
        return pool.subset(rows_of(manifest, pool.names.packed(), root), "manifest", manifest.weights)
    kind = _kind_of(root, kind)
    opener = SOURCES[kind]
    if opener.fixed and channels not in ("auto", opener.channels):
        raise UserError(f"data.channels={channels}: data.kind={kind} has {opener.channels} channel(s)")
    source = opener.open(root)
    if isinstance(source, FileSource):
        source.max_bytes = limits.bytes
        if source.left_out.counts:
            _say_once(f"left out of {shown(root)}: {source.left_out}")
    channels = opener.channels if channels == "auto" else int(channels)
    pool = Pool(source, kind, channels, transform=transform, limits=limits)
    return pool if opener.subset is None else pool.subset(opener.subset(source), kind)


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


@cache
def _say_once(text: str) -> None:
    if rank_and_size()[0] == 0:
        logger.warning(text)


def _require_root(root: str) -> None:
    if not root:
        raise UserError("no images given: name a folder or a zip archive with data.root=…")
    if not (os.path.exists(root) or is_remote(root) or is_pattern(root)):
        raise UserError(f"{root} does not exist")


def _kind_of(root: str, kind: str) -> str:
    """The name in `SOURCES` by which a root is to be opened; raises `UserError` where none fits."""
    if kind == "dataset":
        raise UserError("data.kind=dataset is a data set handed in from Python, which no data.root leads to")
    if kind == "several":
        raise UserError(f"data.kind=several, but {root} is one: leave it auto")
    kinds = ("auto", *SOURCES, "several", "manifest")
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no kind of data is called {kind}: choose of {', '.join(kinds)}{hint}")
    if kind != "auto" and SOURCES[kind].accepts(root):
        return kind
    for name, candidate in SOURCES.items():
        if candidate.noun and candidate.accepts(root):
            if kind == "auto":
                return name
            raise UserError(f"data.kind={kind}, but {root} is {candidate.noun}: use data.kind={name}, or leave it auto")
    _require_root(root)
    if is_remote(root):
        storage_of(root)
    raise UserError(f"{root} is neither {' nor '.join(kind.noun for kind in SOURCES.values() if kind.noun)}")
