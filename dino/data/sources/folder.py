"""All image files below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from dino.data.decode import EXTENSIONS, UnreadableImage
from dino.data.sources.source import Kind, Names, folder_labels, sorted_files, stamp_of


class FolderSource:
    """Image files at every depth, sorted by path; the first folder level is the label, if there are several."""

    def __init__(self, root: str):
        self.root = Path(root)
        self.names = sorted_files(_image_paths(self.root), root)
        self.labels = folder_labels(self.names)

    def read(self, index: int) -> bytes:
        try:
            return (self.root / Names(self.names)[index]).read_bytes()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def stamp(self) -> str:
        return stamp_of(self.root / name for name in Names(self.names))


def _image_paths(root: Path) -> Iterator[str]:
    """Relative POSIX paths; links are followed, a loop of links only once, and what is hidden is passed over."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in files:
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                yield (Path(folder).relative_to(root) / file).as_posix()


KIND = Kind(open=FolderSource, accepts=os.path.isdir, noun="a folder")
