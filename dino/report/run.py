"""RUN/report.html: what ran, whether it is healthy, and what it learned; renewed while the run is alive."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dino.config.schema import Config
from dino.data import Pool, open_images, read_or_reason
from dino.evaluation.features import extract
from dino.evaluation.neighbours import nearest
from dino.methods import METHODS
from dino.methods.network import as_used
from dino.models import Backbone, Preprocess, load_backbone
from dino.monitor.indicators import INDICATORS
from dino.monitor.verdict import healthy_ranges, judge, measured_lines
from dino.report import charts, page, pictures
from dino.report.page import Picture, Status, Table
from dino.run import RunDirectory
from dino.views import DeviceViews, canvas_of, view_spec
from dino.views.draws import sample_key

SPEED = {
    "time/images_per_second": "images per second",
    "time/data_wait": "fraction of time waiting for data",
}
RATES = {"optim/lr": "learning rate", "optim/weight_decay": "weight decay"}
ROWS, NEIGHBOURS = 6, 8  # images shown, and neighbours of each
POOL = 384  # images, spread over all, among which neighbours are looked for
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

    def is_due(self) -> bool:
        """Whether the page may be renewed now."""
        return time.monotonic() >= self.due

    def write(self, backbone: Backbone, state: str, alive: bool) -> dict[str, bytes]:
        """Write the page; the backbone is left as it was.

        Returns:
            The pictures (PNG) of crops and features, by name.
        """
        if self.due == math.inf:
            return {}
        began = time.monotonic()
        config, metrics = self.config, self.directory.read_metrics()
        # When a page is written depends on the clock: it must draw nothing from the run's random state.
        with torch.random.fork_rng(devices=[]):
            looks = feature_pictures(config, self.images, backbone)
        sections: list[Picture | Table] = []
        if self.directory.results.exists():
            results = json.loads(self.directory.results.read_text())
            sections.append(Table("Readout", results["caption"], results["columns"], results["rows"]))
        sections += [*_curves(config, metrics, backbone.embed_dim), *looks.values()]
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
        facts, settings = run_facts(config, self.images, metrics), self.directory.config.read_text()
        try:
            page.write(self.directory.report, title, facts, sections, settings, status)
        except OSError as error:  # a full disk: the run itself goes on, and says so where its own files do not fit
            logger.warning("%s could not be written: %s", self.directory.report, error.strerror or error)
        return {name: picture.png for name, picture in looks.items()}


def write_report(directory: RunDirectory) -> None:
    """The report of a run that has ended, from what lies in its directory."""
    config = directory.read_config()
    images = open_images(config.data.root, config.data.kind, config.data.channels)
    Reporter(directory, config, images).write(load_backbone(directory.path), "ended", alive=False)


def run_facts(config: Config, images: Pool, metrics: list[dict]) -> dict[str, str]:
    """What ran and how far it is, name to text."""
    model, views, train = config.model, config.views, config.train
    last = metrics[-1] if metrics else {"step": 0, "epoch": 0.0}
    sizes = [f"{model.arch}, patch {model.patch_size}"]
    sizes += [f"{name} {value}" for name, value in (("width", model.embed_dim), ("depth", model.depth)) if value]
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    progress = f"{last['step']:,} of {train.steps:,} at batch {train.batch_size}, {last['epoch']:.1f} epochs"
    speeds = sorted(line["time/images_per_second"] for line in metrics if line["step"])
    speed_text = "none logged yet"
    if speeds:
        speed = speeds[len(speeds) // 2]
        speed_text = f"{speed:.0f} images/s (median)"
        minutes = (train.steps - last["step"]) * train.batch_size / speed / 60
        progress += f"; about {minutes:,.0f} min left" if minutes else ""
    facts = {
        "images": f"{len(images.names):,} from {config.data.root or config.data.kind}",
        "backbone": ", ".join(sizes),
        "views": f"2 global {views.global_size}²{local}, {views.preset}",
        **METHODS[config.objective.name].facts(config),
        "steps": progress,
        "speed": speed_text,
    }
    return facts | _loss_facts(config, last)


def _loss_facts(config: Config, last: dict) -> dict[str, str]:
    """The main loss, beside that of a student that predicts nothing."""
    name, curve = next(iter(METHODS[config.objective.name].watched(config).items()))
    if name not in last:
        return {"loss": "none logged yet"}
    blank = f" ({curve.blank:.2f} where nothing is predicted)" if curve.blank is not None else ""
    return {"loss": f"{last[name]:.4f}{blank}"}


def _curves(config: Config, metrics: list[dict], width: int) -> Iterator[Picture | Table]:
    if not metrics:
        return
    method = METHODS[config.objective.name]
    losses = {name: curve.title for name, curve in method.watched(config).items()}
    yield Picture(
        "Progress",
        "Means between two log points. A loss need not fall evenly: what it compares with changes as the run goes on.",
        charts.curves(metrics, losses | SPEED),
    )
    if lines := measured_lines(metrics):
        ranges = healthy_ranges(config, width)
        titles = {indicator.name: indicator.title for indicator in INDICATORS}
        titles["health/gradient_norm"] = "gradient norm before clipping"
        caption = "The network while it learns. Shaded: where runs lie that learn; outside of it, look closer."
        yield Picture("Health", caption, charts.curves(metrics, titles, ranges))
        yield Table("", "", ["indicator", "now", "healthy", "what it says"], _health_rows(lines[-1], ranges))
    rates = RATES | {name: name.replace("/", " ") for name in method.make_schedules(config)}
    yield Picture("Schedules", "As set for this run.", charts.curves(metrics, rates))


def _health_rows(line: dict, ranges: dict[str, tuple[float, float]]) -> list[list[str]]:
    rows = []
    for indicator in INDICATORS:
        if indicator.name in line and indicator.name in ranges:
            low, high = ranges[indicator.name]
            value = f"{line[indicator.name]:.3g}"
            rows.append([indicator.title, value, f"{low:.2g} – {high:.3g}", indicator.meaning])
    return rows


def feature_pictures(config: Config, images: Pool, backbone: Backbone) -> dict[str, Picture]:
    """Crops, attention, patch features and neighbours of a few images spread over the pool, by name."""
    samples = _readable(images)
    if not samples:
        return {}
    preprocess = Preprocess(config.views.global_size, config.views.mean or (), config.views.std or ())
    sections = {
        "crops": Picture(
            "Crops as the network sees them",
            "One image a row: two global crops, which teacher and student see, then the student's local crops.",
            pictures.crop_sheet(_crops(config, samples)),
        )
    }
    with as_used(backbone):
        if backbone.has_patches:
            sections |= _patch_pictures(backbone, preprocess, samples)
        sections["neighbours"] = Picture(
            "Nearest neighbours",
            f"Left, an image; right, the {NEIGHBOURS} most similar of {min(POOL, len(images.names))} others, by the "
            "cosine of class tokens.",
            _neighbours_sheet(images, samples, backbone, preprocess),
        )
    return sections


def _crops(config: Config, samples: dict[int, Tensor]) -> list[list[Tensor]]:
    """The first epoch's views of each image, by the code that training uses."""
    views = DeviceViews(view_spec(config.views))
    rows = []
    for index, image in samples.items():
        keys = np.array([sample_key(config.train.seed, 0, index)], dtype=np.uint64)
        crops = views.photometric(views.crop(canvas_of(image), keys), keys)
        rows.append([view for of_size in crops for view in of_size])
    return rows


def _patch_pictures(backbone: Backbone, preprocess: Preprocess, samples: dict[int, Tensor]) -> dict[str, Picture]:
    # Grids of a few patches show little: images twice as large have four times as many.
    factor = 2 if preprocess.image_size < 160 else 1
    larger = replace(preprocess, image_size=factor * preprocess.image_size)
    device = next(backbone.parameters()).device
    inputs = torch.stack([larger(image) for image in samples.values()]).to(device)
    pixels = torch.stack([larger.crop(image) for image in samples.values()])
    return {
        "attention": Picture(
            "Where the class token looks",
            f"Attention of the last block, at {larger.image_size}² pixels: the image, the mean over heads, then single "
            "heads.",
            pictures.attention_sheet(backbone, inputs, pixels),
        ),
        "pca": Picture(
            "What patches have in common",
            "Each image beside its patch features: their first three principal components, taken over all of these "
            "images, as red, green and blue.",
            pictures.pca_sheet(backbone, inputs, pixels),
        ),
    }


def _neighbours_sheet(images: Pool, samples: dict[int, Tensor], backbone: Backbone, preprocess: Preprocess) -> bytes:
    spread = range(0, len(images.names), -(-len(images.names) // POOL))
    indices = np.unique([*spread, *samples])
    features = extract(backbone, images, indices, preprocess, batch_size=64, title=None)
    readable, tokens = indices[features.rows], features.class_tokens
    neighbours, _ = nearest(tokens, tokens, min(NEIGHBOURS, len(tokens) - 1), itself=0, title=None)
    queries, rows = [], []
    for row in np.searchsorted(readable, list(samples)):
        queries.append(images.read(int(readable[row])))
        rows.append([images.read(int(readable[other])) for other in neighbours[row]])
    return pictures.neighbours_sheet(queries, rows)


def _readable(images: Pool) -> dict[int, Tensor]:
    """Up to six readable images by index, evenly spread over the pool."""
    samples = []
    for index in range(0, len(images.names), max(1, len(images.names) // (4 * ROWS))):
        image, _ = read_or_reason(images, index)
        if image is not None:
            samples.append((index, image))
    return dict(samples[:: max(1, len(samples) // ROWS)][:ROWS])
