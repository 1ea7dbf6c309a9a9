"""Hierarchical k-means: levels that compose, an even spread over the support, and the same on several processes."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from clouds import held, normal
from torch import Tensor
from tqdm import tqdm

from dino.curation import hierarchy
from dino.curation import kmeans as kmeans_module
from dino.curation import points as points_module
from dino.curation.assignment import Assignment
from dino.curation.hierarchy import Level, hierarchical_kmeans, nearest_members
from dino.curation.kmeans import Clustering
from dino.curation.points import Points, shard
from dino.errors import UserError

SIDE = 10.0  # of each concept, a square
FREQUENCIES = [1500, 300, 60, 40]  # images of each concept


def concepts(seed: int) -> Tensor:
    """Four squares of equal area, far apart, with very different numbers of points spread evenly over each."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0], [40.0, 40.0]])
    squares = [
        corner + SIDE * torch.rand(n, 2, generator=generator) for corner, n in zip(corners, FREQUENCIES, strict=True)
    ]
    return torch.cat(squares)[torch.randperm(sum(FREQUENCIES), generator=generator)]


def per_concept(seed: int, clusters: list[int], resamplings: int) -> np.ndarray:
    """(levels, 4) centroids in each square."""
    levels = hierarchical_kmeans(Points(concepts(seed)), clusters, resamplings, 5, 15, seed)
    quarters = [(level.centroids > 25).long() @ torch.tensor([1, 2]) for level in levels]
    return np.stack([torch.bincount(quarter, minlength=4).numpy() for quarter in quarters])


def unevenness(counts: np.ndarray) -> float:
    """Kullback–Leibler divergence from equal parts, in nats."""
    parts = counts / counts.sum()
    return float(np.sum(parts * np.log(np.maximum(parts, 1e-12) * len(parts))))


@pytest.mark.parametrize("resamplings", [0, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("clusters", [[7], [300, 1], [60, 20, 5], [100, 40, 10, 3]])
def test_each_level_has_the_nearest_of_the_next(clusters, spherical, precision, resamplings):
    points = normal(300, 6) + 5
    levels = hierarchical_kmeans(Points(points, spherical=spherical), clusters, resamplings, 4, 20, 0, precision)
    assert [level.centroids.shape for level in levels] == [(count, 6) for count in clusters]
    below = points
    for level in levels:
        assert level.labels.shape == level.distances.shape == (len(below),)
        if spherical:
            torch.testing.assert_close(level.centroids.norm(dim=1), torch.ones(len(level.centroids)))
        rows = F.normalize(below.double(), dim=1) if spherical else below.double()
        squares = (rows[:, None] - level.centroids.double()).square().sum(dim=2)
        assert torch.equal(level.labels, squares.argmin(dim=1))
        torch.testing.assert_close(level.distances.double(), squares.min(dim=1).values, rtol=1e-4, atol=1e-6)
        below = level.centroids


@pytest.mark.parametrize("spherical", [False, True])
def test_without_resampling_centroids_are_the_means_of_what_is_below(spherical):
    points = normal(400, 5) + 2
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
        plain, resampled = ([per_concept(seed, [60, 12], turns) for seed in range(3)] for turns in (0, 10))
        for (before, _), (after, _) in zip(plain, resampled, strict=True):
            assert before.sum() == after.sum() == 60
            assert before[0] > 2 * before[2:].max()
            assert after.max() < 1.8 * after.min()
            assert unevenness(after) < 0.2 * unevenness(before)
            assert (after[2:] > before[2:]).all()
        above, resampled_above = np.sum(plain, axis=0)[1], np.sum(resampled, axis=0)[1]
        assert unevenness(resampled_above) < 0.3 * unevenness(above)
        assert resampled_above.min() >= 5  # of 36, in each of four concepts

    def test_more_is_more_even(self):
        means = [np.mean([unevenness(per_concept(seed, [60], turns)[0]) for seed in range(3)]) for turns in (0, 1, 4)]
        assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(means))

    def test_takes_the_points_nearest_to_each_centroid(self, monkeypatch):
        """What each call of k-means is given."""
        calls, kmeans = [], hierarchy.kmeans

        def watched(points, clusters, *arguments, **settings):
            clustering = kmeans(points, clusters, *arguments, **settings)
            calls.append((points.values, clusters, clustering))
            return clustering

        monkeypatch.setattr(hierarchy, "kmeans", watched)
        points = normal(300, 4) + 3
        hierarchical_kmeans(Points(points), [20, 6], resamplings=2, sample=3)
        assert [clusters for _, clusters, _ in calls] == [20] * 5 + [6] * 5
        for whole, (first, again, then) in ((points, calls[:3]), (calls[4][2].centroids, calls[5:8])):
            assert torch.equal(first[0], whole)
            torch.testing.assert_close(again[0], whole[brute_members(first[2], 3)], rtol=0, atol=1e-6)
            assert torch.equal(then[0], whole)
            assert torch.equal(then[2].centroids, again[2].centroids)

    def test_fewer_distinct_points_than_clusters(self):
        """Whose sample has fewer points than there are clusters, though there were enough to begin with."""
        levels = hierarchical_kmeans(Points(normal(10, 3).repeat(30, 1)), [50, 5], resamplings=1, sample=2)
        assert float(levels[0].distances.max()) < 1e-12


def brute_members(clustering: Clustering, count: int) -> list[int]:
    """Of each cluster the first `count` by (distance, index)."""
    nearest = []
    for cluster in range(len(clustering.centroids)):
        members = np.flatnonzero(clustering.labels == cluster).tolist()
        nearest += sorted(members, key=lambda index: (float(clustering.distances[index]), index))[:count]
    return sorted(nearest)


def random_clustering(points: int, clusters: int, levels: int, seed: int) -> Clustering:
    """Labels and distances at random: `levels` different ones, so that there are equals."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (points,), generator=generator)
    labels[labels == 1] = 0  # an empty one
    distances = torch.randint(levels, (points,), generator=generator) / levels
    return Clustering(torch.zeros(clusters, 2), labels, distances, torch.bincount(labels), 0.0, 0)


@pytest.mark.parametrize("levels", [1, 3, 100_000])
@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize("points", [1, 5, 200])
def test_nearest_members_equal_brute_force(points, count, levels):
    for seed in range(5):
        clustering = random_clustering(points, 7, levels, seed)
        nearest = nearest_members(Points(torch.zeros(points, 2)), clustering, count)
        assert nearest.dtype == torch.int64
        assert nearest.tolist() == brute_members(clustering, count)


@pytest.mark.parametrize("clusters", [[10, 10], [5, 8], [60, 20, 20], [101], [101, 5], [60, 20, 0], [0]])
def test_levels_that_do_not_get_fewer_are_refused(clusters):
    with pytest.raises(UserError, match="cluster"):
        hierarchical_kmeans(Points(normal(100, 3)), clusters)


def assert_same(some: list[Level], other: list[Level]) -> None:
    """To the last bit."""
    assert len(some) == len(other)
    for level, other_level in zip(some, other, strict=True):
        for field in Level._fields:
            assert torch.equal(getattr(level, field), getattr(other_level, field)), field


def arguments(folder: Path | None, spherical: bool = False, seed: int = 0) -> tuple:
    return Points(normal(300, 5), spherical=spherical), [40, 9], 2, 4, 30, seed, torch.float32, folder


def test_follows_the_seed():
    one, again, other = (hierarchical_kmeans(*arguments(None, seed=seed)) for seed in (3, 3, 4))
    assert_same(one, again)
    assert not torch.equal(one[0].centroids, other[0].centroids)


class TestProgress:
    @pytest.mark.parametrize("spherical", [False, True])
    def test_goes_on_where_it_was_killed(self, spherical, tmp_path, monkeypatch):
        """Killed over and over: ever more is done, and nothing else comes out of it."""
        update = Assignment.update
        calls, limit = 0, 10**9

        def mortal(*of_update):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return update(*of_update)

        monkeypatch.setattr(Assignment, "update", mortal)
        whole = hierarchical_kmeans(*arguments(None, spherical))
        needed, kills, levels = calls, 0, None
        while levels is None and kills < 100:
            calls, limit = 0, 18 + 3 * kills
            try:
                levels = hierarchical_kmeans(*arguments(tmp_path, spherical))
            except KeyboardInterrupt:
                kills += 1
        assert kills >= 2
        assert calls < needed - 10  # the last life did not do all
        assert levels is not None
        assert_same(levels, whole)

    def test_what_is_on_disk_is_used(self, tmp_path, monkeypatch):
        """One file a turn; without one of them, its seeds are sought again."""
        whole = hierarchical_kmeans(*arguments(tmp_path))
        expected = {f"level{level}-{turn}.safetensors" for level in (1, 2) for turn in (0, 1, 2)}
        assert {path.name for path in tmp_path.iterdir()} == expected
        monkeypatch.setattr(kmeans_module, "seeds", None)
        assert_same(hierarchical_kmeans(*arguments(tmp_path)), whole)
        (tmp_path / "level1-1.safetensors").unlink()
        with pytest.raises(TypeError):
            hierarchical_kmeans(*arguments(tmp_path))


WORLDS = [3, 2, 1]
CASES = {
    "plain": {"clusters": [60, 12]},
    "resampled": {"clusters": [60, 12, 3], "resamplings": 2, "sample": 5},
    "spherical": {"clusters": [60, 12], "resamplings": 1, "sample": 5, "spherical": True},
    "bf16": {"clusters": [60, 12], "resamplings": 1, "sample": 5, "precision": torch.bfloat16},
    "many": {"clusters": [200, 100], "resamplings": 1, "sample": 2},  # centroids in more blocks than one
}


def work(rank: int, processes: int, folder: Path) -> dict:
    points_module.BLOCK = 64
    results: dict = {}
    for name, settings in CASES.items():
        settings = {"spherical": False} | settings
        points = held(concepts(2)[:700], rank, processes, settings.pop("spherical"))
        results[name] = [tuple(level) for level in hierarchical_kmeans(points, iterations=6, **settings)]
    progress = folder / f"progress-{processes}"
    progress.mkdir(exist_ok=True)
    points = held(concepts(2)[:700], rank, processes)
    for _ in range(2):
        levels = hierarchical_kmeans(points, iterations=4, progress=progress, **CASES["resampled"])
    results["twice"] = [tuple(level) for level in levels]
    whole, rows = random_clustering(700, 9, levels=4, seed=5), shard(700, rank, processes)
    part = whole._replace(labels=whole.labels[rows], distances=whole.distances[rows])
    results["members"] = nearest_members(held(torch.zeros(700, 2), rank, processes), part, 3)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list]:
    folder = tmp_path_factory.mktemp("processes")
    return worlds.run(functools.partial(work, folder=folder), WORLDS, folder)


class TestProcesses:
    @pytest.mark.parametrize("name", [*CASES, "twice"])
    @pytest.mark.parametrize("processes", [2, 3])
    def test_levels_are_the_same_to_the_last_bit(self, processes, name, results):
        alone = [Level(*level) for level in results[1][0][name]]
        firsts = [Level(*of_rank[name][0]) for of_rank in results[processes]]
        labels, distances = torch.cat([one.labels for one in firsts]), torch.cat([one.distances for one in firsts])
        assert len(firsts[-1].labels) < len(labels)
        for of_rank, first in zip(results[processes], firsts, strict=True):
            whole = first._replace(labels=labels, distances=distances)
            assert_same([whole, *(Level(*level) for level in of_rank[name][1:])], alone)

    @pytest.mark.parametrize("processes", WORLDS)
    def test_nearest_members_are_those_of_all(self, processes, results):
        expected = brute_members(random_clustering(700, 9, levels=4, seed=5), 3)
        assert [of_rank["members"].tolist() for of_rank in results[processes]] == [expected] * processes


def test_all_passes_of_all_levels_share_one_bar_that_ends_full(monkeypatch):
    shown = []

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if not self.disable:
                shown.append(self)

    for module in (hierarchy, kmeans_module):
        monkeypatch.setattr(module, "tqdm", Bar)
    points = Points(torch.randn(200, 4, generator=torch.manual_seed(0)), spherical=False)
    hierarchical_kmeans(points, [20, 4], resamplings=3, iterations=30)
    assert len(shown) == 1
    assert 0 < shown[0].n == shown[0].total < 2 * 4 * 30
