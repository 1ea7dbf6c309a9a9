"""The image files in a zip archive."""

import os
import threading
import zipfile
from pathlib import Path

import numpy as np

from dino.data.decode import EXTENSIONS, UnreadableImage
from dino.data.sources.source import Kind, Names, folder_labels, sorted_files, stamp_of
from dino.errors import UserError

# What reading a member takes, under the names that `zipfile.ZipInfo` has for it: 32 bytes instead of its 700.
FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")
MEMBER = np.dtype({"names": FIELDS, "formats": ("i8", "i8", "i8", "u4", "u2", "u2")})


class ZipSource:
    """Images read in place, sorted by path; nothing is extracted, so no member's name can reach a path outside."""

    def __init__(self, root: str):
        self.path = Path(root)
        self._local = threading.local()
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = {member.filename: member for member in archive.infolist() if _is_visible_image(member)}
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{root} cannot be read as a zip archive: {error}") from error
        self.names = sorted_files(members, root)
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
        try:
            return self._archive().read(member)
        except Exception as error:  # BadZipFile, and whatever zlib, bz2 and lzma raise
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error

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


def _is_visible_image(member: zipfile.ZipInfo) -> bool:
    folders_and_file = member.filename.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in folders_and_file)
    return folders_and_file[-1].lower().endswith(EXTENSIONS) and not hidden and folders_and_file[0] != "__MACOSX"


def _is_archive(root: str) -> bool:
    return os.path.isfile(root) and zipfile.is_zipfile(root)


KIND = Kind(open=ZipSource, accepts=_is_archive, noun="a zip archive")
