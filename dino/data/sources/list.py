"""A list of images: a text file with a path on each line, or a CSV or Parquet table with a column of paths.

Paths are relative to the list's folder, or absolute, or URLs: it is the user's own list, and says which files to read.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dino.data.formats import UnreadableImage
from dino.data.sources.columns import (
    LABELS,
    PATHS,
    WEIGHTS,
    as_labels,
    as_text,
    as_weights,
    first_of,
    require_names,
    require_rows,
    require_texts,
    without_views,
)
from dino.data.sources.source import (
    FileSource,
    Kind,
    Names,
    digest_of,
    folder_labels,
    read_file,
    require_bytes,
    stamp_of,
)
from dino.data.sources.storage import files_of, is_remote, read
from dino.errors import UserError
from dino.files import shown

LARGEST = 2**31  # bytes of a list
TABLES = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".txt", *TABLES, ".parquet")


class ListSource(FileSource):
    """Images in the order of the list, under the paths that it has for them.

    Labels are a column with one of the usual names (`dino/data/sources/columns.py`), else the folders of paths;
    weights are a column `weight`.
    """

    def __init__(self, root: str):
        super().__init__()
        self.root = root
        table = read_table(root)
        path = first_of(table.column_names, PATHS)
        if path is None:
            names = ", ".join(map(shown, table.column_names))
            raise UserError(f"{root} has no column of paths: name one of {names} 'path'")
        texts = as_text(table[path], f"{root}, {shown(path)}: ")
        table = table.set_column(table.column_names.index(path), path, texts)
        table = table.filter(pc.fill_null(pc.not_equal(texts, ""), False))
        if not len(table):
            raise UserError(f"{root} lists no image")
        self.names = as_text(table[path]).cast(pa.large_binary())
        _refuse_repeated(self.names, root)
        self.table = table.drop_columns([path])
        label, weight = first_of(self.table.column_names, LABELS), first_of(self.table.column_names, WEIGHTS)
        self.labels = folder_labels(self.names) if label is None else as_labels(self.table[label])
        if weight is not None:
            self.weights = as_weights(self.table[weight], root, weight)

    def read(self, index: int) -> bytes:
        path = self._path(index)
        if not is_remote(path):
            return read_file(path, self.max_bytes)
        try:
            file = files_of(path, ())[0]
            require_bytes(file.size, self.max_bytes)
            return read(file)
        except IndexError as error:
            raise UnreadableImage(f"{path} is no file") from error
        except UserError as error:
            raise UnreadableImage(str(error)) from error

    def stamp(self) -> str:
        paths = (self._path(index) for index in range(len(self.names)))
        return digest_of([stamp_of([Path(self.root)]), stamp_of(Path(path) for path in paths if not is_remote(path))])

    def column(self, name: str) -> pa.Array | None:
        return as_text(self.table[name]) if name in self.table.column_names else None

    def location(self, index: int) -> Path | None:
        path = self._path(index)
        return None if is_remote(path) else Path(path).absolute()

    def columns(self) -> list[str]:
        return self.table.column_names

    def _path(self, index: int) -> str:
        path = Names(self.names)[index]
        return path if is_remote(path) else os.path.join(os.path.dirname(self.root), path)


def read_table(path: str) -> pa.Table:
    """A text file as a table of one column, or a table; raises `UserError`."""
    try:
        table = _read_table(path)
        if not table.column_names:  # which raises ValueError for names that are not UTF-8
            raise UserError(f"{path} has no columns")
        require_names(table.column_names, path)
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a list of images: {shown(reason)}") from error
    return table


def _read_table(path: str) -> pa.Table:
    size = os.path.getsize(path)
    if size > LARGEST:
        raise UserError(f"{path} cannot be read as a list of images: {size:,} bytes are more than {LARGEST:,}")
    if path.endswith(".parquet"):
        return _read_parquet(path, size)
    if path.endswith(".txt"):
        with open(path, "rb") as lines:
            stripped = (line.strip() for line in lines)
            return pa.table({"path": pa.array((line for line in stripped if line), pa.large_binary())})
    ending = os.path.splitext(path)[1].lower()
    return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter=TABLES[ending]))


def _read_parquet(path: str, size: int) -> pa.Table:
    """Text that repeats stays packed, as in the file, until it is known what it becomes."""
    with pq.ParquetFile(path) as file:
        require_rows(file, size, path)
        schema = file.schema_arrow
    require_names(schema.names, path)
    texts = [field.name for field in schema if field.type in (pa.string(), pa.large_string())]
    table = pq.read_table(path, read_dictionary=texts)
    require_texts(table, size, path)
    return without_views(table)


def _refuse_repeated(names: pa.Array, root: str) -> None:
    counts = pc.value_counts(names)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        example = repeated[0]["values"].as_py().decode("utf-8", "replace")
        raise UserError(
            f"{root} lists {len(repeated):,} images twice, for example {shown(example)}: a column 'weight' says more"
        )


def _accepts(root: str) -> bool:
    return root.lower().endswith(ENDINGS) and os.path.isfile(root)


KIND = Kind(open=ListSource, accepts=_accepts, noun="a list of paths (.csv, .tsv, .txt)")
