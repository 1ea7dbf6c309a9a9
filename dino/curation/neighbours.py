"""Nearest neighbours by cosine: exact, in chunks of matrix products, or by faiss where it is installed and pays."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dino.curation.points import as_floats
from dino.errors import UserError

CHUNK = 4096  # queries, and 16 times as many keys, at a time
EXACT_UP_TO = 2_000_000**2  # comparisons


def nearest(
    queries: np.ndarray | Tensor,
    keys: np.ndarray | Tensor,
    count: int,
    itself: int | None = None,
    device: torch.device | str = "cpu",
    title: str = "neighbours",
    of_all: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` keys most like each query.

    Args:
        queries, keys: (Q, D) and (N, D), floating, of any length; arrays may be memory maps.
        of_all: queries of all processes, by which the way of searching is chosen; as many as here if not given.
        itself: where the first query is among the keys; queries are then not their own neighbours.

    Returns:
        (Q, count) int64 places among the keys and (Q, count) fp32 cosines, the most alike first. Where there are fewer
        keys, −1 and −∞.

    Raises:
        UserError: too many keys for an exact search, and no faiss.
    """
    if (of_all or len(queries)) * len(keys) > EXACT_UP_TO:
        return _by_faiss(queries, keys, count, itself)
    places = torch.full((len(queries), count), -1)
    cosines = torch.full((len(queries), count), -torch.inf)
    for start in tqdm(range(0, len(queries), CHUNK), desc=title, unit="chunk", leave=False):
        asked = _unit(queries[start : start + CHUNK], device)
        best = torch.full((len(asked), count), -torch.inf, device=device)
        where = torch.full((len(asked), count), -1, device=device)
        for first in range(0, len(keys), 16 * CHUNK):
            offered = _unit(keys[first : first + 16 * CHUNK], device)
            scores = asked @ offered.T
            if itself is not None:
                rows = torch.arange(len(asked), device=device)
                own = itself + start + rows - first
                inside = (own >= 0) & (own < len(offered))
                scores[rows[inside], own[inside]] = -torch.inf
            found = scores.topk(min(count, len(offered)), dim=1)
            best, chosen = torch.cat([best, found.values], dim=1).topk(count, dim=1)
            where = torch.cat([where, found.indices + first], dim=1).gather(1, chosen)
        where[best == -torch.inf] = -1
        places[start : start + CHUNK], cosines[start : start + CHUNK] = where.cpu(), best.cpu()
    return places, cosines


def _unit(rows: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(as_floats(rows).to(device), dim=1)


def _by_faiss(
    queries: np.ndarray | Tensor, keys: np.ndarray | Tensor, count: int, itself: int | None
) -> tuple[Tensor, Tensor]:
    """An inverted file of √N lists, of which 64 are searched: approximate."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"{len(keys):,} images are too many to compare each with each: pip install faiss-cpu (or faiss-gpu)"
        ) from error
    lists = int(len(keys) ** 0.5)
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(len(keys), min(len(keys), 64 * lists), replace=False)
    index.train(_unit(keys[np.sort(sample)], "cpu").numpy())
    for start in range(0, len(keys), 16 * CHUNK):
        index.add(_unit(keys[start : start + 16 * CHUNK], "cpu").numpy())
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", 64)
    places, cosines = [], []
    for start in range(0, len(queries), CHUNK):
        block = _unit(queries[start : start + CHUNK], "cpu")
        values, indices = (torch.from_numpy(part) for part in index.search(block.numpy(), count + (itself is not None)))
        if itself is not None:
            own = indices == (itself + start + torch.arange(len(block)))[:, None]
            values = values.masked_fill(own, -torch.inf)
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, indices = values[:, :count], indices.gather(1, order)[:, :count]
        none = (indices < 0) | (values == -torch.inf)
        places.append(indices.masked_fill(none, -1))
        cosines.append(values.masked_fill(none, -torch.inf))
    return torch.cat(places), torch.cat(cosines)
