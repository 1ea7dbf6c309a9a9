"""Which class each image is of, where the user says where that stands: folders, a column, or a file."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino.data.sources.columns import LABELS, PATHS, as_text, first_of
from dino.data.sources.list import ENDINGS, read_table
from dino.data.sources.source import Names, Source, folder_labels, packed
from dino.errors import UserError
from dino.files import shown

FOLDERS = "folders"
LEVEL = re.compile(r"folders:(-?\d+)")
FILE = re.compile(rf"(.+(?:{'|'.join(re.escape(ending) for ending in ENDINGS)}))(?::([^:/\\]+))?", re.IGNORECASE)


class Table(NamedTuple):
    """Labels of a file, by what it calls the images."""

    file: str
    labels: dict[str, str]


def labels_by(wanted: str, source: Source) -> pa.DictionaryArray:
    """(N,) class names of a source's images, null where there is none.

    Args:
        wanted: `folders` (the first level at which paths differ), `folders:1` (the first from the top) or
            `folders:-1` (the one that an image lies in), a table `labels.csv` or `labels.csv:column`, or the name of a
            column that the source has.

    Raises:
        UserError: there is no such thing, it says two things of one image, or one and the same of all.
    """
    table = FILE.fullmatch(wanted)
    if wanted == FOLDERS or LEVEL.fullmatch(wanted):
        labels = _of_folders(wanted, source)
    elif table and os.path.isfile(path := os.path.expanduser(table[1])):
        labels = _of_file(_table(path, table[2]), source.names)
    elif (column := source.column(wanted)) is not None:
        labels = as_text(column).cast(pa.large_binary()).dictionary_encode()
    else:
        known = ", ".join(map(shown, source.columns()))
        raise UserError(
            f"labels={shown(wanted)} is neither a column of the images ({known or 'they have none'}) nor a file "
            f"({', '.join(ENDINGS)}) nor folders, folders:1, folders:-1"
        )
    empty = pc.equal(labels.dictionary, b"").to_numpy(zero_copy_only=False)
    numbers = labels.indices.fill_null(-1).to_numpy()
    has_label = (numbers >= 0) & ~np.append(empty, True)[numbers]
    classes = np.unique(numbers[has_label])
    if len(classes) < 2:
        only = shown(labels.dictionary[int(classes[0])].as_py().decode("utf-8", "replace")) if len(classes) else ""
        raise UserError(f"labels={shown(wanted)}: " + (f"all are '{only}'" if only else "no image has one"))
    return pa.DictionaryArray.from_arrays(pa.array(numbers, mask=~has_label), labels.dictionary)


def _of_folders(wanted: str, source: Source) -> pa.DictionaryArray:
    names = source.names
    if wanted == FOLDERS:
        labels = folder_labels(names)
        if labels is None:
            raise UserError("labels=folders: the images lie in one folder, or some in none")
        return labels
    match = LEVEL.fullmatch(wanted)
    assert match
    if not int(match[1]):
        raise UserError(f"labels={wanted}: folders count from 1 at the top, or from -1, the one that an image lies in")
    level = int(match[1]) - (int(match[1]) > 0)
    return packed(_folder(name, level, wanted) for name in Names(names)).dictionary_encode()


def _folder(name: str, level: int, wanted: str) -> str:
    folders = name.split("/")[:-1]
    try:
        return folders[level]
    except IndexError:
        raise UserError(f"labels={wanted}: {shown(name)} lies in {len(folders)} folder(s)") from None


def _table(path: str, column: str | None) -> Table:
    """The labels of a file; of a column of paths, or the first, and of the column that is asked for, or usual."""
    table = read_table(path)
    names = table.column_names
    of_images = first_of(names, PATHS) or names[0]
    others = [name for name in names if name != of_images]
    label = column or first_of(others, LABELS) or (others[0] if len(others) == 1 else None)
    if label is None or label not in others:
        asked = f"column {shown(column)}" if column else "column called label or class"
        columns = ", ".join(map(shown, others)) or "none"
        raise UserError(f"{shown(path)} has no {asked} beside {shown(of_images)}: {columns}; say which: FILE:COLUMN")
    labels: dict[str, str] = {}
    for name, text in zip(as_text(table[of_images]).to_pylist(), as_text(table[label]).to_pylist(), strict=True):
        if name and text and labels.setdefault(name, text) != text:
            raise UserError(f"{shown(path)} calls {shown(name)} both {shown(labels[name])} and {shown(text)}")
    return Table(path, labels)


def _of_file(table: Table, names: pa.Array) -> pa.DictionaryArray:
    """By whole paths; where none is known, by paths without endings, by files' names, by those without endings."""
    for key_of in (_whole, _without_ending, _file, _file_without_ending):
        by_key = _by_key(table, key_of)
        keys = [key_of(name) for name in Names(names)]
        labels = [by_key.get(key) for key in keys]
        if any(label is not None for label in labels):
            if key_of is not _whole:
                _refuse_ambiguous(table.file, keys, by_key)
            encoded = [None if label is None else label.encode("utf-8", "surrogatepass") for label in labels]
            return pa.array(encoded, pa.large_binary()).dictionary_encode()
    first = next(iter(table.labels), "no image")
    raise UserError(
        f"{shown(table.file)} knows none of the images: it speaks of {shown(first)}, they are called "
        f"{shown(next(iter(Names(names))))}"
    )


def _by_key(table: Table, key_of: Callable[[str], str]) -> dict[str, str]:
    """Labels by keys; of those that stand for two labels, no label is known: the file's whole paths are asked for."""
    by_key: dict[str, str] = {}
    for name, label in table.labels.items():
        if by_key.setdefault(key_of(name), label) != label:
            raise UserError(
                f"{shown(table.file)} has several labels for images called {shown(key_of(name))}, and knows none by "
                "its whole path: write paths as they stand below data.root"
            )
    return by_key


def _refuse_ambiguous(file: str, keys: list[str], by_key: dict[str, str]) -> None:
    """Raise a `UserError` where several images would get their label from one row."""
    seen = set()
    for key in keys:
        if key in by_key and key in seen:
            raise UserError(
                f"{shown(file)}: several images are called {shown(key)}: write paths as they stand below data.root"
            )
        seen.add(key)


def _whole(name: str) -> str:
    return name.removeprefix("./")


def _without_ending(name: str) -> str:
    return os.path.splitext(_whole(name))[0]


def _file(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _file_without_ending(name: str) -> str:
    return os.path.splitext(_file(name))[0]
