"""The two ways to make views give a run the same batches."""

import pytest
import torch
from PIL import Image

from dino.data import open_images
from dino.errors import UserError
from dino.training.loader import Batches

WAYS = {
    "resident": {"data.cache": "device"},
    "workers": {"data.cache": "none"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images of several sizes and smooth content, so that a wrong crop would show."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(64):
        coarse = torch.rand(3, 4, 4, generator=generator)
        size = (20 + index % 7, 24 + index % 5)
        fine = torch.nn.functional.interpolate(coarse[None], size=size, mode="bilinear")[0]
        Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy()).save(root / f"{index:02d}.png")
    return root


def batches(accelerator, config, folder, start: int = 0, stop: int = 3) -> list[list[list[torch.Tensor]]]:
    images = open_images(str(folder), "folder", 3)
    return list(Batches(config, images, accelerator, start, stop, None))


@pytest.mark.parametrize("preset", ["line_art", "dino", "dinov2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_views_up_to_rounding(preset, accumulation, accelerator, tiny, folder):
    found = {}
    for name, way in WAYS.items():
        config = tiny({**way, "data.workers": 0, "views.preset": preset, "train.accumulation": accumulation})
        found[name] = batches(accelerator, config, folder)
    for step, other in zip(found["resident"], found["workers"], strict=True):
        assert len(step) == len(other) == accumulation
        for crops, others in zip(step, other, strict=True):
            assert [crop.shape for crop in crops] == [crop.shape for crop in others]
            assert all(crop.dtype == torch.uint8 for crop in crops)
            for crop, peer in zip(crops, others, strict=True):
                difference = (crop.float() - peer.float()).abs()
                assert difference.mean() < 1
                assert difference.flatten(1).mean(dim=1).max() < 2  # of the worst single view


@pytest.mark.parametrize("way", WAYS)
def test_any_step_can_be_the_first(way, accelerator, tiny, folder):
    config = tiny({**WAYS[way], "data.workers": 0})
    whole, rest = batches(accelerator, config, folder), batches(accelerator, config, folder, start=2)
    for crops, again in zip(whole[2][0], rest[0][0], strict=True):
        assert torch.equal(crops, again)
    assert not torch.equal(whole[0][0][0], whole[1][0][0])


@pytest.mark.parametrize("way", WAYS)
def test_indices_are_those_of_the_images(way, accelerator, tiny, folder):
    """Whole images, neither moved nor changed, show which they are."""
    settings = {"views.preset": "line_art", "views.affine": 0.0, "views.stroke": 0.0, "views.global_scale": [1.0, 1.0]}
    config = tiny({**WAYS[way], **settings, "data.workers": 0, "train.accumulation": 2})
    images = open_images(str(folder), "folder", 3)
    stream = Batches(config, images, accelerator, 0, 2, None)
    colours = torch.stack([images.read(index).float().mean(dim=(1, 2)) for index in range(64)])
    for step, micro_batches in enumerate(stream):
        first_views = torch.cat([crops[0][: len(crops[0]) // 2] for crops in micro_batches]).float().mean(dim=(2, 3))
        assert torch.cdist(first_views, colours).argmin(dim=1).tolist() == stream.indices(step)


def test_broken_images_are_replaced_and_listed_alike(accelerator, tiny, folder, tmp_path):
    """Over one epoch, in which every image has its turn; without affine changes a CPU cuts in one way."""
    broken = (5, 6, 40, 63)  # the last is replaced by the first
    for index, path in enumerate(sorted(folder.iterdir())):
        (tmp_path / path.name).write_bytes(b"" if index in broken else path.read_bytes())
    images, found, listed = open_images(str(tmp_path), "folder", 3), {}, {}
    for name, way in WAYS.items():
        settings = {"views.preset": "line_art", "views.affine": 0.0, "data.workers": 0, "data.max_unreadable": 0.1}
        stream = Batches(tiny(way | settings), images, accelerator, 0, 8, None)
        found[name], listed[name] = [step[0] for step in stream], stream.skipped.reasons
    assert listed["workers"] == listed["resident"]  # whatever the order in which they were met
    for crops, others in zip(found["resident"], found["workers"], strict=True):
        assert all((one.int() - other.int()).abs().max() <= 1 for one, other in zip(crops, others, strict=True))
    assert list(listed["resident"]) == [images.names[index] for index in broken]


def test_too_many_unreadable_images_are_told_before_the_first_step(accelerator, tiny, folder, tmp_path):
    for path in sorted(folder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for index in range(5):
        (tmp_path / f"{index:02d}.png").write_text("no picture")
    config = tiny({**WAYS["resident"], "data.workers": 0})
    images = open_images(str(tmp_path), "folder", 3)
    with pytest.raises(UserError, match=r"5 of 64 images \(7\.8%\) cannot be read"):
        Batches(config, images, accelerator, 0, 3, None)
