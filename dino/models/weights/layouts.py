"""Weights files as others lay them out, brought to DINOv2's parameter names.

Read are: DINO's backbones and full checkpoints, DINOv2's releases and teacher checkpoints (with or without block
chunks), timm, Hugging Face (Dinov2Model, Dinov2WithRegistersModel, ViTModel), torchvision's ResNet. Which it is shows
in the names.
"""

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino.errors import UserError
from dino.files import read_json, require_regular, shown
from dino.models.registry import FAMILIES
from dino.models.weights import names
from dino.models.weights.check import require_packed, require_small_header, require_sound, some_of

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
INDEX = ".index.json"
DEEPEST = 10  # mappings inside one another
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        tensors: of the backbone, under DINOv2's (or torchvision's) names.
        heads: tensors of heads, under the names of the file; not part of a backbone.
        layout: whose names the file has, in words; empty: those of the backbone's own family.
    """

    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]
    layout: str = ""


def read(file: Path, network: str = "teacher") -> Contents:
    """Read a weights file.

    Args:
        file: `.safetensors`, or what torch.save wrote.
        network: `teacher` or `student`, where a checkpoint has both.

    Raises:
        UserError: not a weights file, or one that only unpickling of arbitrary objects would open.
    """
    flat = _flatten(_open(file), network, file)
    require_sound(flat, str(file))
    stripped = {_strip(name): tensor for name, tensor in flat.items()}
    if len(stripped) < len(flat):
        raise UserError(f"{file} holds tensors twice, with and without prefixes such as module.")
    try:
        return _under_known_names(stripped)
    except (IndexError, RuntimeError) as error:  # of tensors that are put together, or taken apart
        raise UserError(f"{file} cannot be read as weights: its tensors have shapes of no known layout") from error


def _under_known_names(stripped: Mapping[str, Tensor]) -> Contents:
    heads = {name: tensor for name, tensor in stripped.items() if name.startswith(HEADS)}
    tensors = {name: tensor for name, tensor in stripped.items() if name not in heads}
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        return Contents(names.from_hugging_face(tensors), heads, "Hugging Face")
    if "patch_embed.proj.weight" not in tensors:
        return Contents(tensors, heads)
    # DINOv2's training numbers blocks twice: by their chunk, and by themselves.
    tensors = {CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
    renamed = names.from_timm(tensors)
    if renamed.keys() != tensors.keys():
        return Contents(renamed, heads, "timm")
    return Contents(tensors, heads, "DINOv2" if "blocks.0.ls1.gamma" in tensors else "DINO")


def of_spec(contents: Contents, spec: Any) -> dict[str, Tensor]:
    """The tensors that a spec asks for, of a file of this project that holds more: parts of other libraries' models
    that do nothing here (a mask token, LayerScale by 1), or a checkpoint's heads."""
    tensors = dict(contents.tensors)
    if not getattr(spec, "mask_token", True):
        tensors.pop("mask_token", None)
    if not getattr(spec, "layer_scale", 1):
        for name in [name for name in tensors if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
            if (tensors[name] == 1).all():
                del tensors[name]
    return tensors


def infer_spec(contents: Contents, num_heads: int | None, source: str) -> Any:
    """The architecture that tensors belong to.

    Args:
        num_heads: attention heads, where something besides the tensors tells.

    Raises:
        UserError: they are of no known family, or lack what tells.
    """
    for family in FAMILIES:
        spec = family.infer(contents.tensors, num_heads, source)
        if spec is not None:
            return spec
    titles = " or ".join(family.title for family in FAMILIES)
    first = some_of(contents.tensors) or "nothing"
    raise UserError(f"{source} holds no {titles} of a known layout (it begins with {first})")


def _open(file: Path) -> Any:
    if file.name.endswith(INDEX):
        return _open_shards(file)
    try:
        require_regular(file)
        if file.suffix == ".safetensors":
            require_small_header(file)
            return load_file(file)
        with file.open("rb") as opened:
            if opened.read(1) not in (b"P", b"\x80"):  # a zip archive, or a pickle of protocol 2 and later
                raise UserError(f"{file} is no weights file: torch.save did not write it")
        require_packed(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's checkpoints hold their arguments in one
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"{file} cannot be read as weights: it is damaged or no file of torch.save") from error
        raise UserError(
            f"{file} holds more than weights ({refused[1]}) and is not opened, since that would run code from it: "
            "save its state dict alone, or as .safetensors"
        ) from error
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as weights: it takes more memory than there is") from error
    except Exception as error:  # what torch.load raises for a damaged pickle is nowhere listed
        raise UserError(f"{file} cannot be read as weights: {_in_one_line(error)}") from error


def _open_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several files of one folder, of which Hugging Face's index says which holds what."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"{index} cannot be read: it says nowhere in which file tensors are (weight_map)")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        # Not by is_file: names may be of any length and letters.
        if os.path.basename(shard) != shard or shard.endswith(INDEX) or not os.path.isfile(index.parent / shard):
            raise UserError(f"{index}: {shown(shard[:100]) or 'a name without letters'} is no file beside it")
        held = _open(index.with_name(shard))
        if not isinstance(held, Mapping):
            raise UserError(f"{index.with_name(shard)} holds no mapping of names to tensors")
        tensors |= {name: held[name] for name, place in places.items() if place == shard and name in held}
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index}: {len(missing)} tensor(s) are not in their file: {some_of(missing)}")
    return tensors


def _in_one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split())[:300]) or type(error).__name__


def _flatten(content: Any, network: str, file: Path) -> dict[str, Tensor]:
    """Down to the mapping of names to tensors of one network. A network that is not named is a teacher's."""
    path: list[str] = []
    while isinstance(content, Mapping) and len(path) < DEEPEST:  # some hold themselves
        entries = (key for key in (network, "model", "state_dict", "module") if isinstance(content.get(key), Mapping))
        if (entry := next(entries, None)) is None:
            break
        path.append(entry)
        content = content[entry]
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no mapping of names to tensors")
    # Names stand in messages: a terminal is not steered by them.
    flat = {shown(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    prefix = f"{network}."
    if named := {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}:
        return named
    if not flat or (network == "student" and network not in path):
        some = some_of(map(str, list(content)[:5]))
        raise UserError(f"{file} holds no weights of a {network}: its entries are {some or 'none'}")
    return flat


def _strip(name: str) -> str:
    while match := WRAPPERS.match(name):
        name = name[match.end() :]
    return name
