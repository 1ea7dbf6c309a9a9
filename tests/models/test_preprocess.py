"""What images become before a backbone sees them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from dino.models import Preprocess, ViTSpec
from dino.models.registry import build
from dino.models.resnet import ResNetSpec

PREPROCESS = Preprocess(32, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25], resize=40)


def pixels(height: int, width: int) -> torch.Tensor:
    rows = torch.arange(height)[:, None] * torch.ones(width, dtype=torch.int64)
    return torch.stack([rows % 256, (rows // 3) % 256, rows.T.reshape(height, width) % 256]).to(torch.uint8)


@pytest.mark.parametrize("shape", [(4, 60_000), (60_000, 4), (5, 30_001)])
def test_of_a_strip_only_the_middle_is_resized(shape):
    """A thousand times more pixels come of the whole. The middle is the whole's middle."""
    height, width = shape
    strip = pixels(height, width)
    short, long = min(shape), max(shape)
    start = (long - 4 * short) // 2
    middle = strip[:, :, start : start + 4 * short] if width > height else strip[:, start : start + 4 * short]
    assert (PREPROCESS(strip) - PREPROCESS(middle)).abs().max() < 0.5  # an odd number more: half a pixel beside it
    assert PREPROCESS(strip).shape == (3, 32, 32)


def test_a_pil_image_is_prepared_like_its_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = PREPROCESS(torch.from_numpy(noise).permute(2, 0, 1))
    assert torch.equal(PREPROCESS(Image.fromarray(noise)), expected)
    opaque = Image.fromarray(noise).convert("RGBA")
    assert torch.equal(PREPROCESS(opaque), expected)
    assert Preprocess(32, [0.5], [0.5])(Image.fromarray(noise)).shape == (1, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "spec",
    [
        ViTSpec(48, 2, 3, 4, 24, position_interpolation="offset"),
        ViTSpec(48, 2, 3, 4, 24, positions="rotary", stem="conv", registers=2),
        ResNetSpec("resnet18"),
    ],
    ids=["learned", "rotary", "ResNet"],
)
@torch.no_grad()
def test_a_model_in_another_precision_takes_what_preprocess_gives(spec, dtype):
    model = build(spec).eval()
    images = PREPROCESS(torch.randint(256, (2, 3, 50, 60), dtype=torch.uint8))
    expected = model(images)
    features = model.to(dtype)(images)
    assert features.dtype == dtype
    assert (features.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.bool])
def test_whole_numbers_of_unknown_range_are_refused(dtype):
    """Scaled by what their type can hold, they would be black."""
    with pytest.raises(ValueError, match=r"torch.uint8, torch.uint16 or floating-point from 0 to 1"):
        PREPROCESS(pixels(40, 50).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint16])
def test_white_is_as_torchvision_has_it(dtype):
    """An image that was made a tensor by torchvision is the same image."""
    image = pixels(40, 50)
    scaled = functional.to_dtype(image, dtype, scale=True)
    assert torch.allclose(PREPROCESS(scaled).float(), PREPROCESS(image), atol=0.03)
    assert torch.allclose(PREPROCESS.of_levels(image.float()), PREPROCESS(image), atol=0.03)


@pytest.mark.parametrize("wrong", [lambda image: image.float(), lambda image: 4 * torch.randn(image.shape)])
def test_levels_and_normalised_images_are_not_taken_for_fractions(wrong):
    with pytest.raises(ValueError, match="reach from 0 to 1"):
        PREPROCESS(wrong(pixels(40, 50)))
