"""Archives of which any one byte is wrong: images or one line that tells, never an exception of a library's."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.data import open_images, read_or_reason
from dino.errors import UserError
from dino.files import read_arrays

NAMES = ("cat/1.png", "dog/é.png")
CHANGES = (0x01, 0x20, 0x80, 0xFF)  # bits that are flipped


def picture(level: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 4), level).save(content, "PNG")
    return content.getvalue()


def zipped(compression: int, zip64: bool = False) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name in NAMES:
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(picture(len(name)))
    return content.getvalue()


def tarred(form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archive:
        for name in NAMES:
            facts = tarfile.TarInfo(name)
            facts.size = len(picture(0))
            archive.addfile(facts, io.BytesIO(picture(len(name))))
    return content.getvalue().rstrip(b"\0") + bytes(512)


POOLS = {
    "stored.zip": zipped(zipfile.ZIP_STORED),
    "deflated.zip": zipped(zipfile.ZIP_DEFLATED, zip64=True),
    "lzma.zip": zipped(zipfile.ZIP_LZMA),
    "gnu.tar": tarred(tarfile.GNU_FORMAT),
    "pax.tar": tarred(tarfile.PAX_FORMAT),
}


def with_one_byte_wrong(content: bytes, start: int = 0) -> Iterator[bytes]:
    """Every byte from `start` on that is not one of many zeros in a row, changed in some ways."""
    for place in range(start, len(content)):
        if content[max(0, place - 4) : place + 5].strip(b"\0"):
            for change in CHANGES:
                yield content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_is_read_or_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    file, outcomes, told = tmp_path / name, set(), []
    for content in list(with_one_byte_wrong(POOLS[name]))[::3]:
        file.write_bytes(content)
        try:
            images = open_images(file)
            results = [read_or_reason(images, index) for index in range(len(images.names))]
        except UserError as error:
            told.append(str(error))
            outcomes.add("refused")
        else:
            assert all((image is None) == bool(reason) for image, reason in results)
            outcomes.update("left out" if image is None else "read" for image, _ in results)
    assert outcomes == {"refused", "left out", "read"}
    assert not any("\n" in message for message in told)


def member(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """A tar header of any size, in base 256, and what follows it."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157], header[148:156] = b"\x80" + size.to_bytes(11, "big"), kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


TARS = {
    "names of names of names": member(b"L", 4, b"abc\0") * 3000 + member(b"0", 0),
    "headers of headers of headers": member(b"x", 10, b"10 a=bcde\n") * 3000 + member(b"0", 0),
    "a name of a terabyte": member(b"L", 1 << 60, b"a"),
    "a header of a terabyte": member(b"x", 1 << 60, b"a"),
    "a file of a terabyte": member(b"0", 1 << 40, b"a"),
    "a file larger than numbers": member(b"0", 1 << 80, b"a"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_claims_the_impossible_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.tar").write_bytes(TARS[name])
    with pytest.raises(UserError, match=r"x\.tar cannot be read as a tar archive: [^\n]+$"):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("offset", "number", "reason"), [(8, 1, "encrypted: unpack"), (10, 93, "compression"), (10, 99, "compression")]
)
def test_members_that_are_not_read_say_what_to_do(tmp_path, offset, number, reason):
    content = bytearray(zipped(zipfile.ZIP_STORED))
    for at in (content.find(b"PK\1\2"), content.find(b"PK\3\4") - 2):  # where both kinds of headers have it
        content[at + offset : at + offset + 2] = number.to_bytes(2, "little")
    (tmp_path / "x.zip").write_bytes(content)
    images = open_images(tmp_path / "x.zip")
    assert reason in read_or_reason(images, 0)[1]
    assert read_or_reason(images, 1)[0] is not None


def test_images_beside_zips_are_read_where_a_folder_is_asked_for(tmp_path):
    for name in ("1.zip", "2.zip"):
        (tmp_path / name).write_bytes(zipped(zipfile.ZIP_STORED))
    (tmp_path / "a.png").write_bytes(picture(3))
    assert list(open_images(tmp_path).names) == [f"{archive}.zip/{name}" for archive in "12" for name in NAMES]
    assert list(open_images(tmp_path, "folder").names) == ["a.png"]


def test_a_damaged_list_of_members_is_told_of_in_one_line(tmp_path):
    file, told = tmp_path / "pool.zip", []
    whole = POOLS["stored.zip"]
    start = whole.index(b"PK\x01\x02")
    nameless = whole[:start] + whole[start:].replace(b"cat/1.png", b"\0at/1.png")
    for content in (nameless, *list(with_one_byte_wrong(whole, start))[::7]):
        file.write_bytes(content)
        try:
            open_images(file)
        except UserError as error:
            told.append(str(error))
    assert len(told) > 5
    assert not any("\n" in message for message in told)


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_whole_or_a_value_error_tells(tmp_path, compressed):
    file: Path = tmp_path / "arrays.npz"
    arrays = {"rows": np.arange(3), "blocks": np.ones((2, 2), np.float32)}
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    told, whole = set(), file.read_bytes()
    for content in (
        b"",
        whole[:-30],
        whole + whole[:9],
        *list(with_one_byte_wrong(whole, whole.index(b"PK\x01\x02")))[::2],
    ):
        file.write_bytes(content)
        try:
            read = read_arrays(file)
        except ValueError as error:
            told.add(str(error))
        else:
            for name in set(read) & set(arrays):
                np.testing.assert_array_equal(read[name], arrays[name])
    assert len(told) > 5
    assert all(reason and "\n" not in reason for reason in told)
