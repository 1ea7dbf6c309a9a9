"""What is proposed on a machine without GPU: the largest choice that fits into an hour, in words that start it."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from dino.errors import UserError
from dino.training import proposal
from dino.training.proposal import CHOICES, KEYS, MINUTES, Measured, is_first_run, propose
from dino.training.settings import load


@pytest.fixture
def photos(tmp_path):
    def make(side: int, count: int = 20):
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 256, (side, side + 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        return load(None, [f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}"])

    return make


@pytest.mark.parametrize(
    ("words", "is_first"),
    [
        (["data.root=images"], True),
        (["data.root=images", "run.dir=runs/mine", "monitor.log_every=5"], True),
        (["data.root=images", "train.epochs=100"], False),
        (["data.root=images", "model.init=dinov2_vits14"], False),
    ],
)
def test_only_where_nothing_is_said_of_what_to_train_and_there_is_no_gpu(words, is_first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys, config = [word.partition("=")[0] for word in words], load(None, words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert is_first_run(config, keys) == is_first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not is_first_run(config, keys)


@pytest.mark.parametrize(("fits", "side"), [(1, 300), (3, 300), (5, 300), (5, 48), (5, 20)])
def test_the_largest_that_fits_and_that_the_images_are_large_enough_for(photos, monkeypatch, fits, side):
    tried = []

    def measure(config, images, choice, batch):
        tried.append(tuple(choice.values()))
        seconds = 60 * MINUTES * (0.5 if len(tried) <= fits else 2)
        return Measured(choice | {"train.batch_size": batch, "train.epochs": 7}, "views", 10.0, 7, seconds)

    monkeypatch.setattr(proposal, "measure", measure)
    message = str(propose(photos(side)))
    large_enough = {300: 5, 48: 2, 20: 1}[side]
    assert tried == list(CHOICES[: min(fits + 1, large_enough)])
    command = next(line for line in message.splitlines() if line.startswith("  dino train"))
    config = load(None, shlex.split(command)[2:])  # every word is a setting, and they can work together
    assert config.model.arch == CHOICES[min(fits, large_enough) - 1][KEYS.index("model.arch")]
    assert config.train.batch_size == 20
    assert "30.0 minutes" in message


def test_where_even_the_smallest_takes_longer_that_is_said(photos, monkeypatch):
    monkeypatch.setattr(proposal, "measure", lambda *_: Measured({"model.arch": "vit_tiny", "model.patch_size": 4},
                                                                 "views", 0.5, 500, 30_000))  # fmt: skip
    assert "which takes 8.3 hours" in str(propose(photos(20)))


def test_unreadable_images_are_said(tmp_path):
    (tmp_path / "one.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UserError, match="can be read"):
        propose(load(None, [f"data.root={tmp_path}"]))


@pytest.mark.slow
def test_measured_for_real_it_writes_nothing(photos, tmp_path):
    config = photos(20)
    before = sorted(tmp_path.rglob("*"))
    message = str(propose(config))
    assert sorted(tmp_path.rglob("*")) == before
    speed, epochs = re.search(r"([\d.]+) images/s, (\d+) epochs", message).groups()
    assert float(speed) > 0
    assert int(epochs) >= 500  # 500 steps of a batch of all 20 images
