"""Every layout of weights that is read gives the parameters that were written, or its own library's features.

Files are made here: by the libraries themselves where they are at hand (timm, transformers, torchvision), else by the
names and shapes that DINO's and DINOv2's code writes. Weights are random.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published import (
    DINO,
    DINOV2,
    REGISTERS,
    TOLERANCE,
    State,
    assert_holds,
    assert_same_tokens,
    full_checkpoint,
    prefixed,
    published_head,
    published_vit,
    relative_error,
    torchvisions,
    without_classifier,
    write,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from dino import load_backbone
from dino.errors import UserError
from dino.models import Backbone, ResNetSpec, ViTSpec

META_SPECS = {
    "DINO": DINO,
    "DINO, 8 blocks, one channel, patches of 5": replace(DINO, depth=8, in_chans=1, patch_size=5, image_size=15),
    "DINO, ViT-Ti's width": replace(DINO, embed_dim=192, num_heads=3),
    "DINOv2": DINOV2,
    "DINOv2, more blocks than digits": replace(DINOV2, embed_dim=64, num_heads=1, depth=12),
    "DINOv2, SwiGLU": replace(DINOV2, ffn="swiglu"),
    "DINOv2, registers": REGISTERS,
    "DINOv2, one register, SwiGLU": replace(REGISTERS, registers=1, ffn="swiglu"),
}


class TestMetasBackbones:
    """DINO's and DINOv2's released files: the state dict alone."""

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("spec", META_SPECS.values(), ids=META_SPECS)
    def test_the_parameters_and_the_architecture(self, spec, suffix, tmp_path):
        tensors = published_vit(spec)
        loaded = load_backbone(write(tensors, tmp_path / f"weights{suffix}"))
        assert_holds(loaded, tensors)
        assert loaded.spec == spec
        assert loaded.description["layout"] == ("DINOv2" if spec.layer_scale else "DINO")

    def test_as_torch_wrote_files_before_1_6(self, tmp_path):
        tensors = published_vit(DINO)
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert_holds(load_backbone(tmp_path / "old.pth"), tensors)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_keeps_its_values_in_fp32(self, dtype, tmp_path):
        tensors = {name: tensor.to(dtype) for name, tensor in published_vit(DINOV2).items()}
        loaded = load_backbone(write(tensors, tmp_path / "weights.pth"))
        assert_holds(loaded, {name: tensor.float() for name, tensor in tensors.items()})

    @pytest.mark.parametrize(("channels", "mean"), [(3, (0.485, 0.456, 0.406)), (1, (0.5,)), (5, (0.5,) * 5)], ids=str)
    def test_it_is_ready_for_features(self, channels, mean, tmp_path):
        """Evaluation mode, and the preprocessing of every release, with means for as many channels as there are."""
        loaded = load_backbone(write(published_vit(replace(DINO, in_chans=channels)), tmp_path / "weights.pth"))
        assert not loaded.training
        assert tuple(loaded.preprocess.mean) == mean
        images = loaded.preprocess(torch.randint(256, (2, channels, 300, 260), dtype=torch.uint8))
        assert images.shape == (2, channels, 224, 224)
        assert loaded(images).isfinite().all()

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone."])
    @pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
    def test_prefixes_and_wrappings(self, wrapper, prefix, tmp_path):
        """Of DistributedDataParallel, torch.compile, multi-crop wrappers, and the usual entries of checkpoints."""
        tensors = published_vit(REGISTERS)
        content = prefixed(prefix, tensors)
        file = write({"epoch": 3, wrapper: content} if wrapper else content, tmp_path / "weights.pth")
        assert_holds(load_backbone(file), tensors)

    def test_a_compiled_module(self, tmp_path):
        """The prefix is torch's own, not one written by hand."""
        tensors = published_vit(DINO)
        backbone = load_backbone(write(tensors, tmp_path / "weights.pth"))
        compiled = torch.compile(nn.ModuleDict({"backbone": backbone}))
        assert all(name.startswith("_orig_mod.backbone.") for name in compiled.state_dict())
        assert_holds(load_backbone(write(compiled.state_dict(), tmp_path / "compiled.pth")), tensors)


class TestDINOsCheckpoints:
    """What main_dino.py saves."""

    @pytest.mark.parametrize("folder", ["runs", "runs@night"])
    @pytest.mark.parametrize("parametrized", [False, True], ids=["weight_g", "original0"])
    @pytest.mark.parametrize("network", ["", "@teacher", "@student"])
    def test_either_network(self, network, parametrized, folder, tmp_path, caplog, monkeypatch):
        student, teacher = published_vit(DINO), published_vit(DINO)
        (tmp_path / folder).mkdir()
        content = full_checkpoint(student, teacher, parametrized=parametrized)
        file = write(content, tmp_path / folder / "checkpoint.pth")
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(f"{file}{network}")
        assert_holds(loaded, student if network == "@student" else teacher)
        assert loaded.spec == DINO
        assert "8 tensors of heads are not part of the backbone" in caplog.text
        assert f"{len(teacher)} of {len(teacher)} tensors matched" in caplog.text
        monkeypatch.chdir(file.parent)
        assert_holds(load_backbone(f"checkpoint.pth{network}"), student if network == "@student" else teacher)

    def test_a_teacher_in_distributed_data_parallel(self, tmp_path):
        """A teacher with BatchNorm is wrapped, too; here a ResNet, whose statistics count."""
        student, teacher = (without_classifier(torchvisions("resnet18")) for _ in range(2))
        content = full_checkpoint(student, teacher) | {"teacher": prefixed("module.backbone.", teacher)}
        file = write(content, tmp_path / "checkpoint0080.pth")
        assert_holds(load_backbone(file), teacher)
        assert_holds(load_backbone(f"{file}@student"), student)

    @pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
    def test_no_student_where_there_is_none(self, wrapper, tmp_path):
        tensors = published_vit(DINO)
        file = write({wrapper: tensors} if wrapper else tensors, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="student"):
            load_backbone(f"{file}@student")

    @pytest.mark.parametrize(("has", "network"), [("student", ""), ("student", "@teacher"), ("teacher", "@student")])
    def test_never_the_other_network(self, has, network, tmp_path):
        file = write({has: published_vit(DINO), "epoch": 1}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=f"no weights of a {network.removeprefix('@') or 'teacher'}"):
            load_backbone(f"{file}{network}")

    def test_a_tensor_beside_the_networks(self, tmp_path):
        tensors = published_vit(DINO)
        file = write({"step": torch.tensor(100), "teacher": tensors}, tmp_path / "weights.pth")
        assert_holds(load_backbone(file), tensors)


class TestDINOv2sCheckpoints:
    """eval/training_…/teacher_checkpoint.pth of DINOv2's training."""

    @staticmethod
    def chunked(tensors: State, depth: int, chunks: int) -> State:
        """Blocks in lists of blocks: the chunk's number comes first, the block keeps its own."""
        renamed = {}
        for name, tensor in tensors.items():
            if number := re.match(r"blocks\.(\d+)\.", name):
                name = name.replace("blocks.", f"blocks.{int(number[1]) // (depth // chunks)}.", 1)
            renamed[name] = tensor
        return renamed

    @pytest.mark.parametrize("ibot", [False, True], ids=["one head", "iBOT's head"])
    @pytest.mark.parametrize("chunks", [0, 1, 4, 12])
    @pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
    def test_with_and_without_chunks_of_blocks(self, ffn, chunks, ibot, tmp_path, caplog):
        spec = replace(DINOV2, embed_dim=64, num_heads=1, depth=12, ffn=ffn)
        tensors = published_vit(spec)
        written = self.chunked(tensors, spec.depth, chunks) if chunks else tensors
        if chunks == 4:
            assert {"blocks.0.0.ls1.gamma", "blocks.1.3.ls1.gamma", "blocks.3.11.ls1.gamma"} <= written.keys()
        content = prefixed("backbone.", written) | prefixed("dino_head.", published_head(width=64))
        if ibot:
            content |= prefixed("ibot_head.", published_head(width=64))
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(write({"teacher": content}, tmp_path / "teacher_checkpoint.pth"))
        assert_holds(loaded, tensors)
        assert loaded.spec == spec
        assert loaded.description["layout"] == "DINOv2"
        assert f"{16 if ibot else 8} tensors of heads" in caplog.text

    @pytest.mark.parametrize("network", ["", "@teacher", "@student"])
    def test_both_networks_in_one_mapping(self, network, tmp_path):
        """The whole training module's state dict: names begin with student or teacher."""
        networks = {"student": published_vit(REGISTERS), "teacher": published_vit(REGISTERS)}
        content = {"dino_loss.center": torch.zeros(1, 32)}
        for name, tensors in networks.items():
            content |= prefixed(f"{name}.backbone.", tensors) | prefixed(f"{name}.dino_head.", published_head())
        file = write({"model": content, "iteration": 9}, tmp_path / "model.pth")
        assert_holds(load_backbone(f"{file}{network}"), networks[network.removeprefix("@") or "teacher"])


NARROW_GIANT = {"img_size": 42, "depth": 2, "embed_dim": 192, "num_heads": 3}
TIMM = {
    "DINO": ("vit_small_patch16_224.dino", {"img_size": 64, "depth": 2}),
    "DINO's ViT-Ti with a classifier": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "num_classes": 10}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 70, "depth": 2}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "depth": 2}),
    "a narrow giant": ("vit_giant_patch14_dinov2", NARROW_GIANT),
    "a narrow giant with registers": ("vit_giant_patch14_reg4_dinov2", NARROW_GIANT | {"num_classes": 7}),
}


class TestTimm:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("case", TIMM)
    def test_its_features(self, case, suffix, tmp_path, randomise):
        name, options = TIMM[case]
        theirs = randomise(timm.create_model(name, pretrained=False, **{"num_classes": 0} | options))
        loaded = load_backbone(write(theirs.state_dict(), tmp_path / f"model{suffix}"))
        registers = "reg4" in name
        assert loaded.spec == ViTSpec(
            theirs.embed_dim,
            options["depth"],
            theirs.embed_dim // 64,
            patch_size=14 if "14" in name else 16,
            image_size=options["img_size"],
            ffn="swiglu" if "giant" in name else "mlp",
            layer_scale=1.0 if "dinov2" in name else 0.0,
            registers=4 if registers else 0,
            position_interpolation="size" if registers else "offset",
        )
        images = torch.randn(2, 3, options["img_size"], options["img_size"])
        with torch.no_grad():
            expected = theirs.forward_features(images)
        assert_same_tokens(loaded, images, expected)

    def test_what_is_no_such_vit(self, tmp_path):
        """Trained with the mean of its tokens instead of the class token: the last norm is another."""
        theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1, global_pool="avg")
        with pytest.raises(UserError, match=r"2 missing: norm\.bias, norm\.weight"):
            load_backbone(write(theirs.state_dict(), tmp_path / "model.pth"))


SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "patch_size": 14, "image_size": 70, "layer_norm_eps": 1e-6}


def vit_config(heads: int, **options: Any) -> ViTConfig:
    return ViTConfig(intermediate_size=512, num_attention_heads=heads, **SIZES | options)


def dinov2_config(heads: int, **options: Any) -> Dinov2Config:
    return Dinov2Config(num_attention_heads=heads, **SIZES | options)


def registers_config(heads: int, **options: Any) -> Dinov2WithRegistersConfig:
    return Dinov2WithRegistersConfig(num_register_tokens=3, num_attention_heads=heads, **SIZES | options)


HUGGING_FACE: dict[str, Callable[[int], PreTrainedModel]] = {
    "ViT and its pooler": lambda heads: ViTModel(vit_config(heads), add_pooling_layer=True),
    "ViT": lambda heads: ViTModel(vit_config(heads), add_pooling_layer=False),
    "ViT with a classifier": lambda heads: ViTForImageClassification(vit_config(heads)),
    "ViT with a mask token": lambda heads: ViTModel(vit_config(heads), use_mask_token=True, add_pooling_layer=False),
    "DINOv2": lambda heads: Dinov2Model(dinov2_config(heads)),
    "DINOv2, SwiGLU": lambda heads: Dinov2Model(dinov2_config(heads, use_swiglu_ffn=True)),
    "DINOv2 with a classifier": lambda heads: Dinov2ForImageClassification(dinov2_config(heads)),
    "DINOv2 with registers": lambda heads: Dinov2WithRegistersModel(registers_config(heads)),
    "DINOv2 with registers, SwiGLU": lambda heads: Dinov2WithRegistersModel(
        registers_config(heads, use_swiglu_ffn=True)
    ),
}


class TestHuggingFace:
    """Directories of save_pretrained."""

    @staticmethod
    def assert_same(loaded: Backbone, theirs: PreTrainedModel, tolerance: float = TOLERANCE) -> None:
        images = torch.randn(2, 3, 70, 70)
        with torch.no_grad():
            expected = theirs.base_model(images).last_hidden_state
        assert_same_tokens(loaded, images, expected, tolerance)

    @pytest.fixture
    def saved(self, tmp_path, randomise) -> tuple[PreTrainedModel, Path]:
        """A model with 2 heads and its directory."""
        theirs = randomise(HUGGING_FACE["DINOv2"](2))
        theirs.save_pretrained(tmp_path / "model")
        return theirs, tmp_path / "model"

    @pytest.mark.parametrize("heads", [2, 8], ids=["64 wide", "16 wide, as config.json says"])
    @pytest.mark.parametrize("case", HUGGING_FACE)
    def test_its_features(self, case, heads, tmp_path, randomise):
        theirs = randomise(HUGGING_FACE[case](heads))
        theirs.save_pretrained(tmp_path / "model")
        loaded = load_backbone(tmp_path / "model")
        registers = 3 if "registers" in case else 0
        assert loaded.spec == ViTSpec(
            128,
            2,
            heads,
            patch_size=14,
            image_size=70,
            ffn="swiglu" if "SwiGLU" in case else "mlp",
            layer_scale=1.0 if "DINOv2" in case else 0.0,
            registers=registers,
            mask_token="DINOv2" in case or "mask token" in case,
            position_interpolation="size" if registers else "offset",
        )
        self.assert_same(loaded, theirs)

    def test_norms_as_by_default(self, tmp_path, randomise):
        """A ViT's config there says ε 1e-12, also of DINO's weights, whose own code has 1e-6: the latter is kept."""
        theirs = randomise(ViTModel(vit_config(2, layer_norm_eps=1e-12)))
        theirs.save_pretrained(tmp_path / "model")
        self.assert_same(load_backbone(tmp_path / "model"), theirs, tolerance=1e-4)

    @pytest.mark.parametrize("case", ["ViT", "DINOv2", "DINOv2, SwiGLU", "DINOv2 with registers"])
    def test_under_the_names_of_its_modules(self, case, tmp_path, randomise):
        """As transformers 5 saves when it is asked not to bring names back to those of earlier files."""
        theirs = randomise(HUGGING_FACE[case](2))
        theirs.save_pretrained(tmp_path / "model", save_original_format=False)
        self.assert_same(load_backbone(tmp_path / "model"), theirs)

    def test_the_pooler_is_no_part_of_the_backbone(self, tmp_path, caplog):
        HUGGING_FACE["ViT and its pooler"](2).save_pretrained(tmp_path / "model")
        with caplog.at_level(logging.INFO):
            load_backbone(tmp_path / "model")
        assert "2 tensors of heads are not part of the backbone" in caplog.text

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
    def test_the_file_itself_or_an_older_directory(self, name, saved, tmp_path):
        theirs, folder = saved
        (tmp_path / "other").mkdir()
        file = write(load_file(folder / "model.safetensors"), tmp_path / "other" / name)
        (file.parent / "config.json").write_text((folder / "config.json").read_text())
        self.assert_same(load_backbone(file.parent), theirs)
        self.assert_same(load_backbone(file), theirs)

    def test_without_config_a_head_is_64_wide(self, saved):
        theirs, folder = saved
        (folder / "config.json").unlink()
        self.assert_same(load_backbone(folder), theirs)

    @pytest.mark.parametrize("part", ["key", "value"])
    def test_a_part_of_the_attention_is_missing(self, part, saved, tmp_path):
        tensors = load_file(saved[1] / "model.safetensors")
        tensors.pop(f"encoder.layer.1.attention.attention.{part}.bias")
        with pytest.raises(UserError, match=r"1 missing: blocks\.1\.attn\.qkv\.bias"):
            load_backbone(write(tensors, tmp_path / "model.pth"))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda text: "{", r"config\.json is damaged"),
            (lambda text: json.dumps(json.loads(text) | {"hidden_act": "relu"}), "relu"),
            (lambda text: json.dumps(json.loads(text) | {"hidden_act": "quick_gelu"}), "quick_gelu"),
        ],
        ids=["no JSON", "relu", "quick_gelu"],
    )
    def test_a_config_of_another_network(self, change, match, saved):
        """Of another activation: parameters have the same names and shapes."""
        config = saved[1] / "config.json"
        config.write_text(change(config.read_text()))
        with pytest.raises(UserError, match=match):
            load_backbone(saved[1])


class TestTorchvision:
    @pytest.mark.parametrize(
        ("arch", "classifier", "suffix"),
        [("resnet18", True, ".safetensors"), ("resnet18", False, ".pth"), ("resnet50", True, ".pth")],
    )
    def test_its_parameters_and_features(self, arch, classifier, suffix, tmp_path):
        theirs = torchvisions(arch)
        content = theirs.state_dict() if classifier else without_classifier(theirs)
        loaded = load_backbone(write(content, tmp_path / f"{arch}{suffix}"))
        assert loaded.spec == ResNetSpec(arch)
        assert_holds(loaded, without_classifier(theirs))
        theirs.fc = nn.Identity()
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert relative_error(loaded(images), theirs(images)) < TOLERANCE

    def test_other_channels(self, tmp_path):
        theirs = torchvisions("resnet18")
        theirs.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        loaded = load_backbone(write(theirs.state_dict(), tmp_path / "grey.pth"))
        assert loaded.spec == ResNetSpec("resnet18", in_chans=1)
        assert tuple(loaded.preprocess.mean) == (0.5,)

    @pytest.mark.parametrize("arch", ["resnet34", "resnet101"])
    def test_another_depth(self, arch, tmp_path):
        with pytest.raises(UserError, match=r"does not fit the model, \d+ unexpected: layer1\.2|layer3\.10"):
            load_backbone(write(torchvisions(arch).state_dict(), tmp_path / f"{arch}.pth"))


class Harmful:
    """Unpickled as anything goes, this writes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "executed")


class TestNoCodeFromFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "as before torch 1.6"])
    @pytest.mark.parametrize("where", ["alone", "beside the weights", "in args", "in a list"])
    def test_an_object_is_not_executed(self, where, legacy, suffix, tmp_path):
        trace, harmful = tmp_path / "trace", Harmful(tmp_path / "trace")
        teacher = {"weight": torch.zeros(2)}
        content = {
            "alone": harmful,
            "beside the weights": {"teacher": teacher, "extra": harmful},
            "in args": {"teacher": teacher, "args": argparse.Namespace(harmful=harmful)},
            "in a list": {"teacher": teacher, "extra": [harmful]},
        }[where]
        file = tmp_path / f"weights{suffix}"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="more than weights"):
            load_backbone(file)
        assert not trace.exists()
        torch.load(file, weights_only=False)
        assert trace.exists(), "the object does nothing, so this test shows nothing"

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (nn.Linear(2, 2), r"more than weights.*state dict"),
            ({"teacher": {}, "args": argparse.Namespace(out=Path("/runs"))}, "pathlib"),
        ],
        ids=["a whole module", "a path in the arguments"],
    )
    def test_the_message_names_what_is_no_weight(self, content, match, tmp_path):
        with pytest.raises(UserError, match=match) as refused:
            load_backbone(write(content, tmp_path / "x.pth"))
        assert "\x1b" not in str(refused.value)

    def test_what_is_trusted_while_reading_is_not_afterwards(self, tmp_path):
        with pytest.raises(UserError, match="no weights of a teacher"):
            load_backbone(write({"args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth"))
        assert argparse.Namespace not in torch.serialization.get_safe_globals()


def without(tensors: State, *beginnings: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


def with_narrow_mlp(tensors: State) -> State:
    narrow = {name: tensor[:256] for name, tensor in tensors.items() if ".mlp.fc1." in name}
    return tensors | narrow


MISMATCHES: dict[str, tuple[Callable[[State], State], str]] = {
    "a missing weight": (lambda t: without(t, "blocks.1.attn.qkv.weight"), r"1 missing: blocks\.1\.attn\.qkv\.weight$"),
    "a missing norm": (lambda t: without(t, "norm.bias"), r"1 missing: norm\.bias$"),
    "a missing block": (lambda t: without(t, "blocks.0."), "has a block 1, but 1 before it are missing"),
    "a decoder": (lambda t: t | {"decoder.weight": torch.zeros(3)}, r"1 unexpected: decoder\.weight$"),
    "norms of queries": (
        lambda t: t | {"blocks.1.attn.q_norm.weight": torch.zeros(3)},
        r"1 unexpected: blocks\.1\.attn\.q_norm\.weight$",
    ),
    "DeiT's token": (lambda t: t | {"dist_token": torch.zeros(3)}, "1 unexpected: dist_token$"),
    "another token": (
        lambda t: t | {"cls_token": torch.zeros(3, 5)},
        r"1 of another shape: cls_token is \(3, 5\), not \(1, 1, 128\)",
    ),
    "another bias": (
        lambda t: t | {"patch_embed.proj.bias": torch.zeros(3, 5)},
        r"patch_embed\.proj\.bias is \(3, 5\), not \(128,\)",
    ),
    "another MLP": (with_narrow_mlp, r"4 of another shape: blocks\.0\.mlp\.fc1\.bias is \(256,\), not \(512,\)"),
    "several": (
        lambda t: without(t, "norm.") | {"extra": torch.zeros(1), "norm.weight": torch.zeros(1)},
        r"1 missing: norm\.bias; 1 unexpected: extra; 1 of another shape: norm\.weight is \(1,\)",
    ),
    "no positions": (lambda t: without(t, "pos_embed"), r"pos_embed"),
    "DINOv3": (lambda t: without(t, "pos_embed") | {"storage_tokens": torch.zeros(1, 4, 128)}, "rotary"),
    "no blocks": (lambda t: without(t, "blocks."), "has no blocks"),
    "flat patches": (lambda t: t | {"patch_embed.proj.weight": torch.zeros(128, 192)}, "has 2 dimensions, not 4"),
    "flat positions": (lambda t: t | {"pos_embed": torch.zeros(128)}, "pos_embed has 1 dimensions"),
    "flat registers": (lambda t: t | {"register_tokens": torch.zeros(128)}, "register_tokens has 1 dimensions"),
    "another width": (lambda t: published_vit(replace(DINO, embed_dim=200)), "do not tell how many attention heads"),
    "no number": (lambda t: t | {"blocks.last.weight": torch.zeros(1)}, r"blocks\.last\.weight"),
    "one name twice": (lambda t: t | prefixed("module.", t), "twice"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_vits_file_with_something_wrong(case, tmp_path):
    """The message says what and where."""
    change, match = MISMATCHES[case]
    file = write(change(published_vit(DINO)), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=match) as refused:
        load_backbone(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("patches", [15, 17, 5, 14])
def test_a_position_table_that_is_no_square(patches, tmp_path):
    tensors = published_vit(DINO) | {"pos_embed": torch.zeros(1, 1 + patches, 128)}
    with pytest.raises(UserError, match=f"position table of {1 + patches} entries is no square"):
        load_backbone(write(tensors, tmp_path / "weights.pth"))


class TestNoWeights:
    @pytest.mark.parametrize(
        "content",
        [
            {},
            {"teacher": {}},
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            {"epoch": 3},
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)},
            {"teacher": {"weight": torch.zeros(2, 2)}},
            {"teacher": [torch.zeros(3)]},
            published_head(),
            [{"cls_token": torch.zeros(1)}],
            torch.zeros(3),
            None,
            {1: torch.zeros(2)},
        ],
        ids=lambda content: re.sub(r"tensor\(.*?\)\)?", "…", str(content), flags=re.DOTALL)[:40],
    )
    def test_another_content(self, content, tmp_path):
        with pytest.raises(UserError, match=r"weights\.pth holds no"):
            load_backbone(write(content, tmp_path / "weights.pth"))

    def test_entries_are_named(self, tmp_path):
        file = write({"optimizer": {"state": {}}, "epoch": 3}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="no weights of a teacher: its entries are optimizer, epoch"):
            load_backbone(file)

    @pytest.mark.parametrize("fraction", [0.01, 0.3, 0.6, 0.99, 0.9999])
    @pytest.mark.parametrize("suffix", [".pth", "legacy.pth", ".safetensors"])
    def test_cut_short(self, suffix, fraction, tmp_path):
        file = tmp_path / f"weights{suffix}"
        if suffix.startswith("legacy"):
            torch.save(published_vit(DINO), file, _use_new_zipfile_serialization=False)
        else:
            write(published_vit(DINO), file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * fraction)])
        with pytest.raises(UserError, match=re.escape(str(file))):
            load_backbone(file)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<!DOCTYPE html><html><body>404 Not Found</body></html>",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0676ba61\nsize 102530333\n",
            "{}",
            "hello, these are weights\n",  # of which each letter is an instruction of pickle, as of the next
            "a" * 100,
        ],
        ids=["nothing", "HTML", "a pointer of Git LFS", "JSON", "words", "letters"],
    )
    def test_text(self, text, suffix, tmp_path):
        """Of which no danger is told."""
        file = tmp_path / f"weights{suffix}"
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(file))) as refused:
            load_backbone(file)
        assert "run code" not in str(refused.value)

    @pytest.mark.parametrize("network", ["nonsense", "Teacher", "teacher ", "students"])
    def test_after_at_comes_teacher_or_student(self, network, tmp_path):
        file = write({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="teacher or student"):
            load_backbone(f"{file}@{network}")

    def test_a_directory_without_weights(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="no weights at"):
            load_backbone(tmp_path)
