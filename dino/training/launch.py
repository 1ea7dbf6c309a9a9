"""Starts Accelerate as the launcher and the config say: processes, device, precision, CPU threads, seeds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from dino.config.schema import AUTO, Config, TrainConfig
from dino.distributed import forget_earlier_runs
from dino.errors import UserError
from dino.methods import Method
from dino.methods.network import Network
from dino.precision import inference_precision
from dino.tracking import check_trackers
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
    check_trackers(config.tracking.backends)
    forget_earlier_runs()
    accelerator = Accelerator(
        cpu=not has_accelerator,
        mixed_precision="no" if precision == "fp32" else precision,
    )
    if config.train.fsdp and precision == "fp16":
        raise UserError("train.fsdp cannot watch fp16 gradients for overflow: use train.precision=bf16 or fp32")
    parts = accelerator.num_processes * config.train.accumulation
    if config.train.batch_size % parts:
        below = max(parts, config.train.batch_size // parts * parts)
        raise UserError(
            f"train.batch_size={config.train.batch_size} cannot be shared equally by {accelerator.num_processes} "
            f"process(es) × {config.train.accumulation} micro-batch(es): use {below} or {below + parts}"
        )
    return accelerator


def choose_precision(asked: str, launcher: str | None, has_accelerator: bool) -> str:
    """fp32, bf16 or fp16.

    A launcher that was told nothing says `no`, which is therefore read as no wish.

    Raises:
        UserError: the config names another precision than the launcher.
    """
    launched = LAUNCHER_NAMES.get(launcher or "no", launcher)
    if launched is not None and asked not in (AUTO, "fastest", launched):
        raise UserError(
            f"train.precision={asked}, but the launcher was started with --mixed_precision {launched}: "
            "leave one of them out, or make them agree"
        )
    if asked == "fastest":
        own = inference_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        own = ("bf16" if has_accelerator else "fp32") if asked == AUTO else asked
    precision = launched or own
    if precision == "fp16" and not has_accelerator:
        raise UserError("train.precision=fp16 needs a GPU: use bf16 or fp32 on CPU")
    return precision


def precision_of(accelerator: Accelerator) -> str:
    """The precision that `start` settled on, by the name `train.precision` has for it."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def place(accelerator: Accelerator, method: Method, settings: TrainConfig) -> None:
    """Put all that a method keeps on this process's device; networks compiled or sharded where that is asked for."""
    for module in method.state().values():
        if isinstance(module, Network):
            _place_network(accelerator, module, settings)
        else:
            module.to(accelerator.device)


def _place_network(accelerator: Accelerator, network: Network, settings: TrainConfig) -> None:
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # statistics of all GPUs; replaces the parts in place
    if settings.compile:
        # A block has two graphs of a network and sizes of crops: one of all tokens and, the last, of what is asked for.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 4 * (len(settings.phases) + 1))
    for block in network.backbone.transformer_blocks:
        block.activation_checkpointing = settings.activation_checkpointing
        if settings.compile:
            # Block by block: the one compiled graph serves all of them, and start-up stays short.
            block.compile(dynamic=False)
    if settings.fsdp and accelerator.num_processes > 1:
        shard(network, accelerator)
    else:
        network.to(accelerator.device)


def prepare(accelerator: Accelerator, method: Method, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Wrap the student for the exchange of gradients, which a sharded one does itself; the optimizer as prepared."""
    method.autocast = accelerator.autocast
    if is_sharded(method.student):
        method.forward = method.student
        return accelerator.prepare(optimizer)
    method.forward, prepared = accelerator.prepare(method.student, optimizer)
    return prepared


@contextmanager
def process_state_kept() -> Iterator[None]:
    """CPU threads and random state are the program's again afterwards, whatever a run made of them."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def set_process_state(train: TrainConfig) -> None:
    """Give this process the CPU threads and the random state of a run."""
    torch.set_num_threads(train.cpu_threads)  # launchers ask for one
    torch.manual_seed(train.seed)  # all processes build their weights from it


def seed_process(seed: int, process: int) -> None:
    """Give stochastic depth a stream of its own in each process."""
    # CPython's hash of a pair of integers, which is the same everywhere: another seed would change runs that resume.
    torch.manual_seed(hash((seed, process)) & 0xFFFFFFFF)
