"""Pairs by an inverted file against brute force: exact within the cells that are searched, the same on any number of
processes."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from clouds import mixture, normal

from dino.curation import inverted
from dino.curation import points as points_module
from dino.curation.duplicates import find_copies
from dino.curation.inverted import Pairs, best_cells, similar_pairs
from dino.curation.settings import Duplicates
from dino.evaluation.neighbours import Rows


def with_copies(rows: int, width: int = 24, seed: int = 0) -> np.ndarray:
    """fp16 embeddings in groups, in which every fourth is followed by one all but equal, and some by another."""
    data = mixture(rows, width, of=15, seed=seed)
    data[1::4] = data[0::4][: len(data[1::4])] + 0.15 * normal(len(data[1::4]), width, seed + 3)
    data[2::8] = data[0::8][: len(data[2::8])] + 0.15 * normal(len(data[2::8]), width, seed + 4)
    return data.numpy().astype(np.float16)


def brute(
    queries: np.ndarray, keys: np.ndarray, least: float, count: int, among_themselves: bool
) -> dict[int, list[int]]:
    """Keys of each query in fp64, the most similar first; equal cosines do not occur."""
    unit_queries, unit_keys = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries.astype(float), keys.astype(float))
    )
    cosines = unit_queries @ unit_keys.T
    if among_themselves:
        np.fill_diagonal(cosines, -2)
    assert (np.abs(cosines - least) > 1e-7).all()  # rounding decides nothing
    nearest = {}
    for query, row in enumerate(cosines):
        keys_of_query = [int(key) for key in np.argsort(-row)[:count] if row[key] >= least]
        if keys_of_query:
            nearest[query] = keys_of_query
    return nearest


def by_query(pairs: Pairs) -> dict[int, list[int]]:
    keys: dict[int, list[int]] = {}
    for query, key in zip(pairs.queries.tolist(), pairs.keys.tolist(), strict=True):
        keys.setdefault(query, []).append(key)
    return keys


@pytest.fixture(params=[False, True], ids=["fp32", "bf16 first"])
def either_precision(request, monkeypatch):
    monkeypatch.setattr(inverted, "prefers_bf16", lambda device: request.param)


@pytest.mark.usefixtures("either_precision")
class TestSearchedWhole:
    """With as many cells searched as there are, nothing is missed."""

    @pytest.mark.parametrize("chunk", [7, 4096])
    @pytest.mark.parametrize(("least", "count"), [(0.5, 3), (0.9, 16), (-0.999, 2), (0.9999, 4)])
    def test_equals_brute_force_among_themselves(self, least, count, chunk, monkeypatch):
        monkeypatch.setattr(inverted, "CHUNK", chunk)
        monkeypatch.setattr(inverted, "PENDING", 10)
        data = with_copies(300)
        rows = Rows(data)
        pairs = similar_pairs(rows, rows, least, count, 9, 9)
        assert by_query(pairs) == brute(data, data, least, count, True)
        unit = data.astype(float) / np.linalg.norm(data.astype(float), axis=1, keepdims=True)
        expected = (unit[pairs.queries] * unit[pairs.keys]).sum(axis=1)
        np.testing.assert_allclose(pairs.cosines, expected, rtol=0, atol=1e-6)

    def test_of_other_queries_in_some_rows(self):
        data, asked = with_copies(200), with_copies(60, seed=9)
        asked[::3] = data[5:25]
        indices = np.arange(0, 200, 2)
        pairs = similar_pairs(Rows(asked), Rows(data, indices), 0.7, 4, 6, 6)
        assert by_query(pairs) == brute(asked, data[indices], 0.7, 4, False)

    @pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 1), (1, 3)])
    def test_few(self, queries, keys):
        asked, offered = with_copies(9)[:queries], with_copies(9)[4 : 4 + keys]
        pairs = similar_pairs(Rows(asked), Rows(offered), 0.3, 5, 10, 10)
        assert by_query(pairs) == brute(asked, offered, 0.3, 5, False)


def recall(data: np.ndarray, probes: int) -> float:
    rows = Rows(data)
    found = by_query(similar_pairs(rows, rows, 0.9, len(data), best_cells(len(data), probes), probes))
    expected = brute(data, data, 0.9, len(data), True)
    hits = sum(len(set(keys) & set(found.get(query, []))) for query, keys in expected.items())
    assert all(set(keys) <= set(expected[query]) for query, keys in found.items())  # what it finds is so
    return hits / sum(len(keys) for keys in expected.values())


def test_what_it_misses_is_little_and_less_with_more_cells_searched():
    data = with_copies(2000, 48)
    one, four = recall(data, 1), recall(data, 4)
    assert one < four
    assert four > 0.98


def test_copies_are_those_of_comparing_all(pool_of_copies):
    """The same groups, whether each is compared with each or within cells."""
    exact, by_cells = (
        find_copies(*pool_of_copies, [], Duplicates(similarity=0.0, near=0.9, cells=cells)) for cells in (0, 12)
    )
    assert len(exact.near) > 50
    assert by_cells.original.tolist() == exact.original.tolist()
    assert by_cells.near.tolist() == exact.near.tolist()
    np.testing.assert_allclose(by_cells.cosines, exact.cosines, rtol=0, atol=1e-6)
    assert by_cells.candidates == exact.candidates


@pytest.fixture
def pool_of_copies():
    import pyarrow as pa

    from dino.curation.embed import Embedded
    from dino.data.sources.source import packed

    data = with_copies(240)
    embedded = Embedded(
        tokens=data,
        thumbnails=np.zeros((240, 64, 64), np.uint8),
        hashes=np.array([f"{index:08d}" for index in range(240)], "S32"),
        sizes=np.full((240, 2), 10, np.int32),
        reasons=pa.array([""] * 240).dictionary_encode(),
        key=[],
    )
    return embedded, packed(f"{index:08d}" for index in range(240))


def work(rank: int, processes: int, folder: Path) -> list[torch.Tensor]:
    points_module.BLOCK = 64
    rows, others = Rows(with_copies(700)), Rows(with_copies(150, seed=4))
    among, between = similar_pairs(rows, rows, 0.8, 5, 20, 3), similar_pairs(others, rows, 0.3, 5, 20, 3)
    return [torch.from_numpy(part) for part in (*among, *between)]


@pytest.mark.slow
def test_the_same_pairs_on_any_number_of_processes(tmp_path):
    results = worlds.run(functools.partial(work, folder=tmp_path), [3, 2, 1], tmp_path)
    alone = results[1][0]
    assert len(alone[0]) > 100
    assert len(alone[3]) > 20
    for processes in (2, 3):
        for of_rank in results[processes]:
            assert all(torch.equal(one, other) for one, other in zip(of_rank, alone, strict=True))
