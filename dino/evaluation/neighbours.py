"""Nearest neighbours by cosine, exactly: each query is compared with each key, in chunks of matrix products."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

CHUNK = 4096  # queries, and 16 times as many keys, at a time


class Rows:
    """Some rows of (N, D) numbers, read when they are asked for: a memory map's stay on the disk until then.

    Args:
        indices: (n,) which rows, in which order; None: all.
    """

    def __init__(self, values: np.ndarray, indices: np.ndarray | None = None):
        self.values, self.indices = values, indices
        self.shape = (len(values) if indices is None else len(indices), *values.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.values[rows if self.indices is None else self.indices[rows]]

    def part(self, rows: slice | np.ndarray) -> "Rows":
        """Some of them, unread."""
        indices = np.arange(len(self.values)) if self.indices is None else self.indices
        return Rows(self.values, indices[rows])


def as_floats(rows: Tensor | np.ndarray) -> Tensor:
    """As an fp32 tensor; what a memory map shows is copied."""
    return rows.float() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, dtype=np.float32))


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """(Q, N), in fp32, of queries (Q, D) and keys (N, D) of any length."""
    return F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).mT


def nearest(
    queries: np.ndarray | Tensor | Rows,
    keys: np.ndarray | Tensor | Rows,
    count: int,
    itself: int | None = None,
    device: torch.device | str = "cpu",
    title: str | None = "neighbours",
) -> tuple[Tensor, Tensor]:
    """The `count` keys that are most similar to each query.

    Args:
        queries, keys: (Q, D) and (N, D), floating, of any length; arrays may be memory maps, or `Rows` of them.
        itself: index of the first query among the keys; queries are then not their own neighbours.
        title: what the progress bar says; None: there is none.

    Returns:
        (Q, count) int64 indices of keys and (Q, count) fp32 cosines, the most similar first. Where there are fewer
        keys, −1 and −∞.
    """
    indices = torch.full((len(queries), count), -1)
    values = torch.full((len(queries), count), -torch.inf)
    for start in tqdm(range(0, len(queries), CHUNK), desc=title, unit="chunk", leave=False, disable=title is None):
        block = as_floats(queries[start : start + CHUNK]).to(device)
        own = None if itself is None else itself + start
        block_indices, block_values = _nearest_of_block(block, keys, count, own, device)
        indices[start : start + CHUNK], values[start : start + CHUNK] = block_indices.cpu(), block_values.cpu()
    return indices, values


def _nearest_of_block(
    queries: Tensor, keys: np.ndarray | Tensor | Rows, count: int, itself: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The nearest keys of a chunk of queries: the best so far are compared with each chunk of keys in turn."""
    best = torch.full((len(queries), count), -torch.inf, device=device)
    indices = torch.full((len(queries), count), -1, device=device)
    for first in range(0, len(keys), 16 * CHUNK):
        block = as_floats(keys[first : first + 16 * CHUNK]).to(device)
        similarity = cosines(queries, block)
        if itself is not None:
            rows = torch.arange(len(queries), device=device)
            own = itself + rows - first
            inside = (own >= 0) & (own < len(block))
            similarity[rows[inside], own[inside]] = -torch.inf
        of_block = similarity.topk(min(count, len(block)), dim=1)
        best, columns = torch.cat([best, of_block.values], dim=1).topk(count, dim=1)
        indices = torch.cat([indices, of_block.indices + first], dim=1).gather(1, columns)
    indices[best == -torch.inf] = -1
    return indices, best


def nearest_allowed(queries: Tensor, keys: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices, (N, k) each, of the nearest of the keys (M, D) that `allowed` (N, M) permits a query."""
    return cosines(queries, keys).masked_fill(~allowed, -torch.inf).topk(min(k, len(keys)), dim=1)


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
    similarity, nearest = nearest_allowed(queries, keys, allowed, k)
    weights = (similarity / temperature).exp()  # of a key that may not vote: e^−∞
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, key_labels[nearest], weights).argmax(dim=1)
