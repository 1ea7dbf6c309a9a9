"""Where images come from: a folder, a zip archive of one, Omniglot, scikit-learn's digits, or curation's manifest.

A pool of images has `names`, `labels` and `weights` (or None) and `read(index)`; nothing else is asked of it.
"""

import difflib
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import KINDS
from dino.data.decode import EXTENSIONS, UnreadableImage, decode
from dino.data.manifest import places_of, read_manifest
from dino.data.omniglot import held_out, parse
from dino.errors import UserError


class Images(Protocol):
    """A pool of images.

    `names` holds one name per image, the same in every process and on every start; `labels` a class name per image, or
    None where the pool has none; `weights` (N,) how often each image is drawn in an epoch, on average, None: once;
    every image that `read` gives has `channels` channels; `kind` is what data.kind calls the pool.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[str] | None: ...
    @property
    def weights(self) -> np.ndarray | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def kind(self) -> str: ...

    def read(self, index: int) -> Tensor:
        """(channels, H, W) uint8; raises `UnreadableImage`."""
        ...


class FolderImages:
    """All image files below a folder, sorted by path; the first folder level is the label, if there are several."""

    kind, weights = "folder", None

    def __init__(self, root: Path, channels: int = 3):
        self.root, self.channels = root, channels
        self.names = sorted(_image_paths(root))
        self.labels = labels_of(self.names)

    def read(self, index: int) -> Tensor:
        """(channels, H, W) uint8; raises `UnreadableImage`."""
        name = self.names[index]
        try:
            content = (self.root / name).read_bytes()
        except OSError as error:
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error
        return decode(content, self.channels, name)


class ZipImages:
    """The image files in a zip archive, read in place; nothing is extracted, so no entry can name a path outside."""

    kind, weights = "zip", None

    def __init__(self, path: Path, channels: int = 3):
        self.path, self.channels = path, channels
        self._local = threading.local()
        try:
            entries = self._archive().namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} cannot be read as a zip archive: {error}") from error
        hidden = [entry.startswith("__MACOSX/") or _is_hidden(entry) for entry in entries]
        wanted = (entry for entry, skip in zip(entries, hidden, strict=True) if not skip and is_image(entry))
        self.names = sorted(set(wanted))
        self.labels = labels_of(self.names)

    def read(self, index: int) -> Tensor:
        """(channels, H, W) uint8; raises `UnreadableImage`."""
        name = self.names[index]
        try:
            content = self._archive().read(name)
        except Exception as error:  # BadZipFile, and whatever zlib, bz2 and lzma raise
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error
        return decode(content, self.channels, name)

    def _archive(self) -> zipfile.ZipFile:
        # An open archive has one file position, which processes forked from this one must not share.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = zipfile.ZipFile(self.path), os.getpid()
        return self._local.archive

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _local=threading.local())


class Part:
    """Some images of a pool.

    Args:
        kind: what data.kind calls the part.
        indices: of the images in the whole pool.
        weights: of these images.
    """

    def __init__(self, whole: Images, kind: str, indices: Sequence[int], weights: np.ndarray | None = None):
        self.whole, self.kind, self.indices, self.weights = whole, kind, list(indices), weights
        self.channels = whole.channels
        self.names = [whole.names[index] for index in self.indices]
        self.labels = None if whole.labels is None else [whole.labels[index] for index in self.indices]

    def read(self, index: int) -> Tensor:
        """(channels, H, W) uint8; raises `UnreadableImage`."""
        return self.whole.read(self.indices[index])


class Digits:
    """scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998), 8×8 grey pixels with light ink."""

    channels, kind, weights = 1, "digits", None

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = torch.from_numpy((digits.images * 255 / 16).round()).to(torch.uint8)[:, None]
        self.labels = [str(target) for target in digits.target]
        self.names = [f"digit-{index:04d}" for index in range(len(self.pixels))]

    def read(self, index: int) -> Tensor:
        return self.pixels[index]


def open_images(root: str, kind: str = "auto", channels: int | str = "auto") -> Images:
    """Open a pool of images.

    Args:
        root: a folder, a zip archive, or a manifest; ignored for `digits`.
        kind: `folder`, `zip`, `omniglot`, `omniglot_train`, `digits`, `manifest`, or `auto`.
        channels: of the images given back; `auto`: 1 for Omniglot and digits, else 3.

    Raises:
        UserError: nothing there, or no image in it.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no kind of data is called {kind}: choose of {', '.join(KINDS)}{hint}")
    if kind == "digits":
        if channels not in ("auto", 1):
            raise UserError(f"data.channels={channels}: the digits have 1 channel")
        return Digits()
    if not root:
        raise UserError("no images given: name a folder or a zip archive with data.root=…")
    path = Path(root).expanduser()
    if not path.exists():
        raise UserError(f"{root} does not exist")
    if kind == "manifest" or (kind == "auto" and path.suffix == ".parquet"):
        manifest = read_manifest(path)
        pool = open_images(manifest.root, manifest.kind, channels)
        return Part(pool, "manifest", places_of(manifest, pool.names, path), manifest.weights)
    if kind == "zip" and path.is_dir():
        raise UserError(f"data.kind=zip, but {root} is a folder: use data.kind=folder, or leave it auto")
    if kind == "folder" and not path.is_dir():
        raise UserError(f"data.kind=folder, but {root} is a file: use data.kind=zip, or leave it auto")
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"{root} is neither a folder nor a zip archive")
    is_omniglot = kind in ("omniglot", "omniglot_train")
    wanted = int(channels) if channels != "auto" else (1 if is_omniglot else 3)
    images = FolderImages(path, wanted) if path.is_dir() else ZipImages(path, wanted)
    if not images.names:
        raise UserError(f"no image in {root}: looked for {', '.join(EXTENSIONS)} at every depth")
    if is_omniglot:
        parse(images.names[0])
        images.kind = "omniglot"
    if kind == "omniglot_train":
        return Part(images, kind, np.flatnonzero(~held_out(images.names)).tolist())
    return images


def visits(images: Images) -> int:
    """Of images in an epoch."""
    return len(images.names) if images.weights is None else max(1, round(float(images.weights.sum())))


def fingerprint(images: Images) -> str:
    """A short digest of the images' names, order and weights: a resumed run must see the same pool."""
    digest = hashlib.sha256()
    for name in images.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    if images.weights is not None:
        digest.update(images.weights.tobytes())
    return digest.hexdigest()[:16]


def stamp(images: Images) -> str:
    """A digest of where a pool's files lie, how long they are and when they were written."""
    digest = hashlib.sha256()
    while isinstance(images, Part):
        images = images.whole
    files: list[Path] = []
    if isinstance(images, FolderImages):
        files = [images.root / name for name in images.names]
    elif isinstance(images, ZipImages):
        files = [images.path]
    for file in files:
        try:
            facts = file.stat()
            digest.update(repr((str(file.resolve()), facts.st_size, facts.st_mtime_ns)).encode("utf-8", "replace"))
        except OSError:
            digest.update(b"gone")
    return digest.hexdigest()[:16]


def labels_of(names: Sequence[str]) -> list[str] | None:
    """The first level at which paths differ, as class names; None if that is the file itself, or there is one class."""
    parents = [name.split("/")[:-1] for name in names]
    depth = min(map(len, parents), default=0)
    for level in range(depth):
        labels = [parts[level] for parts in parents]
        if len(set(labels)) > 1:
            return labels
    return None


def is_image(name: str) -> bool:
    """Whether a file name has the ending of a format that is read."""
    return name.lower().endswith(EXTENSIONS)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _image_paths(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the image files below `root`; links are followed, a loop of links only once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        yield from ((relative / file).as_posix() for file in files if is_image(file) and not file.startswith("."))
