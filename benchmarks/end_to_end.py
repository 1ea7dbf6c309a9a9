"""How much of the step's speed is left when its images come from files? The step alone, the views alone, and both.

    python benchmarks/end_to_end.py --data photographs/ --threads 2
    python benchmarks/end_to_end.py --data photographs/ --recipe dino_vits16_imagenet_100ep train.batch_size=128

Times are those of the clock, over as many steps as --rounds says, after as many that fill the workers' queues. Without
--data, JPEGs of 500×375 are made first.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kit
import numpy as np
import torch
from torch import Tensor
from views import photographs

from dino import cli
from dino.training.loader import Batches

WAYS = ("step alone", "views alone", "both")


def main() -> None:
    arguments = parse()
    device = kit.begin(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or photographs(Path(folder))
        settings = {"data.cache": "none"} | dict(setting.split("=", 1) for setting in arguments.settings)
        settings |= {"data.root": str(data), "train.cpu_threads": arguments.threads}
        settings["train.steps"] = 10 * arguments.rounds
        trainer = kit.build_trainer(settings, recipe=arguments.recipe)
        config, batch = trainer.config, trainer.config.train.batch_size
        stored = kit.random_crops(config, device)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(3):  # of each way, one after the other
            for name in WAYS:
                first = turn * 2 * arguments.rounds
                steps = batches_of(trainer, first, 2 * arguments.rounds) if name != "step alone" else None
                act = (lambda *_: None) if name == "views alone" else trainer.take_step
                seconds[name].append(timed(steps, stored, act, first, arguments.rounds, device))
        title = f"{config.model.arch}, batch {batch}, {config.data.workers} workers, images"
        kit.show(title, {name: np.array(taken) for name, taken in seconds.items()}, items=batch)


def batches_of(trainer: kit.Trainer, first: int, count: int) -> Iterator[list[list[Tensor]]]:
    """The micro-batches of some steps, from files."""
    batches = Batches(trainer.config, trainer.images, trainer.accelerator, first, first + count, directory=None)
    return iter(batches)


def timed(
    batches: Iterator[list[list[Tensor]]] | None,
    stored: list[list[Tensor]],
    act: Callable[[int, list[list[Tensor]]], object],
    first: int,
    rounds: int,
    device: torch.device,
) -> float:
    """Seconds of a step, on average over `rounds`, after as many before."""
    for step in range(first, first + 2 * rounds):
        if step == first + rounds:
            kit.wait(device)
            began = time.perf_counter()
        act(step, stored if batches is None else next(batches))
    kit.wait(device)
    return (time.perf_counter() - began) / rounds


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__, rounds=10, official=False)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--data", help="folder or zip archive of photographs")
    parser.add_argument("--recipe", help="a recipe's name or file; else the defaults")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    cli.run(main)
