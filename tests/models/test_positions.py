"""Positions: learned tables resampled as bicubic interpolation is defined, rotations as complex multiplication is."""

import cmath
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from published import relative_error
from torch import Tensor

from dino.models import VisionTransformer, ViTSpec
from dino.models.positions import RotaryPositions, interpolate_positions

SPEC = ViTSpec(32, 2, 2, patch_size=4, image_size=16, registers=2, mask_token=True, positions="rotary")


def keys_kernel(distance: float, a: float) -> float:
    """Cubic convolution kernel (Keys 1981, eq. 15; a = -0.5 is his choice, -0.75 that of most graphics software)."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def weights_of_cells(side: int, cells: int, convention: str) -> np.ndarray:
    """(cells, side): the weight of each old cell in each new one, along one axis, with cells' centres at i + 1/2."""
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
class TestLearned:
    @pytest.mark.parametrize(
        ("side", "grid"),
        [
            (14, (6, 6)),  # DINO's local crops of 96 px
            (37, (7, 7)),  # DINOv2's of 98 px
            (14, (30, 30)),
            (6, (6, 9)),  # one side the table's own
            (6, (13, 4)),
            (4, (2, 8)),  # as many cells as the table, but not its grid
            (5, (1, 2)),
        ],
        ids=str,
    )
    def test_equal_the_definition_of_bicubic(self, side, grid, convention):
        table = torch.randn(1, 1 + side * side, 3)
        cells = table[0, 1:].double().numpy().reshape(side, side, 3)
        rows, columns = (weights_of_cells(side, length, convention) for length in grid)
        expected = torch.from_numpy(np.einsum("ra,cb,abd->rcd", rows, columns, cells)).float().reshape(1, -1, 3)
        result = interpolate_positions(table, grid, convention)
        assert torch.equal(result[:, :1], table[:, :1])
        assert relative_error(result[:, 1:], expected) < 1e-5

    @pytest.mark.parametrize("side", [14, 37])
    def test_at_every_grid(self, side, convention):
        """Untouched at their own; scale factors without the offset miss by one cell at, for instance, 61 from 14."""
        table = torch.randn(1, 1 + side * side, 1)
        assert interpolate_positions(table, (side, side), convention) is table
        for cells in range(1, 130):
            assert interpolate_positions(table, (cells, 3), convention).shape == (1, 1 + 3 * cells, 1)

    def test_half_precision_is_resampled_in_fp32(self, convention):
        table = torch.randn(1, 1 + 14 * 14, 8).bfloat16()
        expected = interpolate_positions(table.float(), (6, 9), convention).bfloat16()
        assert torch.equal(interpolate_positions(table, (6, 9), convention), expected)


def rotated_one_by_one(tokens: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Su et al. 2021, eq. 34, as complex numbers: half of a head's channels are real parts, half imaginary.

    The first half of the pairs turns with the row, the second with the column, which both run from -1 to 1; of each
    axis' n pairs, the i-th has the period 100^(i/n).
    """
    result, (batch, heads, _, width) = tokens.double().clone(), tokens.shape
    half, each = width // 2, width // 4
    for b in range(batch):
        for h in range(heads):
            for row in range(grid[0]):
                for column in range(grid[1]):
                    token = result[b, h, prefix + row * grid[1] + column]
                    for pair in range(half):
                        cell, cells = (row, grid[0]) if pair < each else (column, grid[1])
                        angle = 2 * math.pi * ((2 * cell + 1) / cells - 1) / 100 ** (pair % each / each)
                        value = complex(token[pair], token[pair + half]) * cmath.exp(1j * angle)
                        token[pair], token[pair + half] = value.real, value.imag
    return result.float()


class TestRotary:
    @pytest.mark.parametrize("prefix", [1, 5])
    @pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 1)], ids=str)
    def test_equals_complex_multiplication(self, grid, prefix):
        """Patches alone: class token and registers, which come first, stay as they are."""
        query, key = (torch.randn(2, 2, prefix + grid[0] * grid[1], 8) for _ in range(2))
        for tokens, turned in zip((query, key), RotaryPositions().rotate(query, key, grid), strict=True):
            torch.testing.assert_close(turned, rotated_one_by_one(tokens, grid, prefix))
            assert torch.equal(turned[:, :, :prefix], tokens[:, :, :prefix])

    def test_only_the_offset_of_two_patches_counts(self):
        """One query and one key everywhere in a grid: products at equal offsets are equal, at others they differ."""
        rows, columns = 4, 6
        query, key = (torch.randn(1, 1, 1, 16).expand(-1, -1, rows * columns, -1) for _ in range(2))
        query, key = RotaryPositions().rotate(query, key, (rows, columns))
        products = (query @ key.mT).reshape(rows, columns, rows, columns)
        torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], rtol=1e-4, atol=1e-5)
        assert products[0, 0].flatten().unique().numel() == rows * columns

    def test_a_patch_keeps_its_angle_at_another_resolution(self):
        """Of three times as many cells, every third has the centre of an earlier one."""
        coarse = RotaryPositions().angles((2, 4), 16).reshape(2, 4, -1)
        fine = RotaryPositions().angles((6, 12), 16).reshape(6, 12, -1)
        torch.testing.assert_close(fine[1::3, 1::3], coarse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_gives_the_type_that_it_is_given(self, dtype):
        query = torch.randn(1, 2, 1 + 12, 16)
        turned, _ = RotaryPositions().rotate(query.to(dtype), query.to(dtype), (3, 4))
        assert turned.dtype == dtype
        assert relative_error(turned, RotaryPositions().rotate(query, query, (3, 4))[0]) < 0.01


class TestRotaryViT:
    @torch.no_grad()
    def test_attention_by_the_definition(self, randomise):
        """Class tokens and patches of crops of two sizes in one pass, each size with its own grid; attention maps."""
        model = randomise(VisionTransformer(replace(SPEC, depth=1)))
        crops = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 12)]
        classes, patches = model.encode_crops(crops, patches_of=2)
        for images, grid, class_tokens, patch_tokens in zip(crops, [(4, 4), (2, 3)], classes, patches, strict=True):
            tokens, block = model.prepare_tokens(images), model.blocks[0]
            qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            query, key = (rotated_one_by_one(part, grid, prefix=3) for part in qkv[:2])
            attention = (query @ key.mT / 4).softmax(dim=-1)
            tokens = tokens + block.attn.proj((attention @ qkv[2]).transpose(1, 2).flatten(2))
            expected = model.norm(tokens + block.mlp(block.norm2(tokens)))
            torch.testing.assert_close(class_tokens, expected[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(patch_tokens, expected[:, 3:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(images), class_tokens, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.class_attention(images).flatten(2), attention[:, :, 0, 3:])

    def test_order_of_patches_counts_through_rotation_alone(self, randomise):
        """There is no table, and still two patches that change places give another class token."""
        model = randomise(VisionTransformer(SPEC))
        assert model.pos_embed is None
        assert "pos_embed" not in model.state_dict()
        images = torch.randn(1, 3, 16, 16)
        assert relative_error(model(images.roll(4, dims=-1)), model(images)) > 0.01

    def test_gradients_reach_every_parameter(self):
        model = VisionTransformer(SPEC, drop_path=0.2).train()
        features = model.forward_features(torch.randn(2, 3, 16, 8), torch.rand(2, 8) < 0.5)
        sum(features[name].sin().sum() for name in ("x_norm_clstoken", "x_norm_patchtokens")).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_heads_that_cannot_rotate(self):
        with pytest.raises(ValueError, match="heads 2 wide cannot rotate"):
            VisionTransformer(replace(SPEC, num_heads=16))
