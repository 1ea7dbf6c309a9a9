"""Exports as the users of other libraries open them, and read back: the same network, prepared alike."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from published import DINO, DINOV2, REGISTERS
from transformers import AutoImageProcessor, AutoModel

from dino.commands.export import write_hugging_face, write_timm
from dino.errors import UserError
from dino.models import Backbone, Preprocess, ViTSpec, load_backbone
from dino.models.registry import build
from dino.models.weights.export import at_size

SPECS = {
    "DINO": DINO,
    "DINOv2": DINOV2,
    "giant": ViTSpec(96, 2, 3, 8, 32, ffn="swiglu", layer_scale=1.0, registers=4, mask_token=True),
    "registers": REGISTERS,
    "grey": ViTSpec(48, 2, 3, 4, 24, in_chans=1, registers=2),
}
WRITERS = {"timm": write_timm, "huggingface": write_hugging_face}


def network(spec: ViTSpec) -> Backbone:
    torch.manual_seed(0)
    backbone = build(spec)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    side, channels = spec.image_size, spec.in_chans
    backbone.preprocess = Preprocess(side, [0.4, 0.5, 0.6][:channels], [0.2, 0.3, 0.25][:channels], resize=side + 8)
    backbone.description = {"training": {"seed": 3}}
    return backbone.eval()


def photo(channels: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC)
    return image.convert("L" if channels == 1 else "RGB")


@pytest.fixture(params=SPECS)
def ours(request) -> Backbone:
    return network(SPECS[request.param])


@torch.no_grad()
def test_hugging_faces_auto_classes(ours, tmp_path):
    """Its own processor fits, and its pooler is no chance."""
    write_hugging_face(ours, tmp_path, ours.preprocess.image_size)
    processor, model = AutoImageProcessor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    image = photo(ours.spec.in_chans)
    inputs = processor(images=image, return_tensors="pt")
    expected = ours.preprocess(image)[None]
    assert inputs["pixel_values"].shape == expected.shape
    assert (inputs["pixel_values"] - expected).abs().max() < 0.02  # a level of 255 is 0.004 / 0.2
    features = ours(inputs["pixel_values"])
    outputs = model(**inputs)
    assert (outputs.last_hidden_state[:, 0] - features).abs().max() < 1e-4
    assert (outputs.pooler_output - features).abs().max() < 1e-4


@torch.no_grad()
def test_timms_create_model_and_transform(ours, tmp_path):
    write_timm(ours, tmp_path, ours.preprocess.image_size)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = photo(ours.spec.in_chans)
    data = timm.data.resolve_data_config({}, model=model)
    inputs = timm.data.create_transform(**data)(image)[None]
    assert (inputs - ours.preprocess(image)[None]).abs().max() < 0.05  # Pillow resizes, here torchvision
    assert (model(inputs) - ours(inputs)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("target", WRITERS)
def test_exports_are_read_back_as_the_network_they_were(ours, target, tmp_path):
    """Heads, positions at other sizes, and preprocessing; and also under another name in another place."""
    size = ours.preprocess.image_size
    WRITERS[target](ours, tmp_path, size)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere" / "mine.safetensors")
    back = load_backbone(moved)
    assert (back.spec.num_heads, back.spec.position_interpolation) == (
        ours.spec.num_heads,
        ours.spec.position_interpolation,
    )
    assert (back.preprocess, back.description["training"]) == (ours.preprocess, {"seed": 3})
    for side in (size, size + 2 * ours.patch_size):
        images = torch.randn(2, ours.spec.in_chans, side, side)
        assert (back(images) - ours(images)).abs().max() < 1e-5


@torch.no_grad()
def test_a_plain_release_exported_at_another_size(tmp_path):
    """Its table is resampled once, and images before the crop are as much larger as they were."""
    ours = network(DINO)
    write_hugging_face(at_size(ours, 64), tmp_path, 64)
    back = load_backbone(tmp_path)
    assert (back.preprocess.image_size, back.preprocess.resize) == (64, 80)
    images = torch.randn(2, 3, 64, 64)
    assert (back(images) - ours(images)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_shards(suffix, tmp_path):
    ours = network(DINOV2)
    write_hugging_face(ours, tmp_path, 32)
    model = AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if suffix == "model.safetensors":
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    else:
        state, shards = model.state_dict(), {}
        for number, name in enumerate(state):
            shards.setdefault(f"part-{number % 3}.bin", {})[name] = state[name]
        for file, tensors in shards.items():
            torch.save(tensors, tmp_path / file)
        places = {name: file for file, tensors in shards.items() for name in tensors}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert len(list(tmp_path.glob("*.bin")) + list(tmp_path.glob("model-*.safetensors"))) >= 3
    back = load_backbone(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert (back(images) - ours(images)).abs().max() < 1e-5
    assert (back.preprocess, back.spec.num_heads) == (ours.preprocess, ours.spec.num_heads)


def test_shards_lie_beside_their_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for place, match in (
        ("../x.safetensors", "no file beside it"),
        ("gone.safetensors", "gone.safetensors is no file beside it"),
        (3, "nowhere"),
    ):
        index.write_text(json.dumps({"weight_map": {"cls_token": place}}))
        with pytest.raises(UserError, match=match):
            load_backbone(tmp_path)
