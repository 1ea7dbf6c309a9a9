"""A pool of images as embeddings in a memory-mapped file, written in parts that survive a kill."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from dino.curation.stage import Stage
from dino.curation.thumbnails import SIDE, thumbnail
from dino.data import Pool
from dino.data.manifest import printable
from dino.errors import UserError
from dino.evaluation.features import Batch, read_batches
from dino.files import read_json, replacing, require_regular, way_out, write_text
from dino.models import Backbone, Preprocess
from dino.precision import inference

PART = 1024  # images
DIGITS = 32  # of a hash
LARGEST = float(np.finfo(np.float16).max)


class Embedded(NamedTuple):
    """What is known of each of N images.

    Attributes:
        tokens: (N, D) fp16, class tokens; zeros where there is no image. A memory map.
        thumbnails: (N, 64, 64) uint8; a memory map.
        hashes: (N,) bytes, of the pixels, as hexadecimal digits; empty where there is no image.
        sizes: (N, 2) int32, height and width in pixels.
        reasons: (N,) why there is no image, or nothing; each reason is held once.
        key: of the stage that has made this.
    """

    tokens: np.ndarray
    thumbnails: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    reasons: pa.DictionaryArray
    key: list[Any]

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool."""
        return self.hashes != b""


class _Description(NamedTuple):
    """What is taken of an image where it is decoded: `model_input` is what the backbone takes."""

    model_input: Tensor
    thumbnail: Tensor
    digest: str
    height: int
    width: int


def _describe(image: Tensor, preprocess: Preprocess) -> _Description:
    digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()[:DIGITS]
    return _Description(preprocess.of_levels(image), thumbnail(image), digest, image.shape[1], image.shape[2])


def embed(
    stage: Stage, backbone: Backbone, images: Pool, batch_size: int, workers: int, accelerator: Accelerator
) -> Embedded:
    """Embed what is not there yet; every process must call this and gets all.

    Raises:
        UserError: a class token is not finite or too large for fp16.
    """
    folder, count = stage.folder, len(images.names)
    if stage.begin():
        if accelerator.is_main_process:
            _create_files(folder, count, backbone.embed_dim)
        accelerator.wait_for_everyone()
        own = range(accelerator.process_index, -(-count // PART), accelerator.num_processes)
        missing = [part for part in own if not _facts_file(folder, part).exists()]
        batches = {part: _batches(part, count, batch_size) for part in missing}
        describe = functools.partial(_describe, preprocess=backbone.preprocess)
        reading = read_batches(images, [batch for part in missing for batch in batches[part]], describe, workers)
        total, hidden = sum(len(batch) for part in missing for batch in batches[part]), not accelerator.is_main_process
        bar = tqdm(total=total, desc="embedding", unit="image", leave=False, disable=hidden)
        shown = _counted(reading, bar)
        for part in missing:
            _embed_part(stage, backbone, count, batches[part], shown, _facts_file(folder, part))
        bar.close()
        stage.finish()
    hashes, sizes, reasons = _all_facts(stage, count)
    tokens, thumbnails = (_memory_map(folder / name, "r", stage, count) for name in ("tokens.npy", "thumbnails.npy"))
    return Embedded(tokens, thumbnails, hashes, sizes, reasons, stage.key)


def _counted(reading: Iterator[Batch], bar: tqdm) -> Iterator[Batch]:
    """The same batches, each counted once the next is asked for."""
    for batch in reading:
        yield batch
        bar.update(len(batch.positions) + len(batch.reasons))


def _create_files(folder: Path, count: int, width: int) -> None:
    """The arrays of all images, if a run before this one has not made them."""
    for file, shape, dtype in (
        (folder / "tokens.npy", (count, width), np.float16),
        (folder / "thumbnails.npy", (count, SIDE, SIDE), np.uint8),
    ):
        _reserve(file, dtype, shape)
    (folder / "parts").mkdir(exist_ok=True)


def _reserve(file: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Make a .npy file of zeros, if there is none, and take its room on the disk.

    A memory map that cannot be written where it has a hole kills the process.

    Raises:
        UserError: there is not enough room.
    """
    try:
        if not file.exists():
            with replacing(file) as partial:
                open_memmap(partial, "w+", dtype, shape).flush()
        with file.open("r+b") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}), which takes "
            f"{math.prod(shape) * np.dtype(dtype).itemsize:,} bytes: {way_out(error)}, or name a run.dir elsewhere, "
            "and start the same command again"
        ) from error


def _memory_map(file: Path, mode: Any, stage: Stage, count: int) -> np.memmap:
    """A .npy file's array of `count` images; raises `UserError` where it is damaged."""
    try:
        require_regular(file)
        array = np.load(file, mmap_mode=mode, allow_pickle=False)
        ndim, dtype = (2, np.float16) if file.name == "tokens.npy" else (3, np.uint8)
        if len(array) != count or array.ndim != ndim or array.dtype != dtype:
            raise ValueError(f"{array.dtype} of shape {array.shape}, for {count:,} images")
        return array
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {stage.fix}") from error


def _all_facts(stage: Stage, count: int) -> tuple[np.ndarray, np.ndarray, pa.DictionaryArray]:
    """Hashes, sizes and reasons of all images, as `Embedded` has them; of one part at a time as Python's objects."""
    hashes, sizes = np.zeros(count, f"S{DIGITS}"), np.zeros((count, 2), np.int32)
    codes, texts = np.zeros(count, np.int32), {"": 0}
    for part in range(-(-count // PART)):
        rows = slice(part * PART, min((part + 1) * PART, count))
        facts = _facts(_facts_file(stage.folder, part), stage, rows.stop - rows.start)
        hashes[rows] = [digest for digest, _, _, _ in facts]
        sizes[rows] = [(height, width) for _, height, width, _ in facts]
        codes[rows] = [texts.setdefault(printable(reason), len(texts)) for _, _, _, reason in facts]
    return hashes, sizes, pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(texts), pa.string()))


def _facts(file: Path, stage: Stage, count: int) -> list[Any]:
    """A part's hashes, heights, widths and reasons, a row an image; raises `UserError` where they are damaged."""
    rows = read_json(file, stage.fix)
    if not isinstance(rows, list) or len(rows) != count or not all(map(_is_fact, rows)):
        raise UserError(f"{file} is damaged: {stage.fix}")
    return rows


def _is_fact(row: Any) -> bool:
    """Hash, height, width, reason."""
    if not isinstance(row, list) or [type(value) for value in row] != [str, int, int, str]:
        return False
    digest, height, width, _ = row
    return len(digest) in (0, DIGITS) and digest.isascii() and min(height, width) >= 0 and max(height, width) < 2**31


def _batches(part: int, count: int, batch_size: int) -> list[range]:
    """Indices of the images of each batch of a part."""
    first, last = part * PART, min(count, (part + 1) * PART)
    return [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]


def _facts_file(folder: Path, part: int) -> Path:
    """The file of a part's hashes, sizes and reasons; it is there once the part's embeddings are."""
    return folder / "parts" / f"{part:06d}.json"


def _embed_part(
    stage: Stage, backbone: Backbone, count: int, batches: list[range], reading: Iterator[Batch], facts_file: Path
) -> None:
    """Embed a part's batches, which are the next of `reading`, and write down that it is done."""
    all_tokens = _memory_map(stage.folder / "tokens.npy", "r+", stage, count)
    all_thumbnails = _memory_map(stage.folder / "thumbnails.npy", "r+", stage, count)
    facts = []
    for indices in batches:
        batch = next(reading)
        of_image = {index: ("", 0, 0, reason) for index, reason in batch.reasons.items()}
        if batch.inputs:
            readable = [indices[position] for position in batch.positions]
            inputs = torch.stack([description.model_input for description in batch.inputs])
            all_tokens[readable] = _class_tokens(backbone, inputs, stage.accelerator)
            all_thumbnails[readable] = torch.stack([description.thumbnail for description in batch.inputs]).numpy()
            for index, description in zip(readable, batch.inputs, strict=True):
                of_image[index] = (description.digest, description.height, description.width, "")
        facts += [of_image[index] for index in indices]
    all_tokens.flush()
    all_thumbnails.flush()
    write_text(facts_file, json.dumps(facts))


def _class_tokens(backbone: Backbone, inputs: Tensor, accelerator: Accelerator) -> np.ndarray:
    """(B, D) fp16."""
    with inference(accelerator.device):
        tokens = backbone(inputs.to(accelerator.device)).float().cpu()
    if not bool((tokens.abs() <= LARGEST).all()):
        raise UserError(
            "a class token is NaN, infinite or above 65,504, which does not fit into fp16: embed with other weights",
            alone=True,
        )
    return tokens.half().numpy()
