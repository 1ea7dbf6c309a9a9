"""All image files below a folder."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dino.data.formats import EXTENSIONS
from dino.data.sources.source import FileSource, Kind, LeftOut, Names, folder_labels, read_file, sorted_files, stamp_of
from dino.errors import UserError

KERNEL = ("/proc", "/sys")  # whose files are made when they are read, and lead everywhere
OF_A_RUN = {"metrics.jsonl", "checkpoints", "manifest.parquet", "report.html"}


class FolderSource(FileSource):
    """Image files at every depth, sorted by path; the first folder level is the label, if there are several."""

    def __init__(self, root: str):
        super().__init__()
        self.root = Path(root)
        if _is_of_the_kernel(os.path.realpath(root)):
            raise UserError(f"{root} is no folder of images: it belongs to the kernel")
        self.names = sorted_files(_image_paths(self.root, self.left_out), root, self.left_out)
        self.labels = folder_labels(self.names)

    def read(self, index: int) -> bytes:
        return read_file(self.root / Names(self.names)[index], self.max_bytes)

    def location(self, index: int) -> Path:
        return self.root.absolute() / Names(self.names)[index]

    def stats(self) -> np.ndarray:
        """(N, 2) int64: bytes of each file, and when it was written, in ns; −1 where it is gone."""
        names = Names(self.names)
        with ThreadPoolExecutor(8) as threads:  # a server takes its time for each, and a file only looks up
            blocks = threads.map(self._stats, (names[start : start + 4096] for start in range(0, len(names), 4096)))
            return np.concatenate(list(blocks))

    def _stats(self, names: list[str]) -> np.ndarray:
        stats = np.full((len(names), 2), -1, np.int64)
        for row, name in enumerate(names):
            with contextlib.suppress(OSError):
                facts = os.stat(self.root / name)
                stats[row] = facts.st_size, facts.st_mtime_ns
        return stats

    def stamp(self) -> str:
        return stamp_of(self.root / name for name in Names(self.names))


def _image_paths(root: Path, left_out: LeftOut) -> Iterator[str]:
    """Relative POSIX paths of regular files; links are followed, a loop of links only once, and what is hidden, or of a
    run's own directory, is passed over."""
    seen, folders = set(), [""]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(root / folder)
        if real in seen or _is_of_the_kernel(real):
            continue
        seen.add(real)
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=_name)
        except OSError as error:
            left_out.note(f"folders that cannot be listed: {error.strerror}", folder or str(root))
            continue
        if folder and _is_a_run({entry.name for entry in entries}):
            left_out.note("directories of runs", folder)
            continue
        subfolders = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                subfolders.append(path)
            elif not entry.name.lower().endswith(EXTENSIONS):
                left_out.note_file(path)
            elif _is_special(entry):
                left_out.note("not a regular file", path)
            else:
                yield path
        folders.extend(reversed(subfolders))


def _name(entry: os.DirEntry) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, or where nothing may be looked at
        return False


def _is_special(entry: os.DirEntry) -> bool:
    """A pipe, device or socket. A link to nothing is taken for a file that is gone, which reading tells."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def _is_a_run(names: set[str]) -> bool:
    return "config.yaml" in names and bool(names & OF_A_RUN)


def _is_of_the_kernel(path: str) -> bool:
    return path.startswith(tuple(f"{folder}/" for folder in KERNEL)) or path in KERNEL


KIND = Kind(open=FolderSource, accepts=os.path.isdir, noun="a folder")
