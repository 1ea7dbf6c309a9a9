"""k-means against scikit-learn's, plain definitions written here, and itself on several processes."""

import functools
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor

from dino.curation import assignment as assignment_module
from dino.curation import kmeans as kmeans_module
from dino.curation import points as points_module
from dino.curation.assignment import Assignment
from dino.curation.kmeans import Clustering, kmeans, seeds
from dino.curation.points import Points, share
from dino.errors import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK", 64)


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def mixture(rows: int, width: int, of: int, seed: int = 0) -> Tensor:
    """Groups of unequal size, near enough to overlap."""
    centres = drawn(of, width, seed + 1) * 2
    which = (torch.rand(rows, generator=torch.Generator().manual_seed(seed + 2)) ** 2 * of).long()
    return centres[which] + drawn(rows, width, seed)


def far_away(points: Tensor, clusters: int, empty: int) -> Tensor:
    """Centroids to begin with, the last `empty` of which no point is nearest to."""
    centroids = points[:clusters].clone()
    centroids[clusters - empty :] = 1e3 + torch.arange(empty)[:, None]
    return centroids


DATA = {
    "normal": drawn(600, 16),
    "mixture": mixture(500, 8, of=9),
    "one dimension": torch.randperm(300, generator=torch.Generator().manual_seed(0))[:, None] - 150 + drawn(300, 1) / 9,
    "wide": mixture(200, 300, of=12),
    "offset": mixture(600, 16, of=9) + 1000,
    "offset by directions": mixture(600, 16, of=9) + 3e3 * drawn(1, 16, seed=5),
    "tiny": mixture(300, 8, of=9) * 1e-6,
    "huge": mixture(300, 8, of=9) * 1e6,
    "tiny with an offset": mixture(300, 8, of=9) * 1e-3 + 10,
}


def plain(points: Tensor, initial: Tensor, iterations: int, spherical: bool = False) -> tuple[np.ndarray, ...]:
    """Lloyd's algorithm, cluster by cluster in fp64: labels, centroids, iterations taken."""
    rows, centroids = points.double().numpy(), initial.double().numpy().copy()
    if spherical:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squares = np.empty((len(rows), len(centroids)))
    labels, taken = np.full(len(rows), -1), 0
    for taken in range(1, iterations + 1):  # noqa: B007 (returned)
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
    return ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1), centroids, taken


def assert_same(found: Clustering, other: Clustering) -> None:
    """To the last bit."""
    for name in ("centroids", "labels", "distances", "sizes"):
        assert torch.equal(getattr(found, name), getattr(other, name)), name
    assert found.objective == other.objective
    assert found.iterations == other.iterations


def assert_describes(found: Clustering, points: Tensor, spherical: bool = False) -> None:
    """Labels, distances, sizes and objective are what the points and centroids say."""
    rows, centroids = points.double(), found.centroids.double()
    if spherical:
        rows = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(len(centroids)).double(), rtol=1e-6, atol=0)
        centroids = centroids / centroids.norm(dim=1, keepdim=True)
    squares = (rows[:, None] - centroids).square().sum(dim=2)  # of unit length: 2 − 2·cosine
    spread = (rows - rows.mean(dim=0)).square().sum(dim=1).mean()
    own = squares.gather(1, found.labels[:, None])[:, 0]
    # Centroids are returned in fp32: where there is an offset, they are rounded more coarsely than they were found.
    rounding = float(rows.abs().max() * 1e-7)
    loose = float(2e-6 * spread + 2 * rounding * spread.sqrt() * math.sqrt(rows.shape[1]))
    assert (own - squares.min(dim=1).values).max() <= loose
    torch.testing.assert_close(found.distances.double(), own, rtol=1e-5, atol=loose)
    assert torch.equal(found.sizes, torch.bincount(found.labels, minlength=len(centroids)))
    assert found.objective == pytest.approx(float(found.distances.double().mean()), rel=1e-6)
    assert found.distances.dtype == found.centroids.dtype == torch.float32
    assert found.labels.dtype == found.sizes.dtype == torch.int64


class TestAgainstScikitLearn:
    @pytest.mark.parametrize(("clusters", "iterations"), [(1, 100), (2, 100), (25, 1), (25, 4), (25, 100)])
    @pytest.mark.parametrize("name", DATA)
    def test_same_labels_iterations_and_centroids(self, name, clusters, iterations):
        from sklearn.cluster import KMeans  # here: the processes below need not import it

        points = DATA[name]
        initial = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(3))[:clusters]]
        peer = KMeans(clusters, init=initial.double().numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        peer.fit(points.double().numpy())
        found = kmeans(Points(points), clusters, iterations, initial=initial)
        assert found.labels.tolist() == peer.labels_.tolist()
        assert found.iterations == peer.n_iter_
        assert found.objective == pytest.approx(peer.inertia_ / len(points), rel=1e-5)
        spread, largest = float(points.std()), float(points.abs().max())
        torch.testing.assert_close(
            found.centroids.double(),
            torch.from_numpy(peer.cluster_centers_),
            rtol=0,
            atol=1e-6 * spread + 1e-7 * largest,
        )
        assert_describes(found, points)

    def test_k_means_plus_plus_is_as_good(self):
        """The mean over seeds, to two standard errors; scikit-learn's without local trials, as ours."""
        from sklearn.cluster import KMeans, kmeans_plusplus

        points = DATA["mixture"]
        ours, theirs = [], []
        for seed in range(40):
            ours.append(kmeans(Points(points), 9, 100, seed).objective)
            initial = kmeans_plusplus(points.double().numpy(), 9, random_state=seed, n_local_trials=1)[0]
            peer = KMeans(9, init=initial, n_init=1, max_iter=100, tol=0).fit(points.double().numpy())
            theirs.append(peer.inertia_ / len(points))
        assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.05)


@pytest.mark.parametrize("iterations", [0, 1, 3, 100])
@pytest.mark.parametrize("name", ["normal", "mixture", "wide", "offset by directions", "tiny", "huge"])
def test_spherical_equals_the_plain_definition(name, iterations):
    points = DATA[name]
    initial = torch.nn.functional.normalize(points[:12].double()).float()
    labels, centroids, taken = plain(points, initial, iterations, spherical=True)
    found = kmeans(Points(points, spherical=True), 12, iterations, initial=initial)
    assert found.labels.tolist() == labels.tolist()
    assert found.iterations == taken
    torch.testing.assert_close(found.centroids.double(), torch.from_numpy(centroids), rtol=0, atol=1e-6)
    assert_describes(found, points, spherical=True)


def test_lengths_do_not_matter_to_directions():
    points = DATA["mixture"]
    lengths = torch.logspace(-3, 3, len(points))[:, None]
    one, other = (kmeans(Points(rows, spherical=True), 7, seed=1) for rows in (points, points * lengths))
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.centroids, other.centroids, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("name", ["normal", "mixture", "wide", "offset"])
def test_bf16_is_all_but_as_good(name, spherical):
    """And what it returns is the nearest in fp32 none the less."""
    points = Points(DATA[name], spherical=spherical)
    exact = [kmeans(points, 12, 50, seed) for seed in range(4)]
    found = [kmeans(points, 12, 50, seed, torch.bfloat16) for seed in range(4)]
    assert sum(one.objective for one in found) < 1.01 * sum(one.objective for one in exact)
    for one in found:
        assert_describes(one, DATA[name], spherical)


def tight(rows: int, width: int, of: int, spread: float) -> Tensor:
    """Groups so far apart, for their size, that bf16 cannot tell their members."""
    centres = torch.nn.functional.normalize(drawn(of, width, 5))
    return centres[torch.arange(rows) % of] + spread * drawn(rows, width, 6) / math.sqrt(width)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("spread", [0.1, 0.01, 1e-4])
@pytest.mark.parametrize("width", [16, 64])
def test_bf16_tells_members_of_tight_groups_too(width, spread, spherical):
    points = Points(tight(1500, width, 20, spread), spherical=spherical)
    exact, found = (kmeans(points, 100, 30, 1, precision) for precision in (torch.float32, torch.bfloat16))
    assert found.objective == pytest.approx(exact.objective, rel=0.002)
    assert abs(found.iterations - exact.iterations) <= 3


@pytest.mark.parametrize("empty", [0, 6])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("name", ["normal", "mixture", "one dimension", "offset"])
def test_objective_never_increases(name, spherical, empty):
    points = Points(DATA[name], spherical=spherical)
    initial = far_away(DATA[name], 15, empty)
    if spherical:
        initial = torch.nn.functional.normalize(initial)
    objectives = [kmeans(points, 15, iterations, initial=initial).objective for iterations in (*range(8), 10, 30)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(objectives))
    if name != "one dimension" or not spherical:  # two directions only: there is nothing to gain
        assert objectives[-1] < 0.99 * objectives[0]


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """Of each product with centroids, how many scores it gave."""
    counts, scores = [], assignment_module._Scores.__call__

    def counted(self, *arguments):
        found = scores(self, *arguments)
        counts.append(found.numel())
        return found

    monkeypatch.setattr(assignment_module._Scores, "__call__", counted)
    return counts


class TestCentroidsAtRest:
    """What is not compared again would have made no difference."""

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("spherical", [False, True])
    @pytest.mark.parametrize("name", DATA)
    def test_result_is_that_of_comparing_all(self, name, spherical, precision, compared, monkeypatch):
        points = Points(DATA[name], spherical=spherical)
        sparing = [kmeans(points, clusters, 40, 2, precision) for clusters in (3, 20)]
        some = sum(compared)
        compared.clear()
        monkeypatch.setattr(assignment_module, "WORTHWHILE", -1)
        for found, clusters in zip(sparing, (3, 20), strict=True):
            assert_same(found, kmeans(points, clusters, 40, 2, precision))
        assert some < sum(compared) or name in ("one dimension", "wide")  # which come to rest all at once

    def test_groups_that_are_found_cost_nothing_more(self, compared):
        """Eight groups far apart and two that overlap: only the latter's centroids go on moving."""
        groups = drawn(10, 4, seed=3) * 40
        groups[9] = groups[8] + 1.5
        points = (groups[:, None] + drawn(640, 4).reshape(10, 64, 4)).flatten(0, 1)
        initial = groups.clone()
        initial[9] += 2
        found = kmeans(Points(points), 10, initial=initial)
        assert found.iterations >= 5
        assert sum(compared) < (2 + 0.3 * (found.iterations - 1)) * 640 * 10

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_labels_are_the_nearest_however_centroids_move(self, precision):
        """Some jump, some stay, some swap, one equals another: against all distances in fp64."""
        points, generator = Points(mixture(500, 8, of=9)), torch.Generator().manual_seed(7)
        rows = torch.cat([block for _, block in points]).double()
        centroids, assignment = points.at(torch.arange(30)), Assignment(points, 30, precision)
        for turn in range(40):
            assignment.update(centroids)
            squares = (rows[:, None] - centroids.double()).square().sum(dim=2)
            chosen = squares.gather(1, assignment.labels[:, None])[:, 0]
            loose = {torch.float32: 1e-5, torch.bfloat16: 0.05}[precision]
            assert ((chosen - squares.min(dim=1).values) <= loose * (1 + squares.min(dim=1).values)).all()
            sums = torch.zeros_like(assignment.sums).index_add_(0, assignment.labels, points.integers(rows.float()))
            assert torch.equal(assignment.sums, sums)
            centroids = centroids.clone()
            some = torch.randperm(30, generator=generator)[: 1 + turn % 9]
            centroids[some] += 0.3 * torch.randn(len(some), 8, generator=generator) * (turn % 3)
            centroids[some[:2]] = centroids[some[:2].flip(0)]
            if turn % 4 == 0:
                centroids[some[0]] = centroids[(some[0] + 1) % 30]
        assignment.settle(centroids)
        assert torch.equal(assignment.labels, found_at_once(points, centroids))


def found_at_once(points: Points, centroids: Tensor) -> Tensor:
    """Labels found at once."""
    assignment = Assignment(points, len(centroids))
    assignment.update(centroids)
    return assignment.labels


class TestEmptyClusters:
    @pytest.mark.parametrize("iterations", [1, 2, 100])
    @pytest.mark.parametrize("empty", [1, 3, 9])
    @pytest.mark.parametrize("name", ["normal", "mixture", "one dimension", "wide", "offset"])
    def test_are_put_on_the_farthest_points(self, name, empty, iterations):
        points = DATA[name]
        initial = far_away(points, 10, empty)
        initial[10 - empty :] += points[0]
        labels, centroids, taken = plain(points, initial, iterations)
        found = kmeans(Points(points), 10, iterations, initial=initial)
        assert found.labels.tolist() == labels.tolist()
        assert found.iterations == taken
        atol = 1e-5 + 1e-7 * float(points.abs().max())
        torch.testing.assert_close(found.centroids.double(), torch.from_numpy(centroids), rtol=0, atol=atol)

    def test_of_directions(self):
        points = DATA["mixture"]
        initial = torch.nn.functional.normalize(points[:10])
        initial[4:] = initial[3] * torch.linspace(2, 9, 6)[:, None]  # off the sphere, so farther than what is on it
        labels, centroids, _ = plain(points, initial, 1, spherical=True)
        found = kmeans(Points(points, spherical=True), 10, 1, initial=initial)
        assert found.labels.tolist() == labels.tolist()
        torch.testing.assert_close(found.centroids.double(), torch.from_numpy(centroids), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("block", [1, 2, 64])
    def test_first_of_equals(self, block, monkeypatch):
        """Worked by hand: four points lie nine from 0, the first three of which are taken, in their order."""
        monkeypatch.setattr(points_module, "BLOCK", block)
        points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [1.0, -1.0], [-3.0, 0.0], [0.0, -3.0], [-1.0, 1.0]])
        initial = torch.tensor([[0.0, 0.0], [50.0, 0.0], [60.0, 0.0], [70.0, 0.0]])
        found = kmeans(Points(points), 4, 1, initial=initial)
        assert found.centroids.tolist() == [[0, 0], [3, 0], [0, 3], [-3, 0]]

    def test_order_of_empty_clusters_is_that_of_distance(self):
        """The first empty cluster gets the farthest point; points on their centroid are not used."""
        points = torch.tensor([[0.0], [0.0], [5.0], [-4.0], [-1.0], [0.0]])  # their mean is 0
        initial = torch.tensor([[90.0], [0.0], [80.0], [70.0], [60.0], [100.0]])
        found = kmeans(Points(points), 6, 1, initial=initial)
        assert found.centroids[:, 0].tolist() == [5, 0, -4, -1, 60, 100]

    @pytest.mark.parametrize("copies", [1, 2])
    def test_none_is_left_where_there_are_points_enough(self, copies):
        """100 is alone with the second centroid, which moves on to it: the third would be of more use elsewhere."""
        points = torch.tensor([[0.0], [0.5], [1.0], [-0.5], *[[100.0]] * copies])
        found = kmeans(Points(points), 3, initial=torch.tensor([[0.0], [90.0], [1000.0]]))
        assert (found.sizes > 0).all()


class TestFewPoints:
    @pytest.mark.parametrize("spherical", [False, True])
    def test_as_many_clusters_as_points(self, spherical):
        found = kmeans(Points(drawn(40, 5), spherical=spherical), 40)
        assert found.sizes.tolist() == [1] * 40
        assert found.objective < 1e-12
        assert sorted(found.labels.tolist()) == list(range(40))

    @pytest.mark.parametrize("clusters", [0, 41, 1000])
    def test_more_clusters_than_points_are_refused(self, clusters):
        with pytest.raises(UserError, match=rf"{clusters:,} clusters of 40 points"):
            kmeans(Points(drawn(40, 5)), clusters)

    def test_no_points_are_refused(self):
        with pytest.raises(UserError, match="of 0 points"):
            kmeans(Points(torch.zeros(0, 3)), 1)

    @pytest.mark.parametrize("spherical", [False, True])
    def test_one_point(self, spherical):
        found = kmeans(Points(torch.tensor([[3.0, -4.0]]), spherical=spherical), 1)
        expected = [[0.6, -0.8]] if spherical else [[3.0, -4.0]]
        torch.testing.assert_close(found.centroids, torch.tensor(expected), rtol=1e-6, atol=0)
        assert (found.labels.tolist(), found.sizes.tolist(), found.objective) == ([0], [1], 0)

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e5])
    @pytest.mark.parametrize("spherical", [False, True])
    def test_all_identical(self, value, spherical):
        points = torch.full((200, 3), value)
        found = kmeans(Points(points, spherical=spherical), 7, iterations=10)
        assert found.centroids.isfinite().all()
        assert sorted(found.sizes.tolist()) == [0] * 6 + [200]
        assert found.objective <= 1e-12

    @pytest.mark.parametrize("spherical", [False, True])
    def test_fewer_distinct_points_than_clusters(self, spherical):
        distinct = drawn(6, 4)
        points = distinct.repeat(30, 1)
        found = kmeans(Points(points, spherical=spherical), 10)
        assert found.centroids.isfinite().all()
        assert found.objective < 1e-12
        assert int((found.sizes == 30).sum()) == 6
        assert torch.equal(found.labels, found.labels[:6].repeat(30))
        assert len(set(found.labels[:6].tolist())) == 6

    def test_zeros_among_directions(self):
        points = drawn(100, 4)
        points[::7] = 0
        found = kmeans(Points(points, spherical=True), 5)
        assert found.centroids.isfinite().all()
        torch.testing.assert_close(found.distances[::7], torch.ones(15), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 130, 199])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.float32])
def test_values_that_are_not_finite_are_refused(kind, spherical, place, value):
    points = drawn(200, 5)
    points[place, 3] = value
    rows = points.to(kind) if isinstance(kind, torch.dtype) else points.numpy().astype(kind)
    with pytest.raises(UserError, match="NaN or infinite"):
        Points(rows, spherical=spherical)


class TestMemoryMaps:
    def mapped(self, folder: Path, mode: str) -> np.ndarray:
        np.save(folder / "points.npy", mixture(500, 8, of=9).half().numpy())
        return np.load(folder / "points.npy", mmap_mode=mode)

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("spherical", [False, True])
    def test_half_precision_on_disk_equals_fp32_in_memory(self, spherical, precision, tmp_path):
        rows = self.mapped(tmp_path, "r+")
        assert rows.dtype == np.float16
        initial = far_away(torch.from_numpy(rows[:20].astype(np.float32)), 20, 3) if not spherical else None
        found, expected = (
            kmeans(Points(points, spherical=spherical), 20, 6, 0, precision, initial)
            for points in (rows, torch.from_numpy(rows.astype(np.float32)))
        )
        assert_same(found, expected)

    def test_maps_that_may_only_be_read(self, tmp_path):
        """torch warns of what it may not write, which here is an error."""
        rows = self.mapped(tmp_path, "r")
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)  # not only the first time in this process
        try:
            found = kmeans(Points(rows), 3)
        finally:
            torch.set_warn_always(always)
        assert_same(found, kmeans(Points(rows.copy()), 3))

    @pytest.mark.parametrize("spherical", [False, True])
    @pytest.mark.parametrize("initial", [None, 3])
    def test_rows_too_large_to_be_kept_are_read_again_and_again(self, spherical, initial, tmp_path, monkeypatch):
        """Also where an empty cluster asks for single points."""
        rows = self.mapped(tmp_path, "r")
        if initial:
            initial = far_away(torch.from_numpy(rows[:20].astype(np.float32)), 20, initial)
        kept = kmeans(Points(rows, spherical=spherical), 20, 6, initial=initial)
        monkeypatch.setattr(points_module, "HELD", 0)
        points = Points(rows, spherical=spherical)
        assert not points.held
        assert_same(kmeans(points, 20, 6, initial=initial), kept)


class TestProgress:
    CASES = {  # noqa: RUF012
        "euclidean": ({"iterations": 60}, False),
        "spherical": ({"iterations": 60}, True),
        "bf16": ({"iterations": 60, "precision": torch.bfloat16}, False),
        "limited": ({"iterations": 6}, False),
        "empty clusters": ({"iterations": 60, "initial": far_away(DATA["normal"], 12, 7)}, False),
    }

    def case(self, name: str) -> tuple[Points, dict]:
        settings, spherical = self.CASES[name]
        return Points(DATA["normal"], spherical=spherical), {"clusters": 12, "seed": 4, **settings}

    @pytest.mark.parametrize("name", CASES)
    def test_goes_on_from_any_iteration(self, name, tmp_path):
        points, settings = self.case(name)
        whole = kmeans(points, **settings)
        last_change = whole.iterations - 1 if whole.iterations < settings["iterations"] else whole.iterations
        assert last_change >= 5
        for stop in {1, 2, last_change // 2, last_change - 1}:
            file = tmp_path / f"{stop}.safetensors"
            kmeans(points, **{**settings, "iterations": stop}, progress=file)
            assert_same(kmeans(points, **settings, progress=file), whole)

    @pytest.mark.parametrize("name", CASES)
    def test_goes_on_after_a_crash(self, name, tmp_path, monkeypatch):
        points, settings = self.case(name)
        whole = kmeans(points, **settings)
        file, assign, calls, taken = tmp_path / "progress.safetensors", Assignment.update, [], []

        def failing(*arguments):
            calls.append(1)
            if len(calls) % 5 == 0:
                raise KeyboardInterrupt
            taken.append(1)
            return assign(*arguments)

        monkeypatch.setattr(Assignment, "update", failing)
        for _ in range(100):
            try:
                found = kmeans(points, **settings, progress=file)
            except KeyboardInterrupt:
                continue
            break
        assert len(calls) > len(taken) >= whole.iterations  # it did crash, and nothing was done many times over
        assert len(taken) <= whole.iterations + 3 + len(calls) // 5  # each life begins with the iteration before
        assert_same(found._replace(iterations=whole.iterations), whole)
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_goes_on_where_clusters_stay_empty(self, precision, tmp_path):
        """Groups of equal points, fewer than clusters: a start does not look for uses of the empty ones once more."""
        points = Points(tight(400, 8, 6, 1e-4))
        whole = kmeans(points, 20, 60, 2, precision)
        for stop in {1, whole.iterations // 2, whole.iterations - 1} - {0}:
            file = tmp_path / str(stop)
            kmeans(points, 20, stop, 2, precision, progress=file)
            assert_same(kmeans(points, 20, 60, 2, precision, progress=file), whole)

    def test_seeds_are_not_sought_again(self, tmp_path, monkeypatch):
        points, settings = self.case("euclidean")
        kmeans(points, **{**settings, "iterations": 2}, progress=tmp_path / "file")
        monkeypatch.setattr(kmeans_module, "seeds", None)
        assert kmeans(points, **settings, progress=tmp_path / "file").iterations > 2

    def test_a_file_half_written_is_not_read(self, tmp_path):
        points, settings = self.case("euclidean")
        (tmp_path / ".file.partial").write_bytes(b"half")
        assert_same(kmeans(points, **settings, progress=tmp_path / "file"), kmeans(points, **settings))

    @pytest.mark.parametrize("name", ["euclidean", "spherical", "bf16", "empty clusters"])
    def test_what_is_done_is_not_done_again(self, name, tmp_path):
        points, settings = self.case(name)
        whole = kmeans(points, **settings, progress=tmp_path / "file")
        assert_same(kmeans(points, **settings, progress=tmp_path / "file"), whole)


class TestSeeds:
    def test_are_points_and_follow_the_seed(self):
        points = DATA["offset"]
        held = Points(points)
        one, again, other = (seeds(held, 30, seed) for seed in (5, 5, 6))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        apart = torch.cdist(one.double() + held.mean, points.double())
        assert apart.min(dim=1).values.max() < 1e-3
        assert len(set(apart.argmin(dim=1).tolist())) == 30

    @pytest.mark.parametrize("spherical", [False, True])
    def test_are_drawn_by_squared_distance(self, spherical):
        """Chi-square of 2,000 draws of three centroids of five points, in order, against D² probabilities."""
        from scipy.stats import chisquare

        points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0], [4.0, 3.0], [0.5, -3.0]])
        held = Points(points, spherical=spherical)
        rows = torch.nn.functional.normalize(points) if spherical else points
        squares = torch.cdist(rows.double(), rows.double()).square().numpy()
        expected, observed = np.zeros((5, 5, 5)), np.zeros((5, 5, 5))
        for first in range(5):
            for second in range(5):
                then = np.minimum(squares[first], squares[second])
                if first != second:
                    expected[first, second] = squares[first, second] / squares[first].sum() * then / then.sum() / 5
        for seed in range(2000):
            chosen = seeds(held, 3, seed) + held.mean.float()
            observed[tuple(torch.cdist(chosen, rows).argmin(dim=1).tolist())] += 1
        assert observed[expected == 0].sum() == 0
        assert expected.sum() == pytest.approx(1)
        assert chisquare(observed[expected > 0], 2000 * expected[expected > 0]).pvalue > 1e-3

    def test_groups_far_apart_all_get_one(self):
        points = drawn(400, 3) + 1e4 * drawn(20, 3, seed=8).repeat(20, 1)
        for seed in range(10):
            found = kmeans(Points(points), 20, 0, seed)
            assert found.sizes.tolist() == [20] * 20


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("points", [0, 1, 63, 64, 65, 640, 1000])
def test_shares_are_whole_blocks(points, processes):
    ranges = [share(points, rank, processes) for rank in range(processes)]
    assert [place for one in ranges for place in one] == list(range(points))
    assert all(one.start % 64 == 0 for one in ranges if one)
    blocks = [math.ceil(len(one) / 64) for one in ranges]
    assert max(blocks) - min(blocks) <= 1


def corners() -> Tensor:
    """Of a cube, all as far from 0, which is their mean, and most of them several times."""
    signs = drawn(ROWS // 2, 8).sign()
    return torch.cat([signs, -signs])[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]


def tiny_and_huge(seed: int) -> Tensor:
    """Values from 1e-4 to 1e3; their mean is 0."""
    half = 1e3 * drawn(320, 32, seed)
    half[::2] *= 1e-6
    return torch.cat([half, -half])


def all_but_cancelling(seed: int) -> Tensor:
    """Values whose sum is a small part of theirs, so that the order of an inexact one shows."""
    return tiny_and_huge(seed) + 1e-4 * drawn(640, 32, seed + 1)


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
    "copies": {"data": drawn(ROWS // 7, 3).repeat(7, 1), "initial": far_away(drawn(ROWS // 7, 3), 15, 9)},
    "few points": {"data": drawn(70, 8)},  # two blocks: of three processes one has none
    "going on": {"progress": True},
}
UNFIT = {
    "a NaN in the first process": (3, math.nan),
    "a NaN in the last": (ROWS - 1, math.nan),  # gloo's maximum forgets it
    "an infinity in the last": (ROWS - 1, math.inf),
}


def settings_of(case: str) -> tuple[Tensor, bool, dict]:
    settings = {"iterations": 40, "seed": 0, **COMMON[case]}
    data, spherical = settings.pop("data", mixture(ROWS, 8, of=9)), settings.pop("spherical", False)
    return data, spherical, settings


def held(data: Tensor, rank: int, processes: int, spherical: bool = False) -> Points:
    rows = share(len(data), rank, processes)
    return Points(data[rows.start : rows.stop], spherical=spherical)


def work(rank: int, processes: int, folder: Path) -> dict:
    points_module.BLOCK = 64
    found = {}
    for case in COMMON:
        data, spherical, settings = settings_of(case)
        if settings.pop("progress", False):
            settings["progress"] = folder / f"progress-{processes}"
        found[case] = tuple(kmeans(held(data, rank, processes, spherical), 15, **settings))
    for case, (place, value) in UNFIT.items():
        data = mixture(ROWS, 8, of=9)
        data[place, 2] = value
        try:
            held(data, rank, processes)
            found[case] = "not seen"
        except UserError:
            found[case] = "refused"
    initial = torch.tensor([[0.0], [1e4]]).expand(2, 32)
    found["objectives"] = [
        kmeans(held(tiny_and_huge(seed), rank, processes), 2, 0, initial=initial).objective for seed in range(10)
    ]
    found["means"] = [held(all_but_cancelling(seed), rank, processes).mean for seed in range(5)]
    found["centroids"] = [
        kmeans(held(all_but_cancelling(seed), rank, processes), 5, 1, initial=50 * drawn(5, 32)).centroids
        for seed in range(5)
    ]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list]:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points_module, "BLOCK", 64)
        data, spherical, settings = settings_of("going on")
        kmeans(Points(data, spherical=spherical), 15, 4, settings["seed"], progress=folder / "progress-1")
    for processes in (2, 3):
        shutil.copy(folder / "progress-1", folder / f"progress-{processes}")
    return worlds.run(functools.partial(work, folder=folder), WORLDS, folder)


class TestProcesses:
    @pytest.mark.parametrize("case", COMMON)
    @pytest.mark.parametrize("processes", [2, 3])
    def test_result_is_the_same_to_the_last_bit(self, processes, case, found):
        alone = Clustering(*found[1][0][case])
        together = [Clustering(*of_rank[case]) for of_rank in found[processes]]
        assert [len(part.labels) for part in together] == [
            len(share(len(settings_of(case)[0]), rank, processes)) for rank in range(processes)
        ]
        for part in together:
            joined = part._replace(
                labels=torch.cat([other.labels for other in together]),
                distances=torch.cat([other.distances for other in together]),
            )
            assert_same(joined, alone)

    @pytest.mark.parametrize("case", COMMON)
    def test_result_is_right(self, case, found):
        """One of the processes' worlds, so that all are."""
        data, spherical, settings = settings_of(case)
        alone = Clustering(*found[1][0][case])
        assert_describes(alone, data, spherical)
        if "initial" in settings:
            labels, centroids, taken = plain(data, settings["initial"], settings["iterations"])
            assert (alone.labels.tolist(), alone.iterations) == (labels.tolist(), taken)
            torch.testing.assert_close(alone.centroids.double(), torch.from_numpy(centroids), rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("name", ["means", "centroids"])
    def test_sums_are_exact(self, name, found):
        """Also of values that all but cancel: whatever is lost on the way would show."""
        alone = found[1][0][name]
        for other in (*found[2], *found[3]):
            assert all(torch.equal(one, two) for one, two in zip(alone, other[name], strict=True))
        if name == "means":
            for seed, mean in enumerate(alone):
                expected = [math.fsum(column) / 640 for column in all_but_cancelling(seed).T.tolist()]
                torch.testing.assert_close(mean, torch.tensor(expected).double(), rtol=0, atol=1e-9)
                assert mean.abs().max() < 1e-4

    @pytest.mark.parametrize("processes", WORLDS)
    def test_goes_on_with_another_number_of_processes(self, processes, found):
        whole, gone_on = (Clustering(*found[processes][0][case]) for case in ("euclidean", "going on"))
        assert whole.iterations > 5
        assert_same(gone_on, whole)

    @pytest.mark.parametrize("case", UNFIT)
    @pytest.mark.parametrize("processes", WORLDS)
    def test_values_that_are_not_finite_are_refused_by_all(self, processes, case, found):
        assert [of_rank[case] for of_rank in found[processes]] == ["refused"] * processes

    def test_objective_is_exact_where_squares_are_large(self, found):
        assert found[1][0]["objectives"] == found[2][0]["objectives"] == found[3][0]["objectives"]
