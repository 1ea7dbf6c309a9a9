"""Reads and checks settings: the defaults of `dino.config.schema`, then a YAML file, then `key=value` arguments."""

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino.config.schema import AUTO, Config
from dino.errors import UserError
from dino.models.vit import SIZES

Tree = TypeVar("Tree")


def leaves(schema: Any = Config) -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting of a tree as (`group.key`, its dataclass field), in the order of its file."""
    for group in dataclasses.fields(schema):
        if not dataclasses.is_dataclass(group.type):
            yield group.name, group
            continue
        for field in dataclasses.fields(group.type):
            yield f"{group.name}.{field.name}", field


def get(config: Any, key: str) -> Any:
    """The value of `group.key`."""
    return functools.reduce(getattr, key.split("."), config)


def assign(config: Any, key: str, value: Any) -> None:
    """Set `group.key`."""
    *groups, name = key.split(".")
    setattr(functools.reduce(getattr, groups, config), name, value)


def describe(schema: Any = Config) -> str:
    """The table of keys that `--help` prints: key, type, default, meaning."""
    blank = schema()
    lines = []
    for key, field in leaves(schema):
        value = get(blank, key)
        kind = " | ".join(field.metadata["choices"]) or _type_name(field)
        lines.append(
            f"  {key} ({kind}; default {'none' if value is None else value})\n      {field.metadata['meaning']}"
        )
    return "\n".join(lines)


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """A run's settings: defaults, then the YAML file, then `key=value` overrides.

    Raises:
        UserError: see `read`; or an impossible value.
    """
    loaded = read(Config, path, overrides)
    check(loaded)
    return loaded


def read(schema: type[Tree], path: str | Path | None = None, overrides: Iterable[str] = ()) -> Tree:
    """Settings of any tree of dataclasses; whether the values can work is not looked at.

    Raises:
        UserError: unreadable YAML, unknown key (with the nearest valid one), or wrong type; all are listed at once.
    """
    fields = dict(leaves(schema))
    given = dict(_read_yaml(path, schema)) if path else {}
    for argument in overrides:
        key, separator, text = argument.partition("=")
        if not separator:
            raise UserError(f"'{argument}' is not a setting: write key=value, for example train.batch_size=128")
        given[key.strip()] = _parse(text, fields.get(key.strip()))

    errors = []
    config = OmegaConf.structured(schema)
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.3)
            errors.append(f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
            continue
        try:
            OmegaConf.update(config, key, _number(value) if _takes_number(fields[key]) else value)
            OmegaConf.select(config, key, throw_on_missing=True)  # ${…} and ??? mean something to OmegaConf
        except OmegaConfBaseException:
            errors.append(f"{key} must be {_type_name(fields[key])}, got {value!r}")
    refuse(errors)
    return cast(Tree, OmegaConf.to_object(config))


def dump(config: Any) -> str:
    """`config` as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check(config: Config, weights_known: bool = False) -> None:
    """Raise a `UserError` that lists every value that cannot work, whatever the data set.

    Args:
        weights_known: what the weights of `model.init` decide is in `config` by now.
    """
    views, model, train = config.views, config.model, config.train
    errors = [
        *check_choices(config),
        *_check_sizes(config, weights_known or config.model.init is None),
    ]  # text that is not auto is told there

    def require(holds: bool, message: str) -> None:
        if not holds:
            errors.append(message)

    for key in ("train.batch_size", "train.accumulation", "train.keep_checkpoints", "monitor.log_every",
                "model.patch_size", "objective.head_layers",
                "objective.head_hidden", "objective.head_bottleneck", "objective.sinkhorn_iterations"):  # fmt: skip
        require(get(config, key) >= 1, f"{key} must be at least 1, got {get(config, key)}")
    for key in ("data.channels", "objective.prototypes", "train.steps", "train.checkpoint_every", "train.cpu_threads"):
        value = get(config, key)
        require(isinstance(value, str) or value >= 1, f"{key} must be auto or at least 1, got {value}")
    for key in ("data.workers", "monitor.health_every", "optim.warmup_steps", "optim.freeze_last_layer_steps",
                "optim.freeze_backbone_steps", "data.rebalance_every",
                "views.local_crops", "objective.teacher_temperature_warmup", "model.registers"):  # fmt: skip
        value = get(config, key)
        require(isinstance(value, str) or value >= 0, f"{key} must not be negative, got {value}")
    for key in ("objective.student_temperature", "objective.teacher_temperature", "optim.lr",
                "objective.teacher_temperature_start", "train.epochs"):  # fmt: skip
        value = get(config, key)
        require(isinstance(value, str) or value > 0, f"{key} must be above 0, got {value}")
    for key in ("objective.ibot_weight", "objective.koleo_weight", "optim.layer_decay", "optim.patch_embed_lr"):
        require(0 <= get(config, key) < math.inf, f"{key} must be finite and not negative, got {get(config, key)}")
    for key in ("objective.ibot_prototypes", "objective.ibot_head_hidden", "objective.ibot_head_bottleneck"):
        value = get(config, key)
        require(value is None or value >= 1, f"{key} must be at least 1, got {value}")
        require(
            value is None or config.objective.ibot_head == "separate",
            f"{key} is of a head of its own: it needs objective.ibot_head=separate",
        )
    errors += _check_masks(config)
    for key in ("objective.momentum", "objective.momentum_end", "objective.center_momentum", "data.max_unreadable"):
        value = get(config, key)
        require(isinstance(value, str) or 0 <= value <= 1, f"{key} must lie between 0 and 1, got {value}")
    require(0 <= model.drop_path < 1, f"model.drop_path must lie in [0, 1), got {model.drop_path}")

    require(0 <= train.seed < 2**63, f"train.seed must lie in [0, 2^63), got {train.seed}")
    for key in ("model.embed_dim", "model.depth", "model.num_heads"):
        require(get(config, key) is None or get(config, key) >= 1, f"{key} must be at least 1, got {get(config, key)}")
    if named := SIZES.get(model.arch):
        heads, width = model.num_heads or named.num_heads, model.embed_dim or named.embed_dim
        require(width % heads == 0, f"model.embed_dim={width} is not divisible by model.num_heads={heads}")
    if train.shard:
        require(model.arch.startswith("vit"), f"train.shard cuts up transformer blocks, not model.arch={model.arch}")
        require(config.optim.name == "adamw", f"train.shard works with optim.name=adamw, not {config.optim.name}")
    require(train.epochs < math.inf, "train.epochs must be finite, got inf")
    betas = config.optim.betas
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"optim.betas must be two numbers in [0, 1), got {betas}",
    )
    require(views.std is None or all(value > 0 for value in views.std), f"views.std must be above 0, got {views.std}")
    for key in ("views.affine", "views.stroke"):
        value = get(config, key)
        require(value is None or 0 <= value <= 4, f"{key} must lie between 0 and 4, got {value}")
    require(config.optim.clip_grad >= 0, f"optim.clip_grad must not be negative, got {config.optim.clip_grad}")

    for key in ("views.global_scale", "views.local_scale"):
        scale = get(config, key)
        require(
            len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
            f"{key} must be two shares of the area, 0 < least <= greatest <= 1, got {scale}",
        )
    require(
        train.batch_size % max(train.accumulation, 1) == 0,
        f"train.batch_size={train.batch_size} cannot be divided into train.accumulation={train.accumulation} equal "
        "micro-batches: change one of them",
    )
    refuse(errors)


def refuse(errors: list[str]) -> None:
    """Raise a `UserError` that lists what is wrong, if anything is."""
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        raise UserError("\n  ".join([f"{len(errors)} settings cannot be used:", *errors]))


def _check_sizes(config: Config, patches_known: bool) -> Iterator[str]:
    """Crops that cannot be cut, or not into patches; phases out of order."""
    views, model, phases = config.views, config.model, config.train.phases
    begins = [0.0, *(phase.begin for phase in phases), 1.0]
    if any(later <= earlier for earlier, later in itertools.pairwise(begins)):
        yield f"train.phases must begin one after the other, between 0 and 1, got {begins[1:-1]}"
    named = [("views", views.global_size, views.local_size)]
    named += [(f"train.phases[{i}]", phase.global_size, phase.local_size) for i, phase in enumerate(phases)]
    sizes = [(f"{name}.global_size", size) for name, size, _ in named]
    if model.position_size is not None:
        sizes.append(("model.position_size", model.position_size))
    if views.local_crops:
        sizes += [(f"{name}.local_size", size) for name, _, size in named]
    yield from (f"{key} must be at least 2, got {size}" for key, size in sizes if size < 2)
    if not patches_known or not model.arch.startswith("vit") or model.patch_size < 1:
        return
    for key, size in sizes:
        if 1 <= size < model.patch_size:
            yield f"{key}={size} is smaller than one patch (model.patch_size={model.patch_size})"
        elif size >= 1 and size % model.patch_size:
            below = size - size % model.patch_size
            yield (
                f"{key}={size} is not divisible by model.patch_size={model.patch_size}: "
                f"use {below} or {below + model.patch_size}"
            )


def _check_masks(config: Config) -> Iterator[str]:
    """What the masked-patch loss needs."""
    objective, model = config.objective, config.model
    ratio = objective.mask_ratio
    if len(ratio) != 2 or not 0 <= ratio[0] <= ratio[1] <= 1:
        yield f"objective.mask_ratio must be two shares of the patches, 0 <= least <= greatest <= 1, got {ratio}"
    if not 0 < objective.mask_share <= 1:
        yield f"objective.mask_share must lie in (0, 1], got {objective.mask_share}"
    if objective.ibot_weight and not model.arch.startswith("vit"):
        yield f"objective.ibot_weight needs patches, which model.arch={model.arch} has not: use a ViT, or 0"


def check_choices(config: Any) -> Iterator[str]:
    """What is wrong with values that must be one of some names."""
    for key, field in leaves(type(config)):
        value, choices = get(config, key), field.metadata["choices"]
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield f"{key} must be one of {', '.join(choices)}, got {value!r}{hint}"
        elif isinstance(value, str) and value != AUTO and _takes_auto(field):
            yield f"{key} must be {_type_name(field)}, got {value!r}"


def _takes_auto(field: dataclasses.Field) -> bool:
    return str(field.type) in ("int | str", "float | str")


def _type_name(field: dataclasses.Field) -> str:
    if str(field.type).startswith("list[dino."):
        return "a list of {begin: share, global_size: pixels, local_size: pixels}"
    name = field.type.__name__ if isinstance(field.type, type) and "[" not in str(field.type) else str(field.type)
    name = name.replace("| str", "or 'auto'").replace("| None", "or none")
    return {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}.get(name, name)


def _read_yaml(path: str | Path, schema: Any) -> Iterator[tuple[str, Any]]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return
    groups = {field.name for field in dataclasses.fields(schema)}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold groups of settings ({', '.join(sorted(groups))}), not {type(tree).__name__}")
    for group, settings in tree.items():
        if settings is None and group in groups:
            continue  # all of its lines are commented out
        if isinstance(settings, dict):
            yield from ((f"{group}.{key}", value) for key, value in settings.items())
        else:
            yield str(group), settings


def _parse(text: str, field: dataclasses.Field | None) -> Any:
    """A `key=value` argument's value: text as it stands where text is wanted, else YAML's reading of it."""
    if field is not None and str(field.type) in ("<class 'str'>", "str | None"):
        return None if text.lower() in ("none", "null") and "None" in str(field.type) else text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return None if isinstance(value, str) and value.lower() == "none" else value


def _takes_number(field: dataclasses.Field) -> bool:
    return "float" in str(field.type) and "list" not in str(field.type)


def _number(value: Any) -> Any:
    """1e-3 and 1 as the fractions that they are meant as; YAML 1.1 takes the first for text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return float(value)
    except ValueError:
        return value
