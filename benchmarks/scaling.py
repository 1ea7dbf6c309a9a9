"""What does a step cost, by batch, crops, prototypes, width, depth and processes? Seconds and bytes, as one picture.

    python benchmarks/scaling.py --out scaling.png
    python benchmarks/scaling.py model.arch=vit_small views.global_size=224 --out scaling.png --processes 1 2 4 8

One thing is changed at a time, from a small ViT on crops of noise (or what KEY=VALUE settings make of it). Times are
medians of steps; bytes are those kept for the backward pass, for each image.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kit
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from dino import cli
from dino.files import replacing
from dino.training.memory import Memory

BASE = {
    "views.global_size": 64,
    "views.local_size": 32,
    "views.local_crops": 4,
    "model.arch": "vit_tiny",
    "model.patch_size": 8,
    "model.depth": 6,
    "objective.prototypes": 4096,
    "train.batch_size": 16,
    "train.steps": 1000,
    "data.workers": 0,
}
AXES: dict[str, list[int]] = {
    "train.batch_size": [4, 8, 16, 32],
    "views.global_size": [32, 64, 96, 128],
    "views.local_crops": [0, 2, 4, 8],
    "objective.prototypes": [1024, 4096, 16_384, 65_536],
    "model.embed_dim": [96, 192, 384],
    "model.depth": [3, 6, 12],
}


def main() -> None:
    arguments = parse()
    base = BASE | dict(setting.split("=", 1) for setting in arguments.settings)
    if arguments.inside:
        print(json.dumps(measure(base, arguments.rounds)))
        return
    kit.begin(arguments)
    base["train.cpu_threads"] = arguments.threads
    curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for key, values in AXES.items():
        curves[key] = [
            (value, measure(base | heads_of(key, value) | {key: value}, arguments.rounds)) for value in values
        ]
        show(key, curves[key])
    if len(arguments.processes) > 1:
        curves["processes"] = [(count, measure_apart(count, base, arguments)) for count in arguments.processes]
        show("processes", curves["processes"])
    draw(curves, arguments.out)
    print(arguments.out)


def heads_of(key: str, value: int) -> dict[str, int]:
    """A width brings its heads of 64 numbers, or of 32 where it is narrow."""
    return {"model.num_heads": value // (64 if value >= 192 else 32)} if key == "model.embed_dim" else {}


def measure(settings: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds of a step and bytes kept for each image of it."""
    trainer = kit.build_trainer(settings, kit.Noise(64, 64))
    config, device = trainer.config, trainer.accelerator.device
    micro_batches = kit.random_crops(config, device)
    estimate = Memory(trainer.take_step).estimate(micro_batches, 0)
    steps = iter(range(config.train.steps))
    seconds = kit.alternate({"step": lambda: trainer.take_step(next(steps), micro_batches)}, rounds, device)["step"]
    return {"seconds": float(np.median(seconds)), "bytes": estimate.fixed / estimate.images + estimate.of_image}


def measure_apart(processes: int, base: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """The same by several processes, which share the batch."""
    settings = [f"{key}={value}" for key, value in base.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29511"]
    options = [__file__, "--inside", f"--rounds={arguments.rounds}", f"--out={arguments.out}", *settings]
    done = subprocess.run([*launcher, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(key: str, curve: list[tuple[int, dict[str, float]]]) -> None:
    """A table of an axis."""
    rows = [[value, kit.number(1000 * of["seconds"]), kit.number(of["bytes"] / 1e6)] for value, of in curve]
    kit.print_table(key, ["ms a step", "MB kept for each image"], rows)


def draw(curves: dict[str, list[tuple[int, dict[str, float]]]], out: Path) -> None:
    """Seconds above, bytes below, an axis in each column; both scales are logarithmic, so that a line is a power."""
    figure, axes = plt.subplots(2, len(curves), figsize=(3 * len(curves), 6), squeeze=False, sharey="row")
    for column, (key, curve) in enumerate(curves.items()):
        values = [max(value, 0.5) for value, _ in curve]
        for row, (what, title) in enumerate((("seconds", "seconds a step"), ("bytes", "MB kept for each image"))):
            axis = axes[row, column]
            scale = 1e6 if what == "bytes" else 1.0
            axis.plot(values, [of[what] / scale for _, of in curve], marker="o", color="#2a6f97")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(values, [str(value) for value, _ in curve])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(visible=True, alpha=0.3)
            axis.set_xlabel(key)
            if column == 0:
                axis.set_ylabel(title)
    figure.tight_layout()
    with replacing(out) as partial, partial.open("wb") as file:
        figure.savefig(file, format="png", dpi=100)


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__, rounds=5, official=False)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the run from which one thing is changed")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="also by so many processes")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    cli.run(main)
