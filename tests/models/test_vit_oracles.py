"""The Vision Transformer gives the features of timm's and transformers' implementations, with weights moved either way.

Weights are random: equal features under random weights mean that released files give the same features too.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from dino.models import VisionTransformer, ViTSpec
from dino.models.positions import interpolate_positions

TOLERANCE = 1e-5
SMALL_V2 = ViTSpec(
    384, 4, 6, patch_size=14, image_size=518, layer_scale=1.0, mask_token=True, position_interpolation="offset"
)
GIANT_V2 = replace(SMALL_V2, embed_dim=1536, depth=2, num_heads=24, image_size=84, ffn="swiglu")
AS_REGISTER_RELEASE = {"registers": 4, "position_interpolation": "size"}

# timm's name of an architecture to its specification; depth, and the giant's image, are reduced to save time.
SPECS = {
    "vit_tiny_patch16_224": ViTSpec(192, 4, 3, position_interpolation="offset"),
    "vit_small_patch16_224.dino": ViTSpec(384, 12, 6, position_interpolation="offset"),
    "vit_small_patch14_dinov2": SMALL_V2,
    "vit_giant_patch14_dinov2": GIANT_V2,
    "vit_small_patch14_reg4_dinov2": replace(SMALL_V2, **AS_REGISTER_RELEASE),
    "vit_giant_patch14_reg4_dinov2": replace(GIANT_V2, **AS_REGISTER_RELEASE),
}
PLAIN = [name for name, spec in SPECS.items() if not spec.registers]
WITH_REGISTERS = [name for name, spec in SPECS.items() if spec.registers]

State = dict[str, Tensor]
Grid = tuple[int, int]


def at_grids(names: list[str], grids: list[Grid]) -> list[tuple[str, Grid]]:
    """Every name with every grid, but the giants, to save time, only with the last."""
    return [(name, grid) for name in names for grid in (grids[-1:] if "giant" in name else grids)]


class Peer(NamedTuple):
    """Another implementation: how to build it, how its weights map to ours and back, and how it gives tokens."""

    build: Callable[[str, tuple[int, int]], nn.Module]
    from_ours: Callable[[State, ViTSpec], State]
    to_ours: Callable[[State, ViTSpec], State]
    tokens: Callable[[nn.Module, Tensor], Tensor]


def build_timm(name: str, image_size: tuple[int, int]) -> nn.Module:
    options = {"pretrained": False, "num_classes": 0, "depth": SPECS[name].depth}
    return timm.create_model(name, img_size=image_size, dynamic_img_size=True, **options).eval()


def timm_from_ours(state: State, spec: ViTSpec) -> State:
    """timm has no mask token, and with registers adds the class token's position to the class token itself."""
    theirs = {name.replace("w12", "fc1").replace("w3", "fc2"): value for name, value in state.items()}
    theirs.pop("mask_token", None)
    if spec.registers:
        theirs["reg_token"] = theirs.pop("register_tokens")
        theirs["cls_token"] = theirs["cls_token"] + theirs["pos_embed"][:, :1]
        theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    return theirs


def timm_to_ours(state: State, spec: ViTSpec) -> State:
    ours = dict(state)
    if spec.ffn == "swiglu":
        ours = {name.replace("fc1", "w12").replace("fc2", "w3"): value for name, value in ours.items()}
    if spec.mask_token:
        ours["mask_token"] = torch.zeros(1, spec.embed_dim)
    if spec.registers:
        ours["register_tokens"] = ours.pop("reg_token")
        ours["pos_embed"] = torch.cat([torch.zeros(1, 1, spec.embed_dim), ours["pos_embed"]], dim=1)
    return ours


def build_transformers(name: str, image_size: tuple[int, int], attention: str = "sdpa") -> nn.Module:
    """Layer norms get the ε of Meta's code, 1e-6: ViTConfig's own default is 1e-12."""
    spec = SPECS[name]
    sizes = {
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "patch_size": spec.patch_size,
        "image_size": image_size,
        "layer_norm_eps": 1e-6,
        "attn_implementation": attention,
    }
    if not spec.layer_scale:
        return ViTModel(ViTConfig(intermediate_size=4 * spec.embed_dim, **sizes), add_pooling_layer=False).eval()
    sizes["use_swiglu_ffn"] = spec.ffn == "swiglu"
    if spec.registers:
        config = Dinov2WithRegistersConfig(num_register_tokens=spec.registers, **sizes)
        return Dinov2WithRegistersModel(config).eval()
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    # Dinov2Model takes every table for a square one and resamples it if the image is not square; here it has its size.
    model.embeddings.interpolate_pos_encoding = lambda *_: model.embeddings.position_embeddings
    return model


RENAMED_PARTS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm.": "layernorm.",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w3": "mlp.down_proj",
}
SPLIT_PARTS = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


def transformers_names(name: str, spec: ViTSpec) -> list[str]:
    """transformers' names of one of our parameters; of several, each holds an equal share of its rows, in order."""
    for ours, theirs in RENAMED_PARTS.items():
        name = name.replace(ours, theirs)
    if spec.layer_scale:
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
    else:
        name = re.sub(r"^blocks\.", "layers.", name)
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
    for ours, parts in SPLIT_PARTS.items():
        if ours in name:
            return [name.replace(ours, part) for part in parts]
    return [name]


def transformers_from_ours(state: State, spec: ViTSpec) -> State:
    theirs = {}
    for name, value in state.items():
        names = transformers_names(name, spec)
        theirs |= dict(zip(names, value.chunk(len(names)), strict=True))
    return theirs


def transformers_to_ours(state: State, spec: ViTSpec) -> State:
    with torch.device("meta"):
        names = VisionTransformer(spec).state_dict().keys()
    return {name: torch.cat([state[part] for part in transformers_names(name, spec)]) for name in names}


PEERS = {
    "timm": Peer(build_timm, timm_from_ours, timm_to_ours, lambda model, images: model.forward_features(images)),
    "transformers": Peer(
        build_transformers,
        transformers_from_ours,
        transformers_to_ours,
        lambda model, images: model(images).last_hidden_state,
    ),
}


def square(spec: ViTSpec) -> tuple[int, int]:
    return spec.image_size, spec.image_size


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def assert_same_features(ours: VisionTransformer, peer: Peer, theirs: nn.Module, images: Tensor) -> None:
    features = ours.forward_features(images)
    expected = peer.tokens(theirs, images)
    registers = ours.spec.registers
    assert relative_error(ours(images), expected[:, 0]) < TOLERANCE
    assert relative_error(features["x_norm_clstoken"], expected[:, 0]) < TOLERANCE
    assert relative_error(features["x_norm_patchtokens"], expected[:, 1 + registers :]) < TOLERANCE
    if registers:
        assert relative_error(features["x_norm_regtokens"], expected[:, 1 : 1 + registers]) < TOLERANCE


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_our_weights_in_a_peer(peer, name, randomise):
    """At the grid of the position table; strict loading, so no parameter is missed or left over."""
    spec = SPECS[name]
    ours = randomise(VisionTransformer(spec))
    theirs = peer.build(name, square(spec))
    theirs.load_state_dict(peer.from_ours(ours.state_dict(), spec))
    assert_same_features(ours, peer, theirs, torch.randn(1, 3, *square(spec)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_peers_weights_in_ours(peer, name, randomise):
    spec = SPECS[name]
    theirs = randomise(peer.build(name, square(spec)))
    ours = VisionTransformer(spec).eval()
    ours.load_state_dict(peer.to_ours(theirs.state_dict(), spec))
    assert_same_features(ours, peer, theirs, torch.randn(1, 3, *square(spec)))


@pytest.mark.parametrize(("name", "grid"), at_grids(PLAIN, [(7, 7), (20, 9), (4, 10)]), ids=str)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_plain_releases_at_other_sizes(peer, name, grid, randomise):
    """Images of 98 px (112 for patches of 16) and non-square ones, with our resampled position table in the peer.

    The peers cannot resample it as Meta's code does, by a scale factor of (grid + 0.1) / side without antialiasing:
    timm resamples to the exact size with antialiasing, transformers to the exact size without. The table's own
    correctness is tested against its definition in test_vit.py.
    """
    spec = SPECS[name]
    size = (grid[0] * spec.patch_size, grid[1] * spec.patch_size)
    ours = randomise(VisionTransformer(spec))
    state = ours.state_dict()
    state["pos_embed"] = interpolate_positions(state["pos_embed"], grid, "offset")
    theirs = peer.build(name, size)
    theirs.load_state_dict(peer.from_ours(state, spec))
    assert_same_features(ours, peer, theirs, torch.randn(2, 3, *size))


@pytest.mark.parametrize(("name", "grid"), at_grids(WITH_REGISTERS, [(7, 7), (40, 9), (4, 10)]), ids=str)
@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_register_releases_at_other_sizes(peer, name, grid, randomise):
    """Both peers resample a register release's table as Meta's code does: no help is given."""
    spec = SPECS[name]
    ours = randomise(VisionTransformer(spec))
    theirs = peer.build(name, square(spec))
    theirs.load_state_dict(peer.from_ours(ours.state_dict(), spec))
    images = torch.randn(2, 3, grid[0] * spec.patch_size, grid[1] * spec.patch_size)
    assert_same_features(ours, peer, theirs, images)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_timm_reads_our_files_as_official_dinov2(name, randomise):
    """timm's own converter of Meta's files accepts our names, and nothing is left over."""
    spec = replace(SPECS[name], image_size=84)
    ours = randomise(VisionTransformer(spec))
    theirs = build_timm(name, square(spec))
    theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs))
    assert_same_features(ours, PEERS["timm"], theirs, torch.randn(2, 3, *square(spec)))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_masked_patches_equal_transformers(name, randomise):
    spec = replace(SPECS[name], image_size=84)
    ours = randomise(VisionTransformer(spec))
    theirs = build_transformers(name, square(spec))
    theirs.load_state_dict(transformers_from_ours(ours.state_dict(), spec))
    images, masks = torch.randn(3, 3, 84, 84), torch.rand(3, 36) < 0.4
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
        features = ours.forward_features(images, masks)
    assert relative_error(features["x_norm_clstoken"], expected[:, 0]) < TOLERANCE
    assert relative_error(features["x_norm_patchtokens"], expected[:, 1 + spec.registers :]) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_small_patch14_reg4_dinov2"])
def test_class_attention_equals_transformers(name, randomise):
    """Heads, and the order of rows and columns, on a non-square image."""
    rows, columns = 4, 10
    spec = SPECS[name]
    size = (rows * spec.patch_size, columns * spec.patch_size)
    ours = randomise(VisionTransformer(spec))
    state = ours.state_dict()
    if not spec.registers:  # with registers, transformers resamples the table as we do
        state["pos_embed"] = interpolate_positions(state["pos_embed"], (rows, columns), "offset")
    theirs = build_transformers(name, square(spec) if spec.registers else size, attention="eager")
    theirs.load_state_dict(transformers_from_ours(state, spec))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        attentions = theirs(images, output_attentions=True).attentions[-1]  # (B, heads, queries, keys)
    expected = attentions[:, :, 0, 1 + spec.registers :].reshape(2, spec.num_heads, rows, columns)
    assert relative_error(ours.class_attention(images), expected) < TOLERANCE


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("blocks", [3, [0, 2]], ids=str)
def test_intermediate_layers_equal_timm(blocks, norm, randomise):
    name = "vit_small_patch14_reg4_dinov2"
    ours = randomise(VisionTransformer(SPECS[name]))
    theirs = build_timm(name, square(SPECS[name]))
    theirs.load_state_dict(timm_from_ours(ours.state_dict(), SPECS[name]))
    images = torch.randn(2, 3, 56, 140)
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            images, indices=blocks, return_prefix_tokens=True, norm=norm, intermediates_only=True
        )
        outputs = ours.get_intermediate_layers(images, blocks, reshape=True, return_class_token=True, norm=norm)
    assert len(outputs) == len(expected)
    for (patches, class_token), (expected_patches, prefix) in zip(outputs, expected, strict=True):
        assert relative_error(patches, expected_patches) < TOLERANCE
        assert relative_error(class_token, prefix[:, 0]) < TOLERANCE
