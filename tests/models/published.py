"""Weights as others publish them: names and shapes of DINO's and DINOv2's files, with random values."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dino.models import Backbone, ViTSpec

State = dict[str, Tensor]
TOLERANCE = 1e-5
DINO = ViTSpec(128, 2, 2, patch_size=8, image_size=32, position_interpolation="offset")
DINOV2 = replace(DINO, layer_scale=1.0, mask_token=True)
REGISTERS = replace(DINOV2, registers=4, position_interpolation="size")


def published_vit(spec: ViTSpec) -> State:
    """A ViT's state as DINO's and DINOv2's vision_transformer.py name it; values about as large as trained ones."""
    width, hidden = spec.embed_dim, 4 * spec.embed_dim

    def linear(name: str, inputs: int, *outputs: int) -> State:
        weight = torch.randn(*outputs) / inputs**0.5
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(outputs[0])}

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}

    def token(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, width)

    state = {"cls_token": token(1, 1), "pos_embed": token(1, 1 + (spec.image_size // spec.patch_size) ** 2)}
    pixels = (spec.in_chans, spec.patch_size, spec.patch_size)
    state |= linear("patch_embed.proj", math.prod(pixels), width, *pixels)
    if spec.registers:
        state["register_tokens"] = token(1, spec.registers)
    if spec.mask_token:
        state["mask_token"] = token(1)
    for block in (f"blocks.{index}" for index in range(spec.depth)):
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= linear(f"{block}.attn.qkv", width, 3 * width, width)
        state |= linear(f"{block}.attn.proj", width, width, width)
        if spec.ffn == "swiglu":  # two thirds as wide, in steps of 8; gate and value in one matrix
            narrow = math.ceil(hidden * 2 // 3 / 8) * 8
            state |= linear(f"{block}.mlp.w12", width, 2 * narrow, width)
            state |= linear(f"{block}.mlp.w3", narrow, width, narrow)
        else:
            state |= linear(f"{block}.mlp.fc1", width, hidden, width)
            state |= linear(f"{block}.mlp.fc2", hidden, width, hidden)
        if spec.layer_scale:
            state |= {f"{block}.ls{number}.gamma": 1 + 0.3 * torch.randn(width) for number in (1, 2)}
    return state | norm("norm")


def published_head(*, parametrized: bool = False, width: int = 128, prototypes: int = 32) -> State:
    """A DINO head's 8 tensors, with either name that torch has given to the parts of a weight-normed layer."""
    tensors = {}
    for layer, (inputs, outputs) in {0: (width, 64), 2: (64, 64), 4: (64, 16)}.items():
        tensors[f"mlp.{layer}.weight"], tensors[f"mlp.{layer}.bias"] = (
            torch.randn(outputs, inputs),
            torch.randn(outputs),
        )
    length, direction = ("original0", "original1") if parametrized else ("weight_g", "weight_v")
    before = "last_layer.parametrizations.weight." if parametrized else "last_layer."
    return tensors | {before + length: torch.ones(prototypes, 1), before + direction: torch.randn(prototypes, 16)}


def full_checkpoint(student: State, teacher: State, width: int = 128, parametrized: bool = False) -> dict[str, Any]:
    """What main_dino.py saves: student, teacher, their heads, and the rest of the training."""
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    heads = [prefixed("head.", published_head(parametrized=parametrized, width=width)) for _ in range(2)]
    return {
        "student": prefixed("module.", prefixed("backbone.", student) | heads[0]),
        "teacher": prefixed("backbone.", teacher) | heads[1],
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4), lr=5e-4, use_fp16=True),
        "dino_loss": {"center": torch.randn(1, 32)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    }


def torchvisions(arch: str) -> nn.Module:
    """torchvision's network in evaluation mode, with weights and statistics that are not the initial ones."""
    network = getattr(torchvision.models, arch)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def without_classifier(network: nn.Module) -> State:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def prefixed(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def assert_holds(loaded: Backbone, tensors: State) -> None:
    """The same parameters, bit by bit: no more, no fewer."""
    state = loaded.state_dict()
    assert state.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(state[name], tensor)] == []


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@torch.no_grad()
def assert_same_tokens(loaded: Backbone, images: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """`expected` is (B, 1+R+N, D): class token, registers, patches, after the last norm."""
    patches = 1 + loaded.spec.registers
    features = loaded.forward_features(images)
    assert relative_error(loaded(images), expected[:, 0]) < tolerance
    assert relative_error(features["x_norm_clstoken"], expected[:, 0]) < tolerance
    assert relative_error(features["x_norm_patchtokens"], expected[:, patches:]) < tolerance
    if loaded.spec.registers:
        assert relative_error(features["x_norm_regtokens"], expected[:, 1:patches]) < tolerance
