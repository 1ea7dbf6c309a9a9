"""A model card for an exported backbone: what is known of the data, the training, the figures and the licence."""

from pathlib import Path

from huggingface_hub import ModelCardData

import dino
from dino.config.read import get, leaves
from dino.config.schema import Config
from dino.methods import METHODS
from dino.models import Backbone
from dino.models.weights.released import RELEASED
from dino.report.facts import duration, elapsed, epochs_of, median_speed
from dino.run import RunDirectory

SNIPPETS = {
    "huggingface": """import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained({place!r})
model = AutoModel.from_pretrained({place!r}).eval()
with torch.no_grad():
    tokens = model(**processor(images, return_tensors="pt")).last_hidden_state  # (B, 1 + registers + N, D)
class_tokens = tokens[:, 0]""",
    "timm": """import timm, torch

model = timm.create_model({timm_place!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    class_tokens = model(transform(image)[None])  # (1, D); num_classes=10 adds a head to fine-tune""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession({file!r})
class_tokens, patch_tokens = session.run(None, {{"images": images}})  # (B, C, H, W), normalised as below""",
}
# Settings that say where things lie on the machine that trained.
HIDDEN = {"data.root", "data.labels", "run.dir", "model.init", "objective.distill", "train.resume"}
HIDDEN |= {"tracking.project", "tracking.name"}


def snippet(kind: str, place: str, on_hub: bool) -> str:
    """Lines that load an export.

    Args:
        kind: huggingface, timm or onnx.
        place: its folder, or its name on the Hub.
    """
    timm_place = f"{'hf-hub' if on_hub else 'local-dir'}:{place}"
    return SNIPPETS[kind].format(place=place, timm_place=timm_place, file=f"{place}/model.onnx")


def model_card(weights: str, backbone: Backbone, kind: str, place: str, lines: str, licence: str | None) -> str:
    """The README.md of an export.

    Args:
        weights: that were exported: a run, a file or a released name.
        kind, place: see `snippet`, which gives `lines`.
        licence: an identifier of the Hub such as `mit`; None: that of released weights, else it is left open.
    """
    released = RELEASED.get(weights)
    if licence is None and released is not None:
        licence = released.licence.lower()
    library = {"huggingface": "transformers", "timm": "timm", "onnx": "onnx"}[kind]
    data = ModelCardData(
        license=licence,
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised", "vision", "dino-pretrain"],
    )
    directory = RunDirectory(weights)
    is_run = released is None and directory.config.is_file()
    title = place.rsplit("/", 1)[-1] if released is None else weights
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {title}",
        f"A vision backbone of {sum(p.numel() for p in backbone.parameters()) / 1e6:.3g} M parameters, patches of "
        f"{backbone.patch_size} pixels, {backbone.embed_dim} features. It learned from images without labels"
        + (f" and was exported by dino-pretrain {dino.__version__}." if not is_run else "."),
        f"## Use\n\n```python\n{lines}\n```\n\n{_preprocessing(backbone, kind)}",
    ]
    if is_run:
        parts += _of_run(directory)
    parts.append(f"## Licence\n\n{_licence(licence, released is not None)}")
    return "\n\n".join(parts) + "\n"


def _preprocessing(backbone: Backbone, kind: str) -> str:
    preprocess, levels = backbone.preprocess, backbone.preprocess.levels
    scaled = "divided by 255"
    if levels.bits != "8":
        low, high = levels.range or (0, 65535)
        scaled = f"numbers from {low:g} to {high:g} (data.bits={levels.bits}) as fractions from 0 to 1, cut off beyond"
    grey = ""
    if backbone.spec.in_chans == 1 and kind != "onnx":
        grey = ' The network has one channel, and the library does not convert: pass `image.convert("L")`.'
    return (
        f"Images: the shorter side resized to {preprocess.resize or preprocess.image_size} pixels (bicubic), of it the "
        f"centre {preprocess.image_size} × {preprocess.image_size}, {scaled}, less the mean "
        f"{list(preprocess.mean)}, divided by {list(preprocess.std)}.{grey}"
    )


def _of_run(directory: RunDirectory) -> list[str]:
    """What the run's own files tell."""
    config, metrics = directory.read_config(), directory.read_metrics()
    facts = _facts(config, metrics)
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    parts = [f"## Training\n\n| | |\n|---|---|\n{table}"]
    figures = _figures(directory, metrics)
    parts.append("## Figures\n\n" + ("\n\n".join(figures) or "None were measured."))
    settings = "\n".join(f"{key}={get(config, key)}" for key in leaves(config) if key not in HIDDEN)
    return [*parts, f"<details><summary>All settings</summary>\n\n```\n{settings}\n```\n\n</details>"]


def _facts(config: Config, metrics: list[dict]) -> dict[str, str]:
    train = config.train
    last, epochs = (metrics[-1]["step"], epochs_of(metrics[-1])) if metrics else (0, 0.0)
    facts = {
        "objective": METHODS[config.objective.name].describe(config),
        "images": f"{round(last * train.batch_size / epochs):,}" if epochs else "unknown",
        "started from": Path(config.model.init).name if config.model.init else "random weights",
        "steps": f"{last:,} of {train.steps:,} at batch {train.batch_size}, {epochs:.1f} epochs",
        "precision, seed": f"{train.precision}, {train.seed}",
        "program": f"dino-pretrain {dino.__version__}",
    }
    if speed := median_speed(metrics):
        facts["time"] = f"{duration(elapsed(metrics, train.batch_size))} at {speed:.0f} images/s"
    return facts


def _figures(directory: RunDirectory, metrics: list[dict]) -> list[str]:
    """Readouts with their protocol, and what the run measured of itself."""
    figures = []
    if results := directory.read_results():
        rows = [results["columns"], ["---"] * len(results["columns"]), *results["rows"]]
        figures.append(results["caption"] + "\n\n" + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows))
    if line := next((line for line in reversed(metrics) if "health/knn" in line), None):
        figures.append(
            f"While it trained, at step {line['step']:,}: of augmented views of up to 512 training images, the nearest "
            f"neighbours among those of up to 2,048 others named the class of {line['health/knn']:.1%}. A sign of "
            "health, no benchmark: these are the images that it trained on, without their labels."
        )
    return figures


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _licence(licence: str | None, is_released: bool) -> str:
    if is_released:
        return f"The weights are released by others, under {licence}."
    if licence:
        return f"{licence}."
    return (
        "Not stated yet. Weights that you train are yours: dino-pretrain's licence (Apache-2.0) asks nothing of them."
    )
