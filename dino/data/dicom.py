"""DICOM, the format of medical pictures, where pydicom is installed."""

import io
import struct
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from dino.data.expansion import require_honest
from dino.data.formats import Limits, UnreadableImage, open_picture, require_memory, require_pixels
from dino.data.levels import STRIP, Levels

SIGNATURE, PREAMBLE = b"DICM", 128
DEFLATED, META = (
    b"1.2.840.10008.1.2.1.99",
    1 << 16,
)  # a transfer syntax that pydicom inflates however large; where it is


def is_dicom(content: bytes) -> bool:
    """By its first bytes."""
    return content[PREAMBLE : PREAMBLE + len(SIGNATURE)] == SIGNATURE


def numbers_of(content: bytes, channels: int, limits: Limits, levels: Levels) -> np.ndarray:
    """(H, W, 1 or 3): values after the rescale slope and intercept (Hounsfield units of a CT), fp32.

    But for `data.bits=float` they are as on a screen instead: the window that the file tells of, or from its least to
    its greatest value where it tells of none, as uint16, and MONOCHROME1 inverted.

    Raises:
        UnreadableImage: pydicom is not there, it is too large, or has several frames.
        Exception: whatever pydicom raises.
    """
    from pydicom.pixels import pixel_array

    file = _opened(content, limits)
    height, width = int(file.Rows), int(file.Columns)
    require_pixels(width, height, limits)
    frames = int(file.get("NumberOfFrames", None) or 1)
    if frames > 1:
        raise UnreadableImage(f"it has several frames ({frames}): write each to a file of its own")
    stored_bytes = width * height * int(file.SamplesPerPixel) * -(-int(file.BitsAllocated) // 8)
    needed = 3 * stored_bytes + 4 * width * height  # as it lies in the file and twice more, then the values
    require_memory(needed, width, height, f"{file.BitsAllocated} bits as DICOM", limits)
    _require_honest_frame(file, width, height, limits)
    stored = pixel_array(file)
    del file.PixelData
    return stored if stored.ndim == 3 else _values(file, stored, levels.bits != "float")[:, :, None]


def size_of(content: bytes, limits: Limits) -> tuple[int, int]:
    """(H, W) by the header."""
    file = _opened(content, limits, stop_before_pixels=True)
    return int(file.Rows), int(file.Columns)


def _values(file: Any, stored: np.ndarray, windowed: bool) -> np.ndarray:
    """(H, W) values, or levels as on a screen, some rows at a time."""
    values = np.empty(stored.shape, np.float32)
    step = max(1, STRIP // stored.shape[1])
    strips = [slice(top, top + step) for top in range(0, len(stored), step)]
    for rows in strips:
        values[rows] = _rescaled(file, stored[rows], windowed)
    if not windowed:
        return values
    levels = np.empty(stored.shape, np.uint16)
    low, high = _window(file, values)
    is_inverted = file.PhotometricInterpretation == "MONOCHROME1"
    for rows in strips:
        shown = ((values[rows] - low) * (65535 / max(high - low, 1e-9))).clip(0, 65535).round().astype(np.uint16)
        levels[rows] = 65535 - shown if is_inverted else shown
    return levels


def _rescaled(file: Any, stored: np.ndarray, windowed: bool) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(stored, file)
    if windowed and "VOILUTSequence" in file and "WindowCenter" not in file:
        values = apply_voi_lut(values, file)
    return np.asarray(values, np.float32)


def _window(file: Any, values: np.ndarray) -> tuple[float, float]:
    """Which values are black and white: those of the file's first window, else the least and the greatest."""
    if "WindowCenter" not in file or "WindowWidth" not in file:
        return float(values.min()), float(values.max())
    centre, width = (float(np.atleast_1d(part)[0]) for part in (file.WindowCenter, file.WindowWidth))
    half = (max(width, 1.0) - 1) / 2  # PS3.3 C.11.2.1.2.1
    return centre - 0.5 - half, centre - 0.5 + half


def _opened(content: bytes, limits: Limits, stop_before_pixels: bool = False) -> Any:
    if find_spec("pydicom") is None:
        raise UnreadableImage("it is DICOM, which takes pydicom: pip install pydicom")
    from pydicom import dcmread

    if DEFLATED in content[:META]:
        raise UnreadableImage("it is DICOM that is deflated as a whole, which is not read: save it without that")
    return dcmread(io.BytesIO(content), stop_before_pixels=stop_before_pixels)


def _require_honest_frame(file: Any, width: int, height: int, limits: Limits) -> None:
    """Raise `UnreadableImage` where the compressed picture inside is larger than what is said of it."""
    syntax = file.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    frame = get_frame(file.PixelData, 0, number_of_frames=1)
    if syntax == RLELossless:
        count, *starts = struct.unpack_from("<16I", frame)  # PS3.5 G.5
        ends = [*starts[1:count], len(frame)]
        segments = [memoryview(frame)[start:end] for start, end in zip(starts, ends, strict=False)]
        require_honest(segments, "packbits", limits)
        return
    try:
        with open_picture(frame, limits) as picture:
            size = picture.size
    except (UnidentifiedImageError, OSError, SyntaxError):  # of a kind that Pillow does not read
        return
    if size != (width, height):
        raise UnreadableImage(f"it says {width:,}×{height:,} pixels, the picture inside has {size[0]:,}×{size[1]:,}")
