"""DICOM, the format of medical pictures, where pydicom is installed."""

import io
from importlib.util import find_spec
from typing import Any

import numpy as np

from dino.data.formats import Limits, UnreadableImage, require_pixels

SIGNATURE, PREAMBLE = b"DICM", 128


def is_dicom(content: bytes) -> bool:
    """By its first bytes."""
    return content[PREAMBLE : PREAMBLE + len(SIGNATURE)] == SIGNATURE


def numbers_of(content: bytes, limits: Limits, windowed: bool) -> np.ndarray:
    """(H, W, 1 or 3): values after the rescale slope and intercept (Hounsfield units of a CT).

    Args:
        windowed: as on a screen instead: the window that the file tells of, or from its least to its greatest value
            where it tells of none, as uint16, and MONOCHROME1 inverted.

    Raises:
        UnreadableImage: pydicom is not there, it is too large, or has several frames.
        Exception: whatever pydicom raises.
    """
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    file = _opened(content, stop_before_pixels=False)
    require_pixels(int(file.Columns), int(file.Rows), limits)
    frames = int(file.get("NumberOfFrames", None) or 1)
    if frames > 1:
        raise UnreadableImage(f"it has several frames ({frames}): write each to a file of its own")
    stored = pixel_array(file)
    if stored.ndim == 3:
        return stored
    values = np.asarray(apply_modality_lut(stored, file), np.float32)
    if not windowed:
        return values[:, :, None]
    if "VOILUTSequence" in file and "WindowCenter" not in file:
        values = np.asarray(apply_voi_lut(apply_modality_lut(stored, file), file), np.float32)
    low, high = _window(file, values)
    levels = ((values - low) * (65535 / max(high - low, 1e-9))).clip(0, 65535).round().astype(np.uint16)
    return (65535 - levels if file.PhotometricInterpretation == "MONOCHROME1" else levels)[:, :, None]


def size_of(content: bytes) -> tuple[int, int]:
    """(H, W) by the header."""
    file = _opened(content, stop_before_pixels=True)
    return int(file.Rows), int(file.Columns)


def _window(file: Any, values: np.ndarray) -> tuple[float, float]:
    """Which values are black and white: those of the file's first window, else the least and the greatest."""
    if "WindowCenter" not in file or "WindowWidth" not in file:
        return float(values.min()), float(values.max())
    centre, width = (float(np.atleast_1d(part)[0]) for part in (file.WindowCenter, file.WindowWidth))
    half = (max(width, 1.0) - 1) / 2  # PS3.3 C.11.2.1.2.1
    return centre - 0.5 - half, centre - 0.5 + half


def _opened(content: bytes, stop_before_pixels: bool) -> Any:
    if find_spec("pydicom") is None:
        raise UnreadableImage("it is DICOM, which takes pydicom: pip install pydicom")
    from pydicom import dcmread

    return dcmread(io.BytesIO(content), stop_before_pixels=stop_before_pixels)
