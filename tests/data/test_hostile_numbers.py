"""Arrays, TIFF and DICOM that claim, or expand to, more than an image may take: refused before that is taken."""

import io
import lzma
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from dino.data.decode import decode, size_of
from dino.data.formats import BYTES, Limits, UnreadableImage
from dino.data.levels import STRIP, Levels

LIMITS = Limits(1_000_000)
SLACK = 16 << 20  # for a strip's numbers on the way, and one piece that expands
SIDE = 64


def npy(shape: tuple, descr: str = "<f4", data: bytes = b"", by_columns: bool = False) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': {by_columns}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def tiff(data: bytes = bytes(2 * SIDE * SIDE), pages: int = 1, **tags: int) -> bytes:
    """Grey of 16 bits in one strip, but for the tags given as `t256=…`."""
    pytest.importorskip("tifffile")
    usual = {256: SIDE, 257: SIDE, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: len(data)}
    usual |= {int(tag[1:]): value for tag, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(usual.items()))
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    for page in range(pages):
        end = len(content) + 2 + len(entries) + 4
        content += struct.pack("<H", len(usual)) + entries + struct.pack("<I", end if page < pages - 1 else 0)
    return content


def dicom(data: bytes = bytes(2 * SIDE * SIDE), syntax: str = "1.2.840.10008.1.2.1", **tags: object) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.Rows = file.Columns = SIDE
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    for tag, value in tags.items():
        setattr(file, tag, value)
    encapsulated = file.file_meta.TransferSyntaxUID.is_encapsulated
    file.PixelData = pydicom.encaps.encapsulate([data]) if encapsulated else data
    file["PixelData"].VR = "OB" if encapsulated else "OW"
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def run_lengths(times: int) -> bytes:
    """DICOM's RLE with one segment of so many runs of 128."""
    return struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * times


def jpeg(side: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "JPEG")
    return content.getvalue()


RLE, JPEG, DEFLATED = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.1.99"
COLOUR = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "YBR_FULL_422"}
COLOUR |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
BOMB = 64 << 20
HOSTILE = {
    "an array of many pixels": (lambda: npy((60_000, 60_000)), "more than data.max_pixels"),
    "an array of many bands": (lambda: npy((9, 9, 10_000)), "cut off: its header tells of 810,000 numbers"),
    "an array whose bands are there": (lambda: npy((9, 9, 20_000), "|u1", bytes(1_620_000)), "data.max_pixels="),
    "an array of negative sides": (lambda: npy((-1, 9), data=bytes(360)), "this is (-1, 9)"),
    "an array of no pixels": (lambda: npy((0, 0)), "too few"),
    "an array of no bands": (lambda: npy((9, 9, 0)), "0 channels"),
    "an array of objects": (lambda: npy((9, 9), "|O", bytes(999)), "of object"),
    "TIFF of many pixels": (lambda: tiff(t256=60_000, t257=60_000), "more than data.max_pixels"),
    "TIFF of many bands": (lambda: tiff(t277=10_000), "data.max_pixels="),
    "TIFF in huge tiles": (lambda: tiff(t322=60_000, t323=60_000, t324=8, t325=99), "data.max_pixels="),
    "TIFF that inflates": (lambda: tiff(zlib.compress(bytes(BOMB)), t259=8), "expands to more than"),
    "TIFF in LZMA": (lambda: tiff(lzma.compress(bytes(BOMB), preset=0), t259=34925), "expands to more than"),
    "TIFF in PackBits": (lambda: tiff(b"\x81\0" * (BOMB // 128), t259=32773), "expands to more than"),
    "TIFF of endless pages": (lambda: tiff(pages=5000), "several pages (5,000 of them)"),
    "DICOM of many pixels": (lambda: dicom(Rows=60_000, Columns=60_000), "more than data.max_pixels"),
    "DICOM of wide numbers": (lambda: dicom(Rows=999, Columns=999, BitsAllocated=64), "data.max_pixels="),
    "DICOM of many samples": (lambda: dicom(Rows=999, Columns=999, SamplesPerPixel=99), "data.max_pixels="),
    "DICOM with a larger picture in it": (lambda: dicom(jpeg(1500), JPEG, **COLOUR), "more than data.max_pixels"),
    "DICOM with another picture in it": (lambda: dicom(jpeg(128), JPEG, **COLOUR), "the picture inside has 128×128"),
    "DICOM in long runs": (lambda: dicom(run_lengths(BOMB // 128), RLE), "expands to more than"),
    "DICOM that inflates": (lambda: dicom(syntax=DEFLATED), "deflated as a whole"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_with_the_reason_and_takes_little_memory(name):
    make, reason = HOSTILE[name]
    content = make()
    ending = {b"\x93N": ".npy", b"II": ".tif"}.get(content[:2], ".dcm")
    size_of(content, 1, ending, LIMITS, Levels("float"))  # which is no fault, either
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage) as refusal:
            decode(content, 1, ending, limits=LIMITS, levels=Levels("float"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert peak < BYTES * LIMITS.pixels + SLACK


HONEST = np.arange(SIDE * SIDE, dtype="<u2").reshape(SIDE, SIDE)
READ = {
    "an array in Fortran's order": (lambda: npy(HONEST.shape, "<u2", HONEST.tobytes("F"), True), ".npy"),
    "a deflated TIFF": (lambda: tiff(zlib.compress(HONEST.tobytes()), t259=8), ".tif"),
    "a TIFF in LZMA": (lambda: tiff(lzma.compress(HONEST.tobytes()), t259=34925), ".tif"),
    "a DICOM": (lambda: dicom(HONEST.tobytes()), ".dcm"),
}


@pytest.mark.parametrize("name", READ)
def test_honest_ones_are_read(name):
    make, ending = READ[name]
    tight = Limits(5 * SIDE * SIDE)  # of which compressed parts are expanded once more, to be counted
    assert np.array_equal(decode(make(), 1, ending, limits=tight, levels=Levels("float"))[0], HONEST)


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("bits", ["8", "16", "float"])
def test_numbers_of_several_strips_become_the_levels_of_each(bits, depth):
    shape = (9, STRIP // 16, depth)
    numbers = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    pixels = decode(npy(shape, "<u2", numbers.tobytes()), depth, "a.npy", levels=Levels(bits, (0, 65535)))
    expected = numbers / 257
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= (0.5 if bits == "8" else 1e-3)
