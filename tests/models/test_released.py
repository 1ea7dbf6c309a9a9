"""A released name stands for the file, the network and the preprocessing that its publishers describe.

No released file is at hand in tests: files of the same names, shapes and sizes are made of random weights. What the
table should say is written here by hand, from the publishers' code, or taken from timm's and torchvision's tables.
"""

import logging
import re
import shutil
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from published import (
    DINO,
    assert_holds,
    assert_same_tokens,
    full_checkpoint,
    published_vit,
    torchvisions,
    without_classifier,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torchvision import transforms

from dino import load_backbone
from dino.errors import UserError
from dino.models import ResNetSpec, VisionTransformer, ViTSpec, build, save_backbone
from dino.models.weights.released import RELEASED

# Name to tensors and parameters of the file: counted in modules of DINO's and DINOv2's own code; of the larger register
# releases by adding 4 tokens; of torchvision's ResNet-50 (25,557,032) by taking its classifier (2,049,000) away.
COUNTS = {
    "dino_vits16": (150, 21_665_664),
    "dino_vits8": (150, 21_670_272),
    "dino_vitb16": (150, 85_798_656),
    "dino_vitb8": (150, 85_807_872),
    "dino_resnet50": (318, 23_508_032),
    "dinov2_vits14": (175, 22_056_576),
    "dinov2_vitb14": (175, 86_580_480),
    "dinov2_vitl14": (343, 304_368_640),
    "dinov2_vitg14": (567, 1_136_480_768),
    "dinov2_vits14_reg": (176, 22_058_112),
    "dinov2_vitb14_reg": (176, 86_583_552),
    "dinov2_vitl14_reg": (344, 304_372_736),
    "dinov2_vitg14_reg": (568, 1_136_486_912),
    "resnet50": (318, 23_508_032),
}
COUNTS |= {f"{name}_full": counts for name, counts in COUNTS.items() if name.startswith("dino_")}
HEADS = {"vits": 6, "vitb": 12, "vitl": 16, "vitg": 24}
# timm's name of the same weights, whose table tells where the publishers keep them.
TIMM = {
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    **{
        f"dinov2_vit{letter}14{registers}": f"vit_{size}_patch14{registers and '_reg4'}_dinov2.lvd142m"
        for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
        for registers in ("", "_reg")
    },
    "resnet50": "resnet50.tv_in1k",
}
FULL = [name for name in RELEASED if name.endswith("_full")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder; nothing may be asked of the network, and files of random weights have no digest to keep."""

    def no_network(request: urllib.request.Request, **_: object) -> None:
        raise AssertionError(f"asks for {request.full_url}")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for name, entry in RELEASED.items():
        monkeypatch.setitem(RELEASED, name, replace(entry, sha256=""))
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache")  # pytest would keep gigabytes of several sessions


@pytest.fixture
def shallow(monkeypatch):
    """Function that gives the network of a name one block, to save time, and perhaps a smaller table of positions."""

    def change(name: str, **changes: int) -> ViTSpec:
        entry = RELEASED[name]
        spec = replace(entry.spec, depth=1, **changes)
        monkeypatch.setitem(RELEASED, name, replace(entry, spec=spec))
        return spec

    return change


def put(content: Any, name: str, cache: Path) -> Path:
    """A file where the download of a name would be."""
    file = cache / RELEASED[name].url.rsplit("/", 1)[1]
    torch.save(content, file)
    return file


class TestTable:
    @pytest.mark.parametrize("name", RELEASED)
    def test_tensors_and_parameters(self, name):
        with torch.device("meta"):  # without memory for its parameters
            backbone = build(RELEASED[name].spec)
        tensors, parameters = COUNTS[name]
        assert len(backbone.state_dict()) == tensors
        assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters

    @pytest.mark.parametrize("name", RELEASED)
    def test_what_no_shape_tells(self, name):
        """Attention heads, and how positions are resampled: features depend on them, parameters do not."""
        spec = RELEASED[name].spec
        if isinstance(spec, ResNetSpec):
            assert spec == ResNetSpec("resnet50", in_chans=3)
        else:
            assert spec.num_heads == HEADS[re.search("vit.", name)[0]]
            assert spec.position_interpolation == ("size" if name.endswith("_reg") else "offset")
            assert spec.image_size == (518 if name.startswith("dinov2") else 224)

    @pytest.mark.parametrize("name", TIMM)
    def test_the_publishers_address_and_licence_as_timm_has_them(self, name):
        theirs = timm.get_pretrained_cfg(TIMM[name])
        assert RELEASED[name].url == theirs.url
        assert RELEASED[name].licence.lower() == theirs.license

    @pytest.mark.parametrize(
        ("name", "file"),
        {
            "dino_resnet50": "dino_resnet50_pretrain/dino_resnet50_pretrain",
            "dino_vits16_full": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain_full_checkpoint",
            "dino_vits8_full": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain_full_checkpoint",
            "dino_vitb16_full": "dino_vitbase16_pretrain/dino_vitbase16_pretrain_full_checkpoint",
            "dino_vitb8_full": "dino_vitbase8_pretrain/dino_vitbase8_pretrain_full_checkpoint",
            "dino_resnet50_full": "dino_resnet50_pretrain/dino_resnet50_pretrain_full_checkpoint",
        }.items(),
    )
    def test_addresses_that_timm_does_not_have(self, name, file):
        assert RELEASED[name].url == f"https://dl.fbaipublicfiles.com/dino/{file}.pth"
        assert RELEASED[name].licence == "Apache-2.0"

    def test_every_name_is_checked_here(self):
        assert RELEASED.keys() == COUNTS.keys() == TIMM.keys() | set(FULL) | {"dino_resnet50"}

    def test_torchvisions_file_and_its_digest(self):
        url = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
        assert RELEASED["resnet50"].url == url
        assert url.endswith(f"-{RELEASED['resnet50'].sha256}.pth")  # torch.hub's convention
        assert len(RELEASED["resnet50"].sha256) == 8

    def test_digests_are_of_one_file_each(self):
        digests = {name: entry.sha256 for name, entry in RELEASED.items() if entry.sha256}
        assert len(set(digests.values())) == len(digests) == 10
        assert all(re.fullmatch("[0-9a-f]{8}|[0-9a-f]{16}", digest) for digest in digests.values())
        assert [name for name in FULL if name in digests] == []

    def test_no_two_share_a_file_in_the_cache(self):
        files = Counter(entry.url.rsplit("/", 1)[1] for entry in RELEASED.values())
        assert [file for file, count in files.items() if count > 1] == []

    def test_full_checkpoints_are_those_with_heads(self):
        assert [name for name, entry in RELEASED.items() if entry.has_heads] == FULL

    @pytest.mark.parametrize("size", [(300, 500), (500, 300), (256, 256), (40, 60), (700, 301)], ids=str)
    def test_preprocessing_is_that_of_dinos_evaluations(self, size):
        """Resized to 256 and cut to 224, as eval_knn.py does with Pillow; equal but for roundings to whole levels."""
        noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
        published = transforms.Compose(
            [
                transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        assert len({str(entry.preprocess) for entry in RELEASED.values()}) == 1
        ours = RELEASED["dino_vits16"].preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        assert ours.shape == (3, 224, 224)
        assert ours.dtype == torch.float32
        level = 1 / 255 / 0.224
        difference = (ours - published(image)).abs()
        assert difference.max() < 2.1 * level
        assert difference.mean() < 0.1 * level


class TestByName:
    """Files from the cache."""

    @pytest.mark.parametrize("name", ["dinov2_vits14_reg", "resnet50"])
    def test_a_file_of_full_size(self, name, cache, caplog):
        tensors = torchvisions(name).state_dict() if name == "resnet50" else published_vit(RELEASED[name].spec)
        put(tensors, name, cache)
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(name)
        assert_holds(loaded, {key: tensor for key, tensor in tensors.items() if not key.startswith("fc.")})
        assert loaded.spec == RELEASED[name].spec
        assert loaded.preprocess == RELEASED[name].preprocess
        assert loaded.description["source"] == name
        assert not loaded.training
        matched = COUNTS[name][0]
        assert f"{name} " in caplog.text
        assert f"{matched} of {matched} tensors matched" in caplog.text

    @pytest.mark.parametrize("network", ["", "@teacher", "@student"])
    def test_a_full_checkpoints_networks(self, network, cache, shallow):
        name = "dino_vits16_full"
        student, teacher = (published_vit(shallow(name)) for _ in range(2))
        put(full_checkpoint(student, teacher, width=384), name, cache)
        assert_holds(load_backbone(f"{name}{network}"), student if network == "@student" else teacher)

    @pytest.mark.parametrize("name", [name for name in RELEASED if isinstance(RELEASED[name].spec, ViTSpec)])
    def test_every_vit_at_reduced_depth(self, name, cache, shallow):
        """Every width, patch and table of positions: a file in the published layout is what the table expects."""
        spec = shallow(name)
        tensors = published_vit(spec)
        content = full_checkpoint(tensors, tensors, spec.embed_dim) if name in FULL else tensors
        put(content, name, cache)
        loaded = load_backbone(name)
        assert loaded.spec == spec
        assert_holds(loaded, tensors)

    def test_dinos_resnet(self, cache):
        """DINO's file has no classifier; its full checkpoint has a head."""
        tensors = without_classifier(torchvisions("resnet50"))
        put(tensors, "dino_resnet50", cache)
        put(full_checkpoint(tensors, tensors, width=2048), "dino_resnet50_full", cache)
        assert_holds(load_backbone("dino_resnet50"), tensors)
        assert_holds(load_backbone("dino_resnet50_full"), tensors)

    @pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14"])
    def test_no_student_of_a_backbone_alone(self, name, cache, shallow):
        put(published_vit(shallow(name)), name, cache)
        with pytest.raises(UserError, match="student"):
            load_backbone(f"{name}@student")

    @pytest.mark.parametrize("alike", [True, False], ids=["alike", "of another architecture"])
    def test_a_run_of_the_same_name_in_the_working_directory(self, alike, cache, shallow, tmp_path, monkeypatch):
        spec = shallow("dinov2_vits14")
        tensors = published_vit(spec)
        put(tensors, "dinov2_vits14", cache)
        run = tmp_path / "dinov2_vits14"
        run.mkdir()
        own = VisionTransformer(spec if alike else DINO)
        preprocessing = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
        save_backbone(run / "backbone.safetensors", own, preprocessing, {})
        monkeypatch.chdir(tmp_path)
        assert_holds(load_backbone("./dinov2_vits14"), own.state_dict())
        assert_holds(load_backbone("dinov2_vits14"), tensors)


class TestWrong:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("dinov2_vits14", {"registers": 4, "position_interpolation": "size"}),
            ("dinov2_vits14_reg", {"registers": 0, "position_interpolation": "offset"}),
            ("dinov2_vits14_reg", {"registers": 3}),
            ("dinov2_vits14", {"embed_dim": 768, "num_heads": 12}),
            ("dinov2_vits14", {"image_size": 224}),
            ("dinov2_vits14", {"depth": 2}),
            ("dinov2_vits14", {"mask_token": False}),
            ("dinov2_vits14", {"layer_scale": 0.0}),
            ("dinov2_vits14", {"in_chans": 1}),
            ("dinov2_vitg14", {"ffn": "mlp"}),
            ("dino_vits16", {"patch_size": 8}),
            ("dino_vits8", {"patch_size": 16}),
            ("dino_vits16_full", {"embed_dim": 768, "num_heads": 12}),
        ],
        ids=str,
    )
    def test_another_vit_under_the_name_is_refused(self, name, change, cache, shallow):
        tensors = published_vit(replace(shallow(name), **change))
        file = put(full_checkpoint(tensors, tensors, 384) if name in FULL else tensors, name, cache)
        with pytest.raises(UserError, match="does not hold") as refused:
            load_backbone(name)
        assert name in str(refused.value)
        assert str(file) in str(refused.value)

    @pytest.mark.parametrize("name", ["dinov2_vits14", "resnet50"])
    def test_another_family_under_the_name_is_refused(self, name, cache):
        other = torchvision.models.resnet18(weights=None).state_dict()
        put(other, name, cache)
        with pytest.raises(UserError, match="does not hold"):
            load_backbone(name)

    def test_the_tensors_of_a_file_that_does_not_fit_are_named(self, cache, shallow):
        tensors = published_vit(shallow("dino_vits16"))
        tensors.pop("blocks.0.mlp.fc2.bias")
        put(tensors, "dino_vits16", cache)
        with pytest.raises(UserError, match=r"^dino_vits16 .*1 missing: blocks\.0\.mlp\.fc2\.bias"):
            load_backbone("dino_vits16")

    @pytest.mark.parametrize(
        ("misspelt", "meant"),
        {
            "dinov2_vit_s14": "dinov2_vits14",
            "dinov2-vits14": "dinov2_vits14",
            "dinov2_vits14_reg4": "dinov2_vits14_reg",
            "dino_vits_16": "dino_vits16",
            "dino_deits16": "dino_vits16",
            "DINO_vits16": "dino_vits16",
            "resnet-50": "resnet50",
            "dino_vitb16_ful": "dino_vitb16_full",
            "dinov2_vitl14_registers": "dinov2_vitl14_reg",
            "dino_vits61@student": "dino_vits16",
        }.items(),
    )
    def test_a_misspelt_name_gets_a_suggestion(self, misspelt, meant, cache):
        with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
            load_backbone(misspelt)

    @pytest.mark.parametrize("name", ["runs/2026-10-01", "swin_base", "x", ""])
    def test_what_is_like_no_name_gets_all_of_them(self, name, cache, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as refused:
            load_backbone(name)
        assert "did you mean" not in str(refused.value)
        for released in RELEASED:
            assert released in str(refused.value)

    def test_a_student_that_is_none(self, cache):
        with pytest.raises(UserError, match=r"pupil.*after @ comes teacher or student"):
            load_backbone("dino_vits16_full@pupil")


@pytest.mark.parametrize("name", [name for name in TIMM if name != "resnet50"])
def test_timms_own_converter_reads_the_same_file_to_the_same_features(name, cache, shallow):
    """At reduced depth, and at the size of the position table, which is that of a few patches here."""
    spec = shallow(name, image_size=4 * RELEASED[name].spec.patch_size)
    file = put(published_vit(spec), name, cache)
    theirs = timm.create_model(TIMM[name], pretrained=False, num_classes=0, depth=1, img_size=spec.image_size).eval()
    theirs.load_state_dict(checkpoint_filter_fn(torch.load(file, weights_only=True), theirs))
    images = torch.randn(1, 3, spec.image_size, spec.image_size)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    assert_same_tokens(load_backbone(name), images, expected)
