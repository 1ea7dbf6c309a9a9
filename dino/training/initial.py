"""Starting from weights that exist (`model.init`): the architecture follows them, and heads are new."""

import copy

from dino.config.read import assign, follow, get
from dino.config.schema import Config
from dino.models import Backbone, load_backbone
from dino.models.registry import family_of
from dino.training.settings import check

OF_THE_WEIGHTS = (  # settings that the weights decide
    "model.arch",
    "model.patch_size",
    "model.embed_dim",
    "model.depth",
    "model.num_heads",
    "model.ffn",
    "model.layer_scale",
    "model.registers",
    "model.positions",
    "model.stem",
    "model.position_interpolation",
    "model.position_size",
    "data.channels",
    "views.mean",
    "views.std",
)
OF_FINER_LEVELS = ("data.bits", "data.range")  # and where they are of more than 8 bits


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
        followed, blank = copy.deepcopy(config), Config()
        for key in (*OF_THE_WEIGHTS, *OF_FINER_LEVELS) if earlier.model.init == name else ():
            if get(config, key) == get(blank, key):
                assign(followed, key, get(earlier, key))
        check(followed, weights_known=True)
        return followed, None, {}
    backbone = load_backbone(name, config.model.num_heads)
    values = family_of(backbone.spec).settings(backbone.spec, config.model) | {"data.channels": backbone.spec.in_chans}
    for key in ("mean", "std"):
        values[f"views.{key}"] = list(getattr(backbone.preprocess, key))
    if (levels := backbone.preprocess.levels).bits != "8":  # weights of 8 bits can go on with finer levels
        values |= {"data.bits": levels.bits, "data.range": levels.range and list(levels.range)}
    followed, reasons = follow(config, values, f"model.init={name}")
    check(followed, weights_known=True)
    return followed, backbone, reasons
