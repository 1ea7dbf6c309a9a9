"""Shared by the tests of models: a fixed seed, and weights of which none is trivial."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def randomise():
    """Function that gives every parameter of a model a random value, so that none could be ignored unnoticed."""
    return _randomise


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "token" in name or "pos" in name:
            value = 0.1 * noise  # short, as trained ones: the ε of layer norms counts
        elif parameter.ndim > 1:  # weights: outputs as large as inputs
            value = noise / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:  # gains of norms and LayerScale
            value = 1 + 0.3 * noise
        parameter.copy_(value)
    return model.eval()
