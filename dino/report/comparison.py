"""Runs side by side: how they stand, what they were told, their curves over one another."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dino.config.read import get, leaves
from dino.config.schema import Config
from dino.methods import METHODS
from dino.monitor.indicators import INDICATORS
from dino.report import page
from dino.report.facts import duration, elapsed, median_speed
from dino.report.page import Curves, Section, Table
from dino.report.plots import Line, Panel, line_of
from dino.run import RunDirectory
from dino.run_lock import is_held

UNTOLD = {"run.dir", "tracking.name"}  # settings that differ between any two runs
BEST = ("health/knn", "health/neighbour_agreement", "health/rank_me")  # of these the first that a run has


class Standing(NamedTuple):
    """What lies in a run's directory.

    Attributes:
        name: the end of its path that tells it from the others.
    """

    name: str
    path: Path
    config: Config
    metrics: list[dict]
    results: dict | None

    @property
    def state(self) -> str:
        """Whether it runs, and how far it is."""
        step, steps = self.metrics[-1]["step"] if self.metrics else 0, self.config.train.steps
        if step == steps:
            return "finished"
        return f"{'running' if is_held(self.path) else 'stopped'}, {step:,} of {steps:,} steps"

    @property
    def verdict(self) -> str:
        return next((line["health/verdict"] for line in reversed(self.metrics) if "health/verdict" in line), "")

    @property
    def best(self) -> str:
        """The best value of its main indicator, and when that was."""
        for name in BEST:
            if lines := [line for line in self.metrics if line.get(name) is not None]:
                line = max(lines, key=lambda line: line[name])
                value = f"{line[name]:.1f}" if name == "health/rank_me" else f"{line[name]:.1%}"
                return f"{value} {name.removeprefix('health/')} at step {line['step']:,}"
        return ""

    @property
    def loss(self) -> str:
        name = next(iter(METHODS[self.config.objective.name].watched(self.config)))
        return next((f"{line[name]:.4f}" for line in reversed(self.metrics) if line.get(name) is not None), "")

    @property
    def speed(self) -> str:
        speed = median_speed(self.metrics)
        return f"{speed:.0f} images/s" if speed else ""

    @property
    def time(self) -> str:
        return duration(elapsed(self.metrics, self.config.train.batch_size)) if self.metrics else ""


COLUMNS = ("run", "state", "verdict", "best", "loss", "time", "speed")


def row(run: Standing) -> list[str]:
    """How a run stands, by COLUMNS."""
    return [run.name, run.state, run.verdict, run.best, run.loss, run.time, run.speed]


def standing(path: Path, name: str) -> Standing:
    """How the run in a directory stands."""
    directory = RunDirectory(path)
    results = directory.read_results()
    return Standing(name, path, directory.read_config(), directory.read_metrics(), results)


def folder_of(paths: Sequence[Path]) -> Path:
    """The innermost folder that holds all of these run directories."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def write(path: Path, runs: Sequence[Standing]) -> None:
    """Write the page that lays runs side by side."""
    sections: list[Section] = [
        Table("How they stand", "", COLUMNS, [row(run) for run in runs]),
        _settings(runs),
        *_readouts(runs),
        *_curves(runs),
    ]
    page.write(path, " / ".join(run.name for run in runs), {}, sections)


def _settings(runs: Sequence[Standing]) -> Table:
    """Those that are not the same in all runs; — where a run's method has no such setting."""
    values = [{key: str(get(run.config, key)) for key in leaves(run.config)} for run in runs]
    keys = dict.fromkeys(key for of_run in values for key in of_run if key not in UNTOLD)
    rows = []
    for key in keys:
        of_key = [of_run.get(key, "—") for of_run in values]
        if len(set(of_key)) > 1:
            rows.append([key, *of_key])
    caption = "" if rows else "None but where they lie."
    return Table("Settings that differ", caption, ["setting", *(run.name for run in runs)], rows)


def _readouts(runs: Sequence[Standing]) -> Iterator[Table]:
    """The rows of all results.json with the same columns in one table."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    captions: dict[tuple[str, ...], str] = {}
    for run in runs:
        if run.results:
            columns = tuple(run.results["columns"])
            captions.setdefault(columns, run.results["caption"])
            tables.setdefault(columns, []).extend([run.name, *cells] for cells in run.results["rows"])
    for columns, rows in tables.items():
        yield Table("Readouts", captions[columns], ["run", *columns], rows)


def _curves(runs: Sequence[Standing]) -> Iterator[Curves]:
    """Losses, indicators and speed of all runs over one another."""
    losses: dict[str, str] = {}
    for run in runs:
        losses |= {name: of.title for name, of in METHODS[run.config.objective.name].watched(run.config).items()}
    health = {indicator.name: indicator.title for indicator in INDICATORS}
    speed = {"time/images_per_second": "images per second", "optim/lr": "learning rate"}
    for title, names in (("Losses", losses), ("Health", health), ("Speed and rate", speed)):
        panels = []
        for metric, of_panel in names.items():
            lines: list[Line] = [line_of(run.metrics, metric, run.name) for run in runs]
            if any(line.steps for line in lines):
                panels.append(Panel(of_panel, lines))
        if panels:
            yield Curves(title, "", panels)
