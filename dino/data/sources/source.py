"""What a source of images is, and what those that hold image files have in common."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from dino.data.decode import EXTENSIONS
from dino.errors import UserError

BLOCK = 1 << 16  # names that are Python strings at the same time


class Source(Protocol):
    """Images by number, the same in every process and on every start; worker processes get it pickled or forked."""

    names: pa.Array  # (N,) unique, as `packed` gives them
    labels: pa.DictionaryArray | None  # (N,) class names; None where they are not known

    def read(self, index: int) -> bytes | Tensor:
        """An image file's bytes, or (C, H, W) uint8; raises `UnreadableImage`."""
        ...

    def stamp(self) -> str:
        """Another one when the images' content has changed."""
        ...


@dataclass(frozen=True)
class Kind:
    """How a root is opened that `data.kind` calls by this kind's name."""

    open: Callable[[str], Source]  # raises `UserError`
    accepts: Callable[[str], bool]  # whether a root can be opened so
    noun: str = ""  # what such a root is; `data.kind=auto` chooses among kinds that have one
    channels: int = 3  # of the images, where data.channels=auto
    fixed: bool = False  # whether the images cannot be brought to another number of channels
    subset: Callable[[Source], np.ndarray] | None = None  # indices of the images that belong to the pool; None: all


def packed(names: Iterable[str]) -> pa.Array:
    """Names as bytes in Arrow: 8 bytes a name more than its letters, where a Python string costs 60 more.

    A file name's bytes that are not UTF-8 are surrogates in Python; they are encoded as such ("surrogatepass"), so that
    the order of the bytes is the order of the strings, whatever they hold.
    """
    encoded = (name.encode("utf-8", "surrogatepass") for name in names)
    blocks = [pa.array([], pa.large_binary())]
    while block := list(islice(encoded, BLOCK)):
        blocks.append(pa.array(block, pa.large_binary()))
    return pa.concat_arrays(blocks)


class Names(Sequence[str]):
    """Packed names, or those at (N,) indices, of which only those that are asked for become Python strings."""

    def __init__(self, names: pa.Array, indices: np.ndarray | None = None):
        self._names, self._indices = names, indices

    def packed(self, part: slice = slice(None)) -> pa.Array:
        """Some of the names, or all, as the source has them."""
        return self._names[part] if self._indices is None else self._names.take(pa.array(self._indices[part]))

    def __len__(self) -> int:
        return len(self._names if self._indices is None else self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [_text(name) for name in self.packed(index).to_pylist()]
        return _text(self._names[int(index if self._indices is None else self._indices[index])].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]


def _text(name: bytes | str) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "surrogatepass")


def sorted_files(names: Iterable[str], root: str) -> pa.Array:
    """Names of image files, packed and in order; raises `UserError` where there is none."""
    files = packed(names)
    if not len(files):
        raise UserError(f"no image in {root}: looked for {', '.join(EXTENSIONS)} at every depth")
    return files.take(pc.sort_indices(files))


def folder_labels(names: pa.Array) -> pa.DictionaryArray | None:
    """The first level at which paths differ, as class names; None if that is the file itself, or there is one class."""
    if not len(names):
        return None
    extremes = pc.min_max(names).as_py()
    first, last = (extremes[key].split(b"/")[:-1] for key in ("min", "max"))
    shared = 0  # what the first and the last in order have in common, all have
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    if pc.min(pc.count_substring(names, "/")).as_py() <= shared:
        return None
    parts = pc.split_pattern(names, "/", max_splits=shared + 1)
    return pc.list_element(parts, shared).dictionary_encode()


def stamp_of(files: Iterable[Path]) -> str:
    """A digest of where files lie, how long they are and when they were written."""
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
            digest.update(repr((str(file.resolve()), facts.st_size, facts.st_mtime_ns)).encode("utf-8", "replace"))
        except OSError:
            digest.update(b"gone")
    return digest.hexdigest()[:16]
