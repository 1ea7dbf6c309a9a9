"""A pool of images as embeddings in a memory-mapped file, written in parts that survive a kill."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino.curation.duplicates import SIDE, thumbnail
from dino.curation.stage import Stage
from dino.data import Images, UnreadableImage
from dino.errors import UserError
from dino.models import Backbone

PART = 1024  # images
LARGEST = float(np.finfo(np.float16).max)


class Embedded(NamedTuple):
    """What is known of each of N images.

    Attributes:
        tokens: (N, D) fp16, class tokens; zeros where there is no image. A memory map.
        thumbnails: (N, 32, 32) uint8; a memory map.
        hashes: (N,) of the pixels, as hexadecimal digits; empty where there is no image.
        sizes: (N, 2), height and width in pixels.
        reasons: (N,) why there is no image, or nothing.
    """

    tokens: np.ndarray
    thumbnails: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    reasons: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """(N,) bool."""
        return self.hashes != ""


class _Inputs(Dataset):
    """Images as the backbone takes them, with their thumbnail, hash and size; the reason where there is none."""

    def __init__(self, images: Images, transform: Callable[[Tensor], Tensor]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, str, tuple[int, int]] | str:
        try:
            image = self.images.read(row)
        except UnreadableImage as reason:
            return str(reason)
        digest = hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()[:32]
        return self.transform(image), thumbnail(image), digest, (image.shape[1], image.shape[2])


@torch.inference_mode()
def embed(
    stage: Stage, backbone: Backbone, images: Images, batch_size: int, workers: int, accelerator: Accelerator
) -> Embedded:
    """Embed what is not there yet; every process must call this and gets all.

    Raises:
        UserError: a class token is not finite or too large for fp16.
    """
    folder, count = stage.folder, len(images.names)
    files = {"tokens": ((count, backbone.embed_dim), np.float16), "thumbnails": ((count, SIDE, SIDE), np.uint8)}
    if stage.begin():
        if accelerator.is_main_process:
            for name, (shape, dtype) in files.items():
                if not (folder / f"{name}.npy").exists():
                    open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
            (folder / "parts").mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        mine = range(accelerator.process_index, -(-count // PART), accelerator.num_processes)
        left = {
            part: [range(first, min(first + batch_size, count, (part + 1) * PART))
                   for first in range(part * PART, min(count, (part + 1) * PART), batch_size)]
            for part in mine if not _facts(folder, part).exists()
        }  # fmt: skip
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in files}
        loader = DataLoader(
            _Inputs(images, backbone.preprocess),
            batch_sampler=[list(rows) for rows in itertools.chain.from_iterable(left.values())],
            num_workers=workers,
            collate_fn=list,
        )
        loaded = iter(loader)
        with tqdm(
            total=len(left), desc="embedding", unit=f" × {PART} images", disable=not accelerator.is_main_process
        ) as bar:
            for part, batches in left.items():
                found = zip(batches, loaded, strict=False)
                _embed_part(backbone, found, arrays, _facts(folder, part), accelerator)
                bar.update()
        stage.finish()
    tokens, thumbnails = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in files)
    facts = [row for part in range(-(-count // PART)) for row in json.loads(_facts(folder, part).read_text())]
    hashes, heights, widths, reasons = (np.array(column) for column in zip(*facts, strict=True))
    return Embedded(tokens, thumbnails, hashes, np.stack([heights, widths], axis=1), reasons)


def _facts(folder: Path, part: int) -> Path:
    """The file of a part's hashes, sizes and reasons; it is there once the part's embeddings are."""
    return folder / "parts" / f"{part:06d}.json"


def _embed_part(
    backbone: Backbone,
    batches: Iterable[tuple[range, list]],
    arrays: dict[str, np.ndarray],
    file: Path,
    accelerator: Accelerator,
) -> None:
    """Embed a part's batches, each with its rows, and write down that it is done."""
    facts = []
    for rows, batch in batches:
        found = [(row, *item) for row, item in zip(rows, batch, strict=True) if not isinstance(item, str)]
        if found:
            numbers, inputs, thumbnails, _, _ = zip(*found, strict=True)
            with accelerator.autocast():
                tokens = backbone(torch.stack(inputs).to(accelerator.device)).float().cpu()
            if not bool((tokens.abs() <= LARGEST).all()):
                raise UserError(
                    "a class token is NaN, infinite or above 65,504, which does not fit into fp16: "
                    "embed with other weights, or with --mixed_precision no",
                    alone=True,
                )
            arrays["tokens"][list(numbers)] = tokens.half().numpy()
            arrays["thumbnails"][list(numbers)] = torch.stack(thumbnails).numpy()
        facts += [("", 0, 0, item) if isinstance(item, str) else (item[2], *item[3], "") for item in batch]
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]  # of a memory map
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(facts))
    partial.replace(file)
