"""Copies planted among the user's images: where weights find them nothing is said, else that they do not."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from dino.curation.settings import Duplicates
from dino.curation.trial import CHANGES, planted_and_found, warning
from dino.data import open_images
from dino.models import Preprocess


class Features(torch.nn.Module):
    """Of an image its own small copy, less its mean, or noise: a network that sees all there is to see, or nothing."""

    def __init__(self, seeing: bool):
        super().__init__()
        self.parameter, self.seeing = torch.nn.Parameter(torch.zeros(1)), seeing
        self.preprocess = Preprocess(32, [0.0] * 3, [1.0] * 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = torch.nn.functional.avg_pool2d(inputs.mean(dim=1), 4).flatten(1)
        return features - features.mean(dim=1, keepdim=True) if self.seeing else torch.randn(len(inputs), 64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(12):
        levels = np.full((160, 160, 3), 128.0)
        for scale, contrast in ((12, 50), (3, 20)):  # light and shade, and details
            noise = gaussian_filter(generator.normal(size=levels.shape), (scale, scale, 0.5))
            levels = np.clip(levels + contrast * noise / noise.std(), 0, 255)
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(folder / "tiny.png")
    return folder


def test_what_good_and_bad_weights_are_said_to_be(photos):
    torch.manual_seed(0)
    good = planted_and_found(Features(seeing=True), open_images(photos), Duplicates())
    assert good.keys() == CHANGES.keys()
    assert min(fraction for title, fraction in good.items() if title != "other shape") > 0.8
    assert warning(good) == ""
    bad = planted_and_found(Features(seeing=False), open_images(photos), Duplicates(similarity=0.0))
    assert max(bad.values()) < 0.2
    assert "duplicates.near" in warning(bad)


def test_thumbnails_propose_what_bad_weights_do_not(photos):
    found = planted_and_found(Features(seeing=False), open_images(photos), Duplicates())
    assert min(fraction for title, fraction in found.items() if title != "other shape") > 0.8


def test_what_thumbnails_refuse_is_not_found(photos):
    settings = Duplicates(near=0.01, similarity=1.0, details=1.0)
    strict = planted_and_found(Features(seeing=True), open_images(photos), settings)
    assert strict["cropped to 95 %"] < 0.5


def test_where_no_image_is_large_enough_nothing_is_said(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "tiny.png")
    assert planted_and_found(Features(seeing=True), open_images(tmp_path), Duplicates()) == {}
    assert warning({}) == ""
