"""The image files in a zip archive."""

import io
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dino.data.formats import EXTENSIONS, UnreadableImage, reason_of
from dino.data.sources.source import FileSource, Kind, Names, folder_labels, require_bytes, sorted_files, stamp_of
from dino.errors import UserError

# What reading a member takes, under the names that `zipfile.ZipInfo` has for it: 32 bytes instead of its 700.
FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")
MEMBER = np.dtype({"names": FIELDS, "formats": ("i8", "i8", "i8", "u4", "u2", "u2")})
ENCRYPTED = 1  # of flag_bits
PIECE = 1 << 20  # bytes read at a time
BLIND_PIECE = 64  # compressed bytes of kinds that zipfile expands as far as they go: a bzip2 block of 50 to 45 MB


class ZipSource(FileSource):
    """Images read in place, sorted by path; nothing is extracted, so no member's name can reach a path outside."""

    def __init__(self, root: str):
        super().__init__()
        self.path = Path(root)
        self._local = threading.local()
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = self._images(archive.infolist())
        except Exception as error:  # BadZipFile, OSError, NotImplementedError, ValueError, IndexError, struct.error …
            raise UserError(f"{root} cannot be read as a zip archive: {reason_of(error)}") from error
        self.names = sorted_files(members, root, self.left_out)
        self.labels = folder_labels(self.names)
        self.members = np.empty(len(self.names), MEMBER)
        self.stored_names: dict[int, str] = {}  # of members that zipfile gives another name than the archive does
        for index, name in enumerate(Names(self.names)):
            member = members[name]
            self.members[index] = tuple(getattr(member, field) for field in FIELDS)
            if member.orig_filename != name:
                self.stored_names[index] = member.orig_filename

    def read(self, index: int) -> bytes:
        member = zipfile.ZipInfo(Names(self.names)[index])
        member.orig_filename = self.stored_names.get(index, member.orig_filename)
        for field, value in zip(FIELDS, self.members[index].tolist(), strict=True):
            setattr(member, field, value)
        require_bytes(member.file_size, self.max_bytes)
        if member.flag_bits & ENCRYPTED:
            raise UnreadableImage("it is encrypted: unpack the archive with its password")
        try:
            return self._content(member)
        except NotImplementedError as error:
            raise UnreadableImage("its compression is not read here: pack it anew without one") from error
        except Exception as error:  # BadZipFile, and whatever zlib, bz2 and lzma raise
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error

    def _content(self, member: zipfile.ZipInfo) -> bytes:
        """Of a member, which need not be as long as it says: no more is expanded than that."""
        content = io.BytesIO()  # whose bytes are given out without a copy
        file: Any
        with self._archive().open(member) as file:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                file.MIN_READ_SIZE = BLIND_PIECE
            while piece := file.read(PIECE if file.MIN_READ_SIZE > BLIND_PIECE else BLIND_PIECE):
                content.write(piece)
        return content.getvalue()

    def _images(self, members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        """By their names, of which the last counts where one comes twice; what is hidden is passed over."""
        images = {}
        for member in members:
            folders_and_file = member.filename.split("/")
            is_hidden = any(part.startswith(".") and part not in (".", "..") for part in folders_and_file)
            if is_hidden or member.is_dir() or folders_and_file[0] == "__MACOSX":
                continue
            if member.filename.lower().endswith(EXTENSIONS):
                images[member.filename] = member
            else:
                self.left_out.note_file(member.filename)
        return images

    def stats(self) -> np.ndarray:
        """(N, 2) int64: bytes of each file, unpacked, and when the archive was written, in ns."""
        written = np.full(len(self.members), self.path.stat().st_mtime_ns)
        return np.stack([self.members["file_size"], written], axis=1)

    def stamp(self) -> str:
        return stamp_of([self.path])

    def _archive(self) -> zipfile.ZipFile:
        # An open archive has one file position, which processes forked from this one must not share.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = _Archive(self.path), os.getpid()
        return self._local.archive

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _local=threading.local())


class _Archive(zipfile.ZipFile):
    """An archive whose list of members is known: not read and kept once more, 700 bytes a member, in every thread."""

    def _RealGetContents(self) -> None:  # should zipfile rename it, reading costs that memory and works as before
        pass


def _is_archive(root: str) -> bool:
    return os.path.isfile(root) and zipfile.is_zipfile(root)


KIND = Kind(open=ZipSource, accepts=_is_archive, noun="a zip archive")
