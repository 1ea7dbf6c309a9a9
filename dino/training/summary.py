"""The block that says, before the first step, what will run."""

from accelerate import Accelerator

from dino.config.auto import Pool
from dino.config.read import Config, get
from dino.methods.network import Network
from dino.run import RunDirectory
from dino.training.sharding import is_sharded


def objective_name(config: Config) -> str:
    """What is minimised, in words: DINO, and what is added to it."""
    objective = config.objective
    added = {"iBOT": objective.ibot_weight, "KoLeo": objective.koleo_weight}
    return " + ".join(["DINO", *(f"{weight:g} {name}" for name, weight in added.items() if weight)])


def summary(
    config: Config,
    pool: Pool,
    student: Network,
    accelerator: Accelerator,
    directory: RunDirectory,
    start: int,
    reasons: dict[str, str],
) -> str:
    """Images, steps, epochs, batch, networks, views, precision, checkpoints, and each `auto` value with its reason."""
    train, views, steps = config.train, config.views, int(config.train.steps)
    share = train.batch_size // (accelerator.num_processes * train.accumulation)
    whole, backbone = (sum(p.numel() for p in part.parameters()) for part in (student, student.backbone))
    device = accelerator.device.type.upper() + (
        f", {train.cpu_threads} threads" if accelerator.device.type == "cpu" else ""
    )
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    rows = {
        "images": f"{pool.images:,} ({config.data.kind}, {pool.channels} channel{'s'[: pool.channels - 1]})",
        "steps": f"{steps:,} = {steps * train.batch_size / pool.images:.4g} epochs"
        + (f", going on from step {start:,}" if start else ""),
        "global batch": f"{train.batch_size} = {accelerator.num_processes} process(es) × {train.accumulation} "
        f"micro-batch(es) × {share} images",
        "network": f"{config.model.arch}: {backbone / 1e6:.2f} M parameters, heads {(whole - backbone) / 1e6:.2f} M "
        f"({config.objective.prototypes} prototypes)",
        "objective": f"{objective_name(config)}, {config.objective.centering}",
        "views": f"2 global {views.global_size}²{local}, {views.preset}",
        "device": f"{device}, {train.precision}"
        + (f", sharded over {accelerator.num_processes} processes" if is_sharded(student) else ""),
        "checkpoints": f"every {train.checkpoint_every} steps in {directory.checkpoints}, the newest "
        f"{train.keep_checkpoints} kept",
    }
    lines = [f"{name:>13}  {text}" for name, text in rows.items()]
    if reasons:
        lines.append("set by auto:")
        lines += [f"  {key} = {get(config, key)}  ({reason})" for key, reason in reasons.items()]
    return "\n".join(lines)
