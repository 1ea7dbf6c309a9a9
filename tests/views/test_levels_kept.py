"""Views of images with finer levels than 8 bits: what 8 bits give, and what they lose."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from dino.data import Canvas
from dino.data.resident import border_colour
from dino.models import Preprocess
from dino.views import DeviceViews
from tests.views.material import EVERYTHING, keys_of, only, plain, preset


def canvas(images: torch.Tensor) -> Canvas:
    background = torch.stack([border_colour(image) for image in images])
    return Canvas(images, background, np.array([images.shape[2:]] * len(images)))


def views_of(images: torch.Tensor, spec, singly: bool = False) -> list[torch.Tensor]:
    views, keys = DeviceViews(spec, singly), keys_of(len(images))
    return views.photometric(views.crop(canvas(images), keys), keys)


@pytest.mark.parametrize("singly", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", ["dino", "line_art"])
def test_whole_levels_give_the_same_views_but_for_rounding(name, channels, singly):
    whole = torch.randint(0, 256, (6, channels, 40, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    spec = preset(name, augment={"solarize": 0.0})  # which makes a step of a rounding
    for fine, coarse in zip(views_of(whole.float(), spec, singly), views_of(whole, spec, singly), strict=True):
        assert fine.dtype == torch.float32
        assert fine.min() >= 0
        assert fine.max() <= 255
        difference = (fine - coarse.float()).abs()
        assert difference.mean() < 0.6
        assert difference.quantile(0.99) < 4  # hue and saturation multiply a rounding


def test_differences_within_one_level_of_8_bits_are_seen():
    fine = 100 + torch.rand(4, 1, 40, 40, generator=torch.manual_seed(0)) * 0.4
    spec = only(plain(32, **{name: 1.0 for name in EVERYTHING if name not in ("affine", "stroke", "blur")}), 2)
    crops = views_of(fine, spec)[0]
    assert (crops.flatten(1).std(dim=1) > 0.02).all()
    assert (views_of(fine.round().to(torch.uint8), spec)[0].float().flatten(1).std(dim=1) == 0).all()


def test_preprocessing_takes_both():
    whole = torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    preprocess = Preprocess(24, [0.4] * 3, [0.2] * 3)
    assert (
        preprocess.of_levels(whole.float()) - preprocess(whole)
    ).abs().mean() <= 0.6 / 255 / 0.2  # it clips between passes
    assert preprocess.of_levels(whole.float()).min() >= -2 - 1e-5
    same_size = Preprocess(32, [0.4] * 3, [0.2] * 3)
    expected = functional.normalize(functional.center_crop(whole, [32, 32]) / 255, [0.4] * 3, [0.2] * 3)
    assert torch.allclose(same_size.of_levels(whole.float()), expected, atol=1e-5)
