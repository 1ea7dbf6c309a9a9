"""What a run's page says in words: what ran, how far it is, and how to use what it made."""

import math
import platform
from itertools import pairwise
from pathlib import Path

import torch

import dino
from dino.config.schema import Config
from dino.data import Pool
from dino.methods import METHODS
from dino.report.page import Code


def run_facts(config: Config, images: Pool, metrics: list[dict]) -> dict[str, str]:
    """What ran and how far it is, name to text."""
    model, views, train = config.model, config.views, config.train
    last = metrics[-1] if metrics else {"step": 0, "epoch": 0.0}
    sizes = [f"{model.arch}, patch {model.patch_size}"]
    sizes += [f"{name} {value}" for name, value in (("width", model.embed_dim), ("depth", model.depth)) if value]
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    progress = f"{last['step']:,} of {train.steps:,} at batch {train.batch_size}, {epochs_of(last):.1f} epochs"
    speed_text = "none logged yet"
    if speed := median_speed(metrics):
        speed_text = f"{speed:.0f} images/s (median)"
        progress += f"; {duration(elapsed(metrics, train.batch_size))} so far"
        left = (train.steps - last["step"]) * train.batch_size / speed
        progress += f", about {duration(left)} left" if left else ""
    facts = {
        "images": f"{len(images.names):,} from {config.data.root or config.data.kind}",
        "backbone": ", ".join(sizes),
        "views": f"2 global {views.global_size}²{local}, {views.preset}",
        **METHODS[config.objective.name].facts(config),
        "steps": progress,
        "speed": speed_text,
        "version": f"{dino.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
    }
    return facts | _loss_facts(config, last)


def _loss_facts(config: Config, last: dict) -> dict[str, str]:
    """The main loss, beside that of a student that predicts nothing."""
    name, curve = next(iter(METHODS[config.objective.name].watched(config).items()))
    if name not in last:
        return {"loss": "none logged yet"}
    blank = f" ({curve.blank:.2f} where nothing is predicted)" if curve.blank is not None else ""
    return {"loss": f"{last[name]:.4f}{blank}"}


def epochs_of(line: dict) -> float:
    """Passes over the images up to a line of metrics.jsonl; 0 where it tells of none that can be."""
    epochs = line.get("epoch", 0.0)
    return epochs if 1e-4 <= epochs < math.inf else 0.0  # it is written with four digits


def median_speed(metrics: list[dict]) -> float | None:
    """Images per second; None where no step is logged."""
    speeds = sorted(line["time/images_per_second"] for line in metrics if line.get("time/images_per_second"))
    return speeds[len(speeds) // 2] if speeds else None


def elapsed(metrics: list[dict], batch_size: int) -> float:
    """Seconds that the logged steps took, without reports and checkpoints, over all starts of a run."""
    lines = [{"step": 0}, *metrics]
    return sum(
        (line["step"] - before["step"]) * batch_size / line["time/images_per_second"]
        for before, line in pairwise(lines)
        if line.get("time/images_per_second") and line["step"] > before["step"]
    )


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    for length, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def use_it(run: Path) -> Code:
    """How to load the run's backbone."""
    text = f"""import dino

model = dino.load_backbone({str(run.absolute())!r})
class_tokens = model(model.preprocess(images))   # images: (B, C, H, W) uint8; tokens: (B, D)
patches = model.forward_features(model.preprocess(images))["x_norm_patchtokens"]   # (B, N, D)"""
    return Code("Use it", "", text)
