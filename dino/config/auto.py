"""`auto` settings, resolved once from the data set and the batch, each with its reason."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping

import torch

from dino.config.read import assign, get, leaves
from dino.config.schema import AUTO, CHOICES, Config
from dino.distributed import allowed_cores, cores, local_processes
from dino.errors import UserError


@dataclasses.dataclass(frozen=True)
class PoolFacts:
    """What the rules ask of the data."""

    images: int  # an epoch
    channels: int
    kind: str
    bytes: int = 0  # of all of them, decoded
    canvas: int = 0  # bytes of a canvas on which any of them fits
    mean: list[float] | None = None  # of each channel, where it was measured; see `is_measured`
    std: list[float] | None = None


Rule = Callable[[Config, PoolFacts], tuple[object, str]]


def resolve(config: Config, pool: PoolFacts) -> tuple[Config, dict[str, str]]:
    """Replace every `auto` (and unset mean and deviation) by a value.

    Returns:
        The resolved config, and for each key that was resolved the reason, to be shown.

    Raises:
        UserError: the batch is larger than the data set.
    """
    resolved, reasons = copy.deepcopy(config), {}
    if resolved.train.batch_size > pool.images:
        raise UserError(
            f"train.batch_size={resolved.train.batch_size} is larger than the data set of {pool.images} images: "
            f"use at most {pool.images}, or more images"
        )
    for key, rule in rules(config).items():
        if get(resolved, key) in (AUTO, None):
            value, reason = rule(resolved, pool)
            assign(resolved, key, value)
            reasons[key] = reason
    for key in ("views.mean", "views.std"):
        if len(get(resolved, key)) != pool.channels:
            raise UserError(
                f"{key}={get(resolved, key)} must have one value a channel: these images have {pool.channels}"
            )
    # From here on a setting of type int is an int.
    assert not [key for key, leaf in leaves(resolved).items() if leaf.may_be_auto and get(resolved, key) == AUTO]
    return resolved, reasons


def keep_resolved(config: Config, earlier: Config) -> Config:
    """Take over what an earlier start of the same run resolved, so that `auto` means the same when it is resumed."""
    resumed = copy.deepcopy(config)
    if config.objective.name != earlier.objective.name:
        return resumed  # another run, which is refused with all that differs
    for key in (*rules(config), "data.range"):
        follows_epochs = key == "train.steps" and config.train.epochs != earlier.train.epochs
        if key not in OF_THIS_MACHINE and get(config, key) in (AUTO, None) and not follows_epochs:
            assign(resumed, key, get(earlier, key))
    return resumed


def rules(config: Config) -> Mapping[str, Rule]:
    """How each `auto` is resolved, in order: later rules read what earlier ones resolved; the method's are last."""
    return RULES | CHOICES["objective.name"][config.objective.name].auto_rules


def _kind(config: Config, pool: PoolFacts) -> tuple[str, str]:
    return pool.kind, "by what data.root is"


def _channels(config: Config, pool: PoolFacts) -> tuple[int, str]:
    return pool.channels, f"{pool.kind} images"


def cache_room() -> int:
    """Bytes that decoded images may take on the device where nothing is said of it."""
    return torch.cuda.get_device_properties(0).total_memory // 10 if torch.cuda.is_available() else 2**30


def _cache(config: Config, pool: PoolFacts) -> tuple[str, str]:
    room = cache_room()
    size = f"{pool.bytes / 2**20:,.0f} MiB decoded"
    batch = config.train.batch_size * pool.canvas
    if batch > room:
        return "none", f"canvases for a batch, as large as its largest image, would take {batch / 2**20:,.0f} MiB"
    if pool.bytes <= room:
        return "device", f"{size}, at most {room / 2**30:.0f} GiB"
    return "none", f"{size}, more than {room / 2**30:.0f} GiB"


def _workers(config: Config, pool: PoolFacts) -> tuple[int, str]:
    if config.data.cache == "device":
        return 0, "the images are on the device"
    if torch.cuda.is_available():
        return min(16, cores()), f"{cores()} cores for each process"
    return max(1, cores() // 4), "training itself needs the cores"


def is_measured(config: Config, channels: int) -> bool:
    """Whether means and deviations are asked of the images: everywhere but where others' numbers are the custom."""
    views, has_custom = config.views, config.data.bits == "8" and channels in (1, 3)
    return any(value == AUTO or (value is None and not has_custom) for value in (views.mean, views.std))


def _mean(config: Config, pool: PoolFacts) -> tuple[list[float], str]:
    if pool.mean is not None and is_measured(config, pool.channels):
        return pool.mean, "measured on a sample of the images"
    return ([0.485, 0.456, 0.406], "ImageNet's") if pool.channels == 3 else ([0.5] * pool.channels, "middle of range")


def _std(config: Config, pool: PoolFacts) -> tuple[list[float], str]:
    if pool.std is not None and is_measured(config, pool.channels):
        return pool.std, "measured on a sample of the images"
    return ([0.229, 0.224, 0.225], "ImageNet's") if pool.channels == 3 else ([0.5] * pool.channels, "half the range")


def _ffn(config: Config, pool: PoolFacts) -> tuple[str, str]:
    return ("swiglu" if config.model.arch == "vit_giant2" else "mlp"), f"as published for {config.model.arch}"


def _steps(config: Config, pool: PoolFacts) -> tuple[int, str]:
    steps = max(1, round(config.train.epochs * pool.images / config.train.batch_size))
    return steps, f"{config.train.epochs:g} epochs of {pool.images:,} images in batches of {config.train.batch_size}"


def _checkpoint_every(config: Config, pool: PoolFacts) -> tuple[int, str]:
    return max(1, min(1000, config.train.steps // 10)), "10 a run, at most 1000 steps apart"


def _cpu_threads(config: Config, pool: PoolFacts) -> tuple[int, str]:
    return cores(), f"{allowed_cores()} cores / {local_processes()} process(es)"


def _rebalance_every(config: Config, pool: PoolFacts) -> tuple[int, str]:
    return max(1, round(pool.images / config.train.batch_size)), "1 epoch"


def _health_every(config: Config, pool: PoolFacts) -> tuple[int, str]:
    every = config.monitor.log_every
    return every * max(1, round(min(100, config.train.steps / 100) / every)), "100 a run, at most 100 steps apart"


def _lr(config: Config, pool: PoolFacts) -> tuple[float, str]:
    batch = config.train.batch_size
    if config.model.init is not None and config.optim.name not in ("sgd", "lars"):
        return round(1e-4 * math.sqrt(batch / 512), 8), f"1e-4 · √({batch} / 512): a tenth, the backbone is trained"
    if config.optim.name == "lars":
        return round(0.3 * batch / 256, 8), f"0.3 · {batch} / 256 (SimCLR)"
    if config.optim.name == "sgd":
        return round(0.03 * batch / 256, 8), f"0.03 · {batch} / 256 (DINO's ResNet-50)"
    return round(1e-3 * math.sqrt(batch / 512), 8), f"1e-3 · √({batch} / 512) (DINO: 1e-3 at batch 512)"


def _warmup(config: Config, pool: PoolFacts) -> tuple[int, str]:
    ten_epochs = 10 * pool.images // config.train.batch_size
    return min(ten_epochs, config.train.steps // 10), "10 epochs, at most 10 % of the run"


def _freeze_backbone(config: Config, pool: PoolFacts) -> tuple[int, str]:
    if config.model.init is None:
        return 0, "the backbone is as new as the heads"
    return min(1000, config.train.steps // 10), "new heads would pull a trained backbone apart"


RULES: dict[str, Rule] = {
    "data.kind": _kind,
    "data.channels": _channels,
    "data.cache": _cache,
    "data.workers": _workers,
    "views.mean": _mean,
    "views.std": _std,
    "model.ffn": _ffn,
    "train.steps": _steps,
    "train.checkpoint_every": _checkpoint_every,
    "train.cpu_threads": _cpu_threads,
    "data.rebalance_every": _rebalance_every,
    "monitor.health_every": _health_every,
    "optim.lr": _lr,
    "optim.warmup_steps": _warmup,
    "optim.freeze_backbone_steps": _freeze_backbone,
}
OF_THIS_MACHINE = ("data.cache", "data.workers", "data.kind", "train.cpu_threads")  # where images lie, too
