"""Whether what is near is alike: in its class where images have one, else for two views of an image."""

from torch import Tensor

from dino.evaluation.neighbours import nearest_allowed, weighted_knn
from dino.monitor.indicators.indicator import Indicator, Observed

QUERIES = 512  # newest images whose neighbours are asked for their class


def neighbour_agreement(first: Tensor, second: Tensor, keys: Tensor, allowed: Tensor, k: int = 10) -> Tensor:
    """Fraction of the k nearest keys that two views of the same image have in common, (N, D) each; a scalar.

    Untrained networks have some, by what views share in pixels; a collapsed one k / M, that of chance.
    """
    _, of_first = nearest_allowed(first, keys, allowed, k)
    _, of_second = nearest_allowed(second, keys, allowed, k)
    return (of_first[:, :, None] == of_second[:, None, :]).any(dim=2).float().mean()


def _knn(observed: Observed) -> Tensor:
    """How often the neighbours of the newest images, other images, name the right class."""
    assert observed.labels is not None
    newest, labels = observed.indices[-QUERIES:], observed.labels[observed.indices]
    other_images = observed.indices != newest[:, None]
    predicted = weighted_knn(observed.tokens[-QUERIES:], observed.tokens, labels, observed.classes, other_images)
    return (predicted == labels[-QUERIES:]).float().mean()


def _agreement(observed: Observed) -> Tensor:
    """Whether the two views of the last step's images have the same neighbours."""
    views = observed.seen.tokens
    newest = observed.indices[-views.shape[1] :]
    first, second = views[:, -len(newest) :]
    return neighbour_agreement(first, second, observed.tokens, observed.indices != newest[:, None])


NEIGHBOURS = (
    Indicator(
        "health/knn",
        "neighbours name the class",
        "nearest neighbours have the same class",
        ("tokens", "labels"),
        _knn,
    ),
    Indicator(
        "health/neighbour_agreement",
        "two views, same neighbours",
        "two views of an image have the same nearest neighbours",
        ("tokens", "no labels"),
        _agreement,
    ),
)
