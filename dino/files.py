"""Files that are whole or not there, and where this project keeps what it fetched or computed once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def sync_folder(folder: Path) -> None:
    """Make sure that what was renamed in a folder stays so when the power fails."""
    _to_disk(folder)


def cache_directory() -> Path:
    """Where downloads are kept: DINO_CACHE, else ~/.cache/dino-pretrain (XDG_CACHE_HOME is honoured)."""
    if given := os.environ.get("DINO_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino-pretrain"


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
