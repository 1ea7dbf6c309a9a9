"""One run, one writer: a run directory is held by the process that trains in it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dino.errors import UserError
from dino.files import way_out

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".running"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # what a link leads to would be emptied; Windows has no such flag


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, in which `LOCK` says who does; given back at the end, by whatever end.

    The lock is the system's and ends with the process, so that a killed run leaves none behind; forked workers do not
    inherit it.

    Raises:
        UserError: another process holds the folder, which the message names with its machine; or it cannot be written.
    """
    file, made = folder / LOCK, [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written: {error.strerror or error}") from error
    try:
        descriptor = _locked(file)
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{file}, which says who runs, cannot be written ({reason}): {way_out(error)}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone by then
            file.unlink()
        os.close(descriptor)
        with suppress(OSError):  # what was made for a run that wrote nothing
            for path in made:
                path.rmdir()


def require_free(folder: Path) -> None:
    """Raise a `UserError` if another process holds the folder; nothing is written."""
    if is_held(folder):
        raise _in_use(folder / LOCK)


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder; to be asked by another process, where the system has locks."""
    file = folder / LOCK
    try:
        descriptor = os.open(file, os.O_RDWR | NO_LINK)
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def _locked(file: Path) -> int:
    """A descriptor of the file, locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            raise _in_use(file)
        # Whoever held it may just have removed it: then this is no longer the file that others look at.
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had; also where the file system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _in_use(file: Path) -> UserError:
    holder = _holder(file)
    return UserError(
        f"{file.parent} is in use by process {holder.get('process', '?')} on {holder.get('host', '?')}: wait for its "
        "end, stop it, or name another run.dir",
        alone=True,
    )


def _holder(file: Path) -> dict[str, Any]:
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}
