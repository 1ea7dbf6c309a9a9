"""How often each image is drawn: equal shares for clusters, level by level, or what is near to given images."""

import numpy as np


def water_filling(capacities: np.ndarray, budget: float, wanted: np.ndarray | None = None) -> np.ndarray:
    """Shares of a budget in proportion to what is wanted, but none above its capacity: min(c, cut · w), adding up.

    Args:
        capacities: (k,) of each, not negative.
        wanted: (k,) above 0; None: equal.

    Returns:
        (k,) fp64; all capacities where the budget exceeds their sum.
    """
    capacities = np.asarray(capacities, dtype=np.float64)
    wanted = np.ones(len(capacities)) if wanted is None else wanted
    if budget >= capacities.sum():
        return capacities.copy()
    order = np.argsort(capacities / wanted, kind="stable")
    full, rest = capacities[order], wanted[order]
    below = np.cumsum(full) - full
    cuts = (budget - below) / np.cumsum(rest[::-1])[::-1]  # the cut if all before are full
    fits = cuts * rest <= full
    # By a rounding, the budget may be less than the sum and yet no cut fit.
    return np.minimum(capacities, cuts[fits.argmax()] * wanted) if fits.any() else capacities.copy()


def whole_numbers(shares: np.ndarray, capacities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shares rounded to integers of the same sum (rounded), none above its capacity; who gets the rest is drawn."""
    floors = np.minimum(np.floor(shares + 1e-9), capacities).astype(np.int64)
    left = round(float(shares.sum())) - int(floors.sum())
    order = generator.permutation(len(shares))
    order = order[np.argsort(-(shares - floors)[order], kind="stable")]
    able = order[floors[order] < np.asarray(capacities)[order]]
    floors[able[:left]] += 1
    return floors


def flat(
    labels: np.ndarray, clusters: int, smoothing: float = 0.0, budget: float | None = None, repeats: float = np.inf
) -> np.ndarray:
    """Weights (N,) that add up to the budget: each cluster gets a share in proportion to size^smoothing.

    Args:
        labels: (N,) cluster of each image, −1: none, weight 0.
        smoothing: 0: equal shares; 1: shares as they are.
        budget: draws in all; None: N.
        repeats: the most that one image may get; what a cluster cannot take, the others share.
    """
    sizes = np.bincount(labels[labels >= 0], minlength=clusters).astype(np.float64)
    there = sizes > 0
    each = np.zeros(clusters)
    total = len(labels) if budget is None else budget
    capacities = np.minimum(sizes[there] * repeats, total)
    each[there] = water_filling(capacities, total, sizes[there] ** smoothing) / sizes[there]
    return np.where(labels >= 0, each[labels], 0.0)


def hierarchical(levels: list[np.ndarray], budget: float, repeats: float = 1.0) -> np.ndarray:
    """Weights (N,) that add up to the budget: split evenly from the top level down, at the leaves among images.

    Args:
        levels: (N,) cluster of each image at the first level (−1: none), then (k,) of each cluster one level up.
        budget: draws in all.
        repeats: the most that one image may get.
    """
    of_image = levels[0]
    sizes = [np.bincount(of_image[of_image >= 0], minlength=len(levels[1]) if levels[1:] else 0)]
    for number, above in enumerate(levels[1:], 2):
        sizes.append(np.bincount(above, weights=sizes[-1], minlength=len(levels[number]) if levels[number:] else 0))
    shares = water_filling(sizes[-1] * repeats, budget)
    for above, below in zip(reversed(levels[1:]), reversed(sizes[:-1]), strict=True):
        lower = np.zeros(len(below))
        for parent, children in enumerate(members(above, len(shares))):
            lower[children] = water_filling(below[children] * repeats, shares[parent])
        shares = lower
    each = np.divide(shares, sizes[0], out=np.zeros_like(shares), where=sizes[0] > 0)
    return np.where(of_image >= 0, each[of_image], 0.0)


def subset(weights: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Whole numbers of draws (N,) for weights that are equal within each cluster, in which who is taken is drawn.

    Args:
        labels: (N,) cluster of each image, −1: none.
    """
    generator = np.random.default_rng(seed)
    clusters = int(labels.max(initial=-1)) + 1
    inside = labels >= 0
    sizes = np.bincount(labels[inside], minlength=clusters)
    shares = np.bincount(labels[inside], weights=weights[inside], minlength=clusters).astype(np.float64)
    most = np.ceil(np.divide(shares, sizes, out=np.zeros_like(shares), where=sizes > 0) - 1e-9)
    totals = whole_numbers(shares, sizes * most, generator)
    order = np.lexsort((generator.permutation(len(labels)), labels))
    order = order[labels[order] >= 0]
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    place = np.arange(len(order)) - starts[labels[order]]
    draws = np.zeros(len(labels), dtype=np.int64)
    full, rest = np.divmod(totals, np.maximum(sizes, 1))
    draws[order] = full[labels[order]] + (place < rest[labels[order]])
    return draws


def by_samples(places: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool: images that are among the neighbours (Q, k) of a seed image; −1 are none."""
    chosen = np.zeros(count, dtype=bool)
    chosen[places[places >= 0]] = True
    return chosen


def by_clusters(labels: np.ndarray, seed_labels: np.ndarray, least: int, most: int, seed: int) -> np.ndarray:
    """(N,) bool: at most `most` images at random of every cluster in which at least `least` seed images lie."""
    hits = np.bincount(seed_labels, minlength=int(labels.max(initial=-1)) + 1)
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    of_cluster = members(labels, len(hits))
    for cluster in np.flatnonzero(hits >= least):
        chosen[generator.permutation(of_cluster[cluster])[:most]] = True
    return chosen


def members(labels: np.ndarray, clusters: int) -> list[np.ndarray]:
    """The places at which each label is, in ascending order; −1 is no label."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    return np.split(order, np.cumsum(np.bincount(labels[order], minlength=clusters))[:-1])


def effective_number(shares: np.ndarray) -> float:
    """exp of the entropy: how many equal clusters would be as diverse."""
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
