"""The Vision Transformer's parameters, position tables, packed passes and interface."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.models import SIZES, VisionTransformer, ViTSpec
from dino.models.layers import Group, draw_subset, unpack
from dino.models.positions import interpolate_positions

SPEC = ViTSpec(32, 3, 4, patch_size=4, image_size=16, layer_scale=1.0, registers=2, mask_token=True)
DINOV2 = {"patch_size": 14, "image_size": 518, "layer_scale": 1.0, "mask_token": True}
CROPS = [(2, 16, 16), (6, 8, 8), (3, 12, 20)]  # batch, height, width


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def crops_of(sizes: int) -> list[Tensor]:
    return [torch.randn(batch, 3, height, width) for batch, height, width in CROPS[:sizes]]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert relative_error(left[name], right[name]) < 2e-5, name


# Parameters


@pytest.mark.parametrize(
    ("size", "options", "keys", "parameters"),
    [
        ("vit_tiny", {"patch_size": 16}, 150, 5_524_416),
        ("vit_small", {"patch_size": 16}, 150, 21_665_664),
        ("vit_small", {"patch_size": 8}, 150, 21_670_272),
        ("vit_base", {"patch_size": 16}, 150, 85_798_656),
        ("vit_base", {"patch_size": 8}, 150, 85_807_872),
        ("vit_small", DINOV2, 175, 22_056_576),
        ("vit_small", DINOV2 | {"registers": 4}, 176, 22_058_112),
        ("vit_base", DINOV2, 175, 86_580_480),
        ("vit_large", DINOV2, 343, 304_368_640),
        ("vit_giant2", DINOV2 | {"ffn": "swiglu"}, 567, 1_136_480_768),
    ],
)
def test_counts_of_the_releases(size, options, keys, parameters):
    """Tensors and parameters of Meta's files, so that these load strictly."""
    with torch.device("meta"):
        model = VisionTransformer(ViTSpec(*SIZES[size], **options))
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_names_and_shapes_of_dinov2_small():
    with torch.device("meta"):
        state = VisionTransformer(ViTSpec(*SIZES["vit_small"], **DINOV2)).state_dict()
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 1370, 384),
        "mask_token": (1, 384),
        "patch_embed.proj.weight": (384, 3, 14, 14),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    for index in range(12):
        block = {
            "norm1.weight": (384,),
            "norm1.bias": (384,),
            "attn.qkv.weight": (1152, 384),
            "attn.qkv.bias": (1152,),
            "attn.proj.weight": (384, 384),
            "attn.proj.bias": (384,),
            "ls1.gamma": (384,),
            "norm2.weight": (384,),
            "norm2.bias": (384,),
            "mlp.fc1.weight": (1536, 384),
            "mlp.fc1.bias": (1536,),
            "mlp.fc2.weight": (384, 1536),
            "mlp.fc2.bias": (384,),
            "ls2.gamma": (384,),
        }
        expected |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_shapes_of_dinov2_giants_mlp():
    with torch.device("meta"):
        state = VisionTransformer(ViTSpec(*SIZES["vit_giant2"], **DINOV2, ffn="swiglu", registers=4)).state_dict()
    assert state["blocks.39.mlp.w12.weight"].shape == (8192, 1536)
    assert state["blocks.39.mlp.w3.weight"].shape == (1536, 4096)
    assert state["register_tokens"].shape == (1, 4, 1536)


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


# Positions


def keys_kernel(distance: float, a: float) -> float:
    """Cubic convolution kernel (Keys 1981, eq. 15; a = -0.5 is his choice, -0.75 that of most graphics software)."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def shares(side: int, cells: int, convention: str) -> np.ndarray:
    """(cells, side): the share of each old cell in each new one, along one axis, with cells' centres at i + 1/2."""
    result = np.zeros((cells, side))
    for new in range(cells):
        if convention == "offset":  # the scale is not that of the grids; beyond the border, its cell is repeated
            centre = (new + 0.5) / ((cells + 0.1) / side) - 0.5
            for old in range(math.floor(centre) - 1, math.floor(centre) + 3):
                result[new, min(max(old, 0), side - 1)] += keys_kernel(old - centre, a=-0.75)
        else:  # the kernel widens with the step between new cells; beyond the border, nothing counts
            centre = (new + 0.5) * side / cells - 0.5
            for old in range(side):
                result[new, old] = keys_kernel((old - centre) / max(side / cells, 1), a=-0.5)
            result[new] /= result[new].sum()
    return result


@pytest.mark.parametrize("convention", ["offset", "size"])
@pytest.mark.parametrize(
    ("side", "grid"),
    [
        (14, (6, 6)),  # DINO's local crops of 96 px
        (37, (7, 7)),  # DINOv2's of 98 px
        (37, (16, 16)),
        (14, (30, 30)),
        (6, (6, 9)),  # one side the table's own
        (6, (4, 13)),
        (6, (13, 4)),
        (4, (2, 8)),  # as many cells as the table, but not its grid
        (5, (1, 2)),
    ],
    ids=str,
)
def test_positions_equal_the_definition_of_bicubic(side, grid, convention):
    table = torch.randn(1, 1 + side * side, 3)
    cells = table[0, 1:].double().numpy().reshape(side, side, 3)
    rows, columns = (shares(side, length, convention) for length in grid)
    expected = torch.from_numpy(np.einsum("ra,cb,abd->rcd", rows, columns, cells)).float().reshape(1, -1, 3)
    result = interpolate_positions(table, grid, convention)
    assert torch.equal(result[:, :1], table[:, :1])
    assert relative_error(result[:, 1:], expected) < 1e-5


@pytest.mark.parametrize("convention", ["offset", "size"])
def test_positions_at_their_own_grid_are_untouched(convention):
    table = torch.randn(1, 1 + 7 * 7, 3)
    assert interpolate_positions(table, (7, 7), convention) is table


@pytest.mark.parametrize("convention", ["offset", "size"])
@pytest.mark.parametrize("side", [14, 37])
def test_positions_at_every_grid(side, convention):
    """Scale factors without the offset miss by one cell at, for instance, 61 from 14 and 39 from 37."""
    table = torch.randn(1, 1 + side * side, 1)
    for cells in range(1, 130):
        assert interpolate_positions(table, (cells, 3), convention).shape == (1, 1 + 3 * cells, 1)


@pytest.mark.parametrize("convention", ["offset", "size"])
def test_positions_of_a_half_precision_table_are_resampled_in_fp32(convention):
    table = torch.randn(1, 1 + 14 * 14, 8).bfloat16()
    expected = interpolate_positions(table.float(), (6, 9), convention).bfloat16()
    assert torch.equal(interpolate_positions(table, (6, 9), convention), expected)


def test_registers_and_class_token_have_no_place_in_the_grid(randomise):
    """Registers take no position, and the class token its own, whatever the image's size."""
    model = randomise(VisionTransformer(SPEC))
    for height, width in ((16, 16), (8, 12)):
        tokens = model.prepare_tokens(torch.randn(1, 3, height, width))
        assert torch.equal(tokens[:, 1:3], model.register_tokens)
        assert torch.equal(tokens[:, :1], model.cls_token + model.pos_embed[:, :1])


# One pass for several sizes


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_packed_pass_equals_separate_passes(sizes, randomise):
    """Class tokens, and what they give as gradients of every parameter."""
    model = randomise(VisionTransformer(SPEC)).train()
    crops = crops_of(sizes)
    packed, separate = model(crops), [model(batch) for batch in crops]
    for left, right in zip(packed, separate, strict=True):
        assert relative_error(left, right) < 1e-5
    assert_same_gradients(
        gradients(model, sum(output.sin().sum() for output in packed)),
        gradients(model, sum(output.sin().sum() for output in separate)),
    )


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_packed_features_equal_separate_features(sizes, randomise):
    """Every token, with masks on the first size only."""
    model = randomise(VisionTransformer(SPEC)).train()
    crops = crops_of(sizes)
    masks = [torch.rand(2, 16) < 0.5, None, None][:sizes]
    names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")
    packed = model.forward_features(crops, masks)
    separate = [model.forward_features(batch, mask) for batch, mask in zip(crops, masks, strict=True)]
    for left, right, mask in zip(packed, separate, masks, strict=True):
        assert all(relative_error(left[name], right[name]) < 1e-5 for name in names)
        assert left["masks"] is right["masks"] is mask
    assert_same_gradients(
        gradients(model, sum(features[name].sin().sum() for features in packed for name in names)),
        gradients(model, sum(features[name].sin().sum() for features in separate for name in names)),
    )


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_class_tokens_alone_equal_those_of_all_tokens(ffn, randomise):
    """`forward` leaves the patches of the last block out: exactly the same class tokens and gradients."""
    model = randomise(VisionTransformer(replace(SPEC, ffn=ffn))).train()
    crops = crops_of(3)
    alone, of_all = model(crops), [features["x_norm_clstoken"] for features in model.forward_features(crops)]
    for left, right in zip(alone, of_all, strict=True):
        assert relative_error(left, right) < 1e-5
    assert_same_gradients(
        gradients(model, sum(output.sin().sum() for output in alone)),
        gradients(model, sum(output.sin().sum() for output in of_all)),
    )


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

    chosen = model.get_intermediate_layers(images, n=[0, 2])
    everything = model.get_intermediate_layers(images, n=3)
    torch.testing.assert_close(chosen, (everything[0], everything[2]))


@pytest.mark.parametrize("blocks", [4, [0, 3], [-1]], ids=str)
def test_intermediate_layers_that_do_not_exist(blocks):
    with pytest.raises(ValueError, match="of 3"):
        VisionTransformer(SPEC).get_intermediate_layers(torch.randn(1, 3, 16, 16), n=blocks)


@pytest.mark.parametrize("registers", [0, 2])
def test_class_attention_equals_explicit_softmax(registers, randomise):
    model = randomise(VisionTransformer(replace(SPEC, registers=registers)))
    captured = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: captured.append(output))
    attention = model.class_attention(torch.randn(2, 3, 16, 12))
    handle.remove()
    tokens = captured[0].reshape(2, 1 + registers + 12, 32)
    weight, bias = model.blocks[-1].attn.qkv.weight, model.blocks[-1].attn.qkv.bias
    for image in range(2):
        for head in range(4):
            rows = slice(8 * head, 8 * (head + 1))
            query = weight[:32][rows] @ tokens[image, 0] + bias[:32][rows]
            keys = tokens[image] @ weight[32:64][rows].T + bias[32:64][rows]
            scores = (keys @ query / math.sqrt(8)).exp()
            expected = (scores / scores.sum())[1 + registers :].reshape(4, 3)
            torch.testing.assert_close(attention[image, head], expected)
    assert attention.shape == (2, 4, 4, 3)
    assert attention.sum(dim=(2, 3)).max() < 1


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


# Stochastic depth


def test_drop_path_rates_grow_linearly():
    model = VisionTransformer(replace(SPEC, depth=5), drop_path=0.2)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_is_for_training_only(randomise):
    """Evaluation is that of a model without it, and training too if the rate is 0."""
    plain = randomise(VisionTransformer(SPEC))
    dropping = VisionTransformer(SPEC, drop_path=0.9).eval()
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(dropping(images), plain(images))
    assert torch.equal(plain.train()(images), plain.eval()(images))
    assert not torch.equal(dropping.train()(images), plain(images))


def test_drop_path_keeps_the_expectation():
    """Whole sequences, independently of each other, are dropped at the rate asked for; the others are scaled up."""
    drop_path = VisionTransformer(replace(SPEC, depth=2), drop_path=0.3).train().blocks[-1].drop_path
    groups = [Group(3000, 2, (1, 1)), Group(3000, 5, (2, 2))]
    outputs = drop_path(torch.ones(3000 * (2 + 5), 4), groups)
    first, second = outputs[:6000].reshape(3000, -1), outputs[6000:].reshape(3000, -1)
    for sequences in (first, second):
        assert torch.equal(sequences.amin(dim=1), sequences.amax(dim=1))
    factors = torch.cat([first[:, 0], second[:, 0]])
    torch.testing.assert_close(factors.unique(), torch.tensor([0, 1 / 0.7]))
    deviation = math.sqrt(0.3 / 0.7)
    assert abs(factors.mean() - 1) < 4 * deviation / math.sqrt(6000)
    for left, right in ((factors[:-1], factors[1:]), (first[:, 0], second[:, 0])):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / math.sqrt(3000)


@pytest.mark.parametrize("subset", [False, True])
def test_recomputed_blocks_drop_the_same_paths(randomise, subset):
    """Gradients with activation checkpointing are those without: the draws of the first pass hold for the second."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = randomise(VisionTransformer(replace(SPEC, depth=3), drop_path=0.5, drop_subset=subset)).train()
        for block in model.blocks:
            block.activation_checkpointing = recompute
        torch.manual_seed(1)
        model(torch.randn(6, 3, 8, 8)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_drop_path_leaves_branches_out_of_the_block(randomise):
    """At rate ½, each copy of an image goes through attention or not and through the MLP or not, doubled if so."""
    model = randomise(VisionTransformer(replace(SPEC, depth=2), drop_path=0.5)).train()
    image = torch.randn(1, 3, 8, 8)
    tokens, block = model.prepare_tokens(image)[0], model.blocks[1]
    group = [Group(1, len(tokens), (2, 2))]
    tokens = model.blocks[0](tokens, group)  # rate 0
    expected = []
    for attention in (0, 2):
        attended = tokens + attention * block.ls1(block.attn(block.norm1(tokens), group))
        expected += [attended + mlp * block.ls2(block.mlp(block.norm2(attended))) for mlp in (0, 2)]
    outputs = model.forward_features(image.expand(400, -1, -1, -1))["x_prenorm"]
    distances = torch.stack([(outputs - choice).abs().amax(dim=(1, 2)) for choice in expected])  # (4, 400)
    assert distances.amin(dim=0).max() < 1e-4
    counts = distances.argmin(dim=0).bincount(minlength=4)
    assert (counts - 100).abs().max() < 4 * math.sqrt(400 * 0.25 * 0.75)


def test_drop_path_of_a_subset_computes_only_that(randomise):
    """A fixed number of each group goes through a branch, together, and is scaled up by how many are missing."""
    groups = [Group(10, 3, (1, 2)), Group(4, 2, (1, 1)), Group(1, 5, (2, 2))]
    block = randomise(VisionTransformer(SPEC, drop_path=0.4, drop_subset=True)).train().blocks[0]
    seen = []
    block.attn.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), inputs[1])))
    nn.init.zeros_(block.ls2.gamma)
    tokens = torch.randn(10 * 3 + 4 * 2 + 5, 32)
    output = block(tokens, groups) - tokens
    assert seen == [(6 * 3 + 2 * 2 + 5, [Group(6, 3, (1, 2)), Group(2, 2, (1, 1)), Group(1, 5, (2, 2))])]
    branch = unpack(block.ls1(block.attn(block.norm1(tokens), groups)), groups)
    for part, whole, count, scale in zip(unpack(output, groups), branch, (6, 2, 1), (10 / 6, 2, 1), strict=True):
        through = part[:, 0, 0] != 0
        assert through.sum() == count
        torch.testing.assert_close(part[through], scale * whole[through], rtol=1e-4, atol=1e-5)
        assert not part[~through].any()


def test_a_subset_is_drawn_anew_and_evenly():
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[draw_subset([Group(10, 1, (1, 1))], 0.4, torch.device("cpu"))[0]] += 1
    assert counts.sum() == 2000 * 6
    assert (counts - 1200).abs().max() < 4.5 * math.sqrt(2000 * 0.6 * 0.4)


@torch.no_grad()
def test_drop_path_of_a_subset_in_the_network(randomise):
    """With every rate 0 but the last block's: each image is as without that block's branches, or with them scaled."""
    model = randomise(VisionTransformer(replace(SPEC, depth=2), drop_path=0.5, drop_subset=True)).train()
    assert [block.drop_path.rate for block in model.blocks] == [0.5, 0.5]
    model.blocks[0].drop_path.rate = 0.0
    block, images = model.blocks[1], torch.randn(6, 3, 8, 8)
    tokens, groups = model._embed([images])
    tokens = model.blocks[0](tokens, groups)
    attended = unpack(block.ls1(block.attn(block.norm1(tokens), groups)), groups)[0]
    before = unpack(tokens, groups)[0]
    options = []
    for attention in (0, 2):
        middle = before + attention * attended
        fed = block.ls2(block.mlp(block.norm2(middle.flatten(0, 1)))).view_as(middle)
        options += [model.norm(middle + mlp * fed)[:, 0] for mlp in (0, 2)]
    found = model(images)
    distances = torch.stack([(found - option).abs().amax(dim=1) for option in options])  # (4, 6)
    assert distances.amin(dim=0).max() < 1e-5
    choices = distances.argmin(dim=0)
    assert (choices >= 2).sum() == 3  # half of them through attention
    assert (choices % 2).sum() == 3  # and half through the MLP


def test_gradients_with_a_subset_reach_every_parameter():
    model = VisionTransformer(replace(SPEC, depth=2), drop_path=0.5, drop_subset=True).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    unused = {"mask_token"} if model.mask_token is not None else set()
    assert {name for name, value in model.named_parameters() if value.grad is None} <= unused


# Class tokens with patches


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_class_tokens_and_the_patches_of_the_first_size(registers, randomise):
    """As `forward_features` gives them, masked crops first, others of the same size and of another behind."""
    model = randomise(VisionTransformer(replace(SPEC, mask_token=True, registers=registers)))
    first, second = torch.randn(5, 3, 16, 16), torch.randn(3, 3, 8, 8)
    hidden = torch.rand(2, 16) < 0.5
    classes, (patches,) = model.encode_crops([first, second], hidden, patches_of=1)
    masked, plain = model.forward_features(first[:2], hidden), model.forward_features(first[2:])
    for name, found in (("x_norm_clstoken", classes[0]), ("x_norm_patchtokens", patches)):
        torch.testing.assert_close(found, torch.cat([masked[name], plain[name]]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classes[1], model(second), rtol=1e-4, atol=1e-5)
    _, (unmasked,) = model.encode_crops([first], patches_of=1)
    torch.testing.assert_close(unmasked, model.forward_features(first)["x_norm_patchtokens"], rtol=1e-4, atol=1e-5)


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
