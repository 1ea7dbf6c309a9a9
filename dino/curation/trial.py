"""Are these weights good enough to find copies among these images? Some are planted, and those that are found counted.

Weak features propose too few pairs, and thumbnails of 8×8 pixels not all that are left.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino.curation.confirm import confirmed
from dino.curation.duplicates import OUTLINES, outlines
from dino.curation.settings import Duplicates
from dino.curation.thumbnails import thumbnail
from dino.data import Pool, read_or_reason
from dino.data.decode import decode
from dino.evaluation.neighbours import as_floats
from dino.models import Backbone
from dino.precision import inference

IMAGES = 32
ENOUGH = 0.8  # of the planted copies; below, the user is told


def planted_and_found(backbone: Backbone, images: Pool, settings: Duplicates) -> dict[str, float]:
    """The fraction of copies of each kind that features propose and thumbnails confirm; empty where no image is read.

    Whether an image has more near neighbours than are looked at is not tried.
    """
    rows = np.unique(np.linspace(0, len(images.names) - 1, min(IMAGES, len(images.names))).astype(int)).tolist()
    read = [read_or_reason(images, row)[0] for row in rows]
    originals = [image for image in read if image is not None and min(image.shape[1:]) >= 16]
    if not originals:
        return {}
    tokens, thumbnails = _seen(backbone, originals)
    fractions = {}
    is_photograph = originals[0].dtype == torch.uint8 and len(originals[0]) == 3
    for title, change in CHANGES.items():
        if change in (_recoded, _in_grey) and not is_photograph:
            continue
        copies = [change(image) for image in originals]
        other_tokens, other_thumbnails = _seen(backbone, copies)
        found = F.cosine_similarity(tokens, other_tokens).numpy() >= settings.near
        if settings.similarity:
            every = np.arange(len(originals))
            one, other = (as_floats(outlines(side, every)) for side in (thumbnails, other_thumbnails))
            found |= F.cosine_similarity(one, other).numpy() >= OUTLINES
            pairs = np.repeat(np.flatnonzero(found)[:, None], 2, axis=1)
            found = confirmed(pairs, thumbnails, other_thumbnails, settings.similarity, settings.details)
        fractions[title] = float(found.sum() / len(originals))
    return fractions


def described(fractions: dict[str, float]) -> str:
    """All of them in a line."""
    return ", ".join(f"{title} {fraction:.0%}" for title, fraction in fractions.items())


def warning(fractions: dict[str, float]) -> str:
    """What the user is told where too few are found; else nothing."""
    mean = float(np.mean(list(fractions.values()))) if fractions else 1.0
    if mean >= ENOUGH:
        return ""
    return (
        f"of copies planted among these images {mean:.0%} are found with these weights ({described(fractions)}): "
        "others go unseen; better weights, or a lower duplicates.near, find more"
    )


def _seen(backbone: Backbone, images: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """Class tokens (n, D) and thumbnails (n, 64, 64)."""
    device = next(backbone.parameters()).device
    inputs = torch.stack([backbone.preprocess.of_levels(image) for image in images]).to(device)
    with inference(device):
        tokens = backbone(inputs).float().cpu()
    return tokens, torch.stack([thumbnail(image) for image in images]).numpy()


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return _as(image, resized)


def _as(image: Tensor, pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255) if image.is_floating_point() else pixels.round().clamp(0, 255).to(image.dtype)


def _half(image: Tensor) -> Tensor:
    return _resized(image, image.shape[1] // 2, image.shape[2] // 2)


def _other_shape(image: Tensor) -> Tensor:
    return _resized(image, image.shape[1], round(image.shape[2] * 0.8))


def _darker(image: Tensor) -> Tensor:
    return _as(image, 0.7 * image.float())


def _in_grey(image: Tensor) -> Tensor:
    return _as(image, image.float().mean(dim=0, keepdim=True).expand_as(image)).contiguous()


def _cropped(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    top, left = round(0.025 * height), round(0.025 * width)
    return image[:, top : height - top, left : width - left].contiguous()


def _recoded(image: Tensor) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=30)
    return decode(buffer.getvalue(), len(image))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "JPEG of quality 30": _recoded,
    "half the size": _half,
    "other shape": _other_shape,
    "30 % darker": _darker,
    "in grey": _in_grey,
    "cropped to 95 %": _cropped,
}
