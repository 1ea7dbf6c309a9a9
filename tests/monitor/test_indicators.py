"""Indicators of health against plain definitions and other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dino.monitor.indicators.features import feature_deviation, rank_me
from dino.monitor.indicators.neighbours import neighbour_agreement
from dino.monitor.indicators.targets import kl_to_mean, mean_entropy


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


@pytest.mark.parametrize("width", [8, 64, 384])
def test_spread_of_even_directions_is_one_of_equal_ones_zero_and_of_two_that_are_opposite_by_hand(width):
    """Half of all tokens point one way and half the other: one dimension deviates by 1 and the others by 0."""
    lengths = torch.linspace(0.1, 10, 5000)[:, None]  # which do not count
    opposite = torch.eye(width)[:1] * torch.tensor([1.0, -1.0]).repeat(2500)[:, None]
    assert feature_deviation(lengths * opposite).item() == pytest.approx(width**-0.5, rel=1e-3)
    assert feature_deviation(lengths * normal(5000, width)).item() == pytest.approx(1, abs=0.02)
    assert feature_deviation(normal(1, width).expand(100, -1)).item() == pytest.approx(0, abs=1e-6)


class TestTargets:
    def test_against_scipy(self):
        """The mean may be over more samples, as over those of all processes: some prototypes are used nowhere here."""
        targets = torch.softmax(3 * normal(40, 12), dim=1)
        targets[:, :3] = 0
        targets /= targets.sum(dim=1, keepdim=True)
        rows = targets.double().numpy()
        assert mean_entropy(targets).item() == pytest.approx(np.mean([entropy(row) for row in rows]), rel=1e-5)
        for mean in (targets.mean(dim=0), torch.softmax(normal(1, 12, seed=1), dim=1)[0]):
            divergences = [entropy(row, mean.numpy()) for row in rows]
            assert kl_to_mean(targets, mean).item() == pytest.approx(np.mean(divergences), rel=1e-4)

    @pytest.mark.parametrize(
        ("targets", "of_entropy", "of_divergence"),
        [
            (torch.full((8, 4), 0.25), math.log(4), 0),
            (torch.eye(4)[:1].expand(8, -1), 0, 0),
            (torch.eye(4).repeat(2, 1), 0, math.log(4)),
        ],
        ids=["uniform", "constant", "certain and balanced"],
    )
    def test_the_two_ways_to_collapse_and_the_opposite(self, targets, of_entropy, of_divergence):
        assert mean_entropy(targets).item() == pytest.approx(of_entropy, abs=1e-6)
        assert kl_to_mean(targets, targets.mean(dim=0)).item() == pytest.approx(of_divergence, abs=1e-6)


def test_agreement_of_neighbours_by_a_plain_loop():
    first, second, keys = normal(20, 4), normal(20, 4, seed=1), normal(60, 4, seed=2)
    first = first + 2 * second  # views of the same image have something in common
    allowed = torch.rand(20, 60, generator=torch.Generator().manual_seed(3)) < 0.8
    fractions = []
    for views, may in zip(torch.stack([first, second], dim=1), allowed, strict=True):
        similarity = torch.cosine_similarity(views[:, None], keys[None], dim=2).masked_fill(~may, -2)
        nearest = [set(row.tolist()) for row in similarity.argsort(dim=1, descending=True)[:, :7]]
        fractions.append(len(nearest[0] & nearest[1]) / 7)
    agreement = neighbour_agreement(first, second, keys, allowed, k=7).item()
    assert agreement == pytest.approx(np.mean(fractions))
    assert 0.2 < agreement < 0.95
