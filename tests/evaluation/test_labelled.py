"""Which images a probe learns from and which it is tested on, and by which names their classes go."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dino.errors import UserError
from dino.evaluation.labelled import Labelled, labelled_features
from dino.models import Backbone
from dino.models.preprocess import Preprocess
from dino.models.resnet import ResNetSpec


class Brightness(Backbone):
    """A backbone whose one feature is the level that an image is painted in: it tells which images came."""

    def __init__(self):
        super().__init__()
        self.embed_dim, self.spec = 1, ResNetSpec()
        self.preprocess = Preprocess(8, [0.0] * 3, [1.0] * 3)
        self.weight = nn.Parameter(torch.ones(1))

    def encode_crops(self, crops, masks=None, patches_of=0):
        level = 255 * crops[0].mean(dim=(1, 2, 3))[:, None] * self.weight
        return [level], [level[:, None]]


def paint(root: Path, **levels: list[int]) -> Path:
    """A folder for each key, `_` for `/`, with an image in each level."""
    for name, values in levels.items():
        folder = root / name.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for value in values:
            Image.new("RGB", (8, 8), (value,) * 3).save(folder / f"{value}.png")
    return root


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))

    def of(data: Path, test: Path | None = None) -> Labelled:
        return labelled_features(Brightness(), str(data), test and str(test), "auto", 0, Accelerator(cpu=True))

    return of


def sides(data: Labelled) -> list[dict[str, list[int]]]:
    """Class names to levels, of the images to learn from and of those to test on."""
    outcome = []
    for features, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        levels = np.round(features.class_tokens[:, 0]).astype(int)
        outcome.append({data.classes[c]: sorted(levels[labels == c].tolist()) for c in np.unique(labels)})
    return outcome


@pytest.mark.parametrize("learn", ["train", "Training"])
@pytest.mark.parametrize("test", ["val", "test", "Validation"])
def test_train_and_val_are_the_two_sides_and_no_classes(tmp_path, labelled, caplog, learn, test):
    root = tmp_path / "pool"
    paint(root / learn, apple=[10, 20], pear=[110, 120], plum=[210])
    paint(root / test, apple=[30], pear=[130, 140])
    with caplog.at_level(logging.INFO):
        data = labelled(root)
    assert data.classes == ["apple", "pear", "plum"]
    assert sides(data) == [{"apple": [10, 20], "pear": [110, 120], "plum": [210]}, {"apple": [30], "pear": [130, 140]}]
    assert f"learns from {learn}, tests on {test}" in caplog.text


@pytest.mark.parametrize(
    "layout", ["pear/1", "other/pear/1", "pear/pear/1"], ids=["one class", "a folder more", "the class twice"]
)
def test_a_test_set_goes_by_the_classes_learnt(tmp_path, labelled, layout):
    learn = paint(tmp_path / "learn", apple=[10, 20], pear=[110, 120])
    test = paint(tmp_path / "test", **{layout.replace("/", "_"): [130, 140]})
    assert sides(labelled(learn, test))[1] == {"pear": [130, 140]}
    assert sides(labelled(learn, test / "other/pear" if "other" in layout else test / "pear"))[1] == {
        "pear": [130, 140]
    }


def test_what_was_not_learnt_cannot_be_tested(tmp_path, labelled):
    learn = paint(tmp_path / "learn", apple=[10, 20], pear=[110, 120])
    with pytest.raises(UserError, match="none of the classes learnt: apple, pear"):
        labelled(learn, paint(tmp_path / "one", plum=[30]))
    with pytest.raises(UserError, match="not learnt: plum"):
        labelled(learn, paint(tmp_path / "two", plum=[30], pear=[130]))
