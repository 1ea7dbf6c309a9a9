"""How class tokens are spread."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.monitor.indicators.indicator import Indicator, Observed


def rank_me(features: Tensor) -> Tensor:
    """The effective rank of features (N, D): e to the entropy of their singular values (Garrido et al. 2023, eq. 1).

    Between 1 and min(N, D). The singular values are roots of the Gram matrix's eigenvalues.
    """
    rows, columns = features.shape
    gram = features.mT @ features if columns <= rows else features @ features.mT
    values = torch.linalg.eigvalsh(gram.float()).clamp(min=0).sqrt()
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp()


def feature_deviation(features: Tensor) -> Tensor:
    """√D times the mean deviation of L2-normalised features (N, D): 1 if they spread evenly, 0 if all are equal."""
    normalised = F.normalize(features.float(), dim=1)
    return normalised.std(dim=0).mean() * math.sqrt(features.shape[1])


def _rank_me(observed: Observed) -> Tensor:
    return rank_me(observed.tokens)


def _feature_std(observed: Observed) -> Tensor:
    return feature_deviation(observed.tokens)


FEATURES = (
    Indicator(
        "health/rank_me",
        "effective rank (RankMe)",
        "effective rank of the class tokens",
        ("tokens",),
        _rank_me,
        lambda sizes: (min(4.0, sizes.width / 16), sizes.width),
    ),
    Indicator(
        "health/feature_std",
        "spread of class tokens",
        "spread of the class tokens' directions; 1: even, 0: all equal",
        ("tokens",),
        _feature_std,
        lambda sizes: (0.1, 1.05),
    ),
)
