"""Images through a frozen backbone, once: what comes out is kept on disk, by the content of all that went in."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino.data import Images
from dino.data.cache import cache_directory
from dino.models import Backbone


class Features(NamedTuple):
    """What a backbone says of N images.

    Attributes:
        class_tokens: (N, D) fp32.
        patch_means: (N, D) fp32, the mean of the patch tokens.
    """

    class_tokens: np.ndarray
    patch_means: np.ndarray

    @property
    def both(self) -> np.ndarray:
        """(N, 2·D), side by side."""
        return np.concatenate(self, axis=1)


@torch.inference_mode()
def extract(
    backbone: Backbone,
    images: Images,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 128,
    title: str = "features",
) -> Features:
    """Features of images.

    Args:
        indices: which images of the pool.
        transform: (C, H, W) uint8 to what the backbone takes; all outputs of one size.
        title: what the progress bar says.
    """
    device = next(backbone.parameters()).device
    outputs = []
    for first in tqdm(range(0, len(indices), batch_size), desc=title, unit="batch", leave=False):
        batch = torch.stack([transform(images.read(int(index))) for index in indices[first : first + batch_size]])
        found = backbone.forward_features(batch.to(device))
        outputs.append((found["x_norm_clstoken"].float(), found["x_norm_patchtokens"].float().mean(dim=1)))
    class_tokens, patch_means = (torch.cat(parts).cpu().numpy() for parts in zip(*outputs, strict=True))
    return Features(class_tokens, patch_means)


def cached(compute: Callable[[], Features], backbone: Backbone, content: str, preprocessing: str) -> Features:
    """`compute()`, or what an earlier call with the same weights, data and preprocessing gave.

    Args:
        content: digest of the images and their order.
        preprocessing: in words, complete.
    """
    key = hashlib.sha256(json.dumps([weights_digest(backbone), content, preprocessing]).encode()).hexdigest()
    file = cache_directory() / "features" / f"{key[:32]}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as archive:
            return Features(archive["class_tokens"], archive["patch_means"])
    features = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as opened:
        np.savez(opened, **features._asdict())
    partial.replace(file)
    return features


def weights_digest(backbone: Backbone) -> str:
    """A digest of all of a backbone's tensors and of its architecture."""
    digest = hashlib.sha256(repr(backbone.spec).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def content_digest(images: Images, indices: Sequence[int] | np.ndarray) -> str:
    """A digest of the pixels of images, in order."""
    digest = hashlib.sha256()
    for index in tqdm(indices, desc="reading", unit="image", leave=False):
        image = images.read(int(index))
        digest.update(repr(tuple(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()
