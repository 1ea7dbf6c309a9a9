"""What tensors do not tell of a network: heads, how positions are resampled, preprocessing; and where that is found.

Files of this project say all of it themselves (`describe`). Of others it is read from what lies beside them:
config.json and preprocessor_config.json of Hugging Face's, config.json of timm's, or arguments.json, which one can
write oneself.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from safetensors import SafetensorError, safe_open

from dino.data.levels import Levels
from dino.errors import UserError
from dino.files import read_json, shown
from dino.models.backbone import Backbone
from dino.models.positions import Interpolation
from dino.models.preprocess import Preprocess
from dino.models.registry import family_named, family_of
from dino.models.weights.check import is_of, require_small_header, typed

METADATA_KEY, FORMAT = "dino", 1
LEAST_CROP, LEAST_STD = 0.01, 1e-6
LARGEST = 2**24  # bytes of a file of facts
SIZES = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "embed_dim": "embed_dim", "depth": "depth"}
SIZES |= {"patch_size": "patch_size"}
TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}


class Facts(NamedTuple):
    """What is told of a network beside its tensors; None: nothing is.

    Attributes:
        heads: of each block's attention.
        interpolation: as `ViTSpec.position_interpolation`.
        preprocess: what its weights expect.
        sizes: what tensors tell too (embed_dim, depth, patch_size), and whose words each is.
    """

    heads: int | None = None
    interpolation: Interpolation | None = None
    preprocess: Preprocess | None = None
    sizes: tuple[tuple[str, int, str], ...] = ()


def describe(
    backbone: Backbone, preprocessing: Mapping[str, Any], training: dict[str, Any], layout: str = "", **other: Any
) -> dict[str, str]:
    """The metadata of a file of weights, in one key: several would be written in random order.

    Args:
        preprocessing: `image_size`, `mean`, `std`, `resize` where it is another, and `bits` and `range` where these
            are not 8 bits, that the weights expect.
        layout: whose names the tensors have, if not those of this project.
        other: settings of the spec that differ in the file.
    """
    family = family_of(backbone.spec)
    description = {
        "format": FORMAT,
        "family": family.name,
        "spec": family.describe(backbone.spec) | other,
        **preprocessing,
        "in_chans": backbone.spec.in_chans,
        "training": training,
    }
    if backbone.has_patches:
        description["patch_size"] = backbone.patch_size
    if layout:
        description["layout"] = layout
    return {METADATA_KEY: json.dumps(description, sort_keys=True)}


def description_in(file: Path) -> dict[str, Any] | None:
    """What a safetensors file of this project says of itself; None: it is another's.

    Raises:
        UserError: it is no safetensors file, or says something impossible.
    """
    require_small_header(file)
    try:
        with safe_open(file, framework="pt") as archive:
            text = (archive.metadata() or {}).get(METADATA_KEY)
        if text is None:
            return None
        description = json.loads(text)
        _require_sound(description)
        return description
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: too deep, or too large
        raise UserError(f"{file} cannot be read as a backbone: {shown(str(error)[:300])}") from error


def _require_sound(description: Any) -> None:
    """Raise ValueError for what no version of this project has written, or only a later one."""
    if not isinstance(description, dict) or not isinstance(training := description.get("training", {}), dict):
        raise ValueError("its description is no mapping")
    if description.get("format", FORMAT) != FORMAT:
        raise ValueError("a later version of this program has written it")
    seed = training.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed cannot be {str(seed)[:100]!r}")
    for key, name in (
        ("initialisation", training.get("initialisation", "")),
        ("layout", description.get("layout", "")),
    ):
        if not is_of(str, name):
            raise ValueError(f"{key} cannot be {str(name)[:100]!r}")


def spec_of(description: Mapping[str, Any]) -> tuple[Any, Preprocess]:
    """The backbone and the preprocessing that a description tells of.

    Raises:
        KeyError, ValueError: it tells of none, or of an impossible one.
    """
    spec = typed(family_named(description["family"]).spec_type, description["spec"])
    preprocess = _preprocess(
        description["image_size"], description["mean"], description["std"], description.get("resize")
    )
    preprocess = replace(preprocess, levels=_levels(description))
    if len(preprocess.mean) != spec.in_chans:
        raise ValueError(f"mean has {len(preprocess.mean)} values for {spec.in_chans} channels")
    return spec, preprocess


def beside(file: Path) -> Facts:
    """What the files beside one of weights tell.

    Raises:
        UserError: one of them cannot be read, or tells of a network that is not read.
    """
    arguments, own_name = _read(file.with_name("arguments.json")), str(file.with_name("arguments.json"))
    facts = _of_arguments(arguments, own_name)
    config, name = _read(file.with_name("config.json")), str(file.with_name("config.json"))
    processor = _read(file.with_name("preprocessor_config.json"))
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{name}: only networks with GELU are read, not {shown(str(config['hidden_act'])[:100])}")
    others = Facts(_heads(config.get("num_attention_heads"), name), preprocess=_of_processor(processor, name))
    if isinstance(config.get("architecture"), str):
        others = _of_timm(config, name)
        config = config.get("model_args") or {}
    return Facts(
        facts.heads or others.heads,
        facts.interpolation or others.interpolation,
        facts.preprocess or others.preprocess,
        (*_sizes(arguments, own_name), *_sizes(config, name)),
    )


def require_sizes(facts: Facts, spec: Any) -> None:
    """Raise `UserError` where what lies beside weights is of another network: its heads would be wrong, too."""
    for key, value, source in facts.sizes:
        size = getattr(spec, SIZES[key], value)
        if value != size:
            raise UserError(
                f"{source} is of other weights: its {key} is {value:,}, that of the tensors beside it {size:,}; put "
                "there what belongs to them, or nothing"
            )


def _sizes(facts: dict[str, Any], source: str) -> list[tuple[str, int, str]]:
    return [(key, facts[key], source) for key in SIZES if type(facts.get(key)) is int]


def _read(path: Path) -> dict[str, Any]:
    """A small JSON mapping; empty where there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} is larger than any file of its kind")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no mapping")
    return value


def _heads(value: Any, source: str) -> int | None:
    if value is None:
        return None
    if not is_of(int, value) or not 1 <= value <= 1024:
        raise UserError(f"{source}: {shown(str(value)[:100])} is no number of attention heads")
    return value


def _of_arguments(arguments: dict[str, Any], source: str) -> Facts:
    """Arguments of timm's VisionTransformer, which resamples to the exact grid; or this project's own words."""
    interpolation = arguments.get("position_interpolation", "size" if "embed_dim" in arguments else None)
    if interpolation not in (None, *get_args(Interpolation)):
        raise UserError(f"{source}: position_interpolation is one of {', '.join(get_args(Interpolation))}")
    preprocess = None
    if {"image_size", "mean", "std"} <= arguments.keys():
        parts = (arguments[key] for key in ("image_size", "mean", "std"))
        preprocess = _told(source, *parts, arguments.get("resize"))
    return Facts(_heads(arguments.get("num_heads"), source), interpolation, preprocess)


def _of_timm(config: dict[str, Any], source: str) -> Facts:
    """A config.json as timm's hub has it."""
    arguments = config.get("model_args") or {}
    trained = config.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(trained, dict):
        raise UserError(f"{source}: model_args and pretrained_cfg are mappings")
    size = re.match(r"vit_([a-z]+)_patch", config["architecture"])
    heads = arguments.get("num_heads", TIMM_HEADS.get(size[1]) if size else None)
    preprocess = None
    if {"input_size", "mean", "std"} <= trained.keys():
        shape, part = trained["input_size"], trained.get("crop_pct", 1.0)
        if not isinstance(shape, list) or len(shape) != 3 or not is_of(int, shape[-1]) or not is_of(float, part):
            raise UserError(f"{source}: input_size is [channels, height, width], crop_pct a fraction")
        if 0 < part < LEAST_CROP:
            raise UserError(f"{source}: crop_pct cannot be {part}")
        resize = int(shape[-1] / part) if part else None  # as timm's evaluation has it
        preprocess = _told(source, shape[-1], trained["mean"], trained["std"], None if resize == shape[-1] else resize)
    return Facts(_heads(heads, source), "size", preprocess)


def _of_processor(settings: dict[str, Any], source: str) -> Preprocess | None:
    """A preprocessor_config.json of Hugging Face's."""
    if not {"image_mean", "image_std"} <= settings.keys():
        return None
    resized, cropped = settings.get("size"), settings.get("crop_size")
    short = resized.get("shortest_edge", resized.get("height")) if isinstance(resized, dict) else resized
    side = cropped.get("height") if isinstance(cropped, dict) else cropped
    if side is None or settings.get("do_center_crop") is False:
        side = short
    return _told(source, side, settings["image_mean"], settings["image_std"], None if short == side else short)


def _told(source: str, *values: Any) -> Preprocess:
    try:
        return _preprocess(*values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _preprocess(image_size: Any, mean: Any, std: Any, resize: Any) -> Preprocess:
    """Preprocessing from a file; raises ValueError for what is none."""
    for name, size in (("image_size", image_size), ("resize", resize)):
        if (size is not None or name == "image_size") and not (is_of(int, size) and 1 <= size <= 10_000):
            raise ValueError(f"{name} cannot be {str(size)[:100]!r}")
    for name, values in (("mean", mean), ("std", std)):
        is_list = isinstance(values, list | tuple) and 1 <= len(values) <= 1024
        if not is_list or not all(is_of(float, abs(v) if type(v) in (int, float) else v) for v in values):
            raise ValueError(f"{name} cannot be {str(values)[:100]!r}")
    if len(mean) != len(std) or min(std) < LEAST_STD:
        raise ValueError(f"std has a value of at least {LEAST_STD} for each of mean's")
    return Preprocess(image_size, list(mean), list(std), resize)


def _levels(description: Mapping[str, Any]) -> Levels:
    """Which grey levels a description tells of; raises ValueError for what is none."""
    bits, ends = description.get("bits", "8"), description.get("range")
    if bits not in ("8", "16", "float"):
        raise ValueError(f"bits cannot be {str(bits)[:100]!r}")
    if ends is None:
        return Levels(bits)
    are_numbers = isinstance(ends, list) and all(type(end) in (int, float) and math.isfinite(end) for end in ends)
    if not are_numbers or len(ends) != 2 or ends[0] >= ends[1]:
        raise ValueError(f"range cannot be {str(ends)[:100]!r}")
    return Levels(bits, (float(ends[0]), float(ends[1])))
