"""Layer-wise decay of the learning rate: the factors of DINOv2's published training, and that they reach AdamW."""

import pytest
import torch
from torch import nn

from dino.config.schema import OptimConfig
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.training.optimizer import build_optimizer, parameter_groups, rate_factor, set_rates

PUBLISHED = {  # reference/meta-systems.md §7.8: decay .9, depth 12, patch embedding × .2
    "backbone.cls_token": 0.2542,
    "backbone.pos_embed": 0.2542,
    "backbone.register_tokens": 0.2542,
    "backbone.mask_token": 0.2542,
    "backbone.patch_embed.proj.weight": 0.0508,
    "backbone.patch_embed.proj.bias": 0.0508,
    "backbone.blocks.0.norm1.weight": 0.2824,
    "backbone.blocks.0.attn.qkv.bias": 0.2824,
    "backbone.blocks.1.mlp.fc1.weight": 0.3138,
    "backbone.blocks.10.attn.proj.weight": 0.81,
    "backbone.blocks.11.ls2.gamma": 0.9,
    "backbone.blocks.11.mlp.fc2.bias": 0.9,
    "backbone.norm.weight": 1.0,
    "backbone.norm.bias": 1.0,
    "head.mlp.0.weight": 1.0,
    "head.last_layer.weight_v": 1.0,
    "patch_head.mlp.2.bias": 1.0,
    "patch_head.last_layer.weight_g": 1.0,
}


def dinov2(depth: int = 12, norm_last_layer: bool = False) -> Network:
    spec = ViTSpec(16, depth, 2, 4, 8, registers=2, layer_scale=1e-5, mask_token=True)
    heads = (DINOHead(16, size, 2, 24, 8, norm_last_layer) for size in (12, 20))
    return Network(VisionTransformer(spec), *heads)


def factors(network: nn.Module, groups: list[dict]) -> dict[str, float]:
    """Of every trained parameter, by name; each is in exactly one group."""
    found = {id(value): group["factor"] for group in groups for value in group["params"]}
    trained = {name: id(value) for name, value in network.named_parameters() if value.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trained)
    return {name: found[key] for name, key in trained.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_factors(name):
    assert rate_factor(name, 12, 0.9, 0.2) == pytest.approx(PUBLISHED[name], abs=5e-5)


@pytest.mark.parametrize("decay_tokens", [True, False])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_groups_have_the_published_factors(norm_last_layer, decay_tokens):
    network = dinov2(norm_last_layer=norm_last_layer)
    found = factors(network, parameter_groups(network, decay_tokens, 0.9, 0.2))
    expected = {name: factor for name, factor in PUBLISHED.items() if name in found}
    assert set(PUBLISHED) - set(expected) <= {"patch_head.last_layer.weight_g"}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=5e-5)
    for index in range(12):
        of_block = {factor for name, factor in found.items() if name.startswith(f"backbone.blocks.{index}.")}
        assert list(of_block) == pytest.approx([0.9 ** (12 - index)])


@pytest.mark.parametrize("depth", [1, 2, 24])
def test_the_last_block_is_one_step_below_the_heads_at_any_depth(depth):
    network = dinov2(depth)
    found = factors(network, parameter_groups(network, True, 0.5))
    assert found[f"backbone.blocks.{depth - 1}.attn.qkv.weight"] == 0.5
    assert found["backbone.blocks.0.attn.qkv.weight"] == 0.5**depth
    assert found["backbone.cls_token"] == found["backbone.patch_embed.proj.weight"] == 0.5 ** (depth + 1)


def test_without_decay_all_learn_alike_but_the_patch_embedding():
    """DINOv2's ViT-L and ViT-g: layer decay 1, patch embedding × .2."""
    network = dinov2()
    for name, factor in factors(network, parameter_groups(network, True, 1.0, 0.2)).items():
        assert factor == pytest.approx(0.2 if "patch_embed" in name else 1.0)
    assert set(factors(network, parameter_groups(network)).values()) == {1.0}


def test_a_backbone_without_blocks_has_no_layers():
    network = Network(ResNet(ResNetSpec("resnet18")), DINOHead(512, 12, 2, 24, 8))
    assert set(factors(network, parameter_groups(network, True, 0.9, 0.2)).values()) == {1.0}


def test_what_is_exempt_from_decay_is_so_with_every_factor():
    """As without layer-wise rates: no parameter changes sides."""
    network = dinov2()
    sides = []
    for layer_decay in (1.0, 0.9):
        groups = parameter_groups(network, True, layer_decay)
        sides.append({id(value): group["decayed"] for group in groups for value in group["params"]})
    assert sides[0] == sides[1]


def test_rates_are_those_of_the_step_times_the_factor():
    """Set again for every step, and weight decay without the factor: AdamW multiplies it by the rate itself."""
    network = dinov2()
    optimizer = build_optimizer(network, OptimConfig(layer_decay=0.9, patch_embed_lr=0.2))
    for lr, decay in ((0.25, 0.04), (0.125, 0.4)):
        set_rates(optimizer, lr, decay)
        rates = factors(network, [{**group, "factor": group["lr"]} for group in optimizer.param_groups])
        expected = {name: lr * factor for name, factor in PUBLISHED.items()}
        assert {name: rates[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        for group in optimizer.param_groups:
            assert group["weight_decay"] == (decay if group["decayed"] else 0.0)


def test_first_step_of_adamw_moves_by_the_rate():
    """With a gradient of ones, Adam's first step is the learning rate itself."""
    network = dinov2(depth=2).double()
    optimizer = build_optimizer(network, OptimConfig(layer_decay=0.5, patch_embed_lr=0.2))
    set_rates(optimizer, 0.01, 0.0)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    layers = {"backbone.blocks.0.": 2, "backbone.blocks.1.": 1, "backbone.norm.": 0, "head.": 0, "patch_head.": 0}
    for name, value in network.named_parameters():
        layer = next((layer for start, layer in layers.items() if name.startswith(start)), 3)
        moved = 0.01 * 0.5**layer * (0.2 if "patch_embed" in name else 1)
        torch.testing.assert_close(before[name] - value.detach(), torch.full_like(value, moved), rtol=1e-5, atol=0)
