"""Backbones on disk: one safetensors file that says of itself what it holds, loaded strictly."""

import difflib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dino.config.schema import ModelConfig
from dino.errors import UserError
from dino.files import cache_directory, write_bytes
from dino.models.backbone import Backbone, Spec
from dino.models.preprocess import Preprocess
from dino.models.registry import build, family_named, family_of
from dino.models.weights import layouts
from dino.models.weights.download import fetch
from dino.models.weights.released import PREPROCESS, RELEASED, Released

BACKBONE_FILE = "backbone.safetensors"
METADATA_KEY = "dino"
logger = logging.getLogger(__name__)


def save_backbone(path: Path, backbone: Backbone, preprocessing: dict[str, Any], training: dict[str, Any]) -> None:
    """Write weights and their description, beside `path` first and then renamed, so that no partial file is seen.

    The same weights and description give the same bytes: all metadata sits in one key, as sorted JSON.

    Args:
        backbone: its parameters are written under DINOv2's (or torchvision's) names.
        preprocessing: `image_size`, `mean`, `std` that the weights expect.
        training: how it was trained; JSON values without time or place.
    """
    family = family_of(backbone.spec)
    description = {
        "format": 1,
        "family": family.name,
        "spec": family.describe(backbone.spec),
        **preprocessing,
        "in_chans": backbone.spec.in_chans,
        "training": training,
    }
    if backbone.has_patches:
        description["patch_size"] = backbone.patch_size
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    write_bytes(path, save(tensors, metadata={METADATA_KEY: json.dumps(description, sort_keys=True)}))


def load_backbone(weights: str | Path) -> Backbone:
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

    Raises:
        UserError: no such weights, out of reach, damaged, or tensors that do not match one to one.
    """
    file, network, entry = _locate(weights)
    if entry is not None:
        return _load_foreign(file, network, entry.spec, entry.preprocess, str(weights))
    if file.suffix == ".safetensors" and (description := _own_description(file)) is not None:
        if network == "student":
            raise UserError(f"{file} holds no student: a run writes the backbone of its teacher")
        return _load_own(file, description)
    return _load_foreign(file, network, None, PREPROCESS, str(file))


def load_heads(weights: str | Path) -> dict[str, Tensor]:
    """Tensors of the heads that a full checkpoint holds beside the backbone, under the names of the file.

    Raises:
        UserError: no such weights, or damaged ones.
    """
    file, network, _ = _locate(weights)
    if file.suffix == ".safetensors" and _own_description(file) is not None:
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
        files = [path / name for name in (BACKBONE_FILE, "model.safetensors", "pytorch_model.bin")]
        return next((file for file in files if file.is_file()), None)
    return path if path.is_file() else None


def _own_description(file: Path) -> dict[str, Any] | None:
    """What a file of this project says of itself; None: it is another's."""
    try:
        with safe_open(file, framework="pt") as archive:
            text = (archive.metadata() or {}).get(METADATA_KEY)
        return None if text is None else json.loads(text)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as a backbone: {error}") from error


def _load_own(file: Path, description: dict[str, Any]) -> Backbone:
    try:
        family = family_named(description["family"])
        backbone = family.build(family.spec_type(**description["spec"]))
        preprocess = Preprocess(description["image_size"], description["mean"], description["std"])
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a backbone: {error}") from error
    load_strictly(backbone, tensors, str(file))
    backbone.description, backbone.preprocess = description, preprocess
    return backbone.eval()


def _load_foreign(file: Path, network: str, expected: Spec | None, preprocess: Preprocess, source: str) -> Backbone:
    """Weights of another project; `expected` is what they should be, where that is known."""
    content = layouts.read(file, network)
    spec = layouts.infer_spec(content, str(file))
    if expected is not None and spec != expected:
        raise UserError(f"{file} does not hold {source}: it is {spec}, not {expected}; remove it and start again")
    backbone, layout = build(spec), content.layout or family_of(spec).title
    load_strictly(backbone, content.tensors, f"{source} ({layout}'s layout)")
    if content.heads:
        logger.info("%s: %d tensors of heads are not part of the backbone", source, len(content.heads))
    channels = spec.in_chans
    if channels != len(preprocess.mean):
        preprocess = replace(preprocess, mean=[0.5] * channels, std=[0.5] * channels)
    backbone.preprocess = preprocess
    backbone.description = {"source": source, "layout": layout, "spec": family_of(spec).describe(spec)}
    return backbone.eval()


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors that match the module's one to one, in name and shape, and log how many did.

    Raises:
        UserError: names what is missing, unexpected, or of another shape.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    shapes = []
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            shapes.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:3])}{' …' if names[3:] else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit the model, {'; '.join(problems)}")
    module.load_state_dict(tensors)
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
    training = backbone.description.get("training", {"seed": 0, "initialisation": "published"})
    torch.manual_seed(training["seed"])
    blank = build(backbone.spec, ModelConfig(weight_init=training["initialisation"]))
    blank.preprocess, blank.description = backbone.preprocess, backbone.description
    return blank.eval()
