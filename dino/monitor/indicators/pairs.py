"""What methods that compare embeddings make of their pairs (Wang & Isola 2020; He et al. 2020; Grill et al. 2020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.methods.method import Pairs
from dino.monitor.indicators.features import rank_me
from dino.monitor.indicators.indicator import Indicator, Observed


def alignment(tokens: Tensor) -> Tensor:
    """Mean squared distance of an image's two views (2, B, D) at unit length; 2: no nearer than chance."""
    first, second = F.normalize(tokens.float(), dim=-1)
    return (first - second).square().sum(dim=-1).mean()


def uniformity(tokens: Tensor) -> Tensor:
    """log of the mean of e^(−2·‖x − y‖²) over all pairs of rows (B, D) at unit length; 0: all are alike, −4: even."""
    unit = F.normalize(tokens.float(), dim=1)
    distances = torch.pdist(unit).square()
    return (-2 * distances).logsumexp(dim=0) - math.log(max(1, len(distances)))


def similarities(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of (P, B, E) queries with their own keys, and with the keys of other images."""
    cosines = F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).mT  # (P, B, B)
    own = cosines.diagonal(dim1=1, dim2=2)
    others = cosines.numel() - own.numel()
    return own.mean(), (cosines.sum() - own.sum()) / max(1, others)


def _pairs(observed: Observed) -> Pairs:
    assert observed.seen.pairs is not None
    return observed.seen.pairs


def _alignment(observed: Observed) -> Tensor:
    return alignment(observed.seen.tokens)


def _uniformity(observed: Observed) -> Tensor:
    return uniformity(observed.tokens[-512:])


def _positive_similarity(observed: Observed) -> Tensor:
    return similarities(*_pairs(observed)[:2])[0]


def _negative_similarity(observed: Observed) -> Tensor:
    return similarities(*_pairs(observed)[:2])[1]


def _queue_age(observed: Observed) -> Tensor:
    age = _pairs(observed).queue_age
    assert age is not None
    return age


def _predictor_rank(observed: Observed) -> Tensor:
    predictions = _pairs(observed).queries.flatten(0, 1)
    return (rank_me(predictions) - 1) / max(1, min(predictions.shape) - 1)


PAIRS = (
    Indicator(
        "health/alignment",
        "distance of two views",
        "squared distance of the class tokens of an image's two views; 2: no nearer than chance",
        ("pairs",),
        _alignment,
        lambda sizes: (0.0, 1.5),
    ),
    Indicator(
        "health/uniformity",
        "uniformity of class tokens",
        "how evenly class tokens lie on their sphere; 0: all alike, −4: evenly",
        ("pairs", "tokens"),
        _uniformity,
        lambda sizes: (-4.0, -0.1),
    ),
    Indicator(
        "health/positive_similarity",
        "similarity of two views",
        "cosine of embeddings that are to be alike",
        ("pairs",),
        _positive_similarity,
        lambda sizes: (0.2, 1.0),
    ),
    Indicator(
        "health/negative_similarity",
        "similarity of different images",
        "cosine of embeddings of different images; 1: all are alike",
        ("pairs",),
        _negative_similarity,
        lambda sizes: (-0.5, 0.95),
    ),
    Indicator(
        "health/predictor_rank",
        "rank of predictions",
        "effective rank of the predictor's outputs, as a fraction of the greatest; 0: all alike",
        ("pairs", "predictor"),
        _predictor_rank,
        lambda sizes: (0.02, 1.0),
    ),
    Indicator(
        "health/queue_age",
        "age of the queue's keys",
        "mean age of keys, as a fraction of the steps that the teacher averages over; above 1: of another network",
        ("queue",),
        _queue_age,
        lambda sizes: (0.0, 1.0),
    ),
)
