"""Files that are whole or not there, and where this project keeps what it fetched or computed once."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dino.errors import UserError, shortened

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says where there is no room
WAYS_OUT = (
    (FULL, "make room on the disk"),
    ((errno.EACCES, errno.EPERM), "allow writing there"),
    ((errno.EROFS,), "mount that file system for writing, or name a place on another"),
    ((errno.ENOENT,), "put its folder back"),
    ((errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP), "change what stands in its way there"),
)
LARGEST_TEXT = 2**30  # bytes; no text of a run is as large


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to; once that is done it takes the place of `path`, at once and on the disk.

    A failure, or a kill, leaves what was at `path` before. Names that begin with a dot and end in `.partial` are
    passed over by everything that reads a run.

    Args:
        durable: wait for the disk, so that it outlives a power failure; what is written every second need not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            _to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as a whole; file names that are not UTF-8 keep their bytes. See `replacing`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def read_text(path: Path, fix: str = "restore it") -> str:
    """UTF-8 text of an ordinary file; file names that are not UTF-8 come back as they were written.

    Args:
        fix: what to do where it cannot be read, for the message.

    Raises:
        UserError: it cannot be read, is no ordinary file or no text.
    """
    try:
        require_regular(path)
        if path.stat().st_size > LARGEST_TEXT:
            raise OSError(errno.EFBIG, f"it has more than {LARGEST_TEXT:,} bytes")
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {fix}") from error


def read_json(path: Path, fix: str = "restore it") -> Any:
    """The JSON value in a file; see `read_text`, and raises the same for what is no JSON."""
    try:
        return json.loads(read_text(path, fix))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {fix}") from error


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        require_regular(file)
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # OSError, BadZipFile, NotImplementedError, RuntimeError, MemoryError, zlib.error …
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def require_regular(path: Path) -> None:
    """Raise OSError for what is not there or no ordinary file: a pipe or a device could be read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))


def in_the_way(path: Path, is_folder: bool) -> str:
    """Why a file, or files in a folder, could not be written at a path, which may be free; nothing if they can be.

    A folder may be a link to one. A file may not: it would be replaced, and what the link leads to stay as it was.
    """
    try:
        mode = (path.stat() if is_folder else path.lstat()).st_mode
    except FileNotFoundError:
        return "it is a link to nothing" if path.is_symlink() else ""
    except OSError as error:
        return error.strerror or str(error)
    if is_folder and not stat.S_ISDIR(mode):
        return "it is no folder"
    if stat.S_ISLNK(mode):
        return "it is a link"
    if not is_folder and not stat.S_ISREG(mode):
        return "it is a folder" if stat.S_ISDIR(mode) else "it is no ordinary file"
    return "" if os.access(path, os.W_OK) else "it may not be written"


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file, which several processes may do; where they do not fit, none of them is added.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                content = text.encode("utf-8", "surrogateescape")
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): {way_out(error)} and start the same command again; "
            "what was saved before is whole",
            alone=True,
        ) from error


def way_out(error: OSError) -> str:
    """What helps where a file could not be written, as far as the error tells: room only where there was none."""
    return next((advice for numbers, advice in WAYS_OUT if error.errno in numbers), "mend that")


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link, whose target stays; raises OSError, also if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Make sure that what was renamed in a folder stays so when the power fails; Windows has no such call."""
    if os.name != "nt":
        _to_disk(folder, os.O_RDONLY)


def shown(name: str) -> str:
    """A name for the terminal and for messages: what steers a terminal, ends a line or hides letters is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def without_controls(text: str) -> str:
    """Text of one or more lines, `shortened`, in which everything else that steers a terminal is escaped."""
    return shortened("\n".join("\t".join(map(shown, line.split("\t"))) for line in text.split("\n")))


def cache_directory() -> Path:
    """Where downloads are kept: DINO_CACHE, else ~/.cache/dino-pretrain (XDG_CACHE_HOME is honoured)."""
    if given := os.environ.get("DINO_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dino-pretrain"


def _to_disk(path: Path, access: int = os.O_RDWR) -> None:
    descriptor = os.open(path, access)  # Windows wants to be allowed to write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
