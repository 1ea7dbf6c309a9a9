"""What a run leaves for its reader: the teacher's backbone, and the report of the run directory."""

import json

import torch

from dino import config as configuration
from dino.config import Config
from dino.data import Images, UnreadableImage, open_images
from dino.errors import UserError
from dino.evaluation import pictures, report
from dino.models import Backbone, VisionTransformer, load_backbone, save_backbone
from dino.models.weights import BACKBONE_FILE
from dino.training.loader import view_spec
from dino.training.run_directory import RunDirectory
from dino.views.draws import sample_key
from dino.views.pipeline import make_views

PANELS = {
    "loss/dino": "loss",
    "optim/lr": "learning rate",
    "health/gradient_norm": "gradient norm",
    "optim/weight_decay": "weight decay",
    "teacher/momentum": "teacher momentum",
    "teacher/temperature": "teacher temperature",
    "time/images_per_second": "images per second",
    "time/data_wait": "share of time waiting for data",
}
ROWS = 6


def write_backbone(directory: RunDirectory, config: Config, backbone: Backbone, step: int, fingerprint: str) -> None:
    """RUN/backbone.safetensors: the teacher's backbone after `step` steps, with all that is needed to use it."""
    preprocessing = {"image_size": config.views.global_size, "mean": config.views.mean, "std": config.views.std}
    training = {
        "objective": "dino",
        "arch": config.model.arch,
        "steps": step,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "preset": config.views.preset,
        "initialisation": config.model.initialisation,
        "images": fingerprint,
    }
    try:
        save_backbone(directory.path / BACKBONE_FILE, backbone, preprocessing, training)
    except OSError as error:
        raise UserError(
            f"{directory.path / BACKBONE_FILE} could not be written ({error.strerror or error}); the checkpoint of "
            f"step {step} is whole. Make room on the disk and start the same command again"
        ) from error


def write_report(directory: RunDirectory) -> None:
    """RUN/report.html from what lies in RUN: what ran, curves, crops, attention, and the readout if there is one."""
    config = configuration.load(directory.config)
    images = open_images(config.data.root, config.data.kind, int(config.data.channels))
    backbone = load_backbone(directory.path)
    metrics = directory.read_metrics()
    sections: list[report.Picture | report.Table] = []
    if directory.results.exists():
        sections.append(_readout(json.loads(directory.results.read_text())))
    if metrics:
        caption = "Means over the steps between two log points; the loss starts near ln K and need not fall evenly."
        sections.append(report.Picture("Curves", caption, pictures.curves(metrics, PANELS)))
    sections += _looks(config, images, backbone)
    title = f"{directory.path.name}: DINO pre-training"
    report.write(directory.report, title, _facts(config, images, metrics), sections, directory.config.read_text())


def _facts(config: Config, images: Images, metrics: list[dict]) -> dict[str, str]:
    model, views, train = config.model, config.views, config.train
    last = metrics[-1] if metrics else {}
    width = f", width {model.embed_dim}" if model.embed_dim else ""
    depth = f", depth {model.depth}" if model.depth else ""
    local = f" + {views.local_crops} local {views.local_size}²" if views.local_crops else ""
    speeds = sorted(line["time/images_per_second"] for line in metrics)
    return {
        "images": f"{len(images.names):,} from {config.data.root or config.data.kind}",
        "backbone": f"{model.arch}, patch {model.patch_size}{width}{depth}",
        "views": f"2 global {views.global_size}²{local}, {views.preset}",
        "objective": f"DINO, {config.objective.prototypes} prototypes, {config.objective.centering}",
        "steps": f"{last.get('step', 0):,} of {train.steps:,} at batch {train.batch_size}, "
        f"{last.get('epoch', 0):.1f} epochs",
        "loss": f"{last['loss/dino']:.4f}" if last else "none logged yet",
        "speed": f"{speeds[len(speeds) // 2]:.0f} images/s (median)" if speeds else "none logged yet",
    }


def _looks(config: Config, images: Images, backbone: Backbone) -> list[report.Picture]:
    """The crops and the attention of a few images spread over the pool."""
    chosen = _readable(images)
    if not chosen:
        return []
    spec, seed = view_spec(config), config.train.seed
    sheet = [make_views(image, spec, sample_key(seed, 0, index)) for index, image in chosen]
    found = [
        report.Picture(
            "Crops as the network sees them",
            "One image a row: two global crops, which teacher and student see, then the student's local crops.",
            pictures.crop_sheet(sheet),
        )
    ]
    if isinstance(backbone, VisionTransformer):
        inputs = torch.stack([backbone.preprocess(image) for _, image in chosen])
        shown = torch.stack([backbone.preprocess.crop(image) for _, image in chosen])
        found.append(
            report.Picture(
                "Where the class token looks",
                "Attention of the teacher's last block: the image, the mean over heads, then single heads.",
                pictures.attention_sheet(backbone, inputs, shown),
            )
        )
    return found


def _readable(images: Images) -> list[tuple[int, torch.Tensor]]:
    """Up to six readable images, evenly spread over the pool."""
    found: list[tuple[int, torch.Tensor]] = []
    for index in range(0, len(images.names), max(1, len(images.names) // (4 * ROWS))):
        try:
            found.append((index, images.read(index)))
        except UnreadableImage:
            continue
    return found[:: max(1, len(found) // ROWS)][:ROWS]


def _readout(results: dict) -> report.Table:
    return report.Table("Readout", results["caption"], results["columns"], results["rows"])
