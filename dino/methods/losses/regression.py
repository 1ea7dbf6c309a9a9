"""BYOL's loss (Grill et al. 2020, eq. 2): a prediction points where its target does."""

import torch.nn.functional as F
from torch import Tensor


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of ‖p̄ − z̄‖² = 2 − 2·cos(p, z), both at unit length.

    Args:
        predictions: (..., E), any floating type.
        targets: (..., E); no gradient flows to them.

    Returns:
        Scalar, fp32, between 0 and 4.
    """
    return 2 - 2 * F.cosine_similarity(predictions.float(), targets.detach().float(), dim=-1).mean()
