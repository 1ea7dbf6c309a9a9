"""DICOM, where pydicom is installed: values, windows and what is refused."""

import io

import numpy as np
import pytest

from dino.data import Levels, UnreadableImage, open_images
from dino.data.decode import decode, size_of

pydicom = pytest.importorskip("pydicom")
STORED = np.random.default_rng(0).integers(0, 4096, (9, 7), dtype=np.uint16)


def dicom(stored: np.ndarray, **tags) -> bytes:
    """A CT of 12 bits, without a window unless `tags` give one."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = stored.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.PixelData = stored.tobytes()
    for tag, value in tags.items():
        setattr(file, tag, value)
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def levels_of(content: bytes, levels: Levels) -> np.ndarray:
    pixels = decode(content, 1, "scan.dcm", levels=levels)
    assert size_of(content, 1, "scan.dcm", levels=levels) == tuple(pixels.shape)
    return pixels[0].numpy()


HOUNSFIELD = {"RescaleSlope": 2.0, "RescaleIntercept": -1024.0}


def test_fractions_are_the_values_that_the_file_tells_of():
    levels = levels_of(dicom(STORED, **HOUNSFIELD), Levels("float", (-1000, 1000)))
    values = STORED * 2.0 - 1024
    assert np.allclose(levels, np.clip((values + 1000) / 2000, 0, 1) * 255, atol=1e-2)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("bits", ["8", "16"])
def test_a_window_is_applied_as_on_a_screen(inverted, bits):
    tags = HOUNSFIELD | {"WindowCenter": [40, 500], "WindowWidth": [400, 2000]}
    tags["PhotometricInterpretation"] = "MONOCHROME1" if inverted else "MONOCHROME2"
    levels = levels_of(dicom(STORED, **tags), Levels(bits)).astype(float)
    values = STORED * 2.0 - 1024
    expected = np.clip((values - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.abs(levels - (255 - expected if inverted else expected)).max() < (0.51 if bits == "8" else 0.01)


def test_without_a_window_the_least_is_black_and_the_greatest_white():
    levels = levels_of(dicom(STORED), Levels()).astype(float)
    expected = (STORED - float(STORED.min())) / (float(STORED.max()) - float(STORED.min())) * 255
    assert np.abs(levels - expected).max() < 0.51


def test_a_blank_one_is_an_image():
    assert (levels_of(dicom(np.full((8, 8), 7, np.uint16)), Levels()) == 0).all()


def test_several_frames_too_many_pixels_and_broken_files_are_refused(tmp_path):
    stack = dicom(np.zeros((3, 8, 8), np.uint16), NumberOfFrames=3)
    huge = dicom(np.zeros((8, 8), np.uint16), Rows=60000, Columns=60000)
    for content, reason in (
        (stack, r"several frames \(3\)"),
        (huge, "more than data.max_pixels"),
        (stack[:300], r"\w"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            decode(content, 1, "scan.dcm")


def test_a_folder_of_them_is_a_pool(tmp_path):
    for name in ("a.dcm", "b.DCM"):
        (tmp_path / name).write_bytes(dicom(STORED))
    pool = open_images(tmp_path)
    assert [tuple(pool.read(index).shape) for index in range(len(pool.names))] == [(3, 9, 7)] * 2
