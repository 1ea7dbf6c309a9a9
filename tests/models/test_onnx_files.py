"""ONNX of large and of half-precision networks, run by onnxruntime."""

import pytest
import torch

from dino.models import Backbone, ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.models.weights import export

pytestmark = pytest.mark.slow
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def made(folder, backbone: Backbone, images: torch.Tensor):
    export.write_onnx(backbone, folder / "model.onnx", 16)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["class_token"], {"images": images.numpy()})[0]


def test_weights_too_large_for_the_file_lie_beside_it_and_halves_are_halves(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTSpec(64, 1, 2, 4, 16)).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = backbone(images).numpy()
    monkeypatch.setattr(export, "LARGEST_ONNX", 1000)
    assert made(tmp_path, backbone, images) == pytest.approx(expected, abs=1e-4)
    weights = sum(parameter.nbytes for parameter in backbone.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * weights
    halved = made(tmp_path, backbone.half(), images.half())
    assert halved.dtype == "float16"
    assert halved == pytest.approx(expected, abs=0.02)


def test_a_resnet_of_one_channel_at_other_sizes_than_it_was_traced_with(tmp_path):
    torch.manual_seed(0)
    backbone = ResNet(ResNetSpec("resnet18", in_chans=1)).eval()
    export.check(backbone, "onnx")
    export.write_onnx(backbone, tmp_path / "model.onnx", 64)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 64, 64), (3, 96, 128)):
        images = torch.randn(batch, 1, height, width)
        with torch.no_grad():
            expected = backbone(images).numpy()
        assert session.run(["class_token"], {"images": images.numpy()})[0] == pytest.approx(expected, abs=1e-4)
