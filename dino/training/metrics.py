"""What a run says of itself while it trains: metrics.jsonl, the trackers and the progress bar, by the same names."""

import json
import os
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dino.config.read import get, leaves
from dino.config.schema import Config
from dino.data.manifest import is_manifest
from dino.files import append_text
from dino.methods import METHODS
from dino.models.weights import BACKBONE_FILE
from dino.monitor.health import Health
from dino.monitor.verdict import Verdict, judge, measured_lines
from dino.report.comparison import BEST
from dino.run import RunDirectory
from dino.tracking import Trackers
from dino.training.outlook import outlook

T = TypeVar("T")


class Metrics:
    """Averages device scalars between log points and writes them there; the host waits for the device only then.

    Args:
        width: of the class token.
        start: step from which this process goes on.
    """

    def __init__(self, accelerator: Accelerator, config: Config, directory: RunDirectory, width: int, start: int):
        self.accelerator, self.config, self.directory, self.width = accelerator, config, directory, width
        self.main_loss = next(iter(METHODS[config.objective.name].watched(config)))
        lines = directory.read_metrics()
        self.measured = measured_lines(lines)
        self.verdict = Verdict(self.measured[-1].get("health/verdict", "") if self.measured else "")
        self.sums: dict[str, Tensor] = {}
        self.noted: dict[str, float] = {}
        self.count, self.waited, self.since = 0, 0.0, time.perf_counter()
        self.lines = 0  # that this process has written
        settings = {key: get(config, key) for key in leaves(config)}
        self.trackers = Trackers(accelerator, config.tracking, directory.path, settings, "pre-training", start)
        self.trackers.catch_up(lines)
        if is_manifest(config.data.root):
            self.trackers.uses("manifest", Path(config.data.root).parent)
        self.bar = tqdm(
            total=config.train.steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process,
            mininterval=0.5 if os.isatty(2) else 10.0,
        )

    def timing(self, batches: Iterable[T]) -> Generator[T, None, None]:
        """The same batches; counts the time spent waiting for them."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's scalars; they stay on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        self.bar.update()

    def note(self, values: dict[str, float]) -> None:
        """Take what the host knows; it is written with the next line."""
        self.noted |= values

    def begin(self, indicators: dict[str, float]) -> None:
        """Write what the run begins with, weights that are trained already, as step 0."""
        line: dict[str, Any] = {"step": 0, "epoch": 0.0, **indicators}
        self.measured.append(line)
        self._write(line)
        self.trackers.log(indicators, 0)
        self.since = time.perf_counter()

    def log(self, step: int, epoch: float, rates: dict[str, float], health: Health) -> dict[str, Any]:
        """Average over steps and processes, and write one line everywhere; gives that line.

        Args:
            step: optimizer steps taken so far.
            epoch: passes over the images so far.
            rates: values of this step that the host knows: the schedules'.
            health: asked for its indicators where they are due.
        """
        averages = self._averages()  # waits for the device
        began = time.perf_counter()
        indicators = health.measure(step) if health.is_due(step) else {}
        now = time.perf_counter()
        elapsed = now - self.since
        line: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            **averages,
            **rates,
            **indicators,
            **self.noted,
            "time/images_per_second": round(self.count * self.config.train.batch_size / elapsed, 2),
            "time/data_wait": round(self.waited / elapsed, 4),
        }
        if indicators:
            line["time/health"] = round((now - began) / elapsed, 4)
            self._judge(line)
        self.sums, self.noted, self.count, self.waited, self.since = {}, {}, 0, 0.0, now
        self._write(line)
        self.lines += 1
        if self.lines == 2:  # the first steps were slower
            speed, waiting = line["time/images_per_second"], line["time/data_wait"]
            self._say(f"step {step}: {outlook(self.config, step, speed, waiting, self.accelerator.device)}")
        self.bar.set_postfix_str(
            f"loss {line[self.main_loss]:.4f}, {self.verdict.state or 'starting'}, "
            f"{line['time/images_per_second']:.0f} images/s, {line['time/data_wait']:.0%} waiting for data",
            refresh=False,
        )
        self.trackers.log({name: value for name, value in line.items() if name != "step"}, step)
        return line

    def show(self, step: int, pictures: dict[str, bytes]) -> None:
        """Send pictures (PNG), by name, to W&B, if it is a tracker."""
        self.trackers.pictures({f"pictures/{name}": png for name, png in pictures.items()}, step)

    def hand_over(self, facts: dict[str, Any]) -> None:
        """Send the backbone of a run that is done to W&B, with what it was best at, if it is a tracker.

        Args:
            facts: of the training, for the artifact's metadata.
        """
        if not self.config.tracking.artifacts:
            return
        folder = self.directory.path
        files = [file for file in (folder / BACKBONE_FILE, folder / "best" / BACKBONE_FILE) if file.is_file()]
        lines = self.directory.read_metrics()
        values = {name: [line[name] for line in lines if name in line] for name in BEST}
        best = {f"best/{name}": max(of_name) for name, of_name in values.items() if of_name}
        self.trackers.artifact("model", "backbone", files, facts | best)

    def _averages(self) -> dict[str, float]:
        """Means over the steps since the last line, and over processes."""
        names = sorted(self.sums)
        sums = torch.stack([self.sums[name].float() for name in names])
        means = self.accelerator.reduce(sums, "mean") / self.count
        return dict(zip(names, means.tolist(), strict=True))

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append_text(self.directory.metrics, json.dumps(line) + "\n")

    def _judge(self, line: dict[str, Any]) -> None:
        """Put the verdict into the line, and say so where it has changed."""
        self.measured.append(line)
        verdict = judge(self.measured, self.config, self.width)
        if verdict.state != self.verdict.state:
            text = f"{verdict.state}: {verdict.advice}" if verdict.advice else verdict.state
            self._say(f"step {line['step']}: {text}")
        self.verdict = verdict
        line["health/verdict"] = verdict.state

    def _say(self, text: str) -> None:
        """Above the progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text, file=sys.stderr)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if kind is None:  # trackers of a process that failed end with it
            self.trackers.end()
            self.accelerator.end_training()
