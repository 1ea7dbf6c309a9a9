"""Images through a frozen backbone, once: what comes out is kept on disk, by the content of all that went in."""

import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dino.data import Images, UnreadableImage
from dino.distributed import cores
from dino.files import cache_directory
from dino.models import Backbone, ResNet
from dino.models.weights import weights_digest

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


class _Inputs(Dataset):
    """Images as a backbone takes them, with their row; an unreadable one is its reason instead."""

    def __init__(self, images: Images, indices: np.ndarray, transform: Callable[[Tensor], Tensor]):
        self.images, self.indices, self.transform = images, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            return row, self.transform(self.images.read(int(self.indices[row])))
        except UnreadableImage as reason:
            return row, str(reason)


@torch.inference_mode()
def extract(
    backbone: Backbone,
    images: Images,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 128,
    title: str = "features",
    accelerator: Accelerator | None = None,
    blocks: int = 1,
) -> Features:
    """Features of images; those that cannot be read are left out, with a warning each.

    Args:
        indices: which images of the pool.
        transform: (C, H, W) uint8 to what the backbone takes; all outputs of one size.
        title: what the progress bar says.
        accelerator: shares the images among its processes; each of them gets all features, every image once.
        blocks: how many of the last blocks' class tokens to take; of a ResNet, 1.
    """
    device = next(backbone.parameters()).device
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = np.arange(rank, len(indices), processes)
    inputs = Subset(_Inputs(images, np.asarray(indices), transform), mine.tolist())
    workers = min(8, cores()) if device.type == "cuda" else 0
    loader = DataLoader(inputs, batch_size, num_workers=workers, collate_fn=list)
    rows: list[int] = []
    outputs = [(torch.empty(0, blocks, backbone.embed_dim), torch.empty(0, backbone.embed_dim))]
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=rank > 0):
        for row, reason in batch:
            if isinstance(reason, str):
                logger.warning("left out: %s: %s", images.names[int(indices[row])], reason)
        readable = [(row, image) for row, image in batch if isinstance(image, Tensor)]
        if readable:
            outputs.append(_outputs(backbone, torch.stack([image for _, image in readable]).to(device), blocks))
            rows += [row for row, _ in readable]
    parts = [(np.array(rows, dtype=int), *(torch.cat(part).numpy() for part in zip(*outputs, strict=True)))]
    if processes > 1:
        parts = gather_object(parts)
    rows_of_all, class_tokens, patch_means = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = rows_of_all.argsort()
    return Features(class_tokens[order], patch_means[order], rows_of_all[order])


def _outputs(backbone: Backbone, images: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Class tokens (B, blocks, D) and mean patch token (B, D) of a batch."""
    if blocks == 1 or isinstance(backbone, ResNet):
        found = backbone.forward_features(images)
        class_tokens, patches = found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]
    else:
        layers = backbone.get_intermediate_layers(images, n=blocks, return_class_token=True, norm=True)
        class_tokens, patches = torch.stack([token for _, token in layers], dim=1), layers[-1][0]
    return class_tokens.float().cpu(), patches.float().mean(dim=1).cpu()


def cached(compute: Callable[[], Features], backbone: Backbone, content: str, preprocessing: str) -> Features:
    """`compute()`, or what an earlier call with the same weights, data and preprocessing gave.

    Args:
        content: digest of the images and their order.
        preprocessing: in words, complete.
    """
    key = hashlib.sha256(json.dumps([weights_digest(backbone), content, preprocessing]).encode()).hexdigest()
    file = cache_directory() / "features" / f"{key[:32]}.npz"
    if (earlier := _read(file)) is not None:
        return earlier
    features = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own: several processes may have computed the same.
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", suffix=".partial", delete=False) as partial:
            np.savez(partial, **features._asdict())
        os.replace(partial.name, file)
    except OSError as error:
        logger.warning("features are not kept for the next time: %s cannot be written (%s)", file, error.strerror)
    return features


def _read(file: Path) -> Features | None:
    """A whole entry of the cache, or None."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return Features(**{name: archive[name] for name in Features._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s): its features are computed anew", file, error)
        return None


def content_digest(images: Images, indices: Sequence[int] | np.ndarray) -> str:
    """A digest of the pixels of images, in order."""
    digest = hashlib.sha256()
    for index in tqdm(indices, desc="reading", unit="image", leave=False):
        try:
            image = images.read(int(index))
        except UnreadableImage:
            digest.update(b"unreadable")
            continue
        digest.update(repr(tuple(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()
