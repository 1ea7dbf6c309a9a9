"""Files by path or URL, read from any byte on: local ones, and those of object storage through fsspec.

What is read of object storage is kept on disk in blocks, the first ones until DINO_BLOCK_CACHE GiB are full (10 if not
set; 0: none). Nothing is thrown out for what comes later: epochs read everything in turn, and the newest blocks would
push out those that are needed next.
"""

import glob
import hashlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dino.data.formats import EXTENSIONS, UnreadableImage, reason_of
from dino.errors import UserError
from dino.files import cache_directory, replacing

BLOCK = 4 << 20  # bytes that are fetched and kept at a time
DIGEST = hashlib.sha256().digest_size  # bytes that follow a block on disk
RECOUNTED = 64  # blocks that a process writes before it looks again how many there are
MOST_FILES = 10_000_000  # that a pattern in braces may stand for
BRACES = re.compile(r"\{([^{}]*)\}")
LOOKED_AT = 1000  # files of a folder, by which it is told what it holds
ATTEMPTS = 3  # of a request that fails


class File(NamedTuple):
    """A file as it was when it was listed."""

    path: str  # or URL
    size: int
    written: str  # when, or whatever else the storage has that changes with content


def is_remote(root: str) -> bool:
    """Whether it is an URL of a storage."""
    return "://" in root


def is_pattern(root: str) -> bool:
    """Whether it stands for several files: shards-{000..099}.tar, *.parquet."""
    return any(sign in root for sign in "{*?") and (is_remote(root) or not os.path.exists(root))


def files_of(root: str, endings: tuple[str, ...]) -> list[File]:
    """Files by a path, an URL, a pattern, or a folder (at every depth) of files with these endings, sorted by path.

    Raises:
        UserError: a file that a pattern in braces names is not there, or the storage cannot be reached.
    """
    files: list[File] = []
    for part in braces_expanded(root):
        files += _remote_files(part, endings) if is_remote(part) else _local_files(part, endings)
    return files if is_pattern(root) and "{" in root else sorted(files)


def braces_expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar, a-10.tar, and `{a,b}.tar` as a.tar, b.tar."""
    if not is_pattern(pattern):
        return [pattern]
    choices: list[Iterable[str]] = []
    count = 1
    pieces = BRACES.split(pattern)
    for inside in pieces[1::2]:
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            count *= max(0, last - first + 1)
            width = len(bounds[1]) if bounds[1].startswith("0") else 1
            choices.append(f"{number:0{width}d}" for number in range(first, last + 1))
        else:
            choices.append(inside.split(","))
            count *= inside.count(",") + 1
        if not 0 < count <= MOST_FILES:
            raise UserError(f"{pattern} stands for {count:,} files: write {{000..099}}, the smaller number first")
    texts = pieces[::2]
    return ["".join(itertools.chain(*zip(texts, (*chosen, ""), strict=True))) for chosen in itertools.product(*choices)]


def _local_files(root: str, endings: tuple[str, ...]) -> list[File]:
    if os.path.isdir(root):
        found: Iterable[str] = (
            os.path.join(folder, name)
            for folder, _, names in os.walk(root, followlinks=False)
            for name in names
            if name.lower().endswith(endings) and not name.startswith(".")
        )
    else:
        found = glob.iglob(root, recursive=True) if is_pattern(root) else [root]
    files = []
    for path in found:
        try:
            facts = os.stat(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if os.path.isfile(path):
            files.append(File(path, facts.st_size, str(facts.st_mtime_ns)))
    return files


def _remote_files(root: str, endings: tuple[str, ...]) -> list[File]:
    storage, path = storage_of(root)
    try:
        if is_pattern(root):
            found = storage.glob(path, detail=True)
        elif storage.isdir(path):
            found = storage.find(path, detail=True)
            found = {name: facts for name, facts in found.items() if name.lower().endswith(endings)}
        else:
            found = {path: storage.info(path)}
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(f"{root} cannot be read: {reason_of(error)}") from error
    return [
        File(storage.unstrip_protocol(name), int(facts["size"]), _written(facts))
        for name, facts in found.items()
        if facts["type"] == "file" and not os.path.basename(name).startswith(".")
    ]


def _written(facts: dict[str, Any]) -> str:
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime", "updated", "created")
    return str(next((facts[name] for name in names if facts.get(name)), ""))


def storage_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of an URL, which it keeps by process, and the path there."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error} (pip install s3fs for s3://, gcsfs for gs://)") from error


def most_common_ending(root: str) -> str:
    """`.tar`, `.parquet`, `.zip` or `image`: which of them most of the first 1,000 files below a folder are."""
    counts = Counter(map(_kind_of_file, itertools.islice(_file_names(root), LOOKED_AT)))
    del counts[""]
    return counts.most_common(1)[0][0] if counts else ""


def other_files_with_images(root: str, ending: str) -> list[str]:
    """Names of images and archives below a folder of which only those with this ending are read, sorted."""
    names = (name for name in _file_names(root) if not name.startswith("."))
    return sorted(name for name in names if _kind_of_file(name) not in ("", ending))


def _kind_of_file(name: str) -> str:
    ending = os.path.splitext(name.lower())[1]
    return ending if ending in (".tar", ".parquet", ".zip") else "image" if ending in EXTENSIONS else ""


def _file_names(root: str) -> Iterator[str]:
    if is_pattern(root):
        return
    try:
        for _, _, names in storage_of(root)[0].walk(root) if is_remote(root) else os.walk(root):
            yield from names
    except UserError:  # of a storage that is not known here, but may be to a source of the user's own
        return
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(f"{root} cannot be read: {reason_of(error)}") from error


def read(file: File, offset: int = 0, length: int | None = None) -> bytes:
    """Some bytes of a file; raises `UnreadableImage` where they cannot be had."""
    length = file.size - offset if length is None else length
    if offset < 0 or length < 0 or offset + length > file.size:
        raise UnreadableImage(f"{file.path} has {file.size} bytes, not {offset} + {length}")
    try:
        if is_remote(file.path):
            return _read_blocks(file, offset, length)
        with open(file.path, "rb") as opened:
            opened.seek(offset)
            content = opened.read(length)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    if len(content) != length:
        raise UnreadableImage(f"{file.path} is shorter than it was")
    return content


def _read_blocks(file: File, offset: int, length: int) -> bytes:
    folder = cache_directory() / "blocks" / hashlib.sha256("\0".join(map(str, file)).encode()).hexdigest()[:32]
    if not length:
        return b""
    numbers = range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
    kept = [folder / f"{number:06d}" for number in numbers]
    if not all(block.exists() for block in kept) and not BLOCKS.have_room():
        return _fetch(file, offset, offset + length)
    content = bytearray()
    for number, block in zip(numbers, kept, strict=True):
        content += _block(file, number, block)
    start = offset - numbers[0] * BLOCK
    return bytes(content[start : start + length])


def _block(file: File, number: int, kept: Path) -> bytes:
    first, last = number * BLOCK, min(file.size, (number + 1) * BLOCK)
    if (earlier := BLOCKS.kept(kept, last - first)) is not None:
        return earlier
    content = _fetch(file, first, last)
    BLOCKS.keep(kept, content)
    return content


def _fetch(file: File, first: int, last: int) -> bytes:
    storage, path = storage_of(file.path)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            content = storage.cat_file(path, first, last)
        except Exception as error:  # each storage has exceptions of its own
            if attempt == ATTEMPTS or isinstance(error, FileNotFoundError | PermissionError):
                raise UnreadableImage(reason_of(error)) from error
        else:
            if len(content) == last - first:
                return content
    raise UnreadableImage(f"{file.path} gave fewer bytes than were asked for")


class _Blocks:
    """Blocks on disk, each followed by its digest, and how much they take: counted now and then, as others write too.

    Attributes:
        whole: those that this process has compared with their digests.
    """

    def __init__(self) -> None:
        self.bytes, self.until_recount = 0, 0
        self.whole: set[Path] = set()

    def kept(self, path: Path, length: int) -> bytes | None:
        """A block as it was kept, or None."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        block, digest = content[:length], content[length:]
        if len(digest) != DIGEST or (path not in self.whole and hashlib.sha256(block).digest() != digest):
            return None
        self.whole.add(path)
        return block

    def have_room(self) -> bool:
        asked = os.environ.get("DINO_BLOCK_CACHE", "10")
        try:
            most = float(asked) * 2**30
        except ValueError as error:
            raise UserError(f"DINO_BLOCK_CACHE={asked} is no number of GiB") from error
        if most and not self.until_recount:
            self.bytes = sum(path.stat().st_size for path in (cache_directory() / "blocks").glob("*/??????"))
            self.until_recount = RECOUNTED
        return self.bytes + BLOCK <= most

    def keep(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False) as partial:
                partial.write_bytes(content + hashlib.sha256(content).digest())
        except OSError:  # a full disk is no reason to stop reading
            self.bytes = 1 << 62
            self.until_recount = RECOUNTED
            return
        self.bytes += len(content)
        self.until_recount = max(0, self.until_recount - 1)


BLOCKS = _Blocks()


class Reader(io.RawIOBase):
    """A file as what archives' readers take: it can be read from any byte on, and read only."""

    def __init__(self, file: File):
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence] + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.file.size - self.position))
        try:
            buffer[:length] = read(self.file, self.position, length)
        except UnreadableImage as error:
            raise OSError(str(error)) from error
        self.position += length
        return length


def opened(file: File) -> io.BufferedReader:
    """A file to be read as a stream: the local one itself, or a `Reader`."""
    return open(file.path, "rb") if not is_remote(file.path) else io.BufferedReader(Reader(file), 1 << 16)


def short_names(paths: list[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    first, last = min(paths).split("/"), max(paths).split("/")  # what these two have in common, all have
    shared = 0
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    return [path.split("/", shared)[shared] for path in paths]
