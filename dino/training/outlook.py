"""What a run says once its speed is known: memory, time to the end, and what would make it shorter."""

import torch

from dino.config.schema import Config
from dino.report.facts import duration
from dino.training.memory import most_in_use

LONG = 12 * 3600  # seconds
WAITING = 0.3  # of the time, above which data is what a run waits for


def outlook(config: Config, step: int, speed: float, waiting: float, device: torch.device) -> str:
    """For the terminal.

    Args:
        step: optimizer steps taken so far.
        speed: images per second.
        waiting: fraction of the time that is spent waiting for data.
    """
    left = (config.train.steps - step) * config.train.batch_size / speed
    sentences = [f"{most_in_use(device)}, {duration(left)} to the end"]
    if left > LONG:
        ways = ["fewer train.epochs", "smaller views.global_size and views.local_size", "a smaller model.arch"]
        if config.views.local_crops:
            ways.append("fewer views.local_crops")
        sentences.append(f"shorter by {', '.join(ways)}")
    if waiting > WAITING:
        sentences.append(
            f"{waiting:.0%} of the time waits for images: more data.workers, smaller files, or data.cache=device"
        )
    return "; ".join(sentences)
