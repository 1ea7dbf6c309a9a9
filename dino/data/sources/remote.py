"""Image files in object storage: s3://bucket/folder, gs://…, and whatever else fsspec has a package for."""

import numpy as np
import pyarrow as pa

from dino.data.formats import EXTENSIONS
from dino.data.sources.source import FileSource, Kind, digest_of, folder_labels, no_image, packed, require_bytes
from dino.data.sources.storage import File, files_of, is_pattern, is_remote, most_common_ending, read, short_names
from dino.errors import UserError


class RemoteSource(FileSource):
    """Image files at every depth, sorted by path; the first folder level is the label, as in a folder."""

    def __init__(self, root: str):
        super().__init__()
        files = files_of(root, EXTENSIONS)
        if not files:
            raise UserError(no_image(root, self.left_out))
        names = short_names([file.path for file in files])
        self.base = files[0].path[: len(files[0].path) - len(names[0])]
        self.names, self.sizes = packed(names), np.array([file.size for file in files])
        self.written = pa.array([file.written for file in files])
        self.labels = folder_labels(self.names)

    def read(self, index: int) -> bytes:
        require_bytes(int(self.sizes[index]), self.max_bytes)
        return read(self._file(index))

    def stamp(self) -> str:
        return digest_of(self._file(index) for index in range(len(self.names)))

    def _file(self, index: int) -> File:
        path = self.base + self.names[index].as_py().decode("utf-8", "surrogatepass")
        return File(path, int(self.sizes[index]), self.written[index].as_py())


def _accepts(root: str) -> bool:
    return is_remote(root) and (is_pattern(root) or most_common_ending(root) == "image")


KIND = Kind(open=RemoteSource, accepts=_accepts, noun="images in object storage")
