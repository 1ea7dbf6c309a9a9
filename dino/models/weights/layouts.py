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
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),  # q_proj and the like: transformers 5
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


JOINED = {  # one matrix here, several there
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


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
    if len(stripped) < len(flat):
        raise UserError(f"{file} holds tensors twice, with and without prefixes such as module.")
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
    """The architecture that tensors belong to. Where a file does not say, a head is 64 wide, as in all releases.

    Raises:
        UserError: parts without which that cannot be told are missing, or of other dimensions.
    """
    tensors = found.tensors
    if found.layout == "ResNet":
        arch = "resnet50" if "layer1.0.conv3.weight" in tensors else "resnet18"
        return ResNetSpec(arch, tensors["conv1.weight"].shape[1])
    if "pos_embed" not in tensors:
        raise UserError(f"{file} has no positions (pos_embed); models with rotary ones, as DINOv3, are not read")
    for name, rank in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("register_tokens", 3)):
        if name in tensors and tensors[name].ndim != rank:
            raise UserError(f"{file}: {name} has {tensors[name].ndim} dimensions, not {rank}")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    blocks = {int(number[1]) for number in map(re.compile(r"blocks\.(\d+)\.").match, tensors) if number}
    if not blocks:
        raise UserError(f"{file} has no blocks (blocks.0. …)")
    num_heads = found.num_heads or max(1, width // 64)
    if width % num_heads:
        raise UserError(f"{file}: a width of {width} does not divide into {num_heads} heads")
    side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    if side**2 + 1 != tensors["pos_embed"].shape[1]:
        raise UserError(f"{file}: its position table of {tensors['pos_embed'].shape[1]} entries is no square grid")
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    return ViTSpec(
        embed_dim=width,
        depth=1 + max(blocks),
        num_heads=num_heads,
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
        with file.open("rb") as opened:
            if opened.read(1) not in (b"P", b"\x80"):  # a zip archive, or a pickle of protocol 2 and later
                raise UserError(f"{file} is no weights file: torch.save did not write it")
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints hold their arguments in one
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"{file} cannot be read as weights: it is damaged or no file of torch.save") from error
        raise UserError(
            f"{file} holds more than weights ({refused[1]}) and is not opened, since that would run code from it: "
            "save its state dict alone, or as .safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise UserError(f"{file} cannot be read as weights: {error}") from error


def _flatten(content: Any, network: str, file: Path) -> dict[str, Tensor]:
    """Down to the mapping of names to tensors of one network. A network that is not named is a teacher's."""
    path = []
    while isinstance(content, Mapping):
        entries = (key for key in (network, "model", "state_dict", "module") if isinstance(content.get(key), Mapping))
        if (entry := next(entries, None)) is None:
            break
        path.append(entry)
        content = content[entry]
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no mapping of names to tensors")
    flat = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    prefix = f"{network}."
    if named := {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}:
        return named
    if not flat or (network == "student" and network not in path):
        some = ", ".join(map(str, list(content)[:5]))
        raise UserError(f"{file} holds no weights of a {network}: its entries are {some or 'none'}")
    return flat


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
    for whole, parts in JOINED.items():
        for name in [name for name in renamed if f".{parts[0]}." in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if renamed.keys() >= set(names):
                renamed[name.replace(parts[0], whole)] = torch.cat([renamed.pop(part) for part in names])
    if "mask_token" in renamed:  # (1, 1, D) in a ViTModel
        renamed["mask_token"] = renamed["mask_token"].reshape(1, -1)
    found.tensors = renamed
    config = file.with_name("config.json")
    if not config.is_file():
        return
    try:
        settings = json.loads(config.read_text())
        found.num_heads, activation = settings.get("num_attention_heads"), settings.get("hidden_act", "gelu")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from error
    if activation != "gelu":
        raise UserError(f"{config}: only networks with GELU are read, not {activation}")
