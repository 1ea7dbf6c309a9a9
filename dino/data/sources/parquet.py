"""Parquet files that hold images as bytes, as Hugging Face's data sets have them: one, many, or a folder of them.

A row can only be had with its row group, so a few groups are kept in memory; `data.order=shards` reads them in turn.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino.data.formats import UnreadableImage
from dino.data.sources.columns import (
    IMAGES,
    LABELS,
    WEIGHTS,
    as_labels,
    as_text,
    as_weights,
    first_of,
    require_rows,
    without_views,
)
from dino.data.sources.source import FileSource, Kind, digest_of, no_image, packed, require_bytes
from dino.data.sources.storage import File, files_of, is_pattern, is_remote, most_common_ending, opened, short_names
from dino.errors import UserError
from dino.files import shown

ENDINGS = (".parquet",)
KEPT = 256 << 20  # bytes of row groups that a process keeps
LARGEST_GROUP = 2 << 30  # bytes of a row group


class ParquetSource(FileSource):
    """Images in the order of files and rows, named `<file>/<row>`; `shards` are row groups.

    Labels are a column with one of the usual names, or the only one that the file says is of classes, by whose names
    they are called; weights are a column `weight`.
    """

    def __init__(self, root: str):
        super().__init__()
        self.files = files_of(root, ENDINGS)
        if not self.files:
            raise UserError(no_image(root, self.left_out))
        schema, groups, tables = None, [], []
        for number, file in enumerate(self.files):
            with _open(file) as opened_file:
                if schema is None:
                    schema = opened_file.schema_arrow
                    self.image = image_column(schema) or ""
                    self.small = [field.name for field in schema if not _holds_bytes(field.type)]
                elif opened_file.schema_arrow.names != schema.names:
                    raise UserError(f"{file.path} has other columns than {self.files[0].path}")
                require_rows(opened_file, file.size, file.path)
                groups += [(number, group, rows) for group, rows in enumerate(_groups(opened_file, file))]
                tables.append(without_views(opened_file.read(columns=self.small)))
        assert schema is not None
        if not self.image:
            raise UserError(f"{self.files[0].path} has no column of image bytes: {', '.join(schema.names)}")
        self.groups = np.array(groups).reshape(-1, 3)  # file, group in it, rows
        self.starts = np.concatenate([[0], np.cumsum(self.groups[:, 2])])
        self.shard_of = self.shards = np.repeat(np.arange(len(self.groups), dtype=np.int32), self.groups[:, 2])
        self.table, self.classes = pa.concat_tables(tables), class_names(schema)
        self.names = self._names()
        if not len(self.names):
            raise UserError(no_image(root, self.left_out))
        label = first_of(self.small, LABELS) or (next(iter(self.classes)) if len(self.classes) == 1 else None)
        self.labels = None if label is None else as_labels(self.column(label))
        if weight := first_of(self.small, WEIGHTS):
            self.weights = as_weights(self.table[weight], root, weight)
        self._kept = _Kept()

    def _names(self) -> pa.Array:
        rows_of_files = np.bincount(self.groups[:, 0], weights=self.groups[:, 2], minlength=len(self.files)).astype(int)
        names = zip(short_names([file.path for file in self.files]), rows_of_files.tolist(), strict=True)
        return packed(f"{name}/{row:08d}" for name, rows in names for row in range(rows))

    def read(self, index: int) -> bytes:
        group = int(self.shard_of[index])
        content = self._kept.get(group, lambda: self._read_group(group))[index - int(self.starts[group])].as_py()
        if isinstance(content, dict):
            content = content["bytes"]
        if content is None:
            raise UnreadableImage("the row has no bytes")
        require_bytes(len(content), self.max_bytes)
        return content

    def _read_group(self, group: int) -> pa.ChunkedArray:
        number, group_of_file, rows = self.groups[group].tolist()
        try:
            with _open(self.files[number]) as file:
                column = file.read_row_group(group_of_file, columns=[self.image]).column(0)
        except UserError as error:
            raise UnreadableImage(str(error)) from error
        if len(column) != rows:
            raise UnreadableImage(f"{self.files[number].path} is not what it was")
        return column

    def stamp(self) -> str:
        return digest_of(self.files)

    def column(self, name: str) -> pa.Array | None:
        if name not in self.small:
            return None
        column = self.table[name].combine_chunks()
        if pa.types.is_nested(column.type):
            return None
        if not (classes := self.classes.get(name)) or not pa.types.is_integer(column.type):
            return as_text(column)
        numbers = column.to_numpy(zero_copy_only=False)  # NaN where there is none; −1 in test sets without labels
        named = ~np.isnan(numbers) & (numbers >= 0) & (numbers < len(classes))
        indices = pa.array(np.where(named, numbers, 0).astype(np.int64), mask=~named)
        return pa.array(classes, pa.large_string()).take(indices)

    def columns(self) -> list[str]:
        return [field.name for field in self.table.schema if not pa.types.is_nested(field.type)]


class _Kept:
    """The row groups that this process has read last; in another process there are none."""

    def __init__(self) -> None:
        self._lock, self._groups = threading.Lock(), OrderedDict[int, pa.ChunkedArray]()

    def get(self, group: int, read: Any) -> pa.ChunkedArray:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = read()
            self._groups.move_to_end(group)
            while len(self._groups) > 1 and sum(column.nbytes for column in self._groups.values()) > KEPT:
                self._groups.popitem(last=False)
            return self._groups[group]

    def __reduce__(self) -> tuple:
        return _Kept, ()


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds images: {bytes, path} as Hugging Face has it, or bytes; the usual name where several do."""
    names = [field.name for field in schema if _holds_bytes(field.type)]
    return names[0] if len(names) == 1 else first_of(names, IMAGES)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _holds_bytes(kind.field(position).type)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the classes of each column whose numbers stand for such, as Hugging Face notes them in the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: list(map(str, facts["names"])) for name, facts in features.items() if "names" in facts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


@contextmanager
def _open(file: File) -> Iterator[pq.ParquetFile]:
    """Raises `UserError` where it is none, or turns out to be damaged while it is open."""
    try:
        with opened(file) if is_remote(file.path) else pa.OSFile(file.path) as stream:
            yield pq.ParquetFile(stream)
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file.path} cannot be read as Parquet: {shown(reason)}") from error


def _groups(opened_file: pq.ParquetFile, file: File) -> list[int]:
    """Rows of each row group; raises `UserError` where one is too large to be held."""
    rows = []
    for number in range(opened_file.num_row_groups):
        # Of the group's columns nothing is asked: where those are damaged, pyarrow ends the process.
        group = opened_file.metadata.row_group(number)
        size = group.total_byte_size
        if size > LARGEST_GROUP:
            raise UserError(
                f"{file.path} has row groups of {size / 2**30:.1f} GiB, each of which would be read for one image: "
                "write it anew with row_group_size=100"
            )
        rows.append(group.num_rows)
    return rows


def is_image_parquet(path: str) -> bool:
    """Whether a Parquet file has a column of image bytes; raises `UserError` for one that cannot be read."""
    files = files_of(path, ENDINGS)
    if not files:
        return False
    with _open(files[0]) as file:
        return image_column(file.schema_arrow) is not None


def _accepts(root: str) -> bool:
    if root.lower().endswith(ENDINGS):
        if not (os.path.isfile(root) or is_remote(root) or is_pattern(root)):
            return False
        return is_image_parquet(root)
    return most_common_ending(root) in ENDINGS


KIND = Kind(open=ParquetSource, accepts=_accepts, noun="Parquet files with images")
