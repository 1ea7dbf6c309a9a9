"""The Vision Transformer gives the features of timm's and transformers' implementations with the same weights.

Weights are random: equal features under random weights mean that exported files, and released ones, give the same
features too. The peers load them strictly, so no parameter is missed or left over. How a peer's own files are read is
tested in test_layouts.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from published import TOLERANCE, assert_same_tokens, relative_error
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from transformers import AutoModel

from dino.errors import UserError
from dino.models import ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.models.positions import interpolate_positions
from dino.models.weights import export

PLAIN = ViTSpec(48, 3, 3, patch_size=16, image_size=64, position_interpolation="offset")
DINOV2 = ViTSpec(
    48, 3, 3, patch_size=14, image_size=84, layer_scale=1.0, mask_token=True, position_interpolation="offset"
)
GIANT = replace(DINOV2, embed_dim=96, num_heads=4, ffn="swiglu")
REGISTERS = {"registers": 4, "position_interpolation": "size"}
SPECS = {
    "DINO": PLAIN,
    "DINOv2": DINOV2,
    "DINOv2's giant": GIANT,
    "DINO with registers": replace(PLAIN, **REGISTERS),
    "DINOv2 with registers": replace(DINOV2, **REGISTERS),
    "DINOv2's giant with registers": replace(GIANT, **REGISTERS),
}
Size = tuple[int, int]


class Timm(nn.Module):
    """Our weights in timm's ViT."""

    def __init__(self, ours: VisionTransformer, size: Size, folder: Path, attention: str = "sdpa"):
        super().__init__()
        arguments = export.timm_arguments(ours) | {"img_size": size}
        if "mlp_layer" in arguments:
            arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        self.model = timm.models.vision_transformer.VisionTransformer(**arguments).eval()
        self.model.load_state_dict(export.timm_state(ours))

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class Transformers(nn.Module):
    """Our weights in the model of Hugging Face's library that its config.json names."""

    def __init__(self, ours: VisionTransformer, size: Size, folder: Path, attention: str = "sdpa"):
        super().__init__()
        config = export.hugging_face_config(ours) | {"image_size": size}
        save_file(export.hugging_face_state(ours), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        self.model, report = AutoModel.from_pretrained(folder, attn_implementation=attention, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        if not ours.spec.registers:
            # It takes every table for a square one and resamples it if the image is not square; here it has its size.
            table = self.model.embeddings.position_embeddings
            self.model.embeddings.interpolate_pos_encoding = lambda *_: table

    def forward(self, images: Tensor) -> Tensor:
        return self.model.eval()(images).last_hidden_state


def in_peer(peer: type, ours: VisionTransformer, grid: Size, folder: Path, **options: str) -> nn.Module:
    """A peer for images of a grid of patches.

    The peers cannot resample a plain release's table as Meta's code does, so they get ours, resampled, which is tested
    against its definition in test_positions.py. A register release's table they resample themselves, from their own.
    """
    spec, size = ours.spec, (grid[0] * ours.patch_size, grid[1] * ours.patch_size)
    if spec.registers:
        return peer(ours, (spec.image_size, spec.image_size), folder, **options)
    table = ours.pos_embed
    ours.pos_embed = nn.Parameter(interpolate_positions(table.detach(), grid, "offset"))
    theirs = peer(ours, size, folder, **options)
    ours.pos_embed = table
    return theirs


@pytest.mark.parametrize("grid", [None, (9, 4), (3, 3)], ids=["own", "9×4", "3×3"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("peer", [Timm, Transformers])
def test_our_weights_in_a_peer(peer, spec, grid, tmp_path, randomise):
    """Every token, at the grid of the position table and at others."""
    side = spec.image_size // spec.patch_size
    rows, columns = grid or (side, side)
    ours = randomise(VisionTransformer(spec))
    theirs = in_peer(peer, ours, (rows, columns), tmp_path)
    images = torch.randn(2, 3, rows * spec.patch_size, columns * spec.patch_size)
    with torch.no_grad():
        expected = theirs(images)
    assert_same_tokens(ours, images, expected)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("vit_small_patch14_dinov2", replace(DINOV2, embed_dim=384, num_heads=6)),
        ("vit_small_patch14_reg4_dinov2", replace(DINOV2, embed_dim=384, num_heads=6, **REGISTERS)),
    ],
)
def test_timm_reads_our_files_as_official_dinov2(name, spec, randomise):
    """timm's own converter of Meta's files accepts our names, and nothing is left over."""
    ours = randomise(VisionTransformer(spec))
    theirs = timm.create_model(name, pretrained=False, num_classes=0, depth=3, img_size=84).eval()
    theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs))
    images = torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    assert_same_tokens(ours, images, expected)


@pytest.mark.parametrize("name", ["DINOv2", "DINOv2 with registers"])
@torch.no_grad()
def test_masked_patches_equal_transformers(name, tmp_path, randomise):
    ours = randomise(VisionTransformer(SPECS[name]))
    theirs = in_peer(Transformers, ours, (6, 6), tmp_path).model.eval()
    images, masks = torch.randn(3, 3, 84, 84), torch.rand(3, 36) < 0.4
    expected = theirs(images, bool_masked_pos=masks).last_hidden_state
    features = ours.forward_features(images, masks)
    assert relative_error(features["x_norm_clstoken"], expected[:, 0]) < TOLERANCE
    assert relative_error(features["x_norm_patchtokens"], expected[:, 1 + ours.spec.registers :]) < TOLERANCE


@pytest.mark.parametrize("name", ["DINO", "DINOv2 with registers"])
@torch.no_grad()
def test_class_attention_equals_transformers(name, tmp_path, randomise):
    """Heads, and the order of rows and columns, on a non-square image."""
    rows, columns = 4, 7
    ours = randomise(VisionTransformer(SPECS[name]))
    theirs = in_peer(Transformers, ours, (rows, columns), tmp_path, attention="eager").model.eval()
    images = torch.randn(2, 3, rows * ours.patch_size, columns * ours.patch_size)
    attentions = theirs(images, output_attentions=True).attentions[-1]  # (B, heads, queries, keys)
    expected = attentions[:, :, 0, 1 + ours.spec.registers :].reshape(2, ours.spec.num_heads, rows, columns)
    assert relative_error(ours.class_attention(images), expected) < TOLERANCE


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("blocks", [3, [0, 2]], ids=str)
@torch.no_grad()
def test_intermediate_layers_equal_timm(blocks, norm, tmp_path, randomise):
    ours = randomise(VisionTransformer(SPECS["DINOv2 with registers"]))
    theirs = in_peer(Timm, ours, (6, 6), tmp_path).model
    images = torch.randn(2, 3, 56, 98)
    expected = theirs.forward_intermediates(
        images, indices=blocks, return_prefix_tokens=True, norm=norm, intermediates_only=True
    )
    outputs = ours.get_intermediate_layers(images, blocks, reshape=True, return_class_token=True, norm=norm)
    assert len(outputs) == len(expected)
    for (patches, class_token), (expected_patches, prefix) in zip(outputs, expected, strict=True):
        assert relative_error(patches, expected_patches) < TOLERANCE
        assert relative_error(class_token, prefix[:, 0]) < TOLERANCE


@pytest.mark.parametrize(
    ("backbone", "target", "match"),
    [
        (VisionTransformer(replace(PLAIN, positions="rotary")), "timm", "rotates queries and keys"),
        (VisionTransformer(replace(PLAIN, positions="rotary")), "huggingface", "rotates queries and keys"),
        (VisionTransformer(replace(PLAIN, stem="conv")), "timm", "convolutional stem"),
        (VisionTransformer(replace(PLAIN, stem="conv")), "huggingface", "convolutional stem"),
        (ResNet(ResNetSpec("resnet18")), "timm", "ResNet"),
        (ResNet(ResNetSpec("resnet18")), "huggingface", "ResNet"),
    ],
    ids=[
        "rotary, timm",
        "rotary, Hugging Face",
        "stem, timm",
        "stem, Hugging Face",
        "ResNet, timm",
        "ResNet, Hugging Face",
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(backbone, target, match):
    with pytest.raises(UserError, match=match):
        export.check(backbone, target)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"positions": "rotary"}, {"stem": "conv"}], ids=str)
def test_onnx_runs_at_other_sizes(change, tmp_path, randomise):
    """And for any batch; neither is that of the trace."""
    ours = randomise(VisionTransformer(replace(PLAIN, **change, position_interpolation="size", registers=1)))
    export.write_onnx(ours, tmp_path / "model.onnx", 64)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 64, 64), (3, 32, 112)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = ours(images)
        (tokens,) = session.run(["class_token"], {"images": images.numpy()})
        assert relative_error(torch.from_numpy(tokens), expected) < TOLERANCE
