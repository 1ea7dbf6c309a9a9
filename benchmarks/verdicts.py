"""Does the verdict cry wolf, and does it see what is wrong? Small healthy runs, and failures that are provoked.

    python benchmarks/verdicts.py readings.jsonl --data path/to/data      # train, record, judge
    python benchmarks/verdicts.py readings.jsonl                            # judge once more what was recorded

Healthy: data sets × methods × widths × lengths, of which no measure may be called wrong. Failures: the first tenth of a
run of 1,000 steps, in which what is wrong is to be named. A line of readings.jsonl holds a run's settings and all its
measures, so that ranges can be changed and judged again without training.
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import dino
from dino.config.read import read
from dino.config.schema import Config
from dino.monitor.verdict import Verdict, judge, measured_lines
from dino.report.run import Reporter
from dino.training.metrics import Metrics

TENTH = 100  # steps, of the 1,000 that failures are said to take
COMMON = {  # a small network that learns in a few hundred steps, as configs/demo.yaml has it
    "data.workers": 0,
    "views.local_crops": 0,
    "model.arch": "vit_tiny",
    "model.depth": 2,
    "model.num_heads": 4,
    "model.drop_path": 0.0,
    "model.weight_init": "fan_in",
    "objective.prototypes": 512,
    "objective.head_hidden": 256,
    "objective.head_bottleneck": 64,
    "objective.teacher_temperature": 0.03,
    "objective.teacher_temperature_start": 0.03,
    "objective.teacher_momentum": 0.95,
    "objective.teacher_momentum_end": 0.95,
    "optim.lr": 0.0005,
    "optim.weight_decay_end": 0.04,
    "train.batch_size": 32,
    "train.cpu_threads": 1,
    "train.checkpoint_every": 100_000,
    "monitor.log_every": 10,
    "monitor.health_every": 10,
}
LINE_ART = {"views.preset": "line_art", "views.affine": 0.5}
DIGITS = LINE_ART | {"views.global_size": 16, "views.global_scale": [0.6, 1.0], "model.patch_size": 4}
DRAWINGS = LINE_ART | {
    "views.mean": [0.92],
    "views.std": [0.27],
    "views.global_size": 40,
    "views.global_scale": [0.5, 1.0],
    "model.patch_size": 8,
}
PHOTOS = {"views.preset": "dino", "views.global_size": 40, "views.global_scale": [0.4, 1.0], "model.patch_size": 8}
DINO = {"objective.centering": "sinkhorn"}
DINOV2 = DINO | {"objective.ibot_weight": 1.0, "objective.koleo_weight": 0.1}
CENTER = {"objective.centering": "center"}
SETS = {  # archive (empty: scikit-learn's digits), images, channels, settings
    "digits": ("", 1797, 1, DIGITS),
    "omniglot-320": ("omniglot_images_background.zip", 320, 1, DRAWINGS),
    "omniglot-2000": ("omniglot_images_background.zip", 2000, 1, DRAWINGS),
    "caltech-320": ("caltech101_128px.zip", 320, 3, PHOTOS),
    "caltech-1500": ("caltech101_128px.zip", 1500, 3, PHOTOS),
    "cifar-2000": ("cifar10_jpeg.zip", 2000, 3, PHOTOS),
}
HEALTHY: list[tuple[str, dict[str, Any], int, int]] = [  # data set, method, width, steps
    ("digits", DINO, 96, 1000),
    ("caltech-320", DINO, 96, 120),
    ("omniglot-320", DINO, 96, 120),
    ("cifar-2000", DINO, 96, 120),
    ("digits", DINO, 32, 200),
    ("digits", DINOV2, 64, 200),
    ("digits", CENTER, 96, 200),
    ("caltech-320", DINOV2, 96, 120),
    ("omniglot-2000", DINO, 192, 120),
    ("caltech-1500", CENTER, 64, 120),
    ("cifar-2000", DINOV2, 32, 120),
    ("digits", DINO, 192, 400),
    ("omniglot-320", DINOV2, 64, 1000),
    ("caltech-1500", DINO, 192, 120),
    ("omniglot-2000", CENTER, 96, 120),
    ("cifar-2000", CENTER, 64, 120),
    ("digits", DINOV2, 192, 120),
    ("caltech-320", CENTER, 32, 120),
    ("omniglot-320", CENTER, 32, 120),
    ("cifar-2000", DINO, 192, 1000),
    ("digits", CENTER, 32, 1000),
    ("caltech-1500", DINOV2, 96, 1000),
]
NOT_ASKED = "not asked"
HOT = {"objective.teacher_temperature": 0.5, "objective.teacher_temperature_start": 0.5}
NO_AVERAGE = {"objective.teacher_momentum": 0.0, "objective.teacher_momentum_end": 0.0}
UNCENTERED = {"objective.centering": "center", "objective.center_momentum": 1.0}
FAILURES: dict[str, tuple[str, dict[str, Any], str]] = {  # data set, settings, what is to be said
    "temperature too high": ("digits", HOT, "teacher_temperature"),
    "no centring": ("digits", UNCENTERED, "center_momentum"),
    "momentum 0": ("digits", NO_AVERAGE, "teacher_momentum"),
    "rate × 30": ("digits", {"optim.lr": 0.015, "optim.warmup_steps": 0}, "optim.lr"),
    "one repeated image": ("repeated", {}, "alike"),
    "blank images": ("blank", {}, "alike"),
    "labels of one class": ("one-class", {}, NOT_ASKED),
    "prototypes 2": ("digits", {"objective.prototypes": 2}, "prototypes"),
}


class Enough(Exception):
    """A tenth of the run is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readings", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the three archives; without it nothing is trained")
    arguments = parser.parse_args()
    if arguments.data:
        record(arguments.readings, arguments.data)
    show(arguments.readings)


def record(readings: Path, archives: Path) -> None:
    """Train what is not in the file yet, and add a line for each run."""
    known = {json.loads(line)["name"] for line in readings.read_text().splitlines()} if readings.exists() else set()
    with tempfile.TemporaryDirectory() as scratch:
        for name, images, settings, steps, expected in runs():
            if name not in known:
                root, own = data_settings(images, archives, Path(scratch))
                run = train(root, Path(scratch) / f"run-{len(name)}-{abs(hash(name))}", own | settings, steps)
                line = {"name": name, "expected": expected, "data": images, "steps": steps, **run}
                with readings.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def runs() -> Iterator[tuple[str, str, dict[str, Any], int, str]]:
    """Name, data set, settings, steps and what is to be said; nothing of a healthy one."""
    for name, (images, settings, expected) in FAILURES.items():
        yield name, images, DINO | {"model.embed_dim": 96} | settings, 1000, expected
    for images, method, width, steps in HEALTHY:
        title = "DINOv2" if method is DINOV2 else "DINO, center" if method is CENTER else "DINO"
        yield f"{images}, {title}, width {width}, {steps} steps", images, method | {"model.embed_dim": width}, steps, ""


def data_settings(name: str, archives: Path, scratch: Path) -> tuple[str, dict[str, Any]]:
    """Where images are, and how they are read."""
    if name in ("repeated", "blank", "one-class"):
        return str(made_up(name, scratch / name)), PHOTOS | {"data.channels": 3}
    archive, count, channels, views = SETS[name]
    if not archive:
        return "", views | {"data.kind": "digits"}
    folder = scratch / name
    if not folder.exists():
        with zipfile.ZipFile(archives / archive) as opened:
            names = sorted(entry for entry in opened.namelist() if entry.lower().endswith((".png", ".jpg")))
            folder.mkdir()
            for index in np.linspace(0, len(names) - 1, count).astype(int):  # without classes, as most pools are
                (folder / f"{index:06d}{Path(names[index]).suffix}").write_bytes(opened.read(names[index]))
    return str(folder), views | {"data.channels": channels}


def made_up(name: str, folder: Path) -> Path:
    """400 images from which nothing can be learned, or that have one class."""
    generator = np.random.default_rng(0)
    once = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for index in range(400):
        pixels = {"repeated": once, "blank": np.full_like(once, 255)}.get(name)
        if pixels is None:
            pixels = np.kron(generator.integers(0, 256, (5, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        path = folder / "pears" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def train(root: str, run: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """All measures of a run, its config and the images' number; of a run of 1,000 steps the first tenth."""
    log = Metrics.log

    def until_a_tenth(self: Metrics, step: int, *parts: Any) -> Any:
        line = log(self, step, *parts)
        if steps == 1000 and step >= TENTH:
            raise Enough
        return line

    patched = (mock.patch.object(Metrics, "log", until_a_tenth), mock.patch.object(Reporter, "write", return_value={}))
    with patched[0], patched[1], contextlib.suppress(Enough, dino.UserError):
        dino.train(root or None, run, **COMMON | settings | {"train.steps": steps})
    opened = dino.Run(run)
    lines = measured_lines(opened.metrics)
    return {"config": dataclasses.asdict(opened.config), "lines": lines, "width": settings["model.embed_dim"]}


def show(readings: Path) -> None:
    """What the verdict says of each run, at each measure."""
    alarms = missed = 0
    for text in readings.read_text().splitlines():
        run = json.loads(text)
        config = config_of(run["config"])
        lines = run["lines"]
        said = [(line["step"], judge(lines[: index + 1], config, run["width"])) for index, line in enumerate(lines)]
        wrong = [(step, verdict) for step, verdict in said if verdict.advice]
        if not run["expected"]:
            alarms += bool(wrong)
            outcome = f"false alarm at step {wrong[0][0]}: {wrong[0][1].state}" if wrong else "no alarm"
        else:
            right = [(step, v) for step, v in wrong if run["expected"] in v.advice and step <= run["steps"] / 10]
            outcome = f"named at step {right[0][0]}: {right[0][1].state}" if right else f"missed: {said[-1:]}"
            if run["expected"] == NOT_ASKED:  # always right would look like success: it must not be shown at all
                right = [] if any("health/knn" in line for line in lines) else [(0, Verdict())]
                outcome = "neighbours are not asked for the class" if right else "neighbours are asked for the class"
            missed += not right
        print(f"{run['name']:45} {outcome}")
    print(f"false alarms: {alarms}; failures not named: {missed}")


def config_of(values: dict[str, dict[str, Any]]) -> Config:
    settings = {f"{group}.{key}": value for group, keys in values.items() for key, value in keys.items()}
    return read(Config, None, settings)


if __name__ == "__main__":
    main()
