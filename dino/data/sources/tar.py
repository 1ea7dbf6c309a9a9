"""Tar archives, also many: WebDataset's shards, where key.jpg, key.cls and key.json belong together."""

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dino.data.formats import EXTENSIONS, UnreadableImage, reason_of
from dino.data.sources.index import indexed
from dino.data.sources.source import FileSource, Kind, below, digest_of, folder_labels, no_image, packed, require_bytes
from dino.data.sources.storage import File, files_of, most_common_ending, opened, read, short_names
from dino.errors import UserError

ENDINGS = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LONGEST_LABEL = 1000  # bytes of a .cls member
LONGEST_JSON = 1 << 20
SCHEMA = pa.schema(
    [
        ("name", pa.large_binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("label", pa.large_binary()),
        ("json_offset", pa.int64()),
        ("json_length", pa.int64()),
    ]
)


class TarSource(FileSource):
    """Images of all shards, in the order of shards and of members: an image is read by its offset, nothing else.

    Names are `<shard>/<member>`. Labels are those of the `.cls` members, else the folders within shards;
    `column("field")` gives a field of the `.json` members.
    """

    def __init__(self, root: str):
        super().__init__()
        self.files = files_of(root, ENDINGS)
        refuse_compressed([file.path for file in self.files])
        bar = tqdm(self.files, desc="indexing", unit="shard", leave=False, disable=len(self.files) < 2, delay=1)
        tables = [indexed(file, "tar 1", _index) for file in bar]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        if not len(table):
            raise UserError(no_image(root, self.left_out))
        self.shard_of = self.shards = np.repeat(
            np.arange(len(tables), dtype=np.int32), [len(table) for table in tables]
        )
        self.offsets, self.lengths = table["offset"].to_numpy(), table["length"].to_numpy()
        self.json = np.stack([table["json_offset"].to_numpy(), table["json_length"].to_numpy()], axis=1)
        members = table["name"].combine_chunks()
        shards = packed(short_names([file.path for file in self.files]))
        self.names = below(shards.take(pa.array(self.shard_of)), members)
        cls = table["label"]
        self.labels = folder_labels(members) if cls.null_count else cls.combine_chunks().dictionary_encode()

    def read(self, index: int) -> bytes:
        length = int(self.lengths[index])
        require_bytes(length, self.max_bytes)
        return read(self.files[self.shard_of[index]], int(self.offsets[index]), length)

    def stamp(self) -> str:
        return digest_of(self.files)

    def column(self, name: str) -> pa.Array | None:
        if name == "cls":
            return self.labels
        values = [self._json(index).get(name) for index in range(len(self.names))]
        return None if all(value is None for value in values) else pa.array(map(_text, values), pa.string())

    def columns(self) -> list[str]:
        return list(self._json(0))

    def _json(self, index: int) -> dict[str, Any]:
        offset, length = self.json[index].tolist()
        if not 0 < length <= LONGEST_JSON:
            return {}
        try:
            value = json.loads(read(self.files[self.shard_of[index]], offset, length))
        except (ValueError, RecursionError, UnreadableImage):
            return {}
        return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _index(file: File) -> pa.Table:
    """A row for each image; the last of members of one name counts, as where the archive is unpacked."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    jsons: dict[str, tuple[int, int]] = {}
    for name, offset, length, archive in _members(file):
        key, _, ending = _key(name)
        if name.lower().endswith(EXTENSIONS):
            images[name] = (offset, length)
        elif ending == "cls" and length <= LONGEST_LABEL:
            labels[key] = _content(archive, offset, length).strip()
        elif ending == "json":
            jsons[key] = (offset, length)
    keys = [_key(name)[0] for name in images]
    columns = [
        pa.array([name.encode("utf-8", "surrogatepass") for name in images], pa.large_binary()),
        pa.array([offset for offset, _ in images.values()], pa.int64()),
        pa.array([length for _, length in images.values()], pa.int64()),
        pa.array([labels.get(key) for key in keys], pa.large_binary()),
        pa.array([jsons.get(key, (0, 0))[0] for key in keys], pa.int64()),
        pa.array([jsons.get(key, (0, 0))[1] for key in keys], pa.int64()),
    ]
    return pa.table(columns, schema=SCHEMA)


def _members(file: File) -> Iterator[tuple[str, int, int, Any]]:
    """Name, offset and length of each file that is not hidden, and the open archive."""
    try:
        with opened(file) as stream, tarfile.TarFile(fileobj=stream) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or all would be kept, 1 KB each
                name = member.name.removeprefix("./")
                hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
                if member.isreg() and not member.issparse() and not hidden:
                    yield name, member.offset_data, member.size, stream
    except (tarfile.TarError, OSError, ValueError, RecursionError, MemoryError) as error:
        reason = reason_of(error) if str(error) or isinstance(error, MemoryError) else "it is cut off"
        raise UserError(f"{file.path} cannot be read as a tar archive: {reason}") from error


def _content(stream: Any, offset: int, length: int) -> bytes:
    position = stream.tell()
    stream.seek(offset)
    content = stream.read(length)
    stream.seek(position)
    return content


def _key(name: str) -> tuple[str, str, str]:
    """WebDataset's key and ending: what stands before and after the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    key, dot, ending = base.partition(".")
    return folder + slash + key, dot, ending.lower()


def refuse_compressed(paths: list[str]) -> None:
    """Raise a `UserError` that names the first archive in which no image can be reached without reading all before."""
    for path in paths:
        if path.lower().endswith(COMPRESSED):
            raise UserError(f"{path} is compressed, which images are already: unpack it to a .tar (gunzip keeps all)")


def _accepts(root: str) -> bool:
    return root.lower().endswith((*ENDINGS, *COMPRESSED)) or most_common_ending(root) in ENDINGS


KIND = Kind(open=TarSource, accepts=_accepts, noun="tar archives")
