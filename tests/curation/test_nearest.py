"""Nearest neighbours against each query compared with each key in turn."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dino.curation import neighbours
from dino.curation.neighbours import nearest
from dino.errors import UserError


def drawn(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def brute(
    queries: np.ndarray, keys: np.ndarray, count: int, itself: int | None = None
) -> tuple[list[list[int]], np.ndarray]:
    """Query by query in fp64: places and cosines, the greatest first."""
    places, cosines = [], np.full((len(queries), count), -np.inf)
    for number, query in enumerate(queries.astype(np.float64)):
        others = [place for place in range(len(keys)) if itself is None or place != itself + number]
        alike = {
            place: float(query @ key / np.linalg.norm(query) / np.linalg.norm(key))
            for place, key in zip(others, keys[others].astype(np.float64), strict=True)
        }
        best = sorted(alike, key=lambda place: -alike[place])[:count]
        places.append(best + [-1] * (count - len(best)))
        cosines[number, : len(best)] = [alike[place] for place in best]
    return places, cosines


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], expected: tuple, atol: float = 1e-6) -> None:
    places, cosines = found
    assert places.tolist() == expected[0]
    np.testing.assert_allclose(cosines.numpy(), expected[1], rtol=0, atol=atol)
    assert (places.dtype, cosines.dtype) == (torch.int64, torch.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    """Three queries and 48 keys at a time."""
    monkeypatch.setattr(neighbours, "CHUNK", 3)


@pytest.mark.usefixtures("small_chunks")
class TestExact:
    @pytest.mark.parametrize("count", [1, 5, 60])
    @pytest.mark.parametrize("keys", [1, 4, 47, 48, 49, 96, 131])
    @pytest.mark.parametrize("queries", [1, 3, 7])
    def test_equal_brute_force(self, queries, keys, count):
        asked, offered = drawn(queries, 6), drawn(keys, 6, seed=1)
        assert_equal(nearest(asked, offered, count), brute(asked, offered, count))

    @pytest.mark.parametrize("count", [1, 5, 150])
    @pytest.mark.parametrize("itself", [0, 1, 44, 47, 48, 100, 121, 130])
    def test_own_place_is_not_a_neighbour(self, itself, count):
        """Queries are ten of the keys, from `itself` on, some of which lie in another chunk than the first."""
        offered = drawn(131, 6)
        asked = offered[itself : itself + 10]
        found = nearest(asked, offered, count, itself)
        assert_equal(found, brute(asked, offered, count, itself))
        for row, neighbours_ in enumerate(found[0].tolist()):
            assert itself + row not in neighbours_
        assert (nearest(asked, offered, 1)[0][:, 0] == itself + torch.arange(len(asked))).all()  # else it would be

    def test_a_copy_of_oneself_is_a_neighbour(self):
        offered = drawn(100, 6)
        offered[[20, 70]] = 3 * offered[[70, 20]].mean(axis=0)
        places, cosines = nearest(offered, offered, 1, 0)
        assert places[[20, 70], 0].tolist() == [70, 20]
        torch.testing.assert_close(cosines[[20, 70], 0], torch.ones(2), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("keys", [1, 2])
    def test_fewer_keys_than_asked_for(self, keys):
        places, cosines = nearest(drawn(5, 3)[:keys], drawn(5, 3)[:keys], 4, 0)
        assert (places[:, keys - 1 :] == -1).all()
        assert (cosines[:, keys - 1 :] == -torch.inf).all()
        assert (places[:, : keys - 1] >= 0).all()

    def test_nobody_to_ask_or_to_be_asked(self):
        places, cosines = nearest(drawn(4, 3), np.empty((0, 3), np.float32), 2)
        assert places.tolist() == [[-1, -1]] * 4
        assert (cosines == -torch.inf).all()
        assert nearest(np.empty((0, 3), np.float32), drawn(4, 3), 2)[0].shape == (0, 2)

    def test_lengths_do_not_matter(self):
        asked, offered = drawn(7, 6), drawn(131, 6, seed=1)
        lengths = np.logspace(-4, 4, 131, dtype=np.float32)[:, None]
        assert_equal(nearest(asked * 1e3, offered * lengths, 5), brute(asked, offered, 5))

    @pytest.mark.parametrize("kind", ["fp16", "fp64", "tensor", "fp16 map", "map that may only be read"])
    def test_kinds_of_rows(self, kind, tmp_path):
        asked, offered = drawn(7, 6).astype(np.float16), drawn(131, 6, seed=1).astype(np.float16)
        expected = brute(asked, offered, 5)
        if kind == "fp64":
            asked, offered = asked.astype(np.float64), offered.astype(np.float64)
        elif kind == "tensor":
            asked, offered = torch.from_numpy(asked), torch.from_numpy(offered)
        elif "map" in kind:
            np.save(tmp_path / "asked.npy", asked)
            np.save(tmp_path / "offered.npy", offered)
            mode = "r" if "only" in kind else "r+"
            asked, offered = (np.load(tmp_path / f"{name}.npy", mmap_mode=mode) for name in ("asked", "offered"))
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)  # of what may not be written: not only the first time in this process
        try:
            assert_equal(nearest(asked, offered, 5), expected)
        finally:
            torch.set_warn_always(always)


def test_chunks_change_nothing(monkeypatch):
    asked, offered = drawn(20, 6), drawn(150, 6, seed=1)
    whole = nearest(asked, offered, 7)
    for chunk in (1, 4, 5):
        monkeypatch.setattr(neighbours, "CHUNK", chunk)
        assert_equal(nearest(asked, offered, 7), (whole[0].tolist(), whole[1].numpy()))


class TestManyKeys:
    """More than are compared one by one; of which that is 10 here."""

    @pytest.fixture(autouse=True)
    def few_are_many(self, monkeypatch):
        monkeypatch.setattr(neighbours, "EXACT_UP_TO", 10)
        monkeypatch.setattr(neighbours, "CHUNK", 3)

    def test_without_faiss_the_message_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
        with pytest.raises(UserError, match=r"^11 images .* pip install faiss-cpu"):
            nearest(drawn(2, 3), drawn(11, 3), 1)
        assert_equal(nearest(drawn(2, 3), drawn(10, 3), 1), brute(drawn(2, 3), drawn(10, 3), 1))

    @pytest.mark.parametrize("itself", [None, 0, 44, 100])
    def test_with_an_index_that_misses_nothing(self, itself, stand_in):
        """What is done with the index's answers."""
        offered = drawn(131, 6)
        asked = offered[itself or 0 :][:10]
        assert_equal(nearest(asked, offered, 5, itself), brute(asked, offered, 5, itself))

    def test_a_query_that_the_index_does_not_find(self, stand_in):
        """An approximate index may answer without the query itself: the best of what it says remain."""
        offered = drawn(50, 6)
        stand_in.misses = 7
        found = nearest(offered[7:8], offered, 5, 7)
        assert_equal(found, brute(offered[7:8], offered, 5, 7))

    @pytest.mark.parametrize("itself", [None, 0])
    def test_fewer_than_asked_for(self, itself, stand_in):
        offered = drawn(12, 6)
        places, _ = nearest(offered[:4], offered, 15, itself)
        assert places.tolist() == brute(offered[:4], offered, 15, itself)[0]

    @pytest.mark.xfail(strict=True, reason="faiss's least number is passed on for −∞ where there are fewer keys")
    def test_fewer_than_asked_for_have_no_cosine(self, stand_in):
        offered = drawn(12, 6)
        assert (nearest(offered[:4], offered, 15)[1][:, 12:] == -torch.inf).all()

    @pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss, which is optional")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its bindings
    @pytest.mark.parametrize("itself", [None, 40])
    def test_with_faiss(self, itself):
        """As many lists are searched as there are: what remains is fp16's rounding."""
        offered = drawn(900, 16)
        asked = offered[40:140]
        places, cosines = nearest(asked, offered, 5, itself)
        expected, values = brute(asked, offered, 5, itself)
        np.testing.assert_allclose(cosines.numpy(), values, rtol=0, atol=2e-3)
        hits = [len(set(one) & set(other)) for one, other in zip(places.tolist(), expected, strict=True)]
        assert sum(hits) > 0.98 * 5 * len(asked)


class Index:
    """What faiss's index of inner products does, exactly: the best first; −1 and the least number where there are no more."""

    def __init__(self, width: int):
        self.keys, self.misses, self.trained, self.nprobe = np.empty((0, width), np.float32), None, 0, 1

    def train(self, keys: np.ndarray) -> None:
        self.trained = len(keys)

    def add(self, keys: np.ndarray) -> None:
        assert self.trained
        assert keys.dtype == np.float32
        self.keys = np.concatenate([self.keys, keys])

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert queries.dtype == np.float32
        scores = queries @ self.keys.T
        if self.misses is not None:
            scores[:, self.misses] = -2
        order = np.argsort(-scores, axis=1)[:, :count]
        values = np.take_along_axis(scores, order, axis=1)
        more = ((0, 0), (0, count - order.shape[1]))
        return np.pad(values, more, constant_values=np.finfo(np.float32).min), np.pad(order, more, constant_values=-1)


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """In faiss's place; `misses`: a key that it does not find."""
    options = SimpleNamespace(misses=None)

    def factory(width: int, description: str, metric: str) -> Index:
        assert description.startswith("IVF")
        assert metric == "inner product"
        index = Index(width)
        index.misses = options.misses
        return index

    faiss = SimpleNamespace(index_factory=factory, METRIC_INNER_PRODUCT="inner product")
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    return options
