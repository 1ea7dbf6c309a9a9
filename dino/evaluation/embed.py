"""`dino.embed`: images in, features out."""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from dino.data import open_images
from dino.errors import UserError
from dino.evaluation.features import extract
from dino.models import Backbone, load_backbone


class Embeddings(NamedTuple):
    """The readable images of a pool and what a backbone says of them.

    Attributes:
        names: (N,) as the pool has them.
        labels: (N,) class names, or None where the pool has none.
        class_tokens: (N, D) fp32.
        patch_means: (N, D) fp32, the mean of the patch tokens.
        left_out: how many images could not be read; each has been logged with its reason.
    """

    names: list[str]
    labels: list[str] | None
    class_tokens: np.ndarray
    patch_means: np.ndarray
    left_out: int

    def __repr__(self) -> str:  # in a notebook, not N names
        return f"Embeddings of {len(self.names):,} images, {self.class_tokens.shape[1]} wide"


def embed(
    weights: str | os.PathLike | Backbone,
    data: Any,
    *,
    kind: str = "auto",
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
    precision: str = "auto",
    heads: int | None = None,
    labels: str | None = None,
) -> Embeddings:
    """Embed images with any weights.

        features = dino.embed("runs/mine", "path/to/images")
        features.class_tokens[features.names.index("cat/1.jpg")]

    Args:
        weights: a released name, a run directory, a file, or a backbone, which stays on its device; all others go to
            the first GPU, if there is one.
        data: a folder, zip archive or manifest, or a data set of your own: anything with `len` and items.
        kind: as `data.kind`.
        batch_size: images at a time.
        accelerator: shares the images among its processes; each of them gets all features.
        precision: fp32, bf16, or auto: bf16 where the device has units for it.
        heads: attention heads, for files that do not tell.
        labels: as `data.labels`.

    Raises:
        UserError: no such weights or labels, or no image that can be read.
    """
    if isinstance(weights, Backbone):
        backbone = weights
    else:
        device = accelerator.device if accelerator else "cuda" if torch.cuda.is_available() else "cpu"
        backbone = load_backbone(os.fspath(weights), heads).to(device)
    images = open_images(data, kind, backbone.spec.in_chans, levels=backbone.preprocess.levels, labels=labels)
    features = extract(
        backbone,
        images,
        range(len(images.names)),
        backbone.preprocess.of_levels,
        batch_size,
        title="embedding",
        accelerator=accelerator,
        precision=precision,
    )
    if not len(features.rows):
        raise UserError(f"no image of {len(images.names)} in {data} can be read")
    return Embeddings(
        names=[images.names[row] for row in features.rows],
        labels=None if images.labels is None else [images.labels[row] for row in features.rows],
        class_tokens=features.class_tokens,
        patch_means=features.patch_means,
        left_out=len(images.names) - len(features.rows),
    )
