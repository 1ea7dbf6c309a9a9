"""Indicators of health against plain definitions and other libraries."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.neighbors import KNeighborsClassifier

from dino.monitor.indicators import (
    feature_deviation,
    neighbour_agreement,
    rank_me,
    target_statistics,
    weighted_knn,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestRank:
    @pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
    def test_is_the_entropy_of_the_singular_values(self, shape):
        features = normal(*shape) @ torch.diag(torch.linspace(0.1, 3, shape[1]))
        values = np.linalg.svd(features.double().numpy(), compute_uv=False)
        assert rank_me(features).item() == pytest.approx(np.exp(entropy(values)), rel=1e-4)

    def test_known_cases(self):
        assert rank_me(torch.ones(30, 5)).item() == pytest.approx(1, abs=0.02)
        assert rank_me(torch.eye(6)).item() == pytest.approx(6)
        assert rank_me(torch.eye(12)[:4]).item() == pytest.approx(4)
        assert rank_me(torch.zeros(4, 3)).isfinite()

    @pytest.mark.parametrize("width", [32, 384])
    def test_tokens_that_are_all_alike_are_far_below_every_healthy_range(self, width):
        """Rounding alone must not make a collapse of a wide network look like features."""
        row = normal(1, width)
        for spread in (0, 1e-6, 1e-3):
            assert rank_me(row + spread * normal(2048, width, seed=1)) < 2

    def test_neither_scale_nor_rotation_counts(self):
        features, rotation = normal(60, 12), torch.linalg.qr(normal(12, 12, seed=1)).Q
        assert rank_me(1000 * features @ rotation).item() == pytest.approx(rank_me(features).item(), rel=1e-4)


class TestSpread:
    def test_even_directions_give_one_and_equal_ones_zero(self):
        assert feature_deviation(normal(4000, 64)).item() == pytest.approx(1, abs=0.02)
        assert feature_deviation(normal(1, 64).expand(100, -1)).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("width", [8, 64, 384])
    def test_by_hand(self, width):
        """Half of all tokens point one way and half the other: one dimension deviates by 1 and the others by 0."""
        features = torch.eye(width)[:1] * torch.tensor([1.0, -1.0]).repeat(5000)[:, None]
        assert feature_deviation(features).item() == pytest.approx(width**-0.5, rel=1e-3)
        assert feature_deviation(normal(5000, width)).item() == pytest.approx(1, abs=0.02)

    def test_length_does_not_count(self):
        features = normal(100, 16)
        longer = features * torch.linspace(0.1, 10, 100)[:, None]
        assert feature_deviation(longer).item() == pytest.approx(feature_deviation(features).item(), rel=1e-5)


class TestTargets:
    def test_against_scipy(self):
        targets = torch.softmax(3 * normal(40, 12), dim=1)
        mean = targets.mean(dim=0)
        found = target_statistics(targets, mean)
        plain = targets.double().numpy()
        assert found.entropy.item() == pytest.approx(np.mean([entropy(row) for row in plain]), rel=1e-5)
        divergences = [entropy(row, plain.mean(axis=0)) for row in plain]
        assert found.kl_to_centre.item() == pytest.approx(np.mean(divergences), rel=1e-4)

    def test_the_mean_may_be_over_more_samples(self):
        """As over those of all processes: some of their prototypes are used nowhere here."""
        targets = torch.softmax(3 * normal(40, 12), dim=1)
        targets[:, :3] = 0
        mean = torch.softmax(normal(1, 12, seed=1), dim=1)[0]
        found = target_statistics(targets / targets.sum(dim=1, keepdim=True), mean)
        plain = targets.double().numpy()  # scipy normalises
        assert found.kl_to_centre.item() == pytest.approx(np.mean([entropy(row, mean) for row in plain]), rel=1e-5)

    def test_the_two_ways_to_collapse_and_the_opposite(self):
        uniform, constant, certain = torch.full((8, 4), 0.25), torch.eye(4)[:1].expand(8, -1), torch.eye(4).repeat(2, 1)
        for targets, wanted in ((uniform, (np.log(4), 0)), (constant, (0, 0)), (certain, (0, np.log(4)))):
            found = target_statistics(targets, targets.mean(dim=0))
            assert tuple(map(float, found)) == pytest.approx(wanted, abs=1e-6)


class TestNeighbours:
    def test_votes_are_scikit_learns(self):
        keys, queries = normal(200, 6), normal(50, 6, seed=1)
        labels = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(2))
        everyone = torch.ones(50, 200, dtype=torch.bool)
        peer = KNeighborsClassifier(9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        wanted = peer.fit(keys.numpy(), labels.numpy()).predict(queries.numpy())
        found = weighted_knn(queries, keys, labels, 5, everyone, k=9)
        assert found.tolist() == wanted.tolist()
        assert len(set(wanted)) == 5

    def test_near_ones_count_more_than_many(self):
        """Two of one class that are near outvote seven of another that are among the nine nearest."""
        angles = torch.tensor([5.0, -5.0, *(60.0 + 2 * step for step in range(7)), 170.0]).deg2rad()
        keys, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, *[1] * 7, 2])
        allowed = torch.ones(1, 10, dtype=torch.bool)
        assert weighted_knn(torch.tensor([[1.0, 0.0]]), keys, labels, 3, allowed, k=9).tolist() == [0]
        assert weighted_knn(torch.tensor([[1.0, 0.0]]), keys, labels, 3, allowed, k=9, temperature=100).tolist() == [1]

    def test_votes_are_scikit_learns_among_those_that_are_allowed(self):
        keys, queries = normal(80, 5), normal(30, 5, seed=1)
        labels = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(2))
        allowed = torch.rand(30, 80, generator=torch.Generator().manual_seed(3)) < 0.5
        allowed[0] = torch.arange(80) < 4  # fewer than k
        wanted = []
        for query, may in zip(queries, allowed, strict=True):
            count = min(9, int(may.sum()))
            peer = KNeighborsClassifier(count, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
            wanted += peer.fit(keys[may].numpy(), labels[may].numpy()).predict(query[None].numpy()).tolist()
        assert weighted_knn(queries, keys, labels, 4, allowed, k=9).tolist() == wanted
        assert weighted_knn(queries, keys, labels, 4, torch.ones_like(allowed), k=9).tolist() != wanted

    def test_who_may_not_vote_does_not(self):
        keys, labels = torch.eye(3), torch.tensor([0, 1, 2])
        allowed = ~torch.eye(3, dtype=torch.bool)
        found = weighted_knn(keys + 0.1 * keys.roll(1, dims=1), keys, labels, 3, allowed, k=3)
        assert found.tolist() == [1, 2, 0]  # itself is nearest, and excluded

    def test_agreement_by_a_plain_loop(self):
        first, second, keys = normal(20, 4), normal(20, 4, seed=1), normal(60, 4, seed=2)
        first = first + 2 * second  # views of the same image have something in common
        allowed = torch.rand(20, 60, generator=torch.Generator().manual_seed(3)) < 0.8
        shares = []
        for one, other, may in zip(first, second, allowed, strict=True):
            near = []
            for view in (one, other):
                similarity = torch.cosine_similarity(view[None], keys)
                similarity[~may] = -2
                near.append(set(similarity.argsort(descending=True)[:7].tolist()))
            shares.append(len(near[0] & near[1]) / 7)
        found = neighbour_agreement(first, second, keys, allowed, k=7).item()
        assert found == pytest.approx(np.mean(shares))
        assert 0.2 < found < 0.95
