"""The settings of a pre-training run: read, and checked across all rooms."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dino.config.bounds import out_of_bounds
from dino.config.read import read, refuse
from dino.config.schema import Config
from dino.methods import METHODS
from dino.models import BACKBONES
from dino.views.spec import problems_of_views


def load(path: str | Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """A run's settings: defaults, then the YAML file, then what takes precedence over it; see `dino.config.read.read`.

    Raises:
        UserError: what cannot be read, or cannot work.
    """
    config = read(Config, path, overrides)
    check(config)
    return config


def check(config: Config, weights_known: bool = False) -> None:
    """Raise a `UserError` that lists every value that cannot work, whatever the data set.

    Args:
        weights_known: what the weights of `model.init` decide is in `config` by now.
    """
    problems = list(out_of_bounds(config))
    problems += _problems_of_training(config)
    problems += problems_of_views(config.views)
    problems += _problems_of_sizes(config)
    if config.model.arch in BACKBONES and (weights_known or config.model.init is None):
        problems += BACKBONES[config.model.arch].problems(config)
    problems += METHODS[config.objective.name].problems(config) if config.objective.name in METHODS else []
    refuse(problems)


def _problems_of_training(config: Config) -> Iterator[str]:
    views, model, train, optim = config.views, config.model, config.train, config.optim
    for key, scale in (("views.global_scale", views.global_scale), ("views.local_scale", views.local_scale)):
        if len(scale) != 2 or scale[0] > scale[1]:
            yield f"{key} must be two fractions of the area, 0 < least <= greatest <= 1, got {scale}"
    ends = config.data.range
    if ends is not None and (len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] >= ends[1]):
        yield f"data.range must be two numbers, the least before the greatest, got {ends}"
    if ends is not None and config.data.bits == "8":
        yield "data.range is for data.bits=16 or float: data.bits=8 keeps the levels that files of 8 bits have"
    if len(optim.betas) != 2:
        yield f"optim.betas must be two numbers in [0, 1), got {optim.betas}"
    if train.batch_size % max(train.accumulation, 1):
        yield (
            f"train.batch_size={train.batch_size} cannot be divided into train.accumulation={train.accumulation} "
            "equal micro-batches: change one of them"
        )
    if train.fsdp and optim.name != "adamw":
        reason = " (each process holds a share of a matrix, Muon needs it whole)" if optim.name == "muon" else ""
        yield f"train.fsdp works with optim.name=adamw, not {optim.name}{reason}"
    if optim.name == "muon" and model.arch in BACKBONES and not BACKBONES[model.arch].has_blocks:
        yield f"optim.name=muon is for the matrices of transformer blocks, which model.arch={model.arch} has not"
    if train.fsdp and model.arch in BACKBONES and not BACKBONES[model.arch].has_blocks:
        yield f"train.fsdp shards transformer blocks, which model.arch={model.arch} has not"
    if train.keep_best is not None and not train.keep_best.startswith(("loss/", "health/")):
        yield f"train.keep_best={train.keep_best} is no metric to be best at: name one such as health/knn or loss/dino"
    begins = [0.0, *(phase.begin for phase in train.phases), 1.0]
    if any(later <= earlier for earlier, later in itertools.pairwise(begins)):
        yield f"train.phases must begin one after the other, between 0 and 1, got {begins[1:-1]}"


def _problems_of_sizes(config: Config) -> Iterator[str]:
    """Crops too small to be any. What a backbone needs of them it says itself."""
    views, phases = config.views, config.train.phases
    crops = [("views", views.global_size, views.local_size)]
    crops += [(f"train.phases[{i}]", phase.global_size, phase.local_size) for i, phase in enumerate(phases)]
    sizes = {f"{key}.global_size": size for key, size, _ in crops}
    if config.model.position_size is not None:
        sizes["model.position_size"] = config.model.position_size
    if views.local_crops:
        sizes |= {f"{key}.local_size": size for key, _, size in crops}
    yield from (f"{key} must be at least 2, got {size}" for key, size in sizes.items() if size < 2)
