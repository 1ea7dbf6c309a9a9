"""Nearest neighbours against each query compared with each key in turn."""

import numpy as np
import pytest
import torch

from dino.evaluation import neighbours
from dino.evaluation.neighbours import nearest


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
