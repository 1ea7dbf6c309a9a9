"""Rebalancing against slow definitions, examples worked by hand, and what the weights promise."""

import itertools

import numpy as np
import pytest

from dino.curation.rebalance import (
    by_clusters,
    by_samples,
    flat,
    hierarchical,
    members,
    subset,
    water_filling,
    whole_numbers,
)


def slow_filling(capacities: np.ndarray, budget: float) -> np.ndarray:
    """The water level by bisection."""
    low, high = 0.0, float(np.max(capacities, initial=0))
    for _ in range(200):
        level = (low + high) / 2
        if np.minimum(capacities, level).sum() < budget:
            low = level
        else:
            high = level
    return np.minimum(capacities, high)


def slow_weights(levels: list[np.ndarray], budget: float, repeats: float) -> np.ndarray:
    """From each cluster of the top level down to the images, whole branches at a time."""
    images = np.arange(len(levels[0]))
    of_image = [levels[0]]
    for above in levels[1:]:
        of_image.append(np.where(of_image[-1] >= 0, above[of_image[-1]], -1))
    weights = np.zeros(len(images))

    def pour(part: np.ndarray, depth: int, share: float) -> None:
        if depth < 0:
            weights[part] = share / len(part)
            return
        branches = [part[of_image[depth][part] == cluster] for cluster in sorted(set(of_image[depth][part].tolist()))]
        shares = slow_filling(np.array([len(branch) * repeats for branch in branches]), share)
        for branch, own in zip(branches, shares, strict=True):
            pour(branch, depth - 1, own)

    pour(images[levels[0] >= 0], len(levels) - 1, budget)
    return weights


def tree(seed: int, images: int = 200, clusters: tuple[int, ...] = (30, 8, 3)) -> list[np.ndarray]:
    """Clusters of unequal size, some of them empty, and images that are in none."""
    generator = np.random.default_rng(seed)
    lowest = (generator.random(images) ** 3 * clusters[0]).astype(np.int64)
    lowest[generator.random(images) < 0.1] = -1
    return [lowest, *(generator.integers(above, size=below) for below, above in itertools.pairwise(clusters))]


class TestWaterFilling:
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999, 1.0, 1.5])
    @pytest.mark.parametrize("seed", range(6))
    def test_equals_bisection(self, seed, share):
        generator = np.random.default_rng(seed)
        capacities = np.round(generator.exponential(50, size=generator.integers(1, 30)) * (generator.random() < 0.8))
        capacities[::4] = capacities[0]
        budget = share * capacities.sum()
        found = water_filling(capacities, budget)
        np.testing.assert_allclose(found, slow_filling(capacities, budget), rtol=0, atol=1e-9)
        assert found.sum() == pytest.approx(min(budget, capacities.sum()), abs=1e-9)
        assert (found <= capacities).all()

    @pytest.mark.parametrize(
        ("capacities", "budget", "expected"),
        [
            ([10, 10, 10], 6, [2, 2, 2]),
            ([1, 10, 10], 9, [1, 4, 4]),
            ([10, 0, 3, 1], 9, [5, 0, 3, 1]),
            ([5, 2], 7, [5, 2]),
            ([5, 2], 100, [5, 2]),
            ([4], 1.5, [1.5]),
            ([4, 1], 0, [0, 0]),
            ([0, 0], 3, [0, 0]),
            ([], 3, []),
        ],
    )
    def test_worked_by_hand(self, capacities, budget, expected):
        given = np.array(capacities, dtype=float)
        found = water_filling(given, budget)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        found += 1
        assert given.tolist() == capacities  # what was given is not what comes back

    def test_budget_of_all_but_a_rounding(self):
        """1.3 + 1.1 + 1.2 is one bit more than 3.6 in this order: 0.1 would be lost."""
        assert water_filling(np.array([1.3, 1.1, 1.2]), 3.6).sum() == pytest.approx(3.6, abs=1e-9)


class TestWholeNumbers:
    @pytest.mark.parametrize("seed", range(20))
    def test_sum_and_neighbouring_integers(self, seed):
        generator = np.random.default_rng(seed)
        capacities = generator.integers(0, 6, size=50)
        shares = water_filling(capacities, generator.uniform(0, 1.1) * capacities.sum())
        shares[::2] = np.minimum(shares[::2] * generator.random(25), capacities[::2])
        found = whole_numbers(shares, capacities, np.random.default_rng(1))
        assert found.dtype == np.int64
        assert found.sum() == round(shares.sum())
        assert (found <= capacities).all()
        assert ((found == np.floor(shares)) | (found == np.ceil(shares))).all()
        up, down = (shares - np.floor(shares))[found > shares], (shares - np.floor(shares))[found < shares]
        assert up.min(initial=1) >= down.max(initial=0)  # the largest remainders are rounded up

    @pytest.mark.parametrize(
        ("shares", "capacities", "expected"),
        [
            ([1.5, 1.3, 0.2], [2, 2, 2], [2, 1, 0]),
            ([2.999999999999, 1.000000000001], [3, 1], [3, 1]),
            ([0.6, 0.6, 0.8], [1, 1, 1], None),
            ([3.0, 0.0], [3, 0], [3, 0]),
            ([2.5, 0.3], [2, 1], [2, 1]),  # the greater remainder has no room
        ],
    )
    def test_worked_by_hand(self, shares, capacities, expected):
        found = whole_numbers(np.array(shares), np.array(capacities), np.random.default_rng(0)).tolist()
        assert found in ([expected] if expected else [[1, 0, 1], [0, 1, 1]])

    def test_of_equals_each_is_rounded_up_as_often(self):
        """And the order is the seed's: 3 of 10 in 2,000 draws, give or take five standard deviations."""
        shares, times = np.full(10, 0.3), np.zeros(10)
        for seed in range(2000):
            times += whole_numbers(shares, np.ones(10), np.random.default_rng(seed))
        assert times.sum() == 6000
        assert np.abs(times - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)
        assert times.std() > 1


class TestFlat:
    LABELS = np.array([0, 0, 0, 0, 2, 2, -1, 3, 0, -1])  # of clusters 0 to 4: five, none, two, one, none

    @pytest.mark.parametrize(
        ("smoothing", "shares"),
        [
            (0.0, {0: 1 / 3, 2: 1 / 3, 3: 1 / 3}),
            (1.0, {0: 5 / 8, 2: 2 / 8, 3: 1 / 8}),
            (0.5, {0: 5**0.5, 2: 2**0.5, 3: 1.0}),
        ],
    )
    def test_shares_worked_by_hand(self, smoothing, shares):
        found = flat(self.LABELS, 5, smoothing)
        assert found.shape == (10,)
        assert found.mean() == pytest.approx(1)
        assert (found[self.LABELS == -1] == 0).all()
        for cluster, share in shares.items():
            own = found[np.equal(self.LABELS, cluster)]
            assert own.sum() == pytest.approx(10 * share / sum(shares.values()))
            assert (own == own[0]).all()

    @pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
    def test_all_in_one_cluster(self, smoothing):
        np.testing.assert_allclose(flat(np.zeros(7, dtype=np.int64), 1, smoothing), 1)

    def test_nobody_in_any(self):
        assert flat(np.full(4, -1), 3).tolist() == [0, 0, 0, 0]


class TestHierarchical:
    # Six images in cluster 0, two in 1, one each in 2 and 3; above them 0 and 1 lie together, and so do 2 and 3.
    LEVELS = (np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 3, -1]), np.array([0, 0, 1, 1]))

    @pytest.mark.parametrize(
        ("budget", "repeats", "expected"),
        [
            # 3 each above, but the second can take only 2, so 4 and 2; then 2 and 2, 1 and 1.
            (6, 1, [1 / 3] * 6 + [1, 1] + [1, 1] + [0]),
            # 3 each; then 1.5 each.
            (6, 2, [1.5 / 6] * 6 + [0.75, 0.75] + [1.5, 1.5] + [0]),
            # More than there is.
            (100, 2, [2] * 10 + [0]),
            # 12 and 4, all of it; 8 and 4, all of it.
            (16, 2, [8 / 6] * 6 + [2, 2] + [2, 2] + [0]),
        ],
    )
    def test_worked_by_hand(self, budget, repeats, expected):
        np.testing.assert_allclose(hierarchical(list(self.LEVELS), budget, repeats), expected, rtol=1e-12)

    @pytest.mark.parametrize("repeats", [0.5, 1.0, 10.0])
    @pytest.mark.parametrize("budget", [1, 20, 100, 170, 1000])
    @pytest.mark.parametrize("clusters", [(30,), (30, 8), (30, 8, 3), (40, 20, 10, 1)])
    def test_equals_the_slow_definition(self, clusters, budget, repeats):
        for seed in range(3):
            levels = tree(seed, clusters=clusters)
            inside = levels[0] >= 0
            found = hierarchical(levels, budget, repeats)
            np.testing.assert_allclose(found, slow_weights(levels, budget, repeats), rtol=0, atol=1e-9)
            assert found.sum() == pytest.approx(min(budget, inside.sum() * repeats))
            assert found.max() <= repeats * (1 + 1e-12)
            assert (found[~inside] == 0).all()
            assert (found[inside] > 0).all()
            for cluster in range(clusters[0]):
                assert len(set(found[levels[0] == cluster].tolist())) <= 1

    def test_what_is_together_above_shares(self):
        """Two rare clusters of one kind get together what a third gets alone."""
        found = hierarchical([np.repeat([0, 1, 2], 10), np.array([0, 0, 1])], 10)
        np.testing.assert_allclose([found[:10].sum(), found[10:20].sum(), found[20:].sum()], [2.5, 2.5, 5])

    def test_adds_up_where_products_are_rounded(self):
        levels = [np.repeat(np.arange(6), [5, 2, 2, 1, 1, 40]), np.array([0, 0, 0, 0, 1, 2])]
        assert hierarchical(levels, 21.0, 0.7).sum() == pytest.approx(21)


def weights_of(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    levels = tree(seed)
    if kind == "flat":
        return flat(levels[0], 30, 0.5), levels[0]
    repeats, budget = {"less than one each": (1.0, 70.4), "several": (4.0, 400), "all": (3.0, 1e6)}[kind]
    return hierarchical(levels, budget, repeats), levels[0]


class TestFlatWithinLimits:
    @pytest.mark.parametrize("repeats", [1.5, 4.0, 50.0])
    @pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("seed", range(3))
    def test_what_small_clusters_cannot_take_the_others_share(self, seed, smoothing, repeats):
        labels = tree(seed)[0]
        sizes = np.bincount(labels[labels >= 0], minlength=30).astype(float)
        weights = flat(labels, 30, smoothing, 300.0, repeats)
        assert weights.sum() == pytest.approx(min(300.0, repeats * sizes.sum()))
        assert weights.max() <= repeats + 1e-9
        # Bisection: the scale at which limited shares add up.
        low, high = 0.0, 300.0 * repeats
        for _ in range(200):
            scale = (low + high) / 2
            total = np.minimum(sizes * repeats, scale * sizes**smoothing * (sizes > 0)).sum()
            low, high = (scale, high) if total < 300 else (low, scale)
        wanted = np.minimum(sizes * repeats, high * sizes**smoothing * (sizes > 0))
        found = np.bincount(labels[labels >= 0], weights=weights[labels >= 0], minlength=30)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


class TestSubset:
    @pytest.mark.parametrize("kind", ["flat", "less than one each", "several", "all"])
    @pytest.mark.parametrize("seed", range(4))
    def test_adds_up_and_is_near_to_the_weights(self, seed, kind):
        weights, labels = weights_of(kind, seed)
        draws = subset(weights, labels, seed)
        assert draws.dtype == np.int64
        assert draws.sum() == round(weights.sum())
        assert (draws >= 0).all()
        assert (draws <= np.ceil(weights - 1e-9)).all()
        assert (draws[labels == -1] == 0).all()
        for cluster in range(30):
            own = draws[labels == cluster]
            assert abs(own.sum() - weights[labels == cluster].sum()) < 1
            assert np.ptp(own) <= 1 if len(own) else True

    def test_worked_by_hand(self):
        """2.4 + 1.6: the rest goes to the second cluster."""
        labels = np.array([0, 0, 0, 1, 0, 1])
        weights = np.array([0.6, 0.6, 0.6, 0.8, 0.6, 0.8])
        draws = subset(weights, labels, 0)
        assert (draws[labels == 0].sum(), draws[labels == 1].tolist()) == (2, [1, 1])
        assert sorted(subset(2 * weights, labels, 0)[labels == 0].tolist()) == [1, 1, 1, 2]

    @pytest.mark.parametrize("weight", [0, 1, 3])
    def test_whole_weights_are_as_they_are(self, weight):
        labels = tree(0)[0]
        weights = np.where(labels >= 0, float(weight), 0.0)
        assert subset(weights, labels, 0).tolist() == weights.tolist()

    def test_follows_the_seed(self):
        weights, labels = weights_of("less than one each", 0)
        one, again, other = (subset(weights, labels, seed) for seed in (1, 1, 2))
        assert one.tolist() == again.tolist() != other.tolist()

    def test_at_random_each_is_drawn_as_often_as_it_weighs(self):
        """The mean of 1,000 draws, give or take five standard errors."""
        weights, labels = weights_of("several", 0)
        mean = np.mean([subset(weights, labels, seed) for seed in range(1000)], axis=0)
        totals = [abs(mean[labels == cluster].sum() - weights[labels == cluster].sum()) for cluster in range(30)]
        assert max(totals) < 1  # the clusters' rests are not drawn, but go to the largest
        for cluster in set(labels[labels >= 0].tolist()):
            own = mean[labels == cluster]
            assert np.abs(own - own.mean()).max() < 5 * 0.5 / np.sqrt(1000)

    def test_nobody_in_any_cluster(self):
        assert subset(np.zeros(3), np.full(3, -1), 0).tolist() == [0, 0, 0]


class TestRetrieval:
    @pytest.mark.parametrize("seed", range(5))
    def test_by_samples(self, seed):
        places = np.random.default_rng(seed).integers(-1, 40, size=(6, 4))
        found = by_samples(places, 40)
        assert found.dtype == bool
        assert found.tolist() == [any(place in row for row in places.tolist()) for place in range(40)]

    def test_by_samples_of_nothing(self):
        assert by_samples(np.full((3, 2), -1), 4).tolist() == [False] * 4
        assert by_samples(np.empty((0, 2), dtype=np.int64), 4).tolist() == [False] * 4

    @pytest.mark.parametrize("most", [1, 3, 1000])
    @pytest.mark.parametrize("least", [1, 2, 5, 100])
    @pytest.mark.parametrize("seed", range(3))
    def test_by_clusters(self, seed, least, most):
        labels = tree(seed)[0]
        seeds = np.random.default_rng(seed).integers(30, size=40)
        found = by_clusters(labels, seeds, least, most, 0)
        assert found.dtype == bool
        assert found.shape == labels.shape
        assert not found[labels == -1].any()
        for cluster in range(30):
            wanted = (seeds == cluster).sum() >= least
            assert found[labels == cluster].sum() == (min(most, (labels == cluster).sum()) if wanted else 0)

    def test_by_clusters_at_random(self):
        """Three of ten, as often each in 2,000 draws, give or take five standard deviations."""
        labels = np.array([0] * 10 + [1] * 3)
        times = sum(by_clusters(labels, np.array([0, 0]), 2, 3, seed).astype(int) for seed in range(2000))
        assert (times[10:] == 0).all()
        assert np.abs(times[:10] - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)
        one, again, other = (by_clusters(labels, np.array([0, 0]), 2, 3, seed).tolist() for seed in (0, 0, 1))
        assert one == again != other

    def test_seeds_in_a_cluster_of_no_image(self):
        """Clusters after the last that has images in it."""
        assert by_clusters(np.array([0, -1, 1]), np.array([5, 1]), 1, 9, 0).tolist() == [False, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_members(seed):
    labels = tree(seed)[0]
    found = members(labels, 35)
    assert [one.tolist() for one in found] == [
        [place for place, label in enumerate(labels.tolist()) if label == cluster] for cluster in range(35)
    ]
    assert max(len(one) for one in found) > 5
