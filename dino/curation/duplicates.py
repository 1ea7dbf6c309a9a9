"""Duplicates: images of equal pixels, and near copies, of which one is kept (Oquab et al. 2023, appendix A).

Features propose pairs, and so do thumbnails of 8×8 pixels, which weak weights do not blind; thumbnails of 64×64 confirm
them. A copy of a copy is a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dino.config.schema import AUTO
from dino.curation.confirm import confirmed, small_thumbnails
from dino.curation.embed import Embedded
from dino.curation.inverted import best_cells, similar_pairs
from dino.curation.points import own_rows
from dino.curation.settings import Duplicates
from dino.distributed import gathered_rows, rank_and_size, reduced
from dino.evaluation.neighbours import Rows, as_floats, nearest

EACH_WITH_EACH = 250_000  # images, up to which all are compared with all
OUTLINES = 0.9  # correlation of 8×8 pixels from which two images may be copies


class Copies(NamedTuple):
    """What is a copy of what among N images.

    Attributes:
        original: (N,) index of the image that stands for each: itself, or the one of its copies; −1: unreadable.
        matches: (N,) number, from 1 on, of the test set that an image or one of its copies matches; 0: none.
        near: (m, 2) pairs of near copies.
        cosines: (m,) fp32, of their features.
        candidates: pairs that were proposed.
    """

    original: np.ndarray
    matches: np.ndarray
    near: np.ndarray
    cosines: np.ndarray
    candidates: int


def find_copies(
    embedded: Embedded,
    names: pa.Array,
    test_sets: Sequence[Embedded],
    settings: Duplicates,
    device: torch.device | str = "cpu",
) -> Copies:
    """Equal pixels, near copies, and matches with test sets; every process must call this and gets all.

    Args:
        names: (N,) of the images, packed.
        test_sets: images that none of the pool's may match.
        device: where features are compared.
    """
    near, cosines, candidates = near_copies(embedded, embedded, settings, device)
    group = groups(len(embedded.hashes), np.concatenate([same_pixels(embedded.hashes), near]))
    original = originals(group, embedded.sizes.prod(axis=1), pc.rank(names).to_numpy())
    original[~embedded.readable] = -1
    matches = np.zeros(len(group), dtype=np.int64)
    for number, test_set in enumerate(test_sets, 1):
        pairs, _, _ = near_copies(embedded, test_set, settings, device)
        equal = np.isin(embedded.hashes, test_set.hashes[test_set.readable]) & embedded.readable
        matching_groups = np.unique(np.concatenate([group[pairs[:, 0]], group[equal]]))
        matches[np.isin(group, matching_groups) & (matches == 0)] = number
    return Copies(original, matches, near, cosines, candidates)


def near_copies(
    first: Embedded, second: Embedded, settings: Duplicates, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Near copies between images of `first` and of `second`, which may be the same; every process gets all.

    One of each set of equal images is compared: many would be each other's neighbours, and no one else's.

    Returns:
        (m, 2) pairs of indices, (m,) cosines of their features, and how many candidates there were.
    """
    if not settings.near:
        return np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32), 0
    among_themselves = first is second
    queries, keys = distinct(first.hashes), distinct(second.hashes)
    by_features = Rows(first.tokens, queries), Rows(second.tokens, keys)
    pairs = _similar(*by_features, among_themselves, settings.near, settings, device)
    if settings.similarity:
        by_outlines = Rows(outlines(first.thumbnails, queries)), Rows(outlines(second.thumbnails, keys))
        more = _similar(*by_outlines, among_themselves, OUTLINES, settings, device)
        pairs = np.unique(np.concatenate([pairs, more]), axis=0)
    pairs = np.stack([queries[pairs[:, 0]], keys[pairs[:, 1]]], axis=1)
    candidates = int(reduced(torch.tensor(len(pairs), device=device)))
    if settings.similarity:
        title = "confirming copies" if rank_and_size()[0] == 0 else None
        thumbnails = first.thumbnails, second.thumbnails
        pairs = pairs[confirmed(pairs, *thumbnails, settings.similarity, settings.details, title=title)]
    pairs = gathered_rows(torch.from_numpy(pairs).to(device)).cpu().numpy()
    if among_themselves:
        pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    tokens = as_floats(first.tokens[pairs[:, 0]]), as_floats(second.tokens[pairs[:, 1]])
    cosines = F.cosine_similarity(*tokens).numpy()
    return pairs, cosines, candidates


def outlines(thumbnails: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n, 64) fp16: 8×8 pixels of some of the thumbnails, less their mean, so that cosines are correlations."""
    pixels = small_thumbnails(thumbnails, images).reshape(len(images), -1).astype(np.float16)
    return pixels - pixels.mean(axis=1, keepdims=True, dtype=np.float32).astype(np.float16)


def _similar(
    queries: Rows,
    keys: Rows,
    among_themselves: bool,
    least: float,
    settings: Duplicates,
    device: torch.device | str,
) -> np.ndarray:
    """(m, 2) queries and keys of a cosine of at least `least`; every process gets another part of them."""
    keys = queries if among_themselves else keys
    cells = settings.cells
    if cells == AUTO:
        cells = 0 if len(queries) * len(keys) <= EACH_WITH_EACH**2 else best_cells(len(keys), settings.probes)
    if cells:
        pairs = similar_pairs(queries, keys, least, settings.neighbours, int(cells), settings.probes, device)
        rows = own_rows(len(pairs.queries))
        return np.stack([pairs.queries[rows], pairs.keys[rows]], axis=1)
    rows = own_rows(len(queries))
    itself = rows.start if among_themselves else None
    indices_and_cosines = nearest(queries.part(rows), keys, settings.neighbours, itself=itself, device=device)
    neighbours, cosines = (tensor.numpy() for tensor in indices_and_cosines)
    row, rank = np.nonzero((cosines >= least) & (neighbours >= 0))
    return np.stack([row + rows.start, neighbours[row, rank]], axis=1)


def groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) the number of each image's connected component, of `pairs` (m, 2)."""
    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def originals(group: np.ndarray, pixels: np.ndarray, names: np.ndarray) -> np.ndarray:
    """(count,) which image of its group stands for each: the one of most pixels, of these the first by name, or by its
    rank among names."""
    order = np.lexsort((names, -pixels, group))
    firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
    of_group = np.empty(group.max(initial=-1) + 1, dtype=np.int64)
    of_group[group[order][firsts]] = order[firsts]
    return of_group[group]


def same_pixels(hashes: np.ndarray) -> np.ndarray:
    """(m, 2) pairs that join images of equal hash; empty hashes are of images that could not be read."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    equal = (ordered[1:] == ordered[:-1]) & (ordered[1:] != b"")
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1)


def distinct(hashes: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the first image of each hash; images that could not be read are none."""
    values, firsts = np.unique(hashes, return_index=True)
    return np.sort(firsts[values != b""])
