"""RUN/report.html: what ran, whether it is healthy, and what it learned; renewed while the run is alive."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dino.config import read as configuration
from dino.config.read import Config
from dino.data import Images, UnreadableImage, open_images
from dino.evaluation.neighbours import nearest
from dino.methods.network import as_used
from dino.models import Backbone, Preprocess, VisionTransformer, load_backbone
from dino.monitor.verdict import healthy_ranges, judge
from dino.report import page as report
from dino.report import pictures
from dino.run import RunDirectory
from dino.training.loader import view_spec
from dino.training.summary import objective_name
from dino.views.draws import sample_key
from dino.views.pipeline import make_views

PROGRESS = {
    "loss/dino": "loss of class tokens",
    "loss/ibot": "loss of masked patches",
    "loss/koleo": "KoLeo",
    "time/images_per_second": "images per second",
    "time/data_wait": "share of time waiting for data",
}
HEALTH = {
    "health/entropy_ratio": "teacher entropy / ln K",
    "health/kl_to_centre": "KL of targets to their mean, nats",
    "health/prototypes_in_use": "share of prototypes in use",
    "health/rank_me": "RankMe of class tokens",
    "health/feature_std": "spread of class tokens",
    "health/knn": "neighbours name the class",
    "health/neighbour_agreement": "two views, same neighbours",
    "health/centre_norm": "norm of the mean logits",
    "health/gradient_norm": "gradient norm before clipping",
}
SCHEDULES = {
    "optim/lr": "learning rate",
    "optim/weight_decay": "weight decay",
    "teacher/momentum": "teacher momentum",
    "teacher/temperature": "teacher temperature",
}
ROWS, NEIGHBOURS = 6, 8  # images shown, and neighbours of each
POOL = 384  # images, spread over all, among which neighbours are looked for
SHARE = 50  # a page that took t to write is renewed after SHARE · t at the earliest: at most 2 % of the time
SOONEST = 20  # seconds
logger = logging.getLogger(__name__)


class Reporter:
    """Writes the report of a run that is alive, no more often than costs 2 % of its time.

    Args:
        images: the run's pool.
        is_main_process: the others write nothing.
    """

    def __init__(self, directory: RunDirectory, config: Config, images: Images, is_main_process: bool = True):
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
        with as_used(backbone):
            preprocess = Preprocess(config.views.global_size, config.views.mean or (), config.views.std or ())
            looks = _looks(config, self.images, backbone, preprocess)
        sections: list[report.Picture | report.Table] = []
        if self.directory.results.exists():
            sections.append(_readout(json.loads(self.directory.results.read_text())))
        sections += [*_curves(config, metrics, backbone), *looks.values()]
        elapsed = time.monotonic() - began
        self.due = time.monotonic() + max(SOONEST, SHARE * elapsed)
        verdict = judge(metrics, int(config.train.steps), int(config.objective.prototypes), backbone.embed_dim)
        status = report.Status(
            state,
            verdict.state if metrics else "",
            verdict.advice,
            not verdict.advice,
            math.ceil(max(SOONEST, SHARE * elapsed)) if alive else 0,
            int(time.time()),
        )
        title = f"{self.directory.path.name}: DINO pre-training"
        facts, settings = _facts(config, self.images, metrics), self.directory.config.read_text()
        try:
            report.write(self.directory.report, title, facts, sections, settings, status)
        except OSError as error:  # a full disk: the run itself goes on, and says so where its own files do not fit
            logger.warning("%s could not be written: %s", self.directory.report, error.strerror or error)
        return {name: picture.png for name, picture in looks.items()}


def write_report(directory: RunDirectory) -> None:
    """The report of a run that has ended, from what lies in its directory."""
    config = configuration.load(directory.config)
    images = open_images(config.data.root, config.data.kind, int(config.data.channels))
    Reporter(directory, config, images).write(load_backbone(directory.path), "ended", alive=False)


def _facts(config: Config, images: Images, metrics: list[dict]) -> dict[str, str]:
    model, views, train = config.model, config.views, config.train
    last = metrics[-1] if metrics else {}
    width = f", width {model.embed_dim}" if model.embed_dim else ""
    depth = f", depth {model.depth}" if model.depth else ""
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    speeds = sorted(line["time/images_per_second"] for line in metrics if line["step"])
    speed = speeds[len(speeds) // 2] if speeds else math.nan
    left = (int(train.steps) - last.get("step", 0)) * train.batch_size / speed if speeds else 0
    return {
        "images": f"{len(images.names):,} from {config.data.root or config.data.kind}",
        "backbone": f"{model.arch}, patch {model.patch_size}{width}{depth}",
        "views": f"2 global {views.global_size}²{local}, {views.preset}",
        "objective": objective_name(config),
        "targets": f"{config.objective.prototypes} prototypes, {config.objective.centering}",
        "steps": f"{last.get('step', 0):,} of {train.steps:,} at batch {train.batch_size}, "
        f"{last.get('epoch', 0):.1f} epochs" + (f"; about {left / 60:,.0f} min left" if left else ""),
        "loss": f"{last['loss/dino']:.4f} (ln K = {math.log(int(config.objective.prototypes)):.2f})"
        if "loss/dino" in last
        else "none logged yet",
        "speed": f"{speed:.0f} images/s (median)" if speeds else "none logged yet",
    }


def _curves(config: Config, metrics: list[dict], backbone: Backbone) -> Iterator[report.Picture | report.Table]:
    if not metrics:
        return
    yield report.Picture(
        "Progress",
        "Means between two log points. The loss starts near ln K and need not fall evenly: the teacher's targets "
        "sharpen as it learns.",
        pictures.curves(metrics, PROGRESS),
    )
    ranges = healthy_ranges(int(config.objective.prototypes), backbone.embed_dim)
    if looked := [line for line in metrics if "health/entropy_ratio" in line]:
        shaded = {name: (band.low, band.high) for name, band in ranges.items()}
        caption = "The teacher while it learns. Shaded: where runs lie that learn; outside of it, look closer."
        yield report.Picture("Health", caption, pictures.curves(metrics, HEALTH, shaded))
        rows = [
            [HEALTH[name], f"{looked[-1][name]:.3g}", f"{band.low:.2g} – {band.high:.3g}", band.meaning]
            for name, band in ranges.items()
            if name in looked[-1]
        ]
        columns = ["indicator", "now", "healthy", "what it says"]
        yield report.Table("", "", columns, rows)
    yield report.Picture("Schedules", "As set for this run.", pictures.curves(metrics, SCHEDULES))


def _looks(config: Config, images: Images, backbone: Backbone, preprocess: Preprocess) -> dict[str, report.Picture]:
    """Crops, attention, patch features and neighbours of a few images spread over the pool."""
    chosen = _readable(images)
    if not chosen:
        return {}
    spec, seed = view_spec(config.views), config.train.seed
    sheet = [make_views(image, spec, sample_key(seed, 0, index)) for index, image in chosen]
    found = {
        "crops": report.Picture(
            "Crops as the network sees them",
            "One image a row: two global crops, which teacher and student see, then the student's local crops.",
            pictures.crop_sheet(sheet),
        )
    }
    if isinstance(backbone, VisionTransformer):
        # Grids of a few patches show little: images twice as large have four times as many.
        larger = replace(preprocess, image_size=preprocess.image_size * (2 if preprocess.image_size < 160 else 1))
        device = next(backbone.parameters()).device
        inputs = torch.stack([larger(image) for _, image in chosen]).to(device)
        shown = torch.stack([larger.crop(image) for _, image in chosen])
        found["attention"] = report.Picture(
            "Where the class token looks",
            f"Attention of the teacher's last block, at {larger.image_size}² pixels: the image, the mean over heads, "
            "then single heads.",
            pictures.attention_sheet(backbone, inputs, shown),
        )
        found["pca"] = report.Picture(
            "What patches have in common",
            "Each image beside its patch features: their first three principal components, taken over all of these "
            "images, as red, green and blue.",
            pictures.pca_sheet(backbone, inputs, shown),
        )
    found["neighbours"] = report.Picture(
        "Nearest neighbours",
        f"Left, an image; right, the {NEIGHBOURS} most similar of {min(POOL, len(images.names))} others, by the cosine "
        "of class tokens.",
        _neighbours(images, chosen, backbone, preprocess),
    )
    return found


def _neighbours(images: Images, chosen: list[tuple[int, Tensor]], backbone: Backbone, preprocess: Preprocess) -> bytes:
    places = range(0, len(images.names), -(-len(images.names) // POOL))
    others = [(index, image) for index in places if (image := _read(images, index)) is not None]
    known = dict(others) | dict(chosen)
    order = list(known)
    device = next(backbone.parameters()).device
    parts = [torch.stack([preprocess(known[index]) for index in part]) for part in _parts(order, 64)]
    tokens = torch.cat([backbone(part.to(device)).float().cpu() for part in parts])
    neighbours, _ = nearest(tokens, tokens, min(NEIGHBOURS, len(order) - 1), itself=0)
    rows = neighbours[[order.index(index) for index, _ in chosen]]
    return pictures.neighbours_sheet([image for _, image in chosen], [[known[order[i]] for i in row] for row in rows])


def _readable(images: Images) -> list[tuple[int, Tensor]]:
    """Up to six readable images, evenly spread over the pool."""
    places = range(0, len(images.names), max(1, len(images.names) // (4 * ROWS)))
    found = [(index, image) for index in places if (image := _read(images, index)) is not None]
    return found[:: max(1, len(found) // ROWS)][:ROWS]


def _read(images: Images, index: int) -> Tensor | None:
    try:
        return images.read(index)
    except UnreadableImage:
        return None


def _parts(values: list[int], size: int) -> list[list[int]]:
    return [values[first : first + size] for first in range(0, len(values), size)]


def _readout(results: dict) -> report.Table:
    return report.Table("Readout", results["caption"], results["columns"], results["rows"])
