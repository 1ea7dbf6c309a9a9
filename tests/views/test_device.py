"""Crops and affine changes of whole batches against torch's and torchvision's, image by image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import canvas_of, keys_of, noise, preset, still
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dino.views import DeviceViews
from dino.views.device import crop_resize, crop_resize_singly
from dino.views.draws import draw_geometry
from dino.views.operations import small_affine
from dino.views.pipeline import cut_views

SIZES = [(40, 56), (33, 30), (64, 20), (25, 25)]


def boxes_of(images: int, views: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    boxes = []
    for _ in range(images * views):
        h, w = int(generator.integers(3, height + 1)), int(generator.integers(3, width + 1))
        boxes.append((generator.integers(0, height - h + 1), generator.integers(0, width - w + 1), h, w))
    return np.array(boxes)


@pytest.mark.parametrize("size", [5, 12, 64])  # smaller and larger than the boxes
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_torchs_antialiased_bicubic(size, channels):
    pixels = noise(4, channels, 30, 37).float()
    boxes, flips = boxes_of(4, 3, 30, 37), np.arange(12) % 2 == 1
    found = crop_resize(pixels, boxes, flips, size)
    for index, (top, left, height, width) in enumerate(boxes):
        part = pixels[index % 4, :, top : top + height, left : left + width]
        wanted = F.interpolate(part[None], size=(size, size), mode="bicubic", antialias=True)[0]
        wanted = wanted.flip(-1) if flips[index] else wanted
        assert torch.allclose(found[index], wanted, atol=0.02), index  # of 255


def test_one_by_one_on_a_cpu_is_the_same():
    pixels, boxes, flips = noise(4, 3, 30, 37), boxes_of(4, 3, 30, 37), np.arange(12) % 3 == 1
    products = crop_resize(pixels.float(), boxes, flips, 12).clamp(0, 255)
    singly = crop_resize_singly(pixels, boxes, flips, 12).float()
    # torch's kernel for bytes rounds and cuts off between its two passes.
    assert (products - singly).abs().mean() < 1


@pytest.mark.parametrize("name", ["line_art", "dino"])
@pytest.mark.parametrize("sizes", [[(40, 56)] * 4, SIZES], ids=["uniform", "ragged"])
def test_cuts_are_the_workers(name, sizes):
    images = [F.avg_pool2d(noise(3, *size, seed=index).float(), 3, 1, 1).byte() for index, size in enumerate(sizes)]
    spec, keys = preset(name), keys_of(len(images))
    views = DeviceViews(spec)
    found = views.cut(canvas_of(images), keys)
    for number, (image, key) in enumerate(zip(images, keys, strict=True)):
        for view, wanted in enumerate(cut_views(image, spec, int(key))):
            group = next(place for place, group in enumerate(views.groups) if view in range(5)[group])
            crop = found[group][(view - views.groups[group].start) * len(images) + number]
            difference = (crop.float() - wanted.float()).abs()
            assert difference.mean() < 0.6
            assert difference.max() < 20


def test_each_image_of_a_batch_is_cut_as_alone():
    images, spec, keys = [noise(1, *size) for size in SIZES], preset("line_art"), keys_of(4)
    together = DeviceViews(spec).cut(canvas_of(images), keys)
    for number, image in enumerate(images):
        alone = DeviceViews(spec).cut(canvas_of([image]), keys[number : number + 1])
        for crops, single in zip(together, alone, strict=True):
            chosen = crops[number::4].int()
            assert (chosen - single.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "change", [{"angle": 0.15}, {"shear": 0.17}, {"zoom": 1.1}, {"zoom": 0.9}, {"shift": (0.1, -0.05)}, "all"]
)
def test_affine_changes_are_torchvisions(change):
    """Where a shift is a whole number of pixels, as torchvision has it."""
    if change == "all":
        change = {"angle": -0.12, "shear": 0.1, "zoom": 0.93, "shift": (-0.05, 0.1)}
    image = F.avg_pool2d(noise(2, 40, 60).float(), 5, 1, 2)
    geometry = still([(40, 60)], **{name: [value] for name, value in change.items()})
    found = small_affine(image[None], torch.zeros(1, 2), geometry, torch.tensor([[40.0, 60.0]]))[0]
    wanted = functional.affine(
        image,
        angle=float(np.degrees(geometry.angle[0])),
        translate=[round(60 * geometry.shift[0, 1]), round(40 * geometry.shift[0, 0])],
        scale=float(geometry.zoom[0]),
        shear=[float(np.degrees(geometry.shear[0])), 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    assert torch.allclose(found, wanted, atol=0.05)
    assert (found - image).abs().mean() > 1


def test_what_comes_in_is_background_and_the_canvas_does_not_count():
    image = noise(3, 20, 30, low=100)
    canvas = canvas_of([image, noise(3, 45, 50)])
    geometry = still([(20, 30), (45, 50)], angle=[0.3, 0.3], shift=[(0.2, 0.2)] * 2)
    sizes = torch.tensor(canvas.sizes).float()
    found = small_affine(canvas.pixels.float(), canvas.background.float(), geometry, sizes)[0]
    alone = small_affine(
        image[None].float(),
        canvas.background[:1].float(),
        still([(20, 30)], angle=[0.3], shift=[(0.2, 0.2)]),
        sizes[:1],
    )[0]
    assert torch.allclose(found[:, :20, :30], alone, atol=0.01)
    assert torch.allclose(found[:, 0, 0], canvas.background[0].float(), atol=0.01)


def test_no_random_state_is_read_or_changed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images, spec, keys = [noise(3, 40, 40)] * 3, preset("dino"), keys_of(3)
    views = DeviceViews(spec)
    first = views.retouch(views.cut(canvas_of(images), keys), keys)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = views.retouch(views.cut(canvas_of(images), keys), keys)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_boxes_lie_inside_whatever_the_size():
    generator = np.random.default_rng(0)
    sizes = generator.integers(4, 300, (200, 2))
    boxes = draw_geometry(preset("dino").views, keys_of(200), sizes).box
    assert (boxes[..., :2] >= 0).all()
    assert (boxes[..., 2:] >= 1).all()
    assert (boxes[..., :2] + boxes[..., 2:] <= sizes).all()
