"""The Vision Transformer's packed passes, masks, interface and precision."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from published import relative_error
from torch import Tensor, nn

from dino.models import VisionTransformer, ViTSpec
from dino.models.positions import interpolate_positions

SPEC = ViTSpec(32, 3, 4, patch_size=4, image_size=16, layer_scale=1.0, registers=2, mask_token=True)
ROTARY = replace(SPEC, positions="rotary")
CROPS = [(2, 16, 16), (6, 8, 8), (3, 12, 20)]  # batch, height, width


def crops_of(sizes: int) -> list[Tensor]:
    return [torch.randn(batch, 3, height, width) for batch, height, width in CROPS[:sizes]]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, left: list[Tensor], right: list[Tensor]) -> None:
    """Two ways to the same tensors give every parameter the same gradient."""
    of_left, of_right = (gradients(model, sum(output.sin().sum() for output in side)) for side in (left, right))
    assert of_left.keys() == of_right.keys()
    for name in of_left:
        assert relative_error(of_left[name], of_right[name]) < 2e-5, name


def test_epsilon_of_layer_norms():
    """Meta's 1e-6, not PyTorch's 1e-5; the last norm's is too small beside trained tokens to show in features."""
    norms = [module for module in VisionTransformer(SPEC).modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * (2 * 3 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 18}, "image_size 18 is not divisible"), ({"num_heads": 5}, "embed_dim 32 is not divisible")],
)
def test_sizes_that_do_not_divide(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(replace(SPEC, **change))


def test_registers_and_class_token_have_no_place_in_the_grid(randomise):
    """Registers take no position, and the class token its own, whatever the image's size."""
    model = randomise(VisionTransformer(SPEC))
    for height, width in ((16, 16), (8, 12)):
        tokens = model.prepare_tokens(torch.randn(1, 3, height, width))
        assert torch.equal(tokens[:, 1:3], model.register_tokens)
        assert torch.equal(tokens[:, :1], model.cls_token + model.pos_embed[:, :1])


# One pass for several sizes


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, ffn="swiglu"), ROTARY], ids=["learned", "swiglu", "rotary"])
@pytest.mark.parametrize("patches_of", [0, 1, 3])
def test_one_pass_for_crops_of_three_sizes(patches_of, spec, randomise):
    """Class tokens of all and patches of some sizes, as each size alone has them in full, masked crops first.

    Exactly the same tokens and gradients, although the last block leaves out what is not asked for.
    """
    model, crops = randomise(VisionTransformer(spec)).train(), crops_of(3)
    masks = torch.rand(1, 16) < 0.5
    classes, patches = model.encode_crops(crops, masks, patches_of=patches_of)
    of_first = [model.forward_features(crops[0][:1], masks), model.forward_features(crops[0][1:])]
    first = {name: torch.cat([part[name] for part in of_first]) for name in ("x_norm_clstoken", "x_norm_patchtokens")}
    expected = [first, *model.forward_features(crops[1:])]
    expected_classes = [features["x_norm_clstoken"] for features in expected]
    expected_patches = [features["x_norm_patchtokens"] for features in expected[:patches_of]]
    assert len(patches) == patches_of
    for left, right in zip(classes + patches, expected_classes + expected_patches, strict=True):
        assert relative_error(left, right) < 1e-5
    assert_same_gradients(model, classes + patches, expected_classes + expected_patches)


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_a_list_of_crops_equals_one_batch_after_the_other(sizes, randomise):
    """Class tokens and every token, with masks on the first size only."""
    model, crops = randomise(VisionTransformer(SPEC)).train(), crops_of(sizes)
    classes = [model(batch) for batch in crops]
    assert all(relative_error(left, right) < 1e-5 for left, right in zip(model(crops), classes, strict=True))
    assert_same_gradients(model, model(crops), classes)
    masks = [torch.rand(2, 16) < 0.5, None, None][:sizes]
    names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")
    packed = model.forward_features(crops, masks)
    separate = [model.forward_features(batch, mask) for batch, mask in zip(crops, masks, strict=True)]
    for left, right, mask in zip(packed, separate, masks, strict=True):
        assert all(relative_error(left[name], right[name]) < 1e-5 for name in names)
        assert left["masks"] is right["masks"] is mask
    both = ([features[name] for features in side for name in names] for side in (packed, separate))
    assert_same_gradients(model, *both)


# Masks


def test_mask_token_replaces_exactly_the_masked_patches(randomise):
    model = randomise(VisionTransformer(SPEC))
    images, masks = torch.randn(2, 3, 16, 12), torch.rand(2, 12) < 0.5
    plain, masked = model.prepare_tokens(images), model.prepare_tokens(images, masks)
    prefix, positions = 1 + SPEC.registers, interpolate_positions(model.pos_embed, (4, 3), "size")[0, 1:]
    expected = torch.where(masks[..., None], model.mask_token + positions, plain[:, prefix:])
    assert 0 < masks.sum() < masks.numel()
    assert torch.equal(masked[:, :prefix], plain[:, :prefix])
    assert torch.equal(masked[:, prefix:], expected)


def test_masked_pixels_do_not_matter(randomise):
    """The gradient of the features is 0 at every pixel of a masked patch, and only there."""
    model = randomise(VisionTransformer(SPEC))
    images, masks = torch.randn(2, 3, 16, 12, requires_grad=True), torch.rand(2, 12) < 0.5
    model.forward_features(images, masks)["x_norm_patchtokens"].sin().sum().backward()
    touched = F.max_pool2d(images.grad.abs().amax(dim=1), 4) > 0  # (B, h, w)
    assert torch.equal(touched.flatten(1), ~masks)


def test_empty_mask_changes_nothing(randomise):
    model = randomise(VisionTransformer(SPEC))
    images = torch.randn(2, 3, 16, 16)
    masked = model.forward_features(images, torch.zeros(2, 16, dtype=torch.bool))
    assert torch.equal(masked["x_prenorm"], model.forward_features(images)["x_prenorm"])


def test_masks_need_a_mask_token():
    model = VisionTransformer(replace(SPEC, mask_token=False))
    with pytest.raises(ValueError, match="mask token"):
        model.forward_features(torch.randn(1, 3, 16, 16), torch.zeros(1, 16, dtype=torch.bool))


# Interface


def test_forward_features_shapes(randomise):
    model = randomise(VisionTransformer(SPEC))
    features = model.forward_features(torch.randn(2, 3, 16, 12))
    shapes = {name: tuple(value.shape) for name, value in features.items() if value is not None}
    assert shapes == {
        "x_norm_clstoken": (2, 32),
        "x_norm_regtokens": (2, 2, 32),
        "x_norm_patchtokens": (2, 12, 32),
        "x_prenorm": (2, 15, 32),
    }
    assert features["masks"] is None
    normed = model.norm(features["x_prenorm"])
    torch.testing.assert_close(normed[:, 0], features["x_norm_clstoken"])
    torch.testing.assert_close(normed[:, 3:], features["x_norm_patchtokens"])


def test_intermediate_layers(randomise):
    """The contract of DINOv2's hub models."""
    model = randomise(VisionTransformer(SPEC))
    images = torch.randn(2, 3, 16, 12)
    features = model.forward_features(images)

    (last,) = model.get_intermediate_layers(images)
    torch.testing.assert_close(last, features["x_norm_patchtokens"])
    (raw,) = model.get_intermediate_layers(images, norm=False)
    torch.testing.assert_close(raw, features["x_prenorm"][:, 3:])

    pairs = model.get_intermediate_layers(images, n=2, reshape=True, return_class_token=True)
    assert [(patches.shape, token.shape) for patches, token in pairs] == [((2, 32, 4, 3), (2, 32))] * 2
    torch.testing.assert_close(pairs[-1][0][:, :, 2, 1], last[:, 2 * 3 + 1])
    torch.testing.assert_close(pairs[-1][1], features["x_norm_clstoken"])

    first, second, third = model.get_intermediate_layers(images, n=3)
    for blocks, expected in (([0, 2], (first, third)), ([2, 0], (third, first)), ([-1, 1, -3], (third, second, first))):
        for given in (blocks, tuple(blocks), torch.tensor(blocks)):
            torch.testing.assert_close(model.get_intermediate_layers(images, n=given), expected)


@pytest.mark.parametrize("blocks", [4, 0, -1, [], [0, 3], [-4]], ids=str)
def test_intermediate_layers_that_do_not_exist(blocks):
    with pytest.raises(ValueError, match="of 3"):
        VisionTransformer(SPEC).get_intermediate_layers(torch.randn(1, 3, 16, 16), n=blocks)


def test_what_users_of_the_hub_models_ask_for(randomise):
    """By the names that DINO's and DINOv2's code has."""
    model = randomise(VisionTransformer(SPEC))
    images, masks = torch.randn(2, 3, 16, 12), torch.rand(2, 12) < 0.5
    assert (model.n_blocks, model.num_heads, model.num_register_tokens) == (3, SPEC.num_heads, 2)
    assert model.patch_embed.num_patches == 16
    assert isinstance(model.head, nn.Identity)
    assert not any(name.startswith("head") for name in model.state_dict())
    features = model(images, masks=masks, is_training=True)
    torch.testing.assert_close(features["x_norm_clstoken"], model.forward_features(images, masks)["x_norm_clstoken"])
    tokens = model.prepare_tokens_with_masks(images, masks)
    assert tokens.shape == (2, 15, 32)
    attention = model.get_last_selfattention(images)
    assert attention.shape == (2, SPEC.num_heads, 15, 15)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, SPEC.num_heads, 15))
    torch.testing.assert_close(attention[:, :, 0, 3:].unflatten(2, (4, 3)), model.class_attention(images))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace")
@pytest.mark.parametrize(
    "changes",
    [{}, {"position_interpolation": "offset"}, {"positions": "rotary"}, {"ffn": "swiglu"}, {"stem": "conv"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(16, 16), (24, 12)], ids=str)
def test_a_trace_gives_the_same(changes, shape, randomise):
    """At the size it was traced at; batches of other sizes included."""
    model = randomise(VisionTransformer(replace(SPEC, **changes)))
    traced = torch.jit.trace(model, torch.randn(2, 3, *shape))
    images = torch.randn(5, 3, *shape)
    torch.testing.assert_close(traced(images), model(images))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_are_those_of_the_convolution(channels, randomise):
    """Any number of channels, and images that are not square: patches in row order."""
    model = randomise(VisionTransformer(replace(SPEC, in_chans=channels)))
    images = torch.randn(2, channels, 8, 20)
    projection = model.patch_embed.proj
    expected = F.conv2d(images, projection.weight, projection.bias, stride=4)
    torch.testing.assert_close(model.patch_embed(images), expected.flatten(2).transpose(1, 2))
    assert model(images).shape == (2, 32)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 18, 16), "18×16 cannot be cut into patches of 4"),
        ((1, 3, 16, 18), "16×18 cannot be cut into patches of 4"),
        ((1, 1, 16, 16), "1 channels, the model takes 3"),
    ],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(SPEC)(torch.randn(shape))


# Precision


def test_bf16_autocast_is_close_to_fp32(randomise):
    model = randomise(VisionTransformer(SPEC)).train()
    crops = crops_of(3)
    masks = [torch.rand(2, 16) < 0.5, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_features = model(crops), model.forward_features(crops, masks)
    for left, right in zip(low, model(crops), strict=True):
        assert relative_error(left, right) < 0.03
    for left, right in zip(low_features, model.forward_features(crops, masks), strict=True):
        assert relative_error(left["x_norm_patchtokens"], right["x_norm_patchtokens"]) < 0.03
    low_gradients = gradients(model, sum(output.sin().sum() for output in low))
    full_gradients = gradients(model, sum(output.sin().sum() for output in model(crops)))
    for name, gradient in full_gradients.items():
        cosine = F.cosine_similarity(low_gradients[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_converted_to_another_dtype(dtype, randomise):
    model = randomise(VisionTransformer(SPEC))
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    outputs = model.to(dtype)(images.to(dtype))
    assert outputs.dtype == dtype
    assert relative_error(outputs, expected) < 0.03


def test_random_weights_are_drawn_as_the_named_code_draws_them():
    """Reference: the standard deviations in facebookresearch/dino's and dinov2's vision_transformer.py."""
    spec = ViTSpec(256, 2, 2, registers=4, image_size=32, patch_size=8)
    for initialisation, tokens in (("published", 0.02), ("dinov2", 1e-6)):
        torch.manual_seed(0)
        vit = VisionTransformer(spec, initialisation=initialisation)
        assert vit.register_tokens.std().item() == pytest.approx(tokens, rel=0.2)
        assert vit.cls_token.std().item() == pytest.approx(tokens, rel=0.3)
        assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
        assert vit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
