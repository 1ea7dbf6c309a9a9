"""Pairs of images of similar features without comparing each with each: an inverted file, cut over all processes.

k-means sorts keys into cells (Sivic & Zisserman 2003; Jégou, Douze & Schmid 2011), and a query is compared with the
keys of the cells whose centroids are nearest to it: with these exactly, with the others not at all. A process works on
cells of its own, whichever queries ask there, so none holds all embeddings; what every process holds is `probes`
numbers of cells for each query. The pairs do not depend on how many processes there are.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dino.curation import points as points_module
from dino.curation.hierarchy import rank_within
from dino.curation.kmeans import kmeans
from dino.curation.points import Points, own_rows
from dino.distributed import gathered_rows, rank_and_size
from dino.evaluation.neighbours import Rows, as_floats
from dino.precision import prefers_bf16

LEARNED = 32  # keys a cell, by which the cells are made
ITERATIONS = 10  # of their k-means: they need not come to rest
CHUNK = 4096  # queries at a time, and 4 times as many keys
BF16_ERROR = 2**-7  # of a cosine of unit vectors rounded to bf16, and itself rounded, at most
PENDING = 2**22  # pairs, from which on those that are not among a query's best are sorted out


class Pairs(NamedTuple):
    """m pairs of rows, and the cosines of their features.

    Attributes:
        queries, keys: (m,) int64.
        cosines: (m,) fp32.
    """

    queries: np.ndarray
    keys: np.ndarray
    cosines: np.ndarray


def best_cells(keys: int, probes: int) -> int:
    """How many cost least: comparisons of a row with c centroids and probes · keys / c keys."""
    return max(1, round((probes * keys) ** 0.5))


def similar_pairs(
    queries: Rows,
    keys: Rows,
    least: float,
    count: int,
    cells: int,
    probes: int,
    device: torch.device | str = "cpu",
) -> Pairs:
    """For each query the nearest keys, `count` at most, whose cosine is at least `least`; every process gets all.

    Args:
        queries, keys: (Q, D) and (N, D), of any length; where both are the same object, no row is its own neighbour.
        cells: as many as there are keys, at most.
        probes: cells in which a query's neighbours are looked for.

    Returns:
        By query, and of each the most similar first.
    """
    device, among_themselves = torch.device(device), queries is keys
    cells, probes = min(cells, len(keys)), min(probes, cells, len(keys))
    centroids = _centroids(keys, cells, device)
    asked = _nearest_cells(queries, centroids, probes, device, "queries into cells")
    own = asked[:, 0] if among_themselves else _nearest_cells(keys, centroids, 1, device, "keys into cells")[:, 0]
    keys_of, queries_of = _Lists([own], cells), _Lists(list(asked.T), cells)
    rank, processes = rank_and_size()
    pairs = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    pending, waiting = [pairs], 0
    cells_of_process = range(rank, cells, processes)
    for cell in tqdm(cells_of_process, desc="neighbours", unit="cell", leave=False, disable=rank > 0):
        for some_keys in _chunks(keys_of[cell], 4 * CHUNK):
            key_block = _unit(keys, some_keys, device)
            for some in _chunks(queries_of[cell], CHUNK):
                itself = _places(some, some_keys) if among_themselves else None
                rows, columns, cosines = _compare(_unit(queries, some, device), key_block, itself, least, count)
                pending.append(Pairs(some[rows], some_keys[columns], cosines))
                waiting += len(rows)
        if waiting > PENDING:
            pending, waiting = [_best(pending, count)], 0
    own_pairs = _best(pending, count)
    gathered = Pairs(*(gathered_rows(torch.from_numpy(part).to(device)).cpu().numpy() for part in own_pairs))
    return _best([gathered], count)


def _centroids(keys: Rows, cells: int, device: torch.device) -> Tensor:
    """(cells, D) of unit length, by k-means on a sample of the keys, from some of them."""
    generator = np.random.default_rng(cells)
    sample = np.sort(generator.choice(len(keys), min(len(keys), LEARNED * cells), replace=False))
    some = Points(keys.part(sample[own_rows(len(sample))]), device, spherical=True)
    first = torch.from_numpy(np.sort(generator.choice(len(sample), cells, replace=False))).to(device)
    initial = some.at(first) + some.mean.float()
    precision = torch.bfloat16 if prefers_bf16(device) else torch.float32
    return kmeans(some, cells, ITERATIONS, 0, precision, initial, title="cells").centroids


def _nearest_cells(rows: Rows, centroids: Tensor, count: int, device: torch.device, title: str) -> np.ndarray:
    """(n, count) int32: the cells nearest to each row, in every process; the nearest first."""
    narrow = centroids.bfloat16() if prefers_bf16(device) else centroids
    own = own_rows(len(rows))
    nearest = np.empty((own.stop - own.start, count), np.int32)
    block = points_module.BLOCK
    hidden = rank_and_size()[0] > 0
    for start in tqdm(range(own.start, own.stop, block), desc=title, unit="block", leave=False, disable=hidden):
        some = np.arange(start, min(start + block, own.stop))
        scores = F.linear(_unit(rows, some, device).to(narrow.dtype), narrow).float()
        nearest[some - own.start] = _highest(scores, count)
    return gathered_rows(torch.from_numpy(nearest).to(device)).cpu().numpy()


def _highest(scores: Tensor, count: int) -> np.ndarray:
    """(n, count) columns of the highest scores (n, k), which are used up; on a CPU by NumPy, several times as fast."""
    if scores.device.type != "cpu":
        return scores.topk(count, dim=1).indices.cpu().numpy()
    values, rows = scores.numpy(), np.arange(len(scores))
    columns = np.empty((len(values), count), np.int64)
    for place in range(count):
        columns[:, place] = values.argmax(axis=1)
        values[rows, columns[:, place]] = -np.inf
    return columns


class _Lists:
    """Which rows belong to each cell, in ascending order; a row may belong to one cell by each of several columns."""

    def __init__(self, columns: list[np.ndarray], cells: int):
        self.orders, self.starts = [], []
        for column in columns:
            self.orders.append(np.argsort(column, kind="stable").astype(np.int32))
            self.starts.append(np.concatenate([[0], np.cumsum(np.bincount(column, minlength=cells))]))

    def __getitem__(self, cell: int) -> np.ndarray:
        parts = zip(self.orders, self.starts, strict=True)
        return np.sort(np.concatenate([order[starts[cell] : starts[cell + 1]] for order, starts in parts])).astype(int)


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _unit(rows: Rows, some: np.ndarray, device: torch.device) -> Tensor:
    """(n, D) fp32."""
    return F.normalize(as_floats(rows[some]).to(device), dim=1)


def _places(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of some rows are among others, and where there; both in ascending order."""
    _, rows, columns = np.intersect1d(queries, keys, assume_unique=True, return_indices=True)
    return rows, columns


def _compare(
    queries: Tensor, keys: Tensor, itself: tuple[np.ndarray, np.ndarray] | None, least: float, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and cosine of each query's nearest keys, where the cosine is at least `least`.

    Where bf16 is faster, it sorts out the queries that have no such key; the others are compared in fp32.

    Args:
        itself: rows and columns at which a query meets itself.
    """
    rows = torch.arange(len(queries), device=queries.device)
    if prefers_bf16(queries.device):
        rough = _without(F.linear(queries.bfloat16(), keys.bfloat16()), itself)
        rows = (rough.amax(dim=1) >= least - BF16_ERROR).nonzero()[:, 0]
        if itself is not None:
            still = np.isin(itself[0], rows.cpu().numpy())
            itself = np.searchsorted(rows.cpu().numpy(), itself[0][still]), itself[1][still]
    cosines = _without(queries[rows] @ keys.T, itself)
    best = cosines.topk(min(count, len(keys)), dim=1)
    enough = best.values >= least
    columns, values = best.indices[enough], best.values[enough]
    return rows[enough.nonzero()[:, 0]].cpu().numpy(), columns.cpu().numpy(), values.cpu().numpy()


def _without(cosines: Tensor, places: tuple[np.ndarray, np.ndarray] | None) -> Tensor:
    if places is not None:
        rows, columns = (torch.from_numpy(part).to(cosines.device) for part in places)
        cosines[rows, columns] = -torch.inf
    return cosines


def _best(parts: list[Pairs], count: int) -> Pairs:
    """Of each query the `count` pairs of the highest cosine, of equals that of the first key."""
    queries, keys, cosines = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((keys, -cosines, queries))
    order = order[rank_within(queries[order]) < count]
    return Pairs(queries[order], keys[order], cosines[order])
