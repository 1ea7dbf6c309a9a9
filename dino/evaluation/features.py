"""Images through a frozen backbone: read, embedded, and kept on disk by the content of all that went in."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino.data import Pool, read_or_reason
from dino.distributed import cores
from dino.files import cache_directory, read_arrays, replacing, shown
from dino.models import Backbone
from dino.models.weights import weights_digest
from dino.precision import inference, inference_precision

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """What a backbone says of N images.

    Attributes:
        blocks: (N, blocks, D) fp32, class tokens after the last blocks, each with the final norm; the last one last.
        patch_means: (N, D) fp32, the mean of the patch tokens.
        rows: (N,) which of the images asked for these are; unreadable ones are missing.
    """

    blocks: np.ndarray
    patch_means: np.ndarray
    rows: np.ndarray

    @property
    def class_tokens(self) -> np.ndarray:
        """(N, D)."""
        return self.blocks[:, -1]

    @property
    def both(self) -> np.ndarray:
        """(N, 2·D), side by side."""
        return np.concatenate([self.class_tokens, self.patch_means], axis=1)

    def at(self, rows: np.ndarray) -> "Features":
        """The features of some of the images."""
        return Features(self.blocks[rows], self.patch_means[rows], self.rows[rows])


class Batch(NamedTuple):
    """Some images of a pool, transformed.

    Attributes:
        positions: which of the batch's images could be read.
        inputs: what the transform made of each of these.
        reasons: index in the pool of each other image to why it cannot be read.
    """

    positions: list[int]
    inputs: list[Any]
    reasons: dict[int, str]


class _Inputs(Dataset):
    """A pool's images, transformed; of one that cannot be read the reason, as text."""

    def __init__(self, images: Pool, transform: Callable[[Tensor], Any]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, index: int) -> Any:
        image, reason = read_or_reason(self.images, index)
        return reason if image is None else self.transform(image)


def read_batches(
    images: Pool, batches: Sequence[Sequence[int]], transform: Callable[[Tensor], Any], workers: int = 0
) -> Iterator[Batch]:
    """Read and transform images, batch by batch.

    Args:
        batches: indices in the pool.
        transform: (C, H, W) uint8 to anything but text.
        workers: processes that read ahead; 0: none.
    """
    sampler: Any = batches  # of lists, it is declared, but ranges do as well, and cost nothing of a large pool
    loader = DataLoader(_Inputs(images, transform), batch_sampler=sampler, num_workers=workers, collate_fn=list)
    for indices, results in zip(batches, loader, strict=True):
        batch = Batch([], [], {})
        for position, (index, result) in enumerate(zip(indices, results, strict=True)):
            if isinstance(result, str):
                batch.reasons[index] = result
            else:
                batch.positions.append(position)
                batch.inputs.append(result)
        yield batch


def extract(
    backbone: Backbone,
    images: Pool,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 128,
    title: str | None = "features",
    accelerator: Accelerator | None = None,
    blocks: int = 1,
    precision: str = "auto",
) -> Features:
    """Features of images; those that cannot be read are left out, with a warning each.

    Args:
        indices: which images of the pool.
        transform: (C, H, W) uint8 to what the backbone takes; all outputs of one size.
        title: what the progress bar says; None: neither bar nor warnings.
        accelerator: shares the images among its processes; each of them gets all features, every image once.
        blocks: how many of the last blocks' class tokens to take; at most the backbone's `depth`.
        precision: one of `dino.precision.PRECISIONS`.
    """
    device = next(backbone.parameters()).device
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    indices = np.asarray(indices, dtype=int)
    own_rows = np.arange(rank, len(indices), processes)
    batches = [own_rows[first : first + batch_size] for first in range(0, len(own_rows), batch_size)]
    workers = min(8, cores()) if device.type == "cuda" else 0
    loaded = read_batches(images, [indices[rows].tolist() for rows in batches], transform, workers)
    bar = tqdm(loaded, desc=title, total=len(batches), unit="batch", leave=False, disable=rank > 0 or title is None)
    width = backbone.embed_dim
    parts = [Features(np.empty((0, blocks, width), np.float32), np.empty((0, width), np.float32), own_rows[:0])]
    for rows, batch in zip(batches, bar, strict=True):
        for index, reason in batch.reasons.items() if title is not None else ():
            logger.warning("left out: %s: %s", shown(images.names[index]), reason)
        if batch.inputs:
            with inference(device, precision):
                tokens, patch_means = _outputs(backbone, torch.stack(batch.inputs).to(device), blocks)
            parts.append(Features(tokens.numpy(), patch_means.numpy(), rows[batch.positions]))
    features = _concatenated(parts)
    if processes > 1:
        features = _concatenated(gather_object([features]))
    return features.at(features.rows.argsort())


def _outputs(backbone: Backbone, images: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Class tokens (B, blocks, D) and mean patch token (B, D) of a batch."""
    if blocks == 1 or backbone.depth == 1:
        outputs = backbone.forward_features(images)
        class_tokens, patches = outputs["x_norm_clstoken"][:, None], outputs["x_norm_patchtokens"]
    else:
        layers = backbone.get_intermediate_layers(images, n=blocks, return_class_token=True, norm=True)
        class_tokens, patches = torch.stack([token for _, token in layers], dim=1), layers[-1][0]
    return class_tokens.float().cpu(), patches.float().mean(dim=1).cpu()


def _concatenated(parts: Sequence[Features]) -> Features:
    return Features(
        blocks=np.concatenate([part.blocks for part in parts]),
        patch_means=np.concatenate([part.patch_means for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
    )


def cached(
    backbone: Backbone,
    images: Pool,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Tensor], Tensor],
    *,
    content: str,
    preprocessing: str,
    precision: str = "auto",
    **options: Any,
) -> Features:
    """`extract`, or what an earlier call with the same weights, data and preprocessing gave.

    Args:
        content: digest of the images and their order, by `content_digest`.
        preprocessing: what `transform` does and which blocks are taken, in words, complete.
        options: of `extract`.
    """
    computed = inference_precision(next(backbone.parameters()).device, precision)
    parts = [weights_digest(backbone), content, preprocessing, *([] if computed == "fp32" else [computed])]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    file = cache_directory() / "features" / f"{key[:32]}.npz"
    earlier = _read(file, key)
    if earlier is not None:
        return earlier
    features = extract(backbone, images, indices, transform, precision=computed, **options)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as opened:
            np.savez(opened, **features._asdict(), seal=np.array(_seal(features, key)))
    except OSError as error:
        logger.warning("features are not kept for the next time: %s cannot be written (%s)", file, error.strerror)
    return features


def _read(file: Path, key: str) -> Features | None:
    """An entry of the cache, if it is whole and the one of this key, or None."""
    if not file.is_file():
        return None
    try:
        arrays = read_arrays(file)
        features = Features(arrays["blocks"], arrays["patch_means"], arrays["rows"])
        if str(arrays.get("seal")) == _seal(features, key):
            return features
        reason = "not as it was written for these weights and images" if "seal" in arrays else "of an earlier version"
    except (ValueError, KeyError) as error:
        reason = f"damaged ({error})"
    logger.warning("%s is %s: its features are computed anew", file, reason)
    return None


def _seal(features: Features, key: str) -> str:
    """A digest of an entry and its key: a file that was copied here, or changed, has another."""
    digest = hashlib.sha256(key.encode())
    for array in features:
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def content_digest(images: Pool, indices: Sequence[int] | np.ndarray) -> str:
    """A digest of the pixels of images, in order."""
    digest = hashlib.sha256()
    for index in tqdm(indices, desc="reading", unit="image", leave=False):
        image, _ = read_or_reason(images, int(index))
        digest.update(b"unreadable" if image is None else repr(tuple(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()
