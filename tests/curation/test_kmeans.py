"""k-means against scikit-learn's, plain definitions written here, and itself on several processes."""

import functools
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from clouds import assert_same, held, mixture, normal
from torch import Tensor

from dino.curation import assignment as assignment_module
from dino.curation import kmeans as kmeans_module
from dino.curation import points as points_module
from dino.curation.assignment import Assignment
from dino.curation.kmeans import Clustering, kmeans, seeds
from dino.curation.points import Points, shard
from dino.errors import UserError

both_geometries = pytest.mark.parametrize("spherical", [False, True])
both_precisions = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])


def far_away(points: Tensor, clusters: int, empty: int) -> Tensor:
    """Centroids to begin with, the last `empty` of which no point is nearest to."""
    centroids = points[:clusters].clone()
    centroids[clusters - empty :] = 1e3 + torch.arange(empty)[:, None]
    return centroids


DATA = {
    "normal": normal(600, 16),
    "mixture": mixture(500, 8, of=9),
    "one dimension": torch.randperm(300, generator=torch.Generator().manual_seed(0))[:, None]
    - 150
    + normal(300, 1) / 9,
    "wide": mixture(200, 300, of=12),
    "offset": mixture(600, 16, of=9) + 1000,
    "offset by directions": mixture(600, 16, of=9) + 3e3 * normal(1, 16, seed=5),
    "tiny": mixture(300, 8, of=9) * 1e-6,
    "huge": mixture(300, 8, of=9) * 1e6,
    "tiny with an offset": mixture(300, 8, of=9) * 1e-3 + 10,
}


def plain(points: Tensor, initial: Tensor, iterations: int, spherical: bool = False) -> tuple[np.ndarray, ...]:
    """Lloyd's algorithm, cluster by cluster in fp64: labels, centroids, iterations."""
    rows, centroids = points.double().numpy(), initial.double().numpy().copy()
    if spherical:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    labels, iteration = np.full(len(rows), -1), 0
    for iteration in range(1, iterations + 1):  # noqa: B007 (returned)
        squares = ((rows[:, None] - centroids) ** 2).sum(axis=2)
        newest = squares.argmin(axis=1)
        if (newest == labels).all():
            break
        labels = newest
        own = squares.min(axis=1)
        farthest = iter(sorted(np.flatnonzero(own > 0), key=lambda point: (-own[point], point)))
        for cluster in range(len(centroids)):
            members = rows[labels == cluster]
            if len(members):
                centroids[cluster] = members.mean(axis=0)
                if spherical:
                    centroids[cluster] /= np.linalg.norm(centroids[cluster])
            elif (point := next(farthest, None)) is not None:
                centroids[cluster] = rows[point]
    return ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1), centroids, iteration


def assert_equals_plain(
    clustering: Clustering, points: Tensor, initial: Tensor, iterations: int, spherical: bool, atol: float
) -> None:
    labels, centroids, iteration = plain(points, initial, iterations, spherical)
    assert clustering.labels.tolist() == labels.tolist()
    assert clustering.iterations == iteration
    torch.testing.assert_close(clustering.centroids.double(), torch.from_numpy(centroids), rtol=1e-6, atol=atol)


def assert_describes(clustering: Clustering, points: Tensor, spherical: bool = False) -> None:
    """Labels, distances, sizes and objective are what the points and centroids say."""
    rows, centroids = points.double(), clustering.centroids.double()
    if spherical:
        rows = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(len(centroids)).double(), rtol=1e-6, atol=0)
        centroids = centroids / centroids.norm(dim=1, keepdim=True)
    squares = (rows[:, None] - centroids).square().sum(dim=2)  # of unit length: 2 − 2·cosine
    spread = (rows - rows.mean(dim=0)).square().sum(dim=1).mean()
    own = squares.gather(1, clustering.labels[:, None])[:, 0]
    # Centroids are returned in fp32: where there is an offset, they are rounded more coarsely than they were computed.
    rounding = float(rows.abs().max() * 1e-7)
    loose = float(2e-6 * spread + 2 * rounding * spread.sqrt() * math.sqrt(rows.shape[1]))
    assert (own - squares.min(dim=1).values).max() <= loose
    torch.testing.assert_close(clustering.distances.double(), own, rtol=1e-5, atol=loose)
    assert torch.equal(clustering.sizes, torch.bincount(clustering.labels, minlength=len(centroids)))
    assert clustering.objective == pytest.approx(float(clustering.distances.double().mean()), rel=1e-6)
    assert clustering.distances.dtype == clustering.centroids.dtype == torch.float32
    assert clustering.labels.dtype == clustering.sizes.dtype == torch.int64


class TestAgainstDefinitions:
    @pytest.mark.parametrize(("clusters", "iterations"), [(1, 100), (25, 1), (25, 4), (25, 100)])
    @pytest.mark.parametrize("name", DATA)
    def test_scikit_learn(self, name, clusters, iterations):
        from sklearn.cluster import KMeans  # here: the processes below need not import it

        points = DATA[name]
        initial = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(3))[:clusters]]
        peer = KMeans(clusters, init=initial.double().numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        peer.fit(points.double().numpy())
        clustering = kmeans(Points(points), clusters, iterations, initial=initial)
        assert clustering.labels.tolist() == peer.labels_.tolist()
        assert clustering.iterations == peer.n_iter_
        assert clustering.objective == pytest.approx(peer.inertia_ / len(points), rel=1e-5)
        atol = 1e-6 * float(points.std()) + 1e-7 * float(points.abs().max())
        expected = torch.from_numpy(peer.cluster_centers_)
        torch.testing.assert_close(clustering.centroids.double(), expected, rtol=0, atol=atol)
        assert_describes(clustering, points)

    def test_k_means_plus_plus_is_as_good(self):
        """The mean over seeds, to two standard errors; scikit-learn's without local trials, as ours."""
        from sklearn.cluster import KMeans, kmeans_plusplus

        points = DATA["mixture"]
        ours, theirs = [], []
        for seed in range(30):
            ours.append(kmeans(Points(points), 9, 100, seed).objective)
            initial = kmeans_plusplus(points.double().numpy(), 9, random_state=seed, n_local_trials=1)[0]
            peer = KMeans(9, init=initial, n_init=1, max_iter=100, tol=0).fit(points.double().numpy())
            theirs.append(peer.inertia_ / len(points))
        assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)

    @pytest.mark.parametrize("iterations", [0, 1, 3, 100])
    @pytest.mark.parametrize("name", ["normal", "mixture", "wide", "offset by directions", "tiny", "huge"])
    def test_spherical(self, name, iterations):
        points = DATA[name]
        initial = F.normalize(points[:12].double()).float()
        clustering = kmeans(Points(points, spherical=True), 12, iterations, initial=initial)
        assert_equals_plain(clustering, points, initial, iterations, True, atol=1e-6)
        assert_describes(clustering, points, spherical=True)

    def test_lengths_do_not_matter_to_directions(self):
        points = DATA["mixture"]
        lengths = torch.logspace(-3, 3, len(points))[:, None]
        one, other = (kmeans(Points(rows, spherical=True), 7, seed=1) for rows in (points, points * lengths))
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.centroids, other.centroids, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("empty", [0, 6])
    @both_geometries
    @pytest.mark.parametrize("name", ["mixture", "one dimension", "offset"])
    def test_objective_never_increases(self, name, spherical, empty):
        points = Points(DATA[name], spherical=spherical)
        initial = far_away(DATA[name], 15, empty)
        initial = F.normalize(initial) if spherical else initial
        objectives = [kmeans(points, 15, iterations, initial=initial).objective for iterations in (*range(8), 10, 30)]
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(objectives))
        if name != "one dimension" or not spherical:  # two directions only: there is nothing to gain
            assert objectives[-1] < 0.99 * objectives[0]


def tight(rows: int, width: int, of: int, spread: float) -> Tensor:
    """Groups so far apart, for their size, that bf16 cannot tell their members."""
    centers = F.normalize(normal(of, width, 5))
    return centers[torch.arange(rows) % of] + spread * normal(rows, width, 6) / math.sqrt(width)


class TestBfloat16:
    @both_geometries
    @pytest.mark.parametrize("name", ["normal", "mixture", "wide", "offset"])
    def test_is_all_but_as_good(self, name, spherical):
        """And what it returns is the nearest in fp32 none the less."""
        points = Points(DATA[name], spherical=spherical)
        exact = [kmeans(points, 12, 50, seed) for seed in range(4)]
        rounded = [kmeans(points, 12, 50, seed, torch.bfloat16) for seed in range(4)]
        assert sum(one.objective for one in rounded) < 1.01 * sum(one.objective for one in exact)
        for one in rounded:
            assert_describes(one, DATA[name], spherical)

    @both_geometries
    @pytest.mark.parametrize("spread", [0.1, 0.01, 1e-4])
    @pytest.mark.parametrize("width", [16, 64])
    def test_tells_members_of_tight_groups_too(self, width, spread, spherical):
        points = Points(tight(1500, width, 20, spread), spherical=spherical)
        exact, rounded = (kmeans(points, 100, 30, 1, precision) for precision in (torch.float32, torch.bfloat16))
        assert rounded.objective == pytest.approx(exact.objective, rel=0.002)
        assert abs(rounded.iterations - exact.iterations) <= 3


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """Of each product with centroids, how many scores it gave."""
    counts, call = [], assignment_module._Scores.__call__

    def counted(self, *arguments):
        scores = call(self, *arguments)
        counts.append(scores.numel())
        return scores

    monkeypatch.setattr(assignment_module._Scores, "__call__", counted)
    return counts


class TestCentroidsAtRest:
    """What is not compared again would have made no difference."""

    @both_precisions
    @both_geometries
    @pytest.mark.parametrize("name", DATA)
    def test_result_is_that_of_comparing_all(self, name, spherical, precision, compared, monkeypatch):
        points = Points(DATA[name], spherical=spherical)
        sparing = [kmeans(points, clusters, 40, 2, precision) for clusters in (3, 20)]
        products = sum(compared)
        compared.clear()
        monkeypatch.setattr(assignment_module, "WORTHWHILE", -1)
        for clustering, clusters in zip(sparing, (3, 20), strict=True):
            assert_same(clustering, kmeans(points, clusters, 40, 2, precision))
        assert products < sum(compared) or name in ("one dimension", "wide")  # which come to rest all at once

    def test_groups_at_rest_cost_nothing_more(self, compared):
        """Eight groups far apart and two that overlap: only the latter's centroids go on moving."""
        groups = normal(10, 4, seed=3) * 40
        groups[9] = groups[8] + 1.5
        points = (groups[:, None] + normal(640, 4).reshape(10, 64, 4)).flatten(0, 1)
        initial = groups.clone()
        initial[9] += 2
        clustering = kmeans(Points(points), 10, initial=initial)
        assert clustering.iterations >= 5
        assert sum(compared) < (2 + 0.3 * (clustering.iterations - 1)) * 640 * 10

    @both_precisions
    def test_labels_are_the_nearest_however_centroids_move(self, precision):
        """Some jump, some stay, some swap, one equals another: against all distances in fp64."""
        points, generator = Points(mixture(500, 8, of=9)), torch.Generator().manual_seed(7)
        rows = torch.cat([block for _, block in points]).double()
        centroids, assignment = points.at(torch.arange(30)), Assignment(points, 30, precision)
        loose = 1e-5 if precision == torch.float32 else 0.05
        for turn in range(40):
            assignment.update(centroids)
            squares = (rows[:, None] - centroids.double()).square().sum(dim=2)
            own, least = squares.gather(1, assignment.labels[:, None])[:, 0], squares.min(dim=1).values
            assert (own - least <= loose * (1 + least)).all()
            sums = torch.zeros_like(assignment.sums).index_add_(0, assignment.labels, points.integers(rows.float()))
            assert torch.equal(assignment.sums, sums)
            centroids = centroids.clone()
            some = torch.randperm(30, generator=generator)[: 1 + turn % 9]
            centroids[some] += 0.3 * torch.randn(len(some), 8, generator=generator) * (turn % 3)
            centroids[some[:2]] = centroids[some[:2].flip(0)]
            if turn % 4 == 0:
                centroids[some[0]] = centroids[(some[0] + 1) % 30]
        assignment.settle(centroids)
        at_once = Assignment(points, len(centroids))
        at_once.update(centroids)
        assert torch.equal(assignment.labels, at_once.labels)


class TestEmptyClusters:
    @pytest.mark.parametrize("iterations", [1, 2, 100])
    @pytest.mark.parametrize("empty", [1, 3, 9])
    @pytest.mark.parametrize("name", ["mixture", "one dimension", "wide", "offset"])
    def test_are_put_on_the_farthest_points(self, name, empty, iterations):
        points = DATA[name]
        initial = far_away(points, 10, empty)
        initial[10 - empty :] += points[0]
        clustering = kmeans(Points(points), 10, iterations, initial=initial)
        atol = 1e-5 + 1e-7 * float(points.abs().max())
        assert_equals_plain(clustering, points, initial, iterations, False, atol)

    def test_of_directions(self):
        points = DATA["mixture"]
        initial = F.normalize(points[:10])
        initial[4:] = initial[3] * torch.linspace(2, 9, 6)[:, None]  # off the sphere, so farther than what is on it
        clustering = kmeans(Points(points, spherical=True), 10, 1, initial=initial)
        assert_equals_plain(clustering, points, initial, 1, True, atol=1e-6)

    @pytest.mark.parametrize("block", [1, 2, 64])
    def test_first_of_equals(self, block, monkeypatch):
        """Worked by hand: four points lie nine from 0, the first three of which are used, in their order."""
        monkeypatch.setattr(points_module, "BLOCK", block)
        points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [1.0, -1.0], [-3.0, 0.0], [0.0, -3.0], [-1.0, 1.0]])
        initial = torch.tensor([[0.0, 0.0], [50.0, 0.0], [60.0, 0.0], [70.0, 0.0]])
        clustering = kmeans(Points(points), 4, 1, initial=initial)
        assert clustering.centroids.tolist() == [[0, 0], [3, 0], [0, 3], [-3, 0]]

    def test_order_of_empty_clusters_is_that_of_distance(self):
        """The first empty cluster gets the farthest point; points on their centroid are not used."""
        points = torch.tensor([[0.0], [0.0], [5.0], [-4.0], [-1.0], [0.0]])  # their mean is 0
        initial = torch.tensor([[90.0], [0.0], [80.0], [70.0], [60.0], [100.0]])
        clustering = kmeans(Points(points), 6, 1, initial=initial)
        assert clustering.centroids[:, 0].tolist() == [5, 0, -4, -1, 60, 100]

    @pytest.mark.parametrize("copies", [1, 2])
    def test_none_stays_empty_where_there_are_points_enough(self, copies):
        """100 is alone with the second centroid, which moves on to it: the third would be of more use elsewhere."""
        points = torch.tensor([[0.0], [0.5], [1.0], [-0.5], *[[100.0]] * copies])
        clustering = kmeans(Points(points), 3, initial=torch.tensor([[0.0], [90.0], [1000.0]]))
        assert (clustering.sizes > 0).all()


@both_geometries
class TestFewPoints:
    def test_as_many_clusters_as_points(self, spherical):
        clustering = kmeans(Points(normal(40, 5), spherical=spherical), 40)
        assert clustering.objective < 1e-12
        assert sorted(clustering.labels.tolist()) == list(range(40))

    @pytest.mark.parametrize(("points", "clusters"), [(40, 0), (40, 41), (40, 1000), (0, 1)])
    def test_more_clusters_than_points_are_refused(self, points, clusters, spherical):
        with pytest.raises(UserError, match=rf"{clusters:,} clusters of {points} points"):
            kmeans(Points(normal(points, 5), spherical=spherical), clusters)

    def test_one_point(self, spherical):
        clustering = kmeans(Points(torch.tensor([[3.0, -4.0]]), spherical=spherical), 1)
        expected = [[0.6, -0.8]] if spherical else [[3.0, -4.0]]
        torch.testing.assert_close(clustering.centroids, torch.tensor(expected), rtol=1e-6, atol=0)
        assert (clustering.labels.tolist(), clustering.sizes.tolist(), clustering.objective) == ([0], [1], 0)

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e5])
    def test_all_identical(self, value, spherical):
        clustering = kmeans(Points(torch.full((200, 3), value), spherical=spherical), 7, iterations=10)
        assert clustering.centroids.isfinite().all()
        assert sorted(clustering.sizes.tolist()) == [0] * 6 + [200]
        assert clustering.objective <= 1e-12

    def test_fewer_distinct_points_than_clusters(self, spherical):
        clustering = kmeans(Points(normal(6, 4).repeat(30, 1), spherical=spherical), 10)
        assert clustering.centroids.isfinite().all()
        assert clustering.objective < 1e-12
        assert torch.equal(clustering.labels, clustering.labels[:6].repeat(30))
        assert len(set(clustering.labels[:6].tolist())) == 6


def test_zeros_among_directions():
    points = normal(100, 4)
    points[::7] = 0
    clustering = kmeans(Points(points, spherical=True), 5)
    assert clustering.centroids.isfinite().all()
    torch.testing.assert_close(clustering.distances[::7], torch.ones(15), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 130, 199])
@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.float32])
def test_values_that_are_not_finite_are_refused(kind, row, value):
    points = normal(200, 5)
    points[row, 3] = value
    values = points.to(kind) if isinstance(kind, torch.dtype) else points.numpy().astype(kind)
    for spherical in (False, True):
        with pytest.raises(UserError, match="NaN or infinite"):
            Points(values, spherical=spherical)


class TestMemoryMaps:
    @both_precisions
    @both_geometries
    @pytest.mark.parametrize("mode", ["r", "r+"])
    @pytest.mark.parametrize("bytes_held", [2**29, 0])
    def test_half_precision_on_disk_equals_fp32_in_memory(
        self, spherical, precision, mode, bytes_held, tmp_path, monkeypatch
    ):
        """Also where an empty cluster asks for single points of rows too many to be kept as they are worked with."""
        values = mixture(500, 8, of=9).half()
        np.save(tmp_path / "points.npy", values.numpy())
        initial = far_away(values[:20].float(), 20, 3)
        expected = kmeans(Points(values.float(), spherical=spherical), 20, 6, 0, precision, initial)
        monkeypatch.setattr(points_module, "HELD", bytes_held)
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)  # of a map that may only be read, and not only the first time in this process
        try:
            points = Points(np.load(tmp_path / "points.npy", mmap_mode=mode), spherical=spherical)
            assert_same(kmeans(points, 20, 6, 0, precision, initial), expected)
        finally:
            torch.set_warn_always(always)
        assert points.prepared == bool(bytes_held)


PROGRESS = {
    "euclidean": {},
    "spherical": {"spherical": True},
    "bf16": {"precision": torch.bfloat16},
    "limited": {"iterations": 6},
    "empty clusters": {"initial": far_away(DATA["normal"], 12, 7)},
    # Fewer groups of equal points than clusters: a start does not look for uses of the empty ones once more.
    "clusters that stay empty": {"data": tight(400, 8, 6, 1e-4), "clusters": 20, "seed": 2},
}


def case(name: str) -> tuple[Points, dict]:
    settings = {"clusters": 12, "seed": 4, "iterations": 60} | PROGRESS[name]
    return Points(settings.pop("data", DATA["normal"]), spherical=settings.pop("spherical", False)), settings


class TestProgress:
    @pytest.mark.parametrize("name", PROGRESS)
    def test_goes_on_from_any_iteration(self, name, tmp_path, monkeypatch):
        """From the last one, too: what is done is not done again, and seeds are not sought again."""
        points, settings = case(name)
        whole = kmeans(points, **settings)
        for stop in {1, 2, whole.iterations // 2, whole.iterations - 1, whole.iterations} - {0}:
            file = tmp_path / f"{stop}.safetensors"
            kmeans(points, **settings | {"iterations": stop}, progress=file)
            with monkeypatch.context() as patch:
                patch.setattr(kmeans_module, "seeds", None)
                assert_same(kmeans(points, **settings, progress=file), whole)

    @pytest.mark.parametrize("name", PROGRESS)
    def test_goes_on_after_a_crash(self, name, tmp_path, monkeypatch):
        points, settings = case(name)
        whole = kmeans(points, **settings)
        file, update = tmp_path / "progress.safetensors", Assignment.update
        calls, updates, clustering = 0, 0, None

        def failing(*arguments):
            nonlocal calls, updates
            calls += 1
            if calls % 5 == 0:
                raise KeyboardInterrupt
            updates += 1
            return update(*arguments)

        monkeypatch.setattr(Assignment, "update", failing)
        while clustering is None and calls < 500:
            try:
                clustering = kmeans(points, **settings, progress=file)
            except KeyboardInterrupt:
                continue
        # Each life begins with the iteration before; nothing else is done twice.
        assert whole.iterations <= updates <= whole.iterations + 3 + calls // 5
        assert clustering is not None
        assert_same(clustering._replace(iterations=whole.iterations), whole)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]


class TestSeeds:
    def test_are_points_and_follow_the_seed(self):
        points = Points(DATA["offset"])
        one, again, other = (seeds(points, 30, seed) for seed in (5, 5, 6))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        apart = torch.cdist(one.double() + points.mean, DATA["offset"].double())
        assert apart.min(dim=1).values.max() < 1e-3
        assert len(set(apart.argmin(dim=1).tolist())) == 30

    @both_geometries
    def test_are_drawn_by_squared_distance(self, spherical):
        """Chi-square of 2,000 draws of three centroids of five points, in order, against D² probabilities."""
        from scipy.stats import chisquare

        points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0], [4.0, 3.0], [0.5, -3.0]])
        prepared = Points(points, spherical=spherical)
        rows = F.normalize(points) if spherical else points
        squares = torch.cdist(rows.double(), rows.double()).square().numpy()
        expected, observed = np.zeros((5, 5, 5)), np.zeros((5, 5, 5))
        for first, second in itertools.permutations(range(5), 2):
            third = np.minimum(squares[first], squares[second])
            expected[first, second] = squares[first, second] / squares[first].sum() * third / third.sum() / 5
        for seed in range(2000):
            centroids = seeds(prepared, 3, seed) + prepared.mean.float()
            observed[tuple(torch.cdist(centroids, rows).argmin(dim=1).tolist())] += 1
        assert observed[expected == 0].sum() == 0
        assert chisquare(observed[expected > 0], 2000 * expected[expected > 0]).pvalue > 1e-3

    def test_groups_far_apart_all_get_one(self):
        points = normal(400, 3) + 1e4 * normal(20, 3, seed=8).repeat(20, 1)
        for seed in range(10):
            assert kmeans(Points(points), 20, 0, seed).sizes.tolist() == [20] * 20


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("points", [0, 1, 63, 64, 65, 640, 1000])
def test_shards_are_whole_blocks(points, processes):
    shards = [range(points)[shard(points, rank, processes)] for rank in range(processes)]
    assert [row for one in shards for row in one] == list(range(points))
    assert all(one.start % 64 == 0 for one in shards if one)
    blocks = [math.ceil(len(one) / 64) for one in shards]
    assert max(blocks) - min(blocks) <= 1


def corners() -> Tensor:
    """Of a cube, all as far from 0, which is their mean, and most of them several times."""
    signs = normal(ROWS // 2, 8).sign()
    return torch.cat([signs, -signs])[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]


def tiny_and_huge(seed: int) -> Tensor:
    """Values from 1e-4 to 1e3; their mean is 0."""
    half = 1e3 * normal(320, 32, seed)
    half[::2] *= 1e-6
    return torch.cat([half, -half])


def all_but_cancelling(seed: int) -> Tensor:
    """Values whose sum is a small part of theirs, so that the order of an inexact one shows."""
    return tiny_and_huge(seed) + 1e-4 * normal(640, 32, seed + 1)


WORLDS = [3, 2, 1]
ROWS = 700  # 11 blocks, the last of which is not full
COMMON = {
    "euclidean": {},
    "spherical": {"spherical": True},
    "offset": {"data": mixture(ROWS, 8, of=9) + 1000},
    "bf16": {"precision": torch.bfloat16},
    "bf16 spherical": {"precision": torch.bfloat16, "spherical": True},
    "limited": {"iterations": 3},
    "another seed": {"seed": 1},
    "empty clusters": {"initial": far_away(mixture(ROWS, 8, of=9), 15, 9)},
    "equals": {"data": corners(), "initial": far_away(torch.zeros(15, 8), 15, 14), "iterations": 1},
    "copies": {"data": normal(ROWS // 7, 3).repeat(7, 1), "initial": far_away(normal(ROWS // 7, 3), 15, 9)},
    "few points": {"data": normal(70, 8)},  # two blocks: of three processes one has none
    "going on": {"progress": True},
}
UNFIT = {
    "a NaN in the first process": (3, math.nan),
    "a NaN in the last": (ROWS - 1, math.nan),  # gloo's maximum forgets it
    "an infinity in the last": (ROWS - 1, math.inf),
}


def settings_of(name: str) -> tuple[Tensor, bool, dict]:
    settings = {"iterations": 40, "seed": 0} | COMMON[name]
    return settings.pop("data", mixture(ROWS, 8, of=9)), settings.pop("spherical", False), settings


def work(rank: int, processes: int, folder: Path) -> dict:
    points_module.BLOCK = 64
    results: dict = {}
    for name in COMMON:
        data, spherical, settings = settings_of(name)
        if settings.pop("progress", False):
            settings["progress"] = folder / f"progress-{processes}"
        results[name] = tuple(kmeans(held(data, rank, processes, spherical), 15, **settings))
    for name, (row, value) in UNFIT.items():
        data = mixture(ROWS, 8, of=9)
        data[row, 2] = value
        try:
            held(data, rank, processes)
            results[name] = "not seen"
        except UserError:
            results[name] = "refused"
    cancelling = [held(all_but_cancelling(seed), rank, processes) for seed in range(5)]
    far = torch.tensor([[0.0], [1e4]]).expand(2, 32)
    results["means"] = torch.stack([points.mean for points in cancelling])
    results["centroids"] = torch.stack(
        [kmeans(points, 5, 1, initial=50 * normal(5, 32)).centroids for points in cancelling]
    )
    results["objectives"] = torch.tensor(
        [kmeans(held(tiny_and_huge(seed), rank, processes), 2, 0, initial=far).objective for seed in range(10)]
    )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list]:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points_module, "BLOCK", 64)
        data, spherical, settings = settings_of("going on")
        kmeans(Points(data, spherical=spherical), 15, 4, settings["seed"], progress=folder / "progress-1")
    for processes in (2, 3):
        shutil.copy(folder / "progress-1", folder / f"progress-{processes}")
    return worlds.run(functools.partial(work, folder=folder), WORLDS, folder)


class TestProcesses:
    @pytest.mark.parametrize("name", COMMON)
    @pytest.mark.parametrize("processes", [2, 3])
    def test_result_is_the_same_to_the_last_bit(self, processes, name, results):
        alone = Clustering(*results[1][0][name])
        together = [Clustering(*of_rank[name]) for of_rank in results[processes]]
        labels, distances = (
            torch.cat([getattr(part, field) for part in together]) for field in ("labels", "distances")
        )
        for rank, part in enumerate(together):
            assert torch.equal(part.labels, alone.labels[shard(len(labels), rank, processes)])
            assert_same(part._replace(labels=labels, distances=distances), alone)

    @pytest.mark.parametrize("name", COMMON)
    def test_result_is_right(self, name, results):
        """One of the processes' worlds, so that all are."""
        data, spherical, settings = settings_of(name)
        alone = Clustering(*results[1][0][name])
        assert_describes(alone, data, spherical)
        if "initial" in settings:
            assert_equals_plain(alone, data, settings["initial"], settings["iterations"], False, atol=1e-5)

    @pytest.mark.parametrize("name", ["means", "centroids", "objectives"])
    def test_sums_are_exact(self, name, results):
        """Also of values that all but cancel: whatever is lost on the way would show."""
        alone = results[1][0][name]
        assert all(torch.equal(alone, of_rank[name]) for of_rank in (*results[2], *results[3]))
        if name == "means":
            sums = [[math.fsum(column) / 640 for column in all_but_cancelling(seed).T.tolist()] for seed in range(5)]
            torch.testing.assert_close(alone, torch.tensor(sums).double(), rtol=0, atol=1e-9)
            assert alone.abs().max() < 1e-4

    @pytest.mark.parametrize("processes", WORLDS)
    def test_goes_on_with_another_number_of_processes(self, processes, results):
        whole, gone_on = (Clustering(*results[processes][0][name]) for name in ("euclidean", "going on"))
        assert whole.iterations > 5
        assert_same(gone_on, whole)

    @pytest.mark.parametrize("name", UNFIT)
    @pytest.mark.parametrize("processes", WORLDS)
    def test_values_that_are_not_finite_are_refused_by_all(self, processes, name, results):
        assert [of_rank[name] for of_rank in results[processes]] == ["refused"] * processes
