"""RUN/report.html: what ran, whether it is healthy, and what it learned; renewed while the run is alive."""

import logging
import math
import time
from collections.abc import Iterator

import torch

from dino.config.read import dump
from dino.config.schema import Config
from dino.data import Pool, pool_of
from dino.errors import UserError
from dino.files import way_out
from dino.methods import METHODS
from dino.models import Backbone, load_backbone
from dino.models.weights.load import BACKBONE_FILE
from dino.monitor.indicators import INDICATORS
from dino.monitor.verdict import healthy_ranges, judge, measured_lines
from dino.report import page
from dino.report.facts import run_facts, use_it
from dino.report.looks import Looks, largest_class
from dino.report.page import Curves, Picture, Section, Status, Table
from dino.report.plots import panels
from dino.run import RunDirectory

SPEED = {
    "time/images_per_second": "images per second",
    "time/data_wait": "fraction of time waiting for data",
}
RATES = {"optim/lr": "learning rate", "optim/weight_decay": "weight decay"}
RARELY = 50  # a page that took t to write is renewed after 50 · t at the earliest: at most 2 % of the time
SOONEST = 20  # seconds
logger = logging.getLogger(__name__)


class Reporter:
    """Writes the report of a run that is alive, no more often than costs 2 % of its time.

    Args:
        images: the run's pool.
        is_main_process: the others write nothing.
    """

    def __init__(self, directory: RunDirectory, config: Config, images: Pool, is_main_process: bool = True):
        self.directory, self.config, self.images = directory, config, images
        self.due = 0.0 if is_main_process else math.inf
        self.looks = Looks(config, images)

    def is_due(self) -> bool:
        """Whether the page may be renewed now."""
        return time.monotonic() >= self.due

    def write(self, backbone: Backbone, state: str, alive: bool) -> dict[str, bytes]:
        """Write the page of a run, which goes on where that fails, and says so; the backbone is left as it was.

        Returns:
            The pictures (PNG) of crops and features, by name.
        """
        if self.due == math.inf:
            return {}
        try:
            return self.write_now(backbone, state, alive)
        except UserError as error:
            logger.warning("no report: %s", error)
            return {}

    def write_now(self, backbone: Backbone, state: str, alive: bool) -> dict[str, bytes]:
        """The same; raises `UserError` where the page cannot be written, or what it shows cannot be read."""
        began = time.monotonic()
        config, metrics = self.config, self.directory.read_metrics()
        # When a page is written depends on the clock: it must draw nothing from the run's random state.
        with torch.random.fork_rng(devices=[]):
            looks = self.looks.sections(backbone)
        sections: list[Section] = []
        if results := self.directory.read_results():
            sections.append(Table("Readout", results["caption"], results["columns"], results["rows"]))
        sections += [*_curves(config, self.images, metrics, backbone.embed_dim), *looks.values()]
        if (self.directory.path / BACKBONE_FILE).is_file():
            sections.append(use_it(self.directory.path))
        pause = max(SOONEST, RARELY * (time.monotonic() - began))
        self.due = time.monotonic() + pause
        verdict = judge(metrics, config, backbone.embed_dim)
        status = Status(
            state,
            verdict=verdict.state if metrics else "",
            advice=verdict.advice,
            is_good=not verdict.advice,
            refresh=math.ceil(pause) if alive else 0,
            written=int(time.time()),
        )
        title = f"{self.directory.path.name}: pre-training"
        facts, settings = run_facts(config, self.images, metrics), dump(config)
        try:
            page.write(self.directory.report, title, facts, sections, settings, status)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.directory.report} cannot be written ({reason}): {way_out(error)}") from error
        return {name: section.png for name, section in looks.items() if isinstance(section, Picture)}


def write_report(directory: RunDirectory) -> None:
    """The report of a run that has ended, from what lies in its directory."""
    config = directory.read_config()
    Reporter(directory, config, pool_of(config.data)).write_now(load_backbone(directory.path), "ended", alive=False)


def _curves(config: Config, images: Pool, metrics: list[dict], width: int) -> Iterator[Section]:
    if not metrics:
        return
    method = METHODS[config.objective.name]
    losses = {name: curve.title for name, curve in method.watched(config).items()}
    yield Curves(
        "Progress",
        "Means between two log points. A loss need not fall evenly: what it compares with changes as the run goes on.",
        panels(metrics, losses | SPEED),
    )
    if lines := measured_lines(metrics):
        ranges = healthy_ranges(config, width)
        titles = {indicator.name: indicator.title for indicator in INDICATORS}
        titles["health/gradient_norm"] = "gradient norm before clipping"
        shown = panels(metrics, titles, ranges)
        if images.labels is not None:
            chance = {"always the largest class": largest_class(images.labels.codes)}
            shown = [of._replace(levels=chance) if of.title == titles["health/knn"] else of for of in shown]
        caption = "The network while it learns. Shaded: where runs lie that learn; outside of it, look closer."
        yield Curves("Health", caption, shown)
        yield Table("", "", ["indicator", "now", "healthy", "what it says"], _health_rows(lines[-1], ranges))
    rates = RATES | {name: name.replace("/", " ") for name in method.make_schedules(config)}
    yield Curves("Schedules", "As set for this run.", panels(metrics, rates))


def _health_rows(line: dict, ranges: dict[str, tuple[float, float]]) -> list[list[str]]:
    rows = []
    for indicator in INDICATORS:
        if indicator.name in line and indicator.name in ranges:
            low, high = ranges[indicator.name]
            value = f"{line[indicator.name]:.3g}"
            rows.append([indicator.title, value, f"{low:.2g} – {high:.3g}", indicator.meaning])
    return rows
