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
