"""What features and targets say of a run's health, as pure functions of tensors on any device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.evaluation.neighbours import cosines


class TargetStatistics(NamedTuple):
    """Of the teacher's targets q over samples and prototypes, in nats (Caron et al. 2021, §5.3).

    Attributes:
        entropy: mean of H(q); ln K: uniform, 0: always certain.
        kl_to_centre: mean of KL(q ‖ mean q), what a target tells about its sample; 0: all samples have the same.
    """

    entropy: Tensor
    kl_to_centre: Tensor


def target_statistics(targets: Tensor, mean: Tensor) -> TargetStatistics:
    """Entropy of targets (N, K) and their divergence from their mean (K,), which may be over more samples."""
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    # Mean of Σ q ln (q / m) = −mean H(q) − Σ mean(q) ln m
    cross = -torch.xlogy(targets.mean(dim=0), mean).sum()
    return TargetStatistics(entropy, (cross - entropy).clamp(min=0))


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


def weighted_knn(
    queries: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    classes: int,
    allowed: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The k nearest by cosine vote with weight e^(similarity / τ) (Wu et al. 2018; as DINO evaluates).

    Args:
        queries: (N, D).
        keys: (M, D), with labels (M,) of 0 … classes − 1.
        allowed: (N, M) bool, which keys may vote for a query.

    Returns:
        (N,) predicted labels.
    """
    similarity, nearest = _nearest(queries, keys, allowed, k)
    weights = (similarity / temperature).exp()  # of a key that may not vote: e^−∞
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, key_labels[nearest], weights).argmax(dim=1)


def neighbour_agreement(first: Tensor, second: Tensor, keys: Tensor, allowed: Tensor, k: int = 10) -> Tensor:
    """Share of the k nearest keys that two views of the same image have in common, (N, D) each; a scalar.

    Untrained networks have some, by what views share in pixels; a collapsed one k / M, that of chance.
    """
    one, other = (_nearest(view, keys, allowed, k)[1] for view in (first, second))
    return (one[:, :, None] == other[:, None, :]).any(dim=2).float().mean()


def _nearest(queries: Tensor, keys: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return cosines(queries, keys).masked_fill(~allowed, -torch.inf).topk(min(k, len(keys)), dim=1)
