"""Columns of people's own tables: which one holds paths, images, labels or weights, by the names that are usual."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dino.errors import UserError
from dino.files import shown

GROWTH, SLACK = 100, 2**26  # what a table may become of its file's bytes, and bytes that any may take
PATHS = ("path", "file_path", "filepath", "image_path", "file_name", "filename", "file", "image", "img", "url", "uri")
LABELS = ("label", "labels", "class", "class_name", "target", "category", "cls")
WEIGHTS = ("weight", "sample_weight")
IMAGES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "data")


def first_of(names: list[str], usual: tuple[str, ...]) -> str | None:
    """The column, as the table writes it, that has one of the usual names."""
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def require_rows(file: pq.ParquetFile, size: int, path: str | Path) -> None:
    """Raise `UserError` for a file of `size` bytes that says of itself that it becomes far larger when it is read."""
    facts = file.metadata
    unpacked = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    if facts.num_rows > 8 * size + 1000 or unpacked > GROWTH * size + SLACK:
        raise UserError(
            f"{shown(str(path))}: {facts.num_rows:,} rows of {unpacked:,} bytes in a file of {size:,} are no table of "
            "images: what it says of itself cannot be"
        )


def require_names(names: list[str], path: str | Path) -> None:
    """Raise `UserError` where two columns have one name."""
    if repeated := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise UserError(f"{shown(str(path))} has several columns called {shown(repeated[0][:100])}: rename the others")


def without_views(table: pa.Table) -> pa.Table:
    """A table whose texts are of the kind that Arrow can sort and take from; Polars writes them as views."""
    for number, field in enumerate(table.schema):
        if field.type == pa.string_view():
            table = table.set_column(number, field.name, table[number].cast(pa.large_string()))
    return table


def require_texts(table: pa.Table, size: int, path: str | Path) -> None:
    """Raise `UserError` where texts that repeat, packed in a file of `size` bytes, would fill the memory."""
    for name in table.column_names:
        if pa.types.is_dictionary(table[name].type):
            chunks = table[name].chunks
            lengths = [pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0 for chunk in chunks]
            if sum(lengths) > GROWTH * size + SLACK:
                raise UserError(f"{shown(str(path))}: {shown(name[:100])} holds {sum(lengths):,} bytes of text")


def as_text(column: pa.ChunkedArray | pa.Array, whose: str = "") -> pa.Array:
    """Numbers and texts as texts, in one piece; raises `UserError`, which begins with `whose`, for what is neither."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        text = array.cast(pa.large_string())
        text.validate(full=True)  # that it is UTF-8 is no more than said by a file
    except pa.ArrowException as error:
        kind = shown(str(array.type))
        what = f"{whose}a column of type {kind}"
        raise UserError(f"{what} holds neither numbers nor text in UTF-8: leave it out") from error
    return text


def as_labels(column: pa.ChunkedArray | pa.Array | None) -> pa.DictionaryArray | None:
    """Class names for every image; None where some have none or several, or there is one class."""
    if column is None or column.null_count or pa.types.is_nested(column.type):
        return None
    labels = as_text(column).cast(pa.large_binary()).dictionary_encode()
    return labels if len(labels.dictionary) > 1 else None


def as_weights(column: pa.ChunkedArray, table: str, name: str) -> np.ndarray:
    """(N,) fp64, as many in all as there are above 0; raises `UserError` for what is no weight."""
    try:
        weights = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{table}: weights must be numbers, {name} is {column.type}") from error
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise UserError(f"{table}: weights must be numbers from 0 on, row {wrong[0] + 1} of {name} is not")
    if not (weights > 0).any():
        raise UserError(f"{table}: no weight in {name} is above 0")
    weights = weights / weights.max()  # whose sum is finite
    return weights * (np.count_nonzero(weights) / weights.sum())
