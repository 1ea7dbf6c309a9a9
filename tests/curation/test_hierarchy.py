"""Hierarchical k-means: levels that compose, an even spread over the support, and the same on several processes."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor

from dino.curation import hierarchy
from dino.curation import kmeans as kmeans_module
from dino.curation import points as points_module
from dino.curation.assignment import Assignment
from dino.curation.hierarchy import Level, hierarchical_kmeans, nearest_members
from dino.curation.kmeans import Clustering
from dino.curation.points import Points, share
from dino.errors import UserError

SIDE = 10.0  # of each concept, a square
FREQUENCIES = [1500, 300, 60, 40]  # images of each concept


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK", 64)


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def concepts(seed: int) -> Tensor:
    """Four squares of equal area, far apart, with very different numbers of points spread evenly over each."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0], [40.0, 40.0]])
    squares = [
        corner + SIDE * torch.rand(n, 2, generator=generator) for corner, n in zip(corners, FREQUENCIES, strict=True)
    ]
    return torch.cat(squares)[torch.randperm(sum(FREQUENCIES), generator=generator)]


def per_concept(centroids: Tensor) -> np.ndarray:
    right, up = (centroids > 25).long().T
    return torch.bincount(right + 2 * up, minlength=4).numpy()


def unevenness(counts: np.ndarray) -> float:
    """Kullback–Leibler divergence from equal shares, in nats."""
    shares = counts / counts.sum()
    return float(np.sum(shares * np.log(np.maximum(shares, 1e-12) * len(shares))))


def nearest_centroid(points: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    rows = F.normalize(points.double(), dim=1) if spherical else points.double()
    squares = (rows[:, None] - centroids.double()).square().sum(dim=2)
    return squares.argmin(dim=1), squares.min(dim=1).values


@pytest.mark.parametrize("resamplings", [0, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("clusters", [[7], [300, 1], [60, 20, 5], [100, 40, 10, 3]])
def test_each_level_has_the_nearest_of_the_next(clusters, spherical, precision, resamplings):
    points = drawn(300, 6) + 5
    levels = hierarchical_kmeans(Points(points, spherical=spherical), clusters, resamplings, 4, 20, 0, precision)
    assert len(levels) == len(clusters)
    below = points
    for level, count in zip(levels, clusters, strict=True):
        assert level.centroids.shape == (count, 6)
        assert level.labels.shape == level.distances.shape == (len(below),)
        if spherical:
            torch.testing.assert_close(level.centroids.norm(dim=1), torch.ones(count), rtol=1e-6, atol=0)
        expected, distances = nearest_centroid(below, level.centroids, spherical)
        assert torch.equal(level.labels, expected)
        torch.testing.assert_close(level.distances.double(), distances, rtol=1e-4, atol=1e-6)
        below = level.centroids


@pytest.mark.parametrize("spherical", [False, True])
def test_without_resampling_centroids_are_the_means_of_what_is_below(spherical):
    points = drawn(400, 5) + 2
    levels = hierarchical_kmeans(Points(points, spherical=spherical), [50, 12, 3], iterations=100)
    below = F.normalize(points, dim=1) if spherical else points
    for level in levels:
        means = torch.stack([below[level.labels == one].mean(dim=0) for one in range(len(level.centroids))])
        expected = F.normalize(means, dim=1) if spherical else means
        torch.testing.assert_close(level.centroids, expected, rtol=0, atol=1e-5)
        below = level.centroids


class TestResampling:
    def test_spreads_centroids_evenly_over_the_support(self):
        """Squares of equal area deserve equally many clusters (Vo et al. 2024); k-means gives frequent ones more."""
        before, after = [], []
        for seed in range(4):
            points = Points(concepts(seed))
            for resamplings, counts in ((0, before), (10, after)):
                (level,) = hierarchical_kmeans(points, [60], resamplings, 5, 15, seed)
                counts.append(per_concept(level.centroids))
                assert counts[-1].sum() == 60
        assert all(counts[0] > 2 * counts[2:].max() for counts in before)
        assert all(counts.max() < 1.8 * counts.min() for counts in after)
        for one, other in zip(before, after, strict=True):
            assert unevenness(other) < 0.2 * unevenness(one)
            assert (other[2:] > one[2:]).all()

    def test_more_is_more_even(self):
        means = [
            np.mean(
                [
                    unevenness(
                        per_concept(hierarchical_kmeans(Points(concepts(seed)), [60], turns, 5, 15, seed)[0].centroids)
                    )
                    for seed in range(3)
                ]
            )
            for turns in (0, 1, 4)
        ]
        assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(means))

    def test_upper_levels_are_even_too(self):
        plain, resampled = (
            np.sum(
                [
                    per_concept(hierarchical_kmeans(Points(concepts(seed)), [60, 12], turns, 5, 15, seed)[1].centroids)
                    for seed in range(3)
                ],
                axis=0,
            )
            for turns in (0, 10)
        )
        assert unevenness(resampled) < 0.3 * unevenness(plain)
        assert resampled.min() >= 5  # of 36, in each of four concepts

    def test_takes_the_points_nearest_to_each_centroid(self, monkeypatch):
        """What each call of k-means is given."""
        given, plain = [], hierarchy.kmeans

        def watched(points, clusters, *arguments, **settings):
            found = plain(points, clusters, *arguments, **settings)
            given.append((points.rows, clusters, found))
            return found

        monkeypatch.setattr(hierarchy, "kmeans", watched)
        points = drawn(300, 4) + 3
        hierarchical_kmeans(Points(points), [20, 6], resamplings=2, sample=3)
        assert [clusters for _, clusters, _ in given] == [20] * 5 + [6] * 5
        for whole, (first, again, then) in ((points, given[:3]), (given[4][2].centroids, given[5:8])):
            assert torch.equal(first[0], whole)
            torch.testing.assert_close(again[0], whole[brute_members(first[2], 3)], rtol=0, atol=1e-6)
            assert torch.equal(then[0], whole)
            assert torch.equal(then[2].centroids, again[2].centroids)

    def test_fewer_distinct_points_than_clusters(self):
        """Whose sample has fewer points than there are clusters, though there were enough to begin with."""
        levels = hierarchical_kmeans(Points(drawn(10, 3).repeat(30, 1)), [50, 5], resamplings=1, sample=2)
        assert float(levels[0].distances.max()) < 1e-12


def brute_members(found: Clustering, count: int) -> list[int]:
    """Of each cluster the first `count` by (distance, place)."""
    chosen = []
    for cluster in range(len(found.centroids)):
        members = [place for place, label in enumerate(found.labels.tolist()) if label == cluster]
        chosen += sorted(members, key=lambda place: (float(found.distances[place]), place))[:count]
    return sorted(chosen)


def clustering(points: int, clusters: int, levels: int, seed: int) -> Clustering:
    """Labels and distances at random: `levels` different ones, so that there are equals."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (points,), generator=generator)
    labels[labels == 1] = 0  # an empty one
    distances = torch.randint(levels, (points,), generator=generator) / levels
    return Clustering(torch.zeros(clusters, 2), labels, distances, torch.bincount(labels), 0.0, 0)


class TestNearestMembers:
    @pytest.mark.parametrize("levels", [1, 3, 100_000])
    @pytest.mark.parametrize("count", [1, 3, 1000])
    @pytest.mark.parametrize("points", [1, 5, 200])
    def test_equal_brute_force(self, points, count, levels):
        for seed in range(5):
            found = clustering(points, 7, levels, seed)
            chosen = nearest_members(Points(torch.zeros(points, 2)), found, count)
            assert chosen.dtype == torch.int64
            assert chosen.tolist() == brute_members(found, count)

    def test_number_worked_by_hand(self):
        """Cluster 0: places 0 (far), 2, 3; cluster 1: places 1, 4, as near as one another."""
        distances = torch.tensor([9.0, 2.0, 0.0, 1.0, 2.0])
        found = Clustering(torch.zeros(2, 1), torch.tensor([0, 1, 0, 0, 1]), distances, torch.tensor([3, 2]), 0, 0)
        assert nearest_members(Points(torch.zeros(5, 1)), found, 1).tolist() == [1, 2]
        assert nearest_members(Points(torch.zeros(5, 1)), found, 2).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("clusters", [[10, 10], [5, 8], [60, 20, 20], [101], [101, 5], [60, 20, 0], [0]])
def test_levels_that_do_not_get_fewer_are_refused(clusters):
    with pytest.raises(UserError, match="cluster"):
        hierarchical_kmeans(Points(drawn(100, 3)), clusters)


def assert_same(found: list[Level], other: list[Level]) -> None:
    """To the last bit."""
    assert len(found) == len(other)
    for one, two in zip(found, other, strict=True):
        assert all(torch.equal(mine, yours) for mine, yours in zip(one, two, strict=True))


class TestSeed:
    @pytest.mark.parametrize("resamplings", [0, 2])
    def test_same_seed_same_levels(self, resamplings):
        points = Points(concepts(0))
        one, again, other = (hierarchical_kmeans(points, [30, 7], resamplings, 5, seed=seed) for seed in (3, 3, 4))
        assert_same(one, again)
        assert not torch.equal(one[0].centroids, other[0].centroids)


class TestProgress:
    def arguments(self, folder: Path | None, spherical: bool = False) -> tuple:
        return Points(drawn(300, 5), spherical=spherical), [40, 9], 2, 4, 30, 0, torch.float32, folder

    @pytest.mark.parametrize("spherical", [False, True])
    def test_goes_on_where_it_was_killed(self, spherical, tmp_path, monkeypatch):
        """Killed over and over: ever more is done, and nothing else comes out of it."""
        whole, assign, calls = [], Assignment.update, []

        def counted(*arguments):
            calls.append(1)
            return assign(*arguments)

        monkeypatch.setattr(Assignment, "update", counted)
        whole = hierarchical_kmeans(*self.arguments(None, spherical))
        needed = len(calls)
        folder, kills = tmp_path, 0
        for life in range(1, 100):
            calls.clear()

            def mortal(*arguments, lives=15 + 3 * life):
                calls.append(1)
                if len(calls) > lives:
                    raise KeyboardInterrupt
                return assign(*arguments)

            monkeypatch.setattr(Assignment, "update", mortal)
            try:
                found = hierarchical_kmeans(*self.arguments(folder, spherical))
            except KeyboardInterrupt:
                kills += 1
                continue
            break
        assert kills >= 2
        assert len(calls) < needed - 10  # the last life did not do all
        assert_same(found, whole)

    def test_keeps_one_file_a_turn(self, tmp_path):
        whole = hierarchical_kmeans(*self.arguments(tmp_path))
        expected = {f"level{level}-{turn}.safetensors" for level in (1, 2) for turn in (0, 1, 2)}
        assert {path.name for path in tmp_path.iterdir()} == expected
        assert_same(hierarchical_kmeans(*self.arguments(tmp_path)), whole)

    def test_what_is_kept_is_used(self, tmp_path, monkeypatch):
        hierarchical_kmeans(*self.arguments(tmp_path))
        monkeypatch.setattr(kmeans_module, "seeds", None)
        hierarchical_kmeans(*self.arguments(tmp_path))
        (tmp_path / "level1-1.safetensors").unlink()
        with pytest.raises(TypeError):
            hierarchical_kmeans(*self.arguments(tmp_path))


WORLDS = [3, 2, 1]
CASES = {
    "plain": {"clusters": [60, 12]},
    "resampled": {"clusters": [60, 12, 3], "resamplings": 2, "sample": 5},
    "spherical": {"clusters": [60, 12], "resamplings": 1, "sample": 5, "spherical": True},
    "bf16": {"clusters": [60, 12], "resamplings": 1, "sample": 5, "precision": torch.bfloat16},
    "many": {"clusters": [200, 100], "resamplings": 1, "sample": 2},  # centroids in more blocks than one
    "another seed": {"clusters": [60, 12], "resamplings": 1, "sample": 5, "seed": 1},
}


def held(data: Tensor, rank: int, processes: int, spherical: bool = False) -> Points:
    rows = share(len(data), rank, processes)
    return Points(data[rows.start : rows.stop], spherical=spherical)


def work(rank: int, processes: int, folder: Path) -> dict:
    points_module.BLOCK = 64
    found = {}
    for case, settings in CASES.items():
        settings = dict(settings)
        points = held(concepts(2)[:700], rank, processes, settings.pop("spherical", False))
        found[case] = [tuple(level) for level in hierarchical_kmeans(points, iterations=6, **settings)]
    keep = folder / f"kept-{processes}"
    keep.mkdir(exist_ok=True)
    points, settings = held(concepts(2)[:700], rank, processes), CASES["resampled"]
    hierarchical_kmeans(points, iterations=4, progress=keep, **settings)
    found["twice"] = [tuple(level) for level in hierarchical_kmeans(points, iterations=4, progress=keep, **settings)]
    whole = clustering(700, 9, levels=4, seed=5)
    mine = share(700, rank, processes)
    part = whole._replace(
        labels=whole.labels[mine.start : mine.stop], distances=whole.distances[mine.start : mine.stop]
    )
    found["members"] = nearest_members(held(torch.zeros(700, 2), rank, processes), part, 3)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list]:
    folder = tmp_path_factory.mktemp("processes")
    return worlds.run(functools.partial(work, folder=folder), WORLDS, folder)


class TestProcesses:
    @pytest.mark.parametrize("case", [*CASES, "twice"])
    @pytest.mark.parametrize("processes", [2, 3])
    def test_levels_are_the_same_to_the_last_bit(self, processes, case, found):
        alone = [Level(*level) for level in found[1][0][case]]
        firsts = [Level(*of_rank[case][0]) for of_rank in found[processes]]
        first = Level(
            firsts[0].centroids,
            torch.cat([part.labels for part in firsts]),
            torch.cat([part.distances for part in firsts]),
        )
        assert len(firsts[-1].labels) < len(first.labels)
        for of_rank, mine in zip(found[processes], firsts, strict=True):
            assert torch.equal(mine.centroids, first.centroids)
            assert_same([first, *(Level(*level) for level in of_rank[case][1:])], alone)

    def test_seeds_differ(self, found):
        assert not torch.equal(found[1][0]["plain"][0][0], found[1][0]["another seed"][0][0])

    @pytest.mark.parametrize("processes", WORLDS)
    def test_nearest_members_are_those_of_all(self, processes, found):
        expected = brute_members(clustering(700, 9, levels=4, seed=5), 3)
        for of_rank in found[processes]:
            assert of_rank["members"].tolist() == expected
