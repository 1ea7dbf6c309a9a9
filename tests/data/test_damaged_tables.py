"""Parquet files and lists that are damaged or hold what nobody expects: one line or the images, never a traceback."""

import contextlib
import io
import os
import random
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dino.data import open_images, read_or_reason
from dino.errors import UserError

OTHER_BYTES = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a.png", b"b\xff.png"], pa.binary()).buffers())
PATHS, MANIFEST = ["a.png", "b.png"], {"kept": [True, True], "weight": [1.0, 0.5]}


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    return content.getvalue()


def write(folder: Path, columns: dict) -> Path:
    for name in PATHS:
        (folder / name).write_bytes(picture())
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(
    "columns",
    [
        {"path": OTHER_BYTES, **MANIFEST},
        {"path": OTHER_BYTES},
        {"path": PATHS, "label": OTHER_BYTES},
        {"path": [["a.png"], ["b.png"]]},
        {"image": [{"bytes": picture()}] * 2, "label": OTHER_BYTES},
    ],
)
def test_what_is_no_text_is_told_in_one_line(tmp_path, columns):
    with pytest.raises(UserError) as told:
        open_images(write(tmp_path, columns))
    assert "\n" not in str(told.value)


def repeated(value: object, rows: int, kind: pa.DataType | None = None) -> pa.Array:
    """A value many times, which takes a file of a few bytes for it."""
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), pa.array([value], kind))


BOMBS = {
    "rows without end": {"path": pa.nulls(2_000_000, pa.string())},
    "images without end": {"image": pa.nulls(2_000_000, pa.binary())},
    "one text without end": {"path": ["x" * 80_000_000]},
    "one image without end": {"image": [bytes(80_000_000)]},
    "a text that repeats": {"path": repeated("x" * 100_000, 2000).cast(pa.string())},
    "labels that repeat": {"path": [f"{row}" for row in range(900)], "label": repeated("x" * 100_000, 900)},
    "a manifest's rows": {"path": pa.nulls(2_000_000, pa.string()), "kept": pa.repeat(True, 2_000_000)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_becomes_far_larger_than_its_file_is_refused(tmp_path, name):
    pq.write_table(pa.table(BOMBS[name]), tmp_path / "x.parquet", compression="zstd")
    with pytest.raises(UserError, match=r"x\.parquet.* (are no table of images|bytes of text)"):
        open_images(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", ["list", "manifest"])
def test_a_name_that_two_columns_have_is_told(tmp_path, kind):
    rest = {} if kind == "list" else MANIFEST
    arrays = [pa.array(PATHS), pa.array(PATHS), *map(pa.array, rest.values())]
    pq.write_table(pa.Table.from_arrays(arrays, ["path", "path", *rest]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has several columns called path"):
        open_images(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "columns",
    [
        {"path": pa.array(PATHS, pa.string_view())},
        {"path": pa.array(PATHS, pa.string_view()), **MANIFEST},
        {"image": pa.array([picture()] * 2, pa.binary_view())},
    ],
)
def test_texts_as_polars_writes_them(tmp_path, columns):
    images = open_images(write(tmp_path, columns | {"label": pa.array(["cat", "dog"], pa.string_view())}))
    assert [read_or_reason(images, index)[1] for index in range(2)] == ["", ""]
    if images.kind != "manifest":
        assert images.labels.classes == ["cat", "dog"]


@pytest.mark.parametrize(("weights", "expected"), [([1e308] * 2, [1, 1]), ([5e-324] * 2, [1, 1]), ([1e308, 0], [1, 0])])
def test_weights_of_any_size_are_brought_to_one_on_average(tmp_path, weights, expected):
    images = open_images(write(tmp_path, {"path": PATHS, "weight": weights}))
    assert images.weights.tolist() == expected


@pytest.mark.parametrize("rest", [{"path": PATHS}, {"image": [{"bytes": picture()}] * 2}])
def test_images_of_several_classes_have_no_labels(tmp_path, rest):
    images = open_images(write(tmp_path, {**rest, "label": [[1, 2], [3]]}))
    assert (len(images.names), images.labels) == (2, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_footer_never_ends_the_process(tmp_path):
    """Sizes that a footer notes of columns end the process inside pyarrow, where damaged, if they are asked for."""
    file = write(tmp_path, {"image": [{"bytes": picture(), "path": "a"}] * 3, "label": [0, 1, 1]})
    whole, chance = file.read_bytes(), random.Random(0)
    start = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    child = os.fork()
    if not child:
        code = 1
        try:
            for _ in range(150):
                content = bytearray(whole)
                content[chance.randrange(start, len(whole) - 8)] ^= 1 << chance.randrange(8)
                file.write_bytes(content)
                with contextlib.suppress(UserError):
                    read_or_reason(open_images(file, "parquet"), 0)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
