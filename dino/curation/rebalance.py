"""How often each image is drawn: equal parts for clusters, level by level, or what is near to given images."""

import numpy as np


def water_filling(capacities: np.ndarray, budget: float, proportions: np.ndarray | None = None) -> np.ndarray:
    """Parts of a budget in given proportions, but none above its capacity: min(c, level · p), adding up.

    Args:
        capacities: (k,) of each, not negative.
        proportions: (k,) above 0; None: equal.

    Returns:
        (k,) fp64; all capacities where the budget exceeds their sum.
    """
    capacities = np.asarray(capacities, dtype=np.float64)
    proportions = np.ones(len(capacities)) if proportions is None else proportions
    if budget >= capacities.sum():
        return capacities.copy()
    order = np.argsort(capacities / proportions, kind="stable")
    capacity, proportion = capacities[order], proportions[order]
    budget_before = np.cumsum(capacity) - capacity
    levels = (budget - budget_before) / np.cumsum(proportion[::-1])[::-1]  # the level if all before are full
    fits = levels * proportion <= capacity
    if not fits.any():  # by a rounding, the budget may be less than the sum and yet no level fit
        return capacities.copy()
    return np.minimum(capacities, levels[fits.argmax()] * proportions)


def whole_numbers(parts: np.ndarray, capacities: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Parts rounded to integers of the same sum (rounded), none above its capacity; who gets the rest is drawn."""
    floors = np.minimum(np.floor(parts + 1e-9), capacities).astype(np.int64)
    rest = round(float(parts.sum())) - int(floors.sum())
    order = generator.permutation(len(parts))
    order = order[np.argsort(-(parts - floors)[order], kind="stable")]
    with_room = order[floors[order] < np.asarray(capacities)[order]]
    floors[with_room[:rest]] += 1
    return floors


def flat(
    labels: np.ndarray, clusters: int, smoothing: float = 0.0, budget: float | None = None, repeats: float = np.inf
) -> np.ndarray:
    """Weights (N,) that add up to the budget: each cluster gets a part in proportion to size^smoothing.

    Args:
        labels: (N,) cluster of each image, −1: none, weight 0.
        smoothing: 0: equal parts; 1: in proportion to size.
        budget: draws in all; None: N.
        repeats: the most that one image may get; what a cluster cannot take, the others get.
    """
    sizes = np.bincount(labels[labels >= 0], minlength=clusters).astype(np.float64)
    occupied = sizes > 0
    each = np.zeros(clusters)
    total = len(labels) if budget is None else budget
    capacities = np.minimum(sizes[occupied] * repeats, total)
    each[occupied] = water_filling(capacities, total, sizes[occupied] ** smoothing) / sizes[occupied]
    return np.where(labels >= 0, each[labels], 0.0)


def hierarchical(levels: list[np.ndarray], budget: float, repeats: float = 1.0) -> np.ndarray:
    """Weights (N,) that add up to the budget: split evenly from the top level down, at the leaves among images.

    Args:
        levels: (N,) cluster of each image at the first level (−1: none), then (k,) of each cluster one level up.
        budget: draws in all.
        repeats: the most that one image may get.
    """
    labels, parents_of_levels = levels[0], levels[1:]
    clusters = [len(parents) for parents in parents_of_levels] + [0]  # of each level; of the top one, as many as occur
    sizes = [np.bincount(labels[labels >= 0], minlength=clusters[0])]  # images in each cluster, level by level
    for parents, above in zip(parents_of_levels, clusters[1:], strict=True):
        sizes.append(np.bincount(parents, weights=sizes[-1], minlength=above))
    parts = water_filling(sizes[-1] * repeats, budget)
    for parents, below in zip(reversed(parents_of_levels), reversed(sizes[:-1]), strict=True):
        parts_below = np.zeros(len(below))
        for parent, children in enumerate(members(parents, len(parts))):
            parts_below[children] = water_filling(below[children] * repeats, parts[parent])
        parts = parts_below
    each = np.divide(parts, sizes[0], out=np.zeros_like(parts), where=sizes[0] > 0)
    return np.where(labels >= 0, each[labels], 0.0)


def subset(weights: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Whole numbers of draws (N,) for weights that are equal within each cluster, in which who gets one is drawn.

    Args:
        labels: (N,) cluster of each image, −1: none.
    """
    generator = np.random.default_rng(seed)
    clusters = int(labels.max(initial=-1)) + 1
    inside = labels >= 0
    sizes = np.bincount(labels[inside], minlength=clusters)
    parts = np.bincount(labels[inside], weights=weights[inside], minlength=clusters).astype(np.float64)
    most = np.ceil(np.divide(parts, sizes, out=np.zeros_like(parts), where=sizes > 0) - 1e-9)
    totals = whole_numbers(parts, sizes * most, generator)
    order = np.lexsort((generator.permutation(len(labels)), labels))
    order = order[labels[order] >= 0]
    starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    rank = np.arange(len(order)) - starts[labels[order]]  # of an image in its cluster
    draws = np.zeros(len(labels), dtype=np.int64)
    of_each, rest = np.divmod(totals, np.maximum(sizes, 1))
    draws[order] = of_each[labels[order]] + (rank < rest[labels[order]])
    return draws


def by_samples(neighbours: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool: images that are among the neighbours (Q, k) of a seed image; −1 are none."""
    selected = np.zeros(count, dtype=bool)
    selected[neighbours[neighbours >= 0]] = True
    return selected


def by_clusters(labels: np.ndarray, seed_labels: np.ndarray, least: int, most: int, seed: int) -> np.ndarray:
    """(N,) bool: at most `most` images at random of every cluster in which at least `least` seed images lie."""
    hits = np.bincount(seed_labels, minlength=int(labels.max(initial=-1)) + 1)
    generator = np.random.default_rng(seed)
    selected = np.zeros(len(labels), dtype=bool)
    of_cluster = members(labels, len(hits))
    for cluster in np.flatnonzero(hits >= least):
        selected[generator.permutation(of_cluster[cluster])[:most]] = True
    return selected


def members(labels: np.ndarray, clusters: int) -> list[np.ndarray]:
    """The indices at which each label is, in ascending order; −1 is no label."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    return np.split(order, np.cumsum(np.bincount(labels[order], minlength=clusters))[:-1])
