"""Backbones on disk: one safetensors file that says of itself what it holds, loaded strictly."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dino.errors import UserError
from dino.models.preprocess import Preprocess
from dino.models.resnet import ResNet, ResNetSpec
from dino.models.vit import VisionTransformer, ViTSpec

BACKBONE_FILE = "backbone.safetensors"
METADATA_KEY = "dino"
Backbone = VisionTransformer | ResNet
logger = logging.getLogger(__name__)


def save_backbone(path: Path, backbone: Backbone, preprocessing: dict[str, Any], training: dict[str, Any]) -> None:
    """Write weights and their description, beside `path` first and then renamed, so that no partial file is seen.

    The same weights and description give the same bytes: all metadata sits in one key, as sorted JSON.

    Args:
        backbone: its parameters are written under DINOv2's (or torchvision's) names.
        preprocessing: `image_size`, `mean`, `std` that the weights expect.
        training: how it was trained; JSON values without time or place.
    """
    description = {
        "format": 1,
        "family": "resnet" if isinstance(backbone, ResNet) else "vit",
        "spec": dataclasses.asdict(backbone.spec),
        **preprocessing,
        "in_chans": backbone.spec.in_chans,
        "training": training,
    }
    if isinstance(backbone, VisionTransformer):
        description["patch_size"] = backbone.patch_size
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(save(tensors, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_backbone(weights: str | Path) -> Backbone:
    """A backbone in evaluation mode, from a run directory or a `backbone.safetensors`.

    It has the interface of DINOv2's hub models (`model(images)`, `forward_features`, `get_intermediate_layers`), and
    `model.preprocess`, which brings uint8 images (…, C, H, W) to what the weights expect; `model.description` is what
    the file says of itself.

    Raises:
        UserError: no such file, not a file of this project, damaged, or tensors that do not match one to one.
    """
    path = Path(weights).expanduser()
    file = path / BACKBONE_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no weights at '{weights}': give a run directory that has a {BACKBONE_FILE}, or such a file")
    try:
        with safe_open(file, framework="pt") as archive:
            text = (archive.metadata() or {}).get(METADATA_KEY)
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118  # no mapping
        if text is None:
            raise UserError(f"{file} does not describe itself (no '{METADATA_KEY}' metadata): not made by this project")
        description = json.loads(text)
        backbone = _build(description)
        preprocess = Preprocess(description["image_size"], description["mean"], description["std"])
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a backbone: {error}") from error
    load_strictly(backbone, tensors, str(file))
    backbone.description = description
    backbone.preprocess = preprocess
    return backbone.eval()


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors that match the module's one to one, in name and shape, and log how many did.

    Raises:
        UserError: names what is missing, unexpected, or of another shape.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:3])}{' …' if names[3:] else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit the model, {'; '.join(problems)}")
    module.load_state_dict(tensors)
    logger.debug("%s: %d of %d tensors matched", source, len(wanted), len(wanted))


def _build(description: dict[str, Any]) -> Backbone:
    if description["family"] == "resnet":
        return ResNet(ResNetSpec(**description["spec"]))
    return VisionTransformer(ViTSpec(**description["spec"]))
