"""What a source of images is, and what those that hold image files have in common."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from dino.data.formats import EXTENSIONS, Limits, UnreadableImage
from dino.errors import UserError
from dino.files import shown

# Not to wait for a pipe; and, on Windows, not to change line ends. Either system lacks the other's flag.
READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
BLOCK = 1 << 16  # names that are Python strings at the same time


class Source(Protocol):
    """Images by number, the same in every process and on every start; worker processes get it pickled or forked."""

    names: pa.Array  # (N,) unique, as `packed` gives them
    labels: pa.DictionaryArray | None = None  # (N,) class names; None where they are not known
    weights: np.ndarray | None = None  # (N,) how often each is visited in an epoch, on average; None: once
    shards: np.ndarray | None = None  # (N,) int32, images that are best read together have the same; None: unknown

    def read(self, index: int) -> bytes | Tensor:
        """An image file's bytes, or (C, H, W) uint8; raises `UnreadableImage`."""
        ...

    def stamp(self) -> str:
        """Another one when the images' content has changed."""
        ...

    def column(self, name: str) -> pa.Array | None:
        """(N,) text that the source has of its images under a name of its own; None: it has nothing of that name."""
        return None

    def location(self, index: int) -> Path | None:
        """Of an image that is a file of its own on this machine."""
        return None

    def columns(self) -> list[str]:
        """The names of its columns, for a message."""
        return []


class LeftOut:
    """What was found beside the images of a source: how much of each kind, and an example or two."""

    KINDS, EXAMPLES = 20, 3  # of which more are not told apart, or not named

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def note(self, kind: str, name: str) -> None:
        """One more of a kind, in the words of a message."""
        if kind not in self.counts and len(self.counts) >= self.KINDS:
            kind = "of other kinds"
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < self.EXAMPLES:
            examples.append(shown(name))

    def note_file(self, name: str) -> None:
        """A file that is named like no image."""
        ending = os.path.splitext(name)[1].lower()
        self.note(shown(ending) if 1 < len(ending) <= 10 else "without an ending", name)

    def __str__(self) -> str:
        kinds = []
        for kind, count in self.counts.most_common():
            examples = ", ".join(self.examples[kind])
            kinds.append(f"{count:,} {kind} ({examples}{', …' if count > len(self.examples[kind]) else ''})")
        return "; ".join(kinds)


class FileSource(Source):
    """What sources of image files have besides: a limit on a file's size, and what they left out."""

    def __init__(self) -> None:
        self.max_bytes = Limits().bytes
        self.left_out = LeftOut()


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """A regular file's content.

    Raises:
        UnreadableImage: it is gone, no regular file (which could be waited for, or never end), or too large.
    """
    try:
        descriptor = os.open(path, READING)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableImage("it is not a regular file")
            require_bytes(facts.st_size, max_bytes)
            return file.read(facts.st_size)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def require_bytes(size: int, max_bytes: int) -> None:
    """Raise `UnreadableImage` for a file of more bytes than allowed."""
    if size > max_bytes:
        raise UnreadableImage(f"{size:,} bytes are more than data.max_bytes={max_bytes:,} allows")


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


def below(folders: pa.Array | bytes, names: pa.Array) -> pa.Array:
    """`<folder>/<name>` of packed names, in one folder or (N,) folders."""
    folders = pa.scalar(folders, pa.large_binary()) if isinstance(folders, bytes) else folders
    return pc.binary_join_element_wise(folders, names, pa.scalar(b"/", pa.large_binary()))


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
            return [text_of(name) for name in self.packed(index).to_pylist()]
        return text_of(self._names[int(index if self._indices is None else self._indices[index])].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]


def text_of(name: bytes | str) -> str:
    """A name as a Python string."""
    return name if isinstance(name, str) else name.decode("utf-8", "surrogatepass")


def sorted_files(names: Iterable[str], root: str, left_out: LeftOut) -> pa.Array:
    """Names of image files, packed and in order; raises `UserError` where there is none."""
    files = packed(names)
    if not len(files):
        raise UserError(no_image(root, left_out))
    return files.take(pc.sort_indices(files))


def no_image(root: str, left_out: LeftOut) -> str:
    """What is said of a root in which there is none."""
    others = f"; there are {left_out}" if left_out.counts else ""
    return f"no image in {root}: looked for {', '.join(EXTENSIONS)} at every depth{others}"


def folder_labels(names: pa.Array) -> pa.DictionaryArray | None:
    """The first level at which paths differ, as class names; None if that is the file itself, or there is one class.

    Where that level is of parts of a data set (train/, val/), classes are of the level below it.
    """
    level = first_difference(names)
    if level is None:
        return None
    labels = components(names, level)
    if not split_roles(labels.dictionary):
        return labels
    if pc.min(pc.count_substring(names, "/")).as_py() <= level + 1:
        return None
    labels = components(names, level + 1)
    return labels if len(labels.dictionary) > 1 else None


def first_difference(names: pa.Array) -> int | None:
    """The first level of folders at which sorted paths differ; None where there is none above the files."""
    if not len(names):
        return None
    extremes = pc.min_max(names).as_py()
    first, last = (extremes[key].split(b"/")[:-1] for key in ("min", "max"))
    shared = 0  # what the first and the last in order have in common, all have
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return shared if pc.min(pc.count_substring(names, "/")).as_py() > shared else None


def components(names: pa.Array, level: int) -> pa.DictionaryArray:
    """The folder of each path at a level, which all of them must have."""
    return pc.list_element(pc.split_pattern(names, "/", max_splits=level + 1), level).dictionary_encode()


LEARN, TEST = (
    re.compile(rb"\b(train|training)\d*\b"),
    re.compile(rb"\b(test|testing|val|valid|validation|dev|eval)\d*\b"),
)


def split_roles(folders: pa.Array) -> dict[bytes, str]:
    """Which folders of one level hold the images to learn from and which those to test on, `learn` or `test`.

    Empty unless each folder is one or the other, and both are there: train2017/ and val2017/, seg_train/ and seg_test/.
    """
    roles = {}
    for folder in folders.to_pylist():
        words = folder.lower().replace(b"_", b" ")
        is_learn, is_test = LEARN.search(words), TEST.search(words)
        if bool(is_learn) == bool(is_test):
            return {}
        roles[folder] = "learn" if is_learn else "test"
    return roles if set(roles.values()) == {"learn", "test"} else {}


def digest_of(rows: Iterable[Any]) -> str:
    """A short digest of rows of facts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


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
