"""Every kind of backbone, image and view trains, and leaves a backbone that can be used."""

import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import backbone, copy_run, losses, write_images
from safetensors import safe_open

import dino

pytestmark = pytest.mark.slow

RESNET = ("model.arch=resnet18", "views.global_size=32", "views.local_size=16", "train.batch_size=8")
RESNET += ("train.checkpoint_every=2",)
SGD = (*RESNET, "optim.name=sgd", "objective.freeze_last_layer_steps=1")
IMAGES = ("data.kind=auto", "views.preset=dino", "train.batch_size=8", "views.global_size=16", "views.local_size=8")
WORKERS = ("data.cache=none", "data.workers=1")


def settings_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """Settings of each run, by name; what data they need is written to `folder`."""
    generator = np.random.default_rng(0)
    (folder / "bands").mkdir()
    for index in range(12):
        bands = generator.integers(0, 65536, (20 + index, 24, 5)).astype(np.uint16)
        np.save(folder / "bands" / f"{index}.npy", bands if index % 2 else (bands // 257).astype(np.uint8))
    archive = folder / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in write_images(folder / "images", 16):
            file.write(path, f"photographs/{path.name}")
    return {
        "resnet_on_two": RESNET,
        "resnet": RESNET,
        "resnet_sgd": SGD,
        "registers": ("model.registers=2", "model.layer_scale=1e-5", "model.ffn=swiglu"),
        "globals_only": ("views.local_crops=0",),
        "five_channels": (*IMAGES, "data.cache=none", "data.channels=5", f"data.root={folder / 'bands'}"),
        "zip_dino": (*IMAGES, f"data.root={archive}"),
        "zip_dinov2": (*IMAGES, *WORKERS, "views.preset=dinov2", "views.inverted_blur=true", f"data.root={archive}"),
    }


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """Run directories of three steps each, by name."""
    folder = tmp_path_factory.mktemp("backbones")
    commands = {
        name: ["train.steps=3", f"run.dir={folder / name}", *settings] for name, settings in settings_of(folder).items()
    }
    for name, done in runs.together(commands, page=True, resnet_on_two="torchrun").items():
        assert ("2 process(es)" in done.stdout) == (name == "resnet_on_two")
    return {name: folder / name for name in commands}


@pytest.mark.parametrize(
    ("name", "channels", "width", "patches", "registers"),
    [
        ("resnet_on_two", 1, 512, 1, 0),
        ("resnet", 1, 512, 1, 0),
        ("resnet_sgd", 1, 512, 1, 0),
        ("registers", 1, 32, 4, 2),
        ("globals_only", 1, 32, 4, 0),
        ("five_channels", 5, 32, 16, 0),
        ("zip_dino", 3, 32, 16, 0),
        ("zip_dinov2", 3, 32, 16, 0),
    ],
)
def test_trains_and_leaves_a_backbone_that_can_be_used(trained, name, channels, width, patches, registers):
    run = trained[name]
    assert len(losses(run)) == 3
    assert all(math.isfinite(loss) for loss in losses(run))
    model = dino.load_backbone(run)
    images = torch.randint(0, 256, (2, channels, 40, 30), dtype=torch.uint8)
    with torch.inference_mode():
        features = model.forward_features(model.preprocess(images))
    assert features["x_norm_clstoken"].shape == (2, width)
    assert features["x_norm_patchtokens"].shape == (2, patches, width)
    assert features["x_norm_regtokens"].shape == (2, registers, width)
    assert all(features[name].isfinite().all() for name in features if name.startswith("x_norm"))
    with safe_open(run / "backbone.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["dino"]
        described = json.loads(file.metadata()["dino"])
    assert described["in_chans"] == channels == len(described["mean"])
    assert described["training"]["steps"] == 3
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(("name", "settings"), [("resnet", RESNET), ("resnet_sgd", SGD)])
def test_batch_norm_statistics_and_momentum_survive_a_restart(runs, trained, tmp_path, name, settings):
    run = copy_run(trained[name], tmp_path / "run", 2)
    done = runs.finish("train.steps=3", *settings, f"run.dir={run}")
    assert "going on from step 2\n" in done.stdout
    assert backbone(run) == backbone(trained[name])


def test_photographs_in_a_zip_dry_run(runs, tmp_path, caltech_zip):
    views = ("views.preset=dino", "views.global_size=64", "views.local_size=32", "model.patch_size=16")
    data = ("data.kind=auto", f"data.root={caltech_zip.resolve()}", "data.workers=1")
    done = runs.finish("--dry-run", *data, *views, f"run.dir={tmp_path / 'run'}")
    assert "8,677 (zip, 3 channels)" in done.stdout
    assert "0 unreadable" in done.stdout
    assert re.search(r"memory: about .* GB", done.stdout)
    assert re.search(r"time: [\d.]+ \w+ for 27,116 steps", done.stdout)
    assert not (tmp_path / "run").exists()
