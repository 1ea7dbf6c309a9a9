"""What the views of a batch ask of a GPU: so many operators, few copies, no wait; counted without one."""

import numpy as np
import pytest
import torch
from counting import Counted
from material import Pool, keys_of, preset

from dino.data import ResidentImages
from dino.views import DeviceViews
from dino.views.plan import Upload

META = torch.device("meta")
MOST = {"dino": 510, "dinov2": 510, "line_art": 300}  # operators of a batch of any size, with some room


def counted(name: str, images: int, **settings) -> Counted:
    resident = ResidentImages(Pool(images), torch.device("cpu"), show_progress=False)
    resident.pixels, resident.background = resident.pixels.to(META), resident.background.to(META)
    views = DeviceViews(preset(name, **settings))
    with Counted() as counts:
        views.photometric(views.crop(resident.gather(range(images)), keys_of(images)), keys_of(images))
    return counts


@pytest.mark.parametrize("name", MOST)
def test_views_of_resident_images(name):
    small, large = counted(name, 64), counted(name, 128)
    assert small.copies == large.copies == 3  # which images, what was drawn for crops, and for their augmentation
    assert small.syncs == large.syncs == 0
    assert small.operators == pytest.approx(large.operators, abs=8)
    assert large.operators <= MOST[name], large.by_name


def test_views_of_many_more_crops_take_no_more_operators():
    assert counted("dino", 64, local_crops=8).operators == pytest.approx(counted("dino", 64).operators, abs=8)


def test_what_is_sent_arrives():
    """Of every type and shape; to a device where there is one, else to a CPU as if it were one."""
    arrays = {"a": np.arange(3), "b": np.random.default_rng(0).random((5, 1, 1)), "c": np.zeros((0, 2)), "d": np.eye(3)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    upload = Upload()
    first, second = upload.add(arrays), upload.add({"e": np.arange(7)[::-1]})
    upload.send(device)
    for name, values in arrays.items():
        assert first[name].device.type == device.type
        assert first[name].dtype == (torch.int64 if name == "a" else torch.float32)
        np.testing.assert_allclose(first[name].cpu().numpy(), values, rtol=1e-6)
    assert second["e"].tolist() == list(range(7))[::-1]
