"""Rank and spread against plain definitions; the other indicators are tested as health reports them."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dino.monitor.indicators.features import feature_deviation, rank_me


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
