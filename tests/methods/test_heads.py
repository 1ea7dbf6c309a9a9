"""The DINO head computes what its paper defines, under the names of the released checkpoints."""

import math
from itertools import pairwise

import pytest
import torch
from builders import add_noise
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dino.methods.heads import DINOHead


def definition(state: dict[str, Tensor], features: Tensor, layers: int) -> Tensor:
    """Caron et al. 2021, appendix C, in double precision: MLP with exact GELU, l2 normalisation, weight norm."""
    state = {name: value.double() for name, value in state.items()}
    hidden = features.double()
    for layer in range(layers):
        hidden = hidden @ state[f"mlp.{2 * layer}.weight"].T + state[f"mlp.{2 * layer}.bias"]
        if layer < layers - 1:
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    hidden = hidden / hidden.square().sum(1, keepdim=True).sqrt()
    direction = state["last_layer.weight_v"]
    prototypes = state["last_layer.weight_g"] * direction / direction.square().sum(1, keepdim=True).sqrt()
    return hidden @ prototypes.T


def small_head(**options) -> DINOHead:
    return DINOHead(12, 20, hidden=16, bottleneck=8, **options)


def randomised(**options) -> DINOHead:
    """No parameter at a value that could be ignored unnoticed; outputs about as large as inputs."""
    head = small_head(**options)
    add_noise(head, 0.3)
    return head


def prototypes(head: DINOHead) -> Tensor:
    """(K, bottleneck), from the outputs that the last layer gives for unit vectors."""
    return head.last_layer(torch.eye(8)).T


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_definition(layers):
    """With in_dim, then `hidden` in all but the last layer of the MLP, then the bottleneck, then the prototypes."""
    head = randomised(layers=layers)
    widths = [12, *[16] * (layers - 1), 8]
    assert [tuple(layer.weight.shape[::-1]) for layer in head.mlp[::2]] == list(pairwise(widths))
    features = torch.randn(7, 12)
    expected = definition(head.state_dict(), features, layers)
    torch.testing.assert_close(head(features).double(), expected, rtol=1e-5, atol=1e-6)


def test_names_and_sizes_of_the_released_small_model():
    """384 → 2048 → 2048 → 256 → 65,536 has 22,352,128 parameters, the 65,536 prototype lengths included."""
    with torch.device("meta"):
        head = DINOHead(384, 65536)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    mlp = {f"mlp.{index}.{part}" for index in (0, 2, 4) for part in ("weight", "bias")}
    assert shapes.keys() == mlp | {"last_layer.weight_g", "last_layer.weight_v"}
    assert (shapes["last_layer.weight_g"], shapes["last_layer.weight_v"]) == ((65536, 1), (65536, 256))
    assert sum(parameter.numel() for parameter in head.parameters()) == 22_352_128


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototypes_begin_with_length_1_and_keep_it_or_learn_it(norm_last_layer):
    """They turn in a step of the optimizer either way."""
    head = small_head(norm_last_layer=norm_last_layer)
    before = prototypes(head).detach()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(20))
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=10.0)
    head(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    after = prototypes(head).detach()
    assert (after - before).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(after.norm(dim=1), head.last_layer.weight_g[:, 0].abs().detach())
    changes = (after.norm(dim=1) - 1).abs()
    assert changes.max() < 1e-5 if norm_last_layer else changes.max() > 1e-2


def test_last_layer_equals_torchs_weight_norm():
    """Outputs and gradients, of the features, the lengths and the directions."""
    ours = randomised(norm_last_layer=False).last_layer
    theirs = weight_norm(nn.Linear(8, 20, bias=False))
    theirs.load_state_dict(
        {"parametrizations.weight.original0": ours.weight_g, "parametrizations.weight.original1": ours.weight_v}
    )
    features = torch.randn(6, 8)
    results = []
    for layer in (ours, theirs):
        inputs = features.clone().requires_grad_()
        outputs = layer(inputs)
        outputs.sin().sum().backward()
        results.append((outputs, inputs.grad))
    torch.testing.assert_close(*results)
    originals = theirs.parametrizations.weight
    torch.testing.assert_close(ours.weight_g.grad, originals.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, originals.original1.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-4, 1.0, 1e4])
def test_half_precision_features_of_any_length(length, dtype):
    """Squares of the shortest and longest do not exist in fp16; logits are still cosines, and 0 without a direction."""
    head = randomised(layers=1)
    nn.init.zeros_(head.mlp[0].bias)  # the bottleneck is then as long as the features
    features = length * torch.randn(6, 12)
    expected = head(features)
    with torch.autocast("cpu", dtype=dtype):
        outputs = head(features)
    torch.testing.assert_close(outputs.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
