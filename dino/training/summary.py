"""The block that says, before the first step, what will run."""

from accelerate import Accelerator

from dino.config.auto import PoolFacts
from dino.config.read import get
from dino.config.schema import Config
from dino.methods import Method
from dino.run import RunDirectory
from dino.training.sharding import is_sharded


def summary(
    config: Config,
    pool: PoolFacts,
    method: Method,
    accelerator: Accelerator,
    directory: RunDirectory,
    start: int,
    reasons: dict[str, str],
) -> str:
    """Images, steps, epochs, batch, networks, views, precision, checkpoints, and each `auto` value with its reason."""
    train, steps = config.train, config.train.steps
    per_process = train.batch_size // (accelerator.num_processes * train.accumulation)
    channels = "1 channel" if pool.channels == 1 else f"{pool.channels} channels"
    resumed = f", going on from step {start:,}" if start else ""
    rows = {
        "images": f"{pool.images:,} ({config.data.kind}, {channels})",
        "steps": f"{steps:,} = {steps * train.batch_size / pool.images:.4g} epochs{resumed}",
        "global batch": f"{train.batch_size} = {accelerator.num_processes} process(es) × {train.accumulation} "
        f"micro-batch(es) × {per_process} images",
        "network": network_text(config, method),
        **method.facts(config),
        "views": views_text(config),
        "device": device_text(config, method, accelerator),
        "checkpoints": f"every {train.checkpoint_every} steps in {directory.checkpoints}, the newest "
        f"{train.keep_checkpoints} kept",
    }
    lines = [f"{name:>13}  {text}" for name, text in rows.items()]
    if reasons:
        lines.append("set by auto:")
        lines += [f"  {key} = {get(config, key)}  ({reason})" for key, reason in reasons.items()]
    return "\n".join(lines)


def network_text(config: Config, method: Method) -> str:
    """Backbone and heads with their parameters."""
    whole = sum(parameter.numel() for parameter in method.student.parameters())
    backbone = sum(parameter.numel() for parameter in method.student.backbone.parameters())
    return f"{config.model.arch}: {backbone / 1e6:.2f} M parameters, heads {(whole - backbone) / 1e6:.2f} M"


def views_text(config: Config) -> str:
    """Number and size of crops."""
    views = config.views
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    return f"2 global {views.global_size}²{local}, {views.preset}"


def device_text(config: Config, method: Method, accelerator: Accelerator) -> str:
    """Device, precision, and what is special about the processes."""
    parts = [accelerator.device.type.upper()]
    if accelerator.device.type == "cpu":
        parts.append(f"{config.train.cpu_threads} threads")
    parts.append(config.train.precision)
    if is_sharded(method.student):
        parts.append(f"sharded over {accelerator.num_processes} processes")
    return ", ".join(parts)
