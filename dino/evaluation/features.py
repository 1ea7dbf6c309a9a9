"""Images through a frozen backbone."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino.data import Images
from dino.models import Backbone


@torch.inference_mode()
def class_tokens(
    backbone: Backbone,
    images: Images,
    indices: Sequence[int] | np.ndarray,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 256,
    title: str = "features",
) -> np.ndarray:
    """Class tokens of images.

    Args:
        indices: which images of the pool.
        transform: (C, H, W) uint8 to what the backbone takes; all outputs of one size.
        title: what the progress bar says.

    Returns:
        (len(indices), D) fp32.
    """
    device = next(backbone.parameters()).device
    outputs = []
    for first in tqdm(range(0, len(indices), batch_size), desc=title, unit="batch", leave=False):
        batch = torch.stack([transform(images.read(int(index))) for index in indices[first : first + batch_size]])
        outputs.append(backbone(batch.to(device)).float().cpu())
    return torch.cat(outputs).numpy()
