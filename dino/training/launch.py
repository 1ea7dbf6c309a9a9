"""Starts Accelerate as the launcher and the config say: processes, device, precision, CPU threads, seeds."""

import os
from collections.abc import Iterable
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from dino.config.read import AUTO, Config
from dino.config.schema import TrainConfig
from dino.errors import UserError
from dino.methods.network import Network
from dino.models import VisionTransformer
from dino.models.layers import Block
from dino.training.sharding import is_sharded, shard

LAUNCHER_NAMES = {"no": None, "fp16": "fp16", "bf16": "bf16"}


def start(config: Config) -> Accelerator:
    """The Accelerator of this process.

    Raises:
        UserError: precision against the launcher's or the device, unknown tracker, or a batch that the processes and
            micro-batches cannot share equally.
    """
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    precision = choose_precision(config.train.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"), has_accelerator)
    accelerator = Accelerator(
        cpu=not has_accelerator,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=_trackers(config.tracking.backends),
        project_dir=config.run.dir,
    )
    if config.train.shard and precision == "fp16":
        raise UserError("train.shard cannot watch fp16 gradients for overflow: use train.precision=bf16 or fp32")
    shares = accelerator.num_processes * config.train.accumulation
    if config.train.batch_size % shares:
        below = max(shares, config.train.batch_size // shares * shares)
        raise UserError(
            f"train.batch_size={config.train.batch_size} cannot be shared equally by {accelerator.num_processes} "
            f"process(es) × {config.train.accumulation} micro-batch(es): use {below} or {below + shares}"
        )
    return accelerator


def choose_precision(wanted: str, launcher: str | None, has_accelerator: bool) -> str:
    """fp32, bf16 or fp16.

    A launcher that was told nothing says `no`, which is therefore read as no wish.

    Raises:
        UserError: the config names another precision than the launcher.
    """
    launched = LAUNCHER_NAMES.get(launcher or "no", launcher)
    if launched is not None and wanted not in (AUTO, launched):
        raise UserError(
            f"train.precision={wanted}, but the launcher was started with --mixed_precision {launched}: "
            "leave one of them out, or make them agree"
        )
    precision = launched or (wanted if wanted != AUTO else ("bf16" if has_accelerator else "fp32"))
    if precision == "fp16" and not has_accelerator:
        raise UserError("train.precision=fp16 needs a GPU: use bf16 or fp32 on CPU")
    return precision


def place(
    accelerator: Accelerator, networks: tuple[Network, Network], settings: TrainConfig
) -> tuple[Network, Network]:
    """Networks on this process's device, if asked compiled or sharded; BatchNorm takes its statistics over all GPUs."""
    student, teacher = networks
    sharded = settings.shard and accelerator.num_processes > 1
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        student, teacher = (nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks)
    for network in (student, teacher):
        if isinstance(network.backbone, VisionTransformer):
            for block in cast(Iterable[Block], network.backbone.blocks):
                block.recompute = settings.checkpoint_blocks
                if settings.compile:
                    # Block by block: the one compiled graph serves all of them, and start-up stays short.
                    block.compile(dynamic=False)
        if sharded:
            shard(network, accelerator)
        else:
            network.to(accelerator.device)
    return student, teacher


def prepare(
    accelerator: Accelerator, student: Network, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both as Accelerate wants them; a sharded student exchanges gradients itself."""
    if is_sharded(student):
        return student, accelerator.prepare(optimizer)
    return accelerator.prepare(student, optimizer)


def precision_of(accelerator: Accelerator) -> str:
    """The precision that `start` settled on, by the name `train.precision` has for it."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def set_threads_and_seed(config: Config) -> None:
    """CPU threads of this process (launchers ask for one), and the seed that all processes build their weights from."""
    torch.set_num_threads(int(config.train.cpu_threads))
    torch.manual_seed(config.train.seed)


def seed_process(seed: int, process: int) -> None:
    """Give stochastic depth a stream of its own in each process."""
    torch.manual_seed(hash((seed, process)) & 0xFFFFFFFF)


def _trackers(names: list[str]) -> list[str] | None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"unknown tracker '{name}' in tracking.backends: choose of {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            raise UserError(f"tracking.backends asks for {name}, which is not installed: pip install {name}")
    return names or None
