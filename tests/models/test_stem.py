"""The convolutional stem: its layers as they are described, what a token sees, and a ViT that has one."""

import pytest
import torch
import torch.nn.functional as F
from published import relative_error
from torch import nn

from dino.models import VisionTransformer, ViTSpec
from dino.models.stem import ConvStem

SPEC = ViTSpec(32, 2, 4, patch_size=8, image_size=32, in_chans=1, registers=1, mask_token=True, stem="conv")


@pytest.mark.parametrize(
    ("patch", "width", "channels", "last"),
    [
        (8, 192, [24, 48, 96], 1),
        (16, 384, [24, 48, 96, 192], 1),
        (16, 192, [16, 24, 48, 96], 1),  # whole groups of GroupNorm
        (4, 192, [48, 96], 1),
        (14, 384, [192], 7),
        (12, 64, [16, 32], 3),
    ],
)
def test_channels_double_up_to_half_the_width(patch, width, channels, last):
    stem = ConvStem(patch, 3, width)
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == channels
    assert (stem.proj.kernel_size, stem.proj.stride) == ((last, last), (last, last))
    assert stem(torch.randn(2, 3, 2 * patch, 3 * patch)).shape == (2, 6, width)


def test_equals_its_layers_one_after_the_other(randomise):
    stem = randomise(ConvStem(4, 1, 32))
    images = torch.randn(3, 1, 8, 12)
    of, features = dict(stem.named_parameters()), images
    for name, norm in (("layers.0", "layers.1"), ("layers.3", "layers.4")):
        features = F.conv2d(features, of[f"{name}.weight"], of[f"{name}.bias"], stride=2, padding=1)
        grouped = features.unflatten(1, (8, -1))
        centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
        deviation = (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        features = (centred / deviation).flatten(1, 2)
        features = features * of[f"{norm}.weight"][:, None, None] + of[f"{norm}.bias"][:, None, None]
        features = features * (1 + torch.erf(features / 2**0.5)) / 2
    expected = torch.einsum("bchw,dc->bhwd", features, of["proj.weight"][:, :, 0, 0]) + of["proj.bias"]
    assert relative_error(stem(images), expected.flatten(1, 2)) < 1e-5


@pytest.mark.parametrize(
    ("stem", "images", "message"),
    [
        (lambda: ConvStem(7, 3, 32), None, "patch_size 7 is odd"),
        (lambda: ConvStem(8, 3, 32), (1, 3, 16, 20), "16×20 cannot be cut into patches of 8"),
        (lambda: ConvStem(8, 3, 32), (1, 1, 16, 16), "1 channels, the model takes 3"),
    ],
)
def test_what_does_not_fit_is_told(stem, images, message):
    with pytest.raises(ValueError, match=message):
        stem()(torch.zeros(images))


class TestViT:
    def test_gradients_reach_every_parameter(self):
        model = VisionTransformer(SPEC)
        masks = torch.zeros(2, 16, dtype=torch.bool)
        masks[:, ::3] = True
        tokens, (patches,) = model.encode_crops([torch.randn(2, 1, 32, 32), torch.randn(3, 1, 16, 24)], masks, 1)
        (sum(t.square().sum() for t in tokens) + patches.square().sum()).backward()
        assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == set()
        assert {name for name in dict(model.named_parameters()) if name.startswith("patch_embed.layers.")}

    def test_sizes_do_not_touch_each_other(self, randomise):
        """GroupNorm looks at one image at a time: crops go through alone as they do together."""
        model = randomise(VisionTransformer(SPEC)).eval()
        crops = [torch.randn(2, 1, 32, 32), torch.randn(3, 1, 16, 24)]
        together, alone = model(crops), [torch.cat([model(image[None]) for image in batch]) for batch in crops]
        for left, right in zip(together, alone, strict=True):
            assert relative_error(left, right) < 1e-5

    def test_mask_tokens_replace_what_comes_out_of_it(self, randomise):
        model = randomise(VisionTransformer(SPEC))
        masks = torch.zeros(1, 16, dtype=torch.bool)
        masks[0, 5] = True
        images = torch.randn(1, 1, 32, 32)
        plain, masked = model.prepare_tokens(images), model.prepare_tokens(images, masks)
        assert (plain != masked).any(dim=2)[0].nonzero().flatten().tolist() == [2 + 5]
        torch.testing.assert_close(masked[:, 2 + 5], model.mask_token + model.pos_embed[:, 1 + 5])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_under_autocast(self, dtype):
        model = VisionTransformer(SPEC)
        images = torch.randn(2, 1, 32, 32)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            tokens = model(images)
        assert relative_error(tokens, model(images)) < 0.03
