"""`auto` settings, resolved once from the data set and the batch, each with its reason."""

import copy
import dataclasses
import math
from collections.abc import Callable

import torch

from dino.config.read import AUTO, Config, assign, get, leaves
from dino.distributed import allowed_cores
from dino.errors import UserError

SMALL = 100_000  # images; below, what is published for ImageNet (1.28 M) hardly learns (benchmarks/RESULTS.md)


@dataclasses.dataclass(frozen=True)
class Pool:
    """What the rules ask of the data: images an epoch, of how many channels, how read, and all their bytes decoded."""

    images: int
    channels: int
    kind: str
    bytes: int = 0


def resolve(config: Config, pool: Pool, local_processes: int = 1) -> tuple[Config, dict[str, str]]:
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
    for key, rule in RULES.items():
        if get(resolved, key) in (AUTO, None):
            value, reason = rule(resolved, pool, local_processes)
            assign(resolved, key, value)
            reasons[key] = reason
    if (resolved.data.cache, resolved.views.backend) == ("device", "workers"):
        raise UserError("with views.backend=workers, data.cache=device is of no use: leave one of them out")
    for key in ("views.mean", "views.std"):
        if len(get(resolved, key)) != pool.channels:
            raise UserError(
                f"{key}={get(resolved, key)} must have one value a channel: these images have {pool.channels}"
            )
    return resolved, reasons


def keep_resolved(config: Config, earlier: Config) -> Config:
    """Take over what an earlier start of the same run resolved, so that `auto` means the same when it is resumed."""
    kept = copy.deepcopy(config)
    for key, _ in leaves():
        follows_epochs = key == "train.steps" and config.train.epochs != earlier.train.epochs
        if key in RULES and key not in OF_THIS_MACHINE and get(config, key) in (AUTO, None) and not follows_epochs:
            assign(kept, key, get(earlier, key))
    return kept


def _kind(config: Config, pool: Pool, _: int) -> tuple[str, str]:
    return pool.kind, "by what data.root is"


def _channels(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    return pool.channels, f"{pool.kind} images"


def _cache(config: Config, pool: Pool, _: int) -> tuple[str, str]:
    if config.views.backend == "workers":
        return "none", "views are made by workers"
    room = torch.cuda.get_device_properties(0).total_memory // 10 if torch.cuda.is_available() else 2**30
    fits = "at most" if pool.bytes <= room else "more than"
    reason = f"{pool.bytes / 2**20:,.0f} MiB decoded, {fits} {room / 2**30:.0f} GiB"
    return ("device" if pool.bytes <= room else "none"), reason


def _mean(config: Config, pool: Pool, _: int) -> tuple[list[float], str]:
    return ([0.485, 0.456, 0.406], "ImageNet's") if pool.channels == 3 else ([0.5] * pool.channels, "middle of range")


def _std(config: Config, pool: Pool, _: int) -> tuple[list[float], str]:
    return ([0.229, 0.224, 0.225], "ImageNet's") if pool.channels == 3 else ([0.5] * pool.channels, "half the range")


def _ffn(config: Config, pool: Pool, _: int) -> tuple[str, str]:
    return ("swiglu" if config.model.arch == "vit_giant2" else "mlp"), f"as published for {config.model.arch}"


def _steps(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    steps = max(1, round(config.train.epochs * pool.images / config.train.batch_size))
    return steps, f"{config.train.epochs:g} epochs of {pool.images:,} images in batches of {config.train.batch_size}"


def _prototypes(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    nearest = 2 ** round(math.log2(pool.images / 20))
    return min(65536, max(256, nearest)), f"one per 20 of {pool.images:,} images (65,536 for ImageNet), power of two"


def _centering(config: Config, pool: Pool, _: int) -> tuple[str, str]:
    if pool.images < SMALL:
        return "sinkhorn", f"{pool.images:,} images: on small sets EMA centring hardly learns"
    return "centre", "as published for DINO"


def _teacher_temperature(config: Config, pool: Pool, _: int) -> tuple[float, str]:
    if pool.images < SMALL:
        return 0.04, f"{pool.images:,} images: as DINO's 100-epoch recipe, without the rise to 0.07"
    return 0.07, "as DINO's 300-epoch recipe"


def _temperature_warmup(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    return int(config.train.steps) // 10, "10 % of the run (DINO: 30 of 300 epochs)"


def _momentum(config: Config, pool: Pool, _: int) -> tuple[float, str]:
    per_step = 5 * config.train.batch_size / pool.images
    return round(1 - min(0.1, max(0.0005, per_step)), 6), "memory of a fifth of an epoch (DINO: 0.996 at batch 1024)"


def _momentum_end(config: Config, pool: Pool, _: int) -> tuple[float, str]:
    if pool.images < SMALL:
        return float(config.objective.momentum), "constant: on a small set a teacher that stops moving stops learning"
    return 1.0, "as published"


def _lr(config: Config, pool: Pool, _: int) -> tuple[float, str]:
    batch = config.train.batch_size
    if config.model.init is not None and config.optim.name == "adamw":
        return round(1e-4 * math.sqrt(batch / 512), 8), f"1e-4 · √({batch} / 512): a tenth, the backbone is trained"
    if config.optim.name == "sgd":
        return round(0.03 * batch / 256, 8), f"0.03 · {batch} / 256 (DINO's ResNet-50)"
    return round(1e-3 * math.sqrt(batch / 512), 8), f"1e-3 · √({batch} / 512) (DINO: 1e-3 at batch 512)"


def _warmup(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    ten_epochs = 10 * pool.images // config.train.batch_size
    return min(ten_epochs, int(config.train.steps) // 10), "10 epochs, at most 10 % of the run"


def _freeze(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    return min(
        pool.images // config.train.batch_size, int(config.train.steps) // 10
    ), "1 epoch, at most 10 % of the run"


def _freeze_backbone(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    if config.model.init is None:
        return 0, "the backbone is as new as the heads"
    return min(1000, int(config.train.steps) // 10), "new heads would pull a trained backbone apart"


def _checkpoint_every(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    return max(1, min(1000, int(config.train.steps) // 10)), "10 a run, at most 1000 steps apart"


def _rebalance_every(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    return max(1, round(pool.images / config.train.batch_size)), "1 epoch"


def _health_every(config: Config, pool: Pool, _: int) -> tuple[int, str]:
    every = config.monitor.log_every
    return every * max(1, round(min(100, int(config.train.steps) / 100) / every)), "100 a run, at most 100 steps apart"


def _cpu_threads(config: Config, pool: Pool, local_processes: int) -> tuple[int, str]:
    return max(1, allowed_cores() // local_processes), f"{allowed_cores()} cores / {local_processes} process(es)"


def _workers(config: Config, pool: Pool, local_processes: int) -> tuple[int, str]:
    if config.data.cache == "device":
        return 0, "the images are on the device"
    cores = max(1, allowed_cores() // local_processes)
    if torch.cuda.is_available():
        return min(16, cores), f"{cores} cores for each process"
    return max(1, cores // 4), "training itself needs the cores"


Rule = Callable[[Config, Pool, int], tuple[object, str]]
RULES: dict[str, Rule] = {  # in order: later rules read what earlier ones resolved
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
    "objective.prototypes": _prototypes,
    "objective.centering": _centering,
    "objective.teacher_temperature": _teacher_temperature,
    "objective.teacher_temperature_warmup": _temperature_warmup,
    "objective.momentum": _momentum,
    "objective.momentum_end": _momentum_end,
    "optim.lr": _lr,
    "optim.warmup_steps": _warmup,
    "optim.freeze_last_layer_steps": _freeze,
    "optim.freeze_backbone_steps": _freeze_backbone,
}
OF_THIS_MACHINE = ("data.cache", "data.workers", "train.cpu_threads")
