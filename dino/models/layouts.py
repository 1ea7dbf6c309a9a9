"""Weights files as others lay them out, brought to DINOv2's parameter names.

Read are: DINO's backbones and full checkpoints, DINOv2's releases and teacher checkpoints (with or without block
chunks), timm, Hugging Face (Dinov2Model, Dinov2WithRegistersModel, ViTModel), torchvision's ResNet. Which it is shows
in the names; sizes show in the shapes.
"""

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dino.errors import UserError
from dino.models.resnet import ResNetSpec
from dino.models.vit import ViTSpec

WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|backbone\.|dinov2\.|dinov2_with_registers\.|vit\.)"
)
HEADS = (
    "head.",
    "head_dist.",
    "dino_head.",
    "ibot_head.",
    "projection_head.",
    "fc.",
    "classifier.",
    "pooler.",
    "fc_norm.",
)
HUGGING_FACE = (  # pattern in a file's names to DINOv2's
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


@dataclass
class Found:
    """What a file holds.

    Attributes:
        layout: whose it is, in words.
        tensors: of the backbone, under DINOv2's (or torchvision's) names.
        heads: tensors of heads, under the names of the file; not part of a backbone.
        num_heads: attention heads, where the file (or its config) says.
    """

    layout: str
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    num_heads: int | None = None


def read(file: Path, network: str = "teacher") -> Found:
    """Read a weights file.

    Args:
        file: `.safetensors`, or what torch.save wrote.
        network: `teacher` or `student`, where a checkpoint has both.

    Raises:
        UserError: not a weights file, one that only unpickling of arbitrary objects would open, or of no known layout.
    """
    flat = _flatten(_open(file), network, file)
    stripped = {_strip(name): tensor for name, tensor in flat.items()}
    heads = {name: tensor for name, tensor in stripped.items() if name.startswith(HEADS)}
    tensors = {name: tensor for name, tensor in stripped.items() if name not in heads}
    found = Found("", tensors, heads)
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        _from_hugging_face(found, file)
    elif "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        found.layout = "ResNet"
    elif "patch_embed.proj.weight" in tensors and "cls_token" in tensors:
        _from_meta_or_timm(found)
    else:
        some = ", ".join(list(tensors)[:3])
        raise UserError(f"{file} holds no ViT or ResNet of a known layout (it begins with {some or 'nothing'})")
    return found


def infer_spec(found: Found, file: Path) -> ViTSpec | ResNetSpec:
    """The architecture that tensors belong to. Where a file does not say, a head is 64 wide, as in all releases."""
    tensors = found.tensors
    if found.layout == "ResNet":
        arch = "resnet50" if "layer1.0.conv3.weight" in tensors else "resnet18"
        return ResNetSpec(arch, tensors["conv1.weight"].shape[1])
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    if side**2 + 1 != tensors["pos_embed"].shape[1]:
        raise UserError(f"{file}: its position table of {tensors['pos_embed'].shape[1]} entries is no square grid")
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    return ViTSpec(
        embed_dim=width,
        depth=depth,
        num_heads=found.num_heads or max(1, width // 64),
        patch_size=patch,
        image_size=side * patch,
        in_chans=channels,
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        layer_scale=1.0 if "blocks.0.ls1.gamma" in tensors else 0.0,
        registers=registers,
        mask_token="mask_token" in tensors,
        position_interpolation="size" if registers else "offset",
    )


def _open(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints hold their arguments in one
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{file} holds more than weights and is not opened, since that would run code from it ({reason}): "
            "save its state dict alone, or as .safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read as weights: {error}") from error


def _flatten(content: Any, network: str, file: Path) -> dict[str, Tensor]:
    """Down to the mapping of names to tensors of one network."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        wanted = next((key for key in (network, "model", "state_dict", "module") if key in content), None)
        if wanted is None:
            raise UserError(f"{file} holds no weights of a {network}: its entries are {', '.join(map(str, content))}")
        content = content[wanted]
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no mapping of names to tensors")
    flat = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    of_network = {
        name.removeprefix(f"{network}."): value for name, value in flat.items() if name.startswith(f"{network}.")
    }
    return of_network or flat


def _strip(name: str) -> str:
    while match := WRAPPERS.match(name):
        name = name[match.end() :]
    return name


def _from_meta_or_timm(found: Found) -> None:
    """Chunked blocks are numbered twice (DINOv2's training); timm packs registers, positions and SwiGLU otherwise."""
    chunked = re.compile(r"^blocks\.\d+\.(\d+)\.")
    tensors = {chunked.sub(r"blocks.\1.", name): tensor for name, tensor in found.tensors.items()}
    found.layout = "DINOv2" if "blocks.0.ls1.gamma" in tensors else "DINO"
    first, second = (tensors.get(f"blocks.0.mlp.fc{layer}.weight") for layer in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        found.layout = "timm"
        swiglu = re.compile(r"\.mlp\.fc([12])\.")
        tensors = {swiglu.sub(lambda m: f".mlp.{'w12' if m[1] == '1' else 'w3'}.", k): v for k, v in tensors.items()}
    if "reg_token" in tensors:  # the class token holds its position already
        found.layout = "timm"
        tensors["register_tokens"] = tensors.pop("reg_token")
        none = torch.zeros_like(tensors["pos_embed"][:, :1])
        tensors["pos_embed"] = torch.cat([none, tensors["pos_embed"]], dim=1)
    found.tensors = tensors


def _from_hugging_face(found: Found, file: Path) -> None:
    found.layout = "Hugging Face"
    renamed = {}
    for name, tensor in found.tensors.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    found.tensors = renamed
    config = file.with_name("config.json")
    if config.is_file():
        found.num_heads = json.loads(config.read_text()).get("num_attention_heads")
