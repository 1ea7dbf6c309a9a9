"""Starting from weights that exist (`model.init`): the architecture follows them, and heads are new."""

import copy

import torch
from torch import nn

from dino.config.read import Config, assign, check, get
from dino.config.schema import ModelConfig
from dino.errors import UserError
from dino.models import SIZES, Backbone, ResNetSpec, ViTSpec, load_backbone
from dino.models.vit import Size
from dino.models.weights.load import load_strictly

OF_THE_WEIGHTS = (  # settings that the weights decide
    "model.arch",
    "model.patch_size",
    "model.embed_dim",
    "model.depth",
    "model.num_heads",
    "model.ffn",
    "model.layer_scale",
    "model.registers",
    "model.position_interpolation",
    "model.position_size",
    "data.channels",
    "views.mean",
    "views.std",
)


def follow_weights(config: Config, earlier: Config | None) -> tuple[Config, Backbone | None, dict[str, str]]:
    """Let `model.init` decide the architecture.

    Args:
        earlier: of the run that goes on from a checkpoint: it knows the architecture, and the checkpoint the weights.

    Returns:
        The config, the weights to start from (None: random ones, or those of a checkpoint), and the reason of each
        setting that they decided.

    Raises:
        UserError: no such weights, or a setting that contradicts them.
    """
    name = config.model.init
    if name is None:
        return config, None, {}
    if earlier is not None:
        followed = copy.deepcopy(config)
        for key in OF_THE_WEIGHTS if earlier.model.init == name else ():
            if get(config, key) == get(Config(), key):
                assign(followed, key, get(earlier, key))
        check(followed, weights_known=True)
        return followed, None, {}
    backbone = load_backbone(name)
    values = _of_spec(backbone.spec, config.model) | {"data.channels": backbone.spec.in_chans}
    for key in ("mean", "std"):
        values[f"views.{key}"] = list(getattr(backbone.preprocess, key))
    followed, reasons = follow(config, values, f"model.init={name}")
    check(followed, weights_known=True)
    return followed, backbone, reasons


def follow(config: Config, values: dict[str, object], source: str) -> tuple[Config, dict[str, str]]:
    """Take over what `source` decides; returns the config and the reason of each setting.

    Raises:
        UserError: a setting that is not at its default says otherwise.
    """
    followed = copy.deepcopy(config)
    for key, value in values.items():
        given = get(config, key)
        if given not in (get(Config(), key), value):
            raise UserError(f"{key}={given}, but {source} has {value}: leave {key} out")
        assign(followed, key, value)
    return followed, dict.fromkeys(values, f"of {source}")


def _of_spec(spec: ViTSpec | ResNetSpec, given: ModelConfig) -> dict[str, object]:
    """Settings of a spec; in the words of `given`, where they say the same."""
    if isinstance(spec, ResNetSpec):
        return {"model.arch": spec.arch}
    size = Size(spec.embed_dim, spec.depth, spec.num_heads)
    names = [name for name, named in SIZES.items() if size == named]
    arch = given.arch if vit_size(given) == size else next(iter(names), ModelConfig.arch)
    return {
        "model.arch": arch,
        **{f"model.{key}": value for key, value in size._asdict().items()},
        "model.patch_size": spec.patch_size,
        "model.ffn": spec.ffn,
        "model.layer_scale": spec.layer_scale,
        "model.registers": spec.registers,
        "model.position_interpolation": spec.position_interpolation,
        "model.position_size": spec.image_size,
    }


def vit_size(model: ModelConfig) -> Size | None:
    """Width, depth and heads that the settings come to; None for a ResNet."""
    if (named := SIZES.get(model.arch)) is None:
        return None
    return Size(model.embed_dim or named.embed_dim, model.depth or named.depth, model.num_heads or named.num_heads)


def copy_weights(backbone: Backbone, network: Backbone, source: str) -> None:
    """Give `network` the weights of `backbone`; its mask token, if it has one more or one fewer, is set aside."""
    state = dict(backbone.state_dict())
    wanted = network.state_dict()
    if "mask_token" in wanted:
        state.setdefault("mask_token", torch.zeros_like(wanted["mask_token"]))
    else:
        state.pop("mask_token", None)
    load_strictly(network, state, source)


def freeze(module: nn.Module) -> None:
    """Leave this step's gradients of a module out, so that the optimizer passes it over."""
    for parameter in module.parameters():
        parameter.grad = None
