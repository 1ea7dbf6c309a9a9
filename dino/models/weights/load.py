"""Backbones on disk: one safetensors file that says of itself what it holds, loaded strictly."""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dino.config.schema import ModelConfig
from dino.errors import UserError
from dino.files import cache_directory, write_bytes
from dino.models.backbone import Backbone, Spec
from dino.models.preprocess import Preprocess
from dino.models.registry import build, family_of
from dino.models.vit import ViTSpec
from dino.models.weights import layouts
from dino.models.weights.check import built, require_match
from dino.models.weights.download import fetch
from dino.models.weights.facts import Facts, beside, describe, description_in, require_sizes, spec_of
from dino.models.weights.released import PREPROCESS, RELEASED, Released

BACKBONE_FILE = "backbone.safetensors"
PART = "backbone."  # how parameters of a checkpoint's backbone begin
logger = logging.getLogger(__name__)


def save_backbone(path: Path, backbone: Backbone, preprocessing: Mapping[str, Any], training: dict[str, Any]) -> None:
    """Write weights and their description, beside `path` first and then renamed, so that no partial file is seen.

    The same weights and description give the same bytes.

    Args:
        backbone: its parameters are written under DINOv2's (or torchvision's) names.
        preprocessing: `image_size`, `mean`, `std` that the weights expect.
        training: how it was trained; JSON values without time or place.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_bytes(path, save(tensors, metadata=describe(backbone, preprocessing, training)))


def load_backbone(weights: str | Path, heads: int | None = None) -> Backbone:
    """A backbone in evaluation mode, by a released name or from a file.

    It has the interface of DINOv2's hub models (`model(images)`, `forward_features`, `get_intermediate_layers`), and
    `model.preprocess`, which brings uint8 images (…, C, H, W) to what the weights expect; `model.description` is what
    is known of its making.

    Args:
        weights: a name of `dino.models.weights.released`, a run directory, a directory of
            Hugging Face's, or a file: this project's backbone.safetensors, or any layout that
            `dino.models.weights.layouts` reads. `…@student` names
            the student's network of a checkpoint that has both; otherwise the teacher's is taken. A released name goes
            before a path of the same name; write ./NAME for the latter.
        heads: attention heads, for files that do not tell.

    Raises:
        UserError: no such weights, out of reach, damaged, or tensors that do not match one to one.
    """
    file, network, entry = _locate(weights)
    if entry is not None:
        return _load_released(file, network, entry, str(weights))
    if file.suffix == ".safetensors" and (description := description_in(file)) is not None:
        if network == "student" and not description.get("layout"):
            raise UserError(f"{file} holds no student: a run writes the backbone of its teacher")
        return _load_own(file, description)
    facts = beside(file)
    return _load_foreign(file, network, facts._replace(heads=heads or facts.heads))


def load_heads(weights: str | Path) -> dict[str, Tensor]:
    """Tensors of the heads that a full checkpoint holds beside the backbone, under the names of the file.

    Raises:
        UserError: no such weights, or damaged ones.
    """
    file, network, _ = _locate(weights)
    if file.suffix == ".safetensors" and not (description_in(file) or {"layout": "another's"}).get("layout"):
        return {}
    return layouts.read(file, network).heads


def directory_of(weights: str | Path) -> Path | None:
    """The directory, of a run or of Hugging Face's, that weights are named by; None: they are named otherwise."""
    name, _ = _split(weights)
    path = Path(name).expanduser()
    return path if name not in RELEASED and path.is_dir() else None


def _split(weights: str | Path) -> tuple[str, str]:
    """The name, and which network is meant."""
    name, _, network = str(weights).rpartition("@")
    return (name, network) if network in ("teacher", "student") else (str(weights), "teacher")


def _locate(weights: str | Path) -> tuple[Path, str, Released | None]:
    """The file of some weights, which network of it is meant, and its entry in the table of releases."""
    name, network = _split(weights)
    if entry := RELEASED.get(name):
        return fetch(entry.url, cache_directory() / entry.url.rsplit("/", 1)[1], entry.sha256), network, entry
    if (file := _find(name)) is None:
        near = difflib.get_close_matches(name, RELEASED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if "@" in Path(name).name:
            hint = " (after @ comes teacher or student)"
        raise UserError(
            f"no weights at '{weights}'{hint}: give a run directory that has a {BACKBONE_FILE}, a weights file, or one "
            f"of {', '.join(RELEASED)}"
        )
    return file, network, None


def _find(name: str) -> Path | None:
    """The file that a path names; of a directory, the weights in it."""
    path = Path(name).expanduser()
    if path.is_dir():
        names = (BACKBONE_FILE, "model.safetensors", "pytorch_model.bin")
        files = [path / name for name in (*names, *(f"{name}{layouts.INDEX}" for name in names[1:]))]
        return next((file for file in files if file.is_file()), None)
    return path if path.is_file() else None


def _load_own(file: Path, description: dict[str, Any]) -> Backbone:
    """A file that this project wrote, be it under other names."""
    try:
        spec, preprocess = spec_of(description)
        layout = description.get("layout")
        if layout == "checkpoint":
            held = load_file(file)
            tensors = {name.removeprefix(PART): held[name] for name in held if name.startswith(PART)}
        else:
            tensors = layouts.of_spec(layouts.read(file), spec) if layout else load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a backbone: {error}") from error
    backbone = built(spec, tensors, str(file))
    load_strictly(backbone, tensors, str(file))
    backbone.description, backbone.preprocess = description, preprocess
    return backbone.eval()


def _load_released(file: Path, network: str, entry: Released, name: str) -> Backbone:
    """Weights of which all is known."""
    content = layouts.read(file, network)
    spec = layouts.infer_spec(content, getattr(entry.spec, "num_heads", None), str(file))
    if spec != entry.spec:
        raise UserError(f"{file} does not hold {name}: it is {spec}, not {entry.spec}; remove it and start again")
    return _loaded(content, spec, entry.preprocess, name)


def _load_foreign(file: Path, network: str, facts: Facts) -> Backbone:
    """Weights of another project, of which as much is known as is told."""
    content = layouts.read(file, network)
    spec, assumed = layouts.infer_spec(content, facts.heads, str(file)), []
    require_sizes(facts, spec)
    if facts.interpolation is not None and isinstance(spec, ViTSpec):
        spec = replace(spec, position_interpolation=facts.interpolation)
    elif isinstance(spec, ViTSpec):
        assumed.append(f"positions are resampled as DINO's releases do ({spec.position_interpolation})")
    preprocess = facts.preprocess or PREPROCESS
    if len(preprocess.mean) != spec.in_chans:
        preprocess = replace(PREPROCESS, mean=[0.5] * spec.in_chans, std=[0.5] * spec.in_chans)
    if preprocess is not facts.preprocess:
        assumed.append(f"images are prepared as DINO's were ({preprocess})")
    if assumed:
        logger.info("%s does not tell all of its network; taken for granted: %s", file, "; ".join(assumed))
    return _loaded(content, spec, preprocess, str(file))


def _loaded(content: layouts.Contents, spec: Spec, preprocess: Preprocess, source: str) -> Backbone:
    layout = content.layout or family_of(spec).title
    backbone = built(spec, content.tensors, f"{source} ({layout}'s layout)")
    load_strictly(backbone, content.tensors, f"{source} ({layout}'s layout)")
    if content.heads:
        logger.info("%s: %d tensors of heads are not part of the backbone", source, len(content.heads))
    backbone.preprocess = preprocess
    backbone.description = {"source": source, "layout": layout, "spec": family_of(spec).describe(spec)}
    return backbone.eval()


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors that match the module's one to one, in name and shape, and log how many did, if there are any.

    Raises:
        UserError: names what is missing, unexpected, or of another shape.
    """
    expected = module.state_dict()
    require_match(expected, tensors, source)
    module.load_state_dict(tensors)
    if expected:
        logger.info("%s: %d of %d tensors matched", source, len(expected), len(expected))


def copy_weights(backbone: Backbone, network: Backbone, source: str) -> None:
    """Give `network` the weights of `backbone`; its mask token, if it has one more or one fewer, is set aside."""
    state, expected = dict(backbone.state_dict()), network.state_dict()
    if "mask_token" in expected:
        state.setdefault("mask_token", torch.zeros_like(expected["mask_token"]))
    else:
        state.pop("mask_token", None)
    load_strictly(network, state, source)


def random_like(backbone: Backbone) -> Backbone:
    """The same architecture as it was before training."""
    training = backbone.description.get("training", {})
    torch.manual_seed(training.get("seed", 0))
    blank = build(backbone.spec, ModelConfig(weight_init=training.get("initialisation", "published")))
    blank.preprocess, blank.description = backbone.preprocess, backbone.description
    return blank.eval()
