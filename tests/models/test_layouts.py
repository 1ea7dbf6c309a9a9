"""Every layout of weights that is read gives the parameters that were written, or its own library's features.

Files are made here: by the libraries themselves where they are at hand (timm, transformers, torchvision), else by the
names and shapes that DINO's and DINOv2's code writes. Weights are random.
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

State = dict[str, Tensor]
TOLERANCE = 1e-5
DINO = ViTSpec(128, 2, 2, patch_size=8, image_size=32, position_interpolation="offset")
DINOV2 = replace(DINO, layer_scale=1.0, mask_token=True)
REGISTERS = replace(DINOV2, registers=4, position_interpolation="size")
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
IDENTIFY = ("DINO", "DINOv2, registers")  # where a wrapping is tested, not what it wraps


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks are so small that waking further threads takes longer than the work, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def meta_tensors(spec: ViTSpec) -> State:
    """Random tensors under the names and in the shapes of DINO's and DINOv2's files (vision_transformer.py of each).

    Values are about as large as trained ones, so that features can be compared.
    """
    width, hidden = spec.embed_dim, 4 * spec.embed_dim

    def linear(name: str, inputs: int, *outputs: int) -> State:
        weight = torch.randn(*outputs) / inputs**0.5
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(outputs[0])}

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}

    def token(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, width)

    state = {"cls_token": token(1, 1), "pos_embed": token(1, 1 + (spec.image_size // spec.patch_size) ** 2)}
    pixels = (spec.in_chans, spec.patch_size, spec.patch_size)
    state |= linear("patch_embed.proj", math.prod(pixels), width, *pixels)
    if spec.registers:
        state["register_tokens"] = token(1, spec.registers)
    if spec.mask_token:
        state["mask_token"] = token(1)
    for block in (f"blocks.{index}" for index in range(spec.depth)):
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= linear(f"{block}.attn.qkv", width, 3 * width, width)
        state |= linear(f"{block}.attn.proj", width, width, width)
        if spec.ffn == "swiglu":  # two thirds as wide, in steps of 8; gate and value in one matrix
            narrow = math.ceil(hidden * 2 // 3 / 8) * 8
            state |= linear(f"{block}.mlp.w12", width, 2 * narrow, width)
            state |= linear(f"{block}.mlp.w3", narrow, width, narrow)
        else:
            state |= linear(f"{block}.mlp.fc1", width, hidden, width)
            state |= linear(f"{block}.mlp.fc2", hidden, width, hidden)
        if spec.layer_scale:
            state |= {f"{block}.ls{number}.gamma": 1 + 0.3 * torch.randn(width) for number in (1, 2)}
    return state | norm("norm")


def head(*, parametrized: bool = False, width: int = 128, prototypes: int = 32) -> State:
    """A DINO head's tensors, with either name that torch has given to the parts of a weight-normed layer."""
    tensors = {}
    for layer, (inputs, outputs) in {0: (width, 64), 2: (64, 64), 4: (64, 16)}.items():
        tensors[f"mlp.{layer}.weight"], tensors[f"mlp.{layer}.bias"] = (
            torch.randn(outputs, inputs),
            torch.randn(outputs),
        )
    length, direction = ("original0", "original1") if parametrized else ("weight_g", "weight_v")
    before = "last_layer.parametrizations.weight." if parametrized else "last_layer."
    return tensors | {before + length: torch.ones(prototypes, 1), before + direction: torch.randn(prototypes, 16)}


def prefixed(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


def assert_holds(loaded: Backbone, tensors: State) -> None:
    """The same parameters, bit by bit: no more, no fewer."""
    state = loaded.state_dict()
    assert state.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(state[name], tensor)] == []


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def assert_same_tokens(loaded: Backbone, images: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """`expected` is (B, 1+R+N, D): class token, registers, patches, after the last norm."""
    registers = loaded.spec.registers
    features = loaded.forward_features(images)
    assert relative_error(loaded(images), expected[:, 0]) < tolerance
    assert relative_error(features["x_norm_clstoken"], expected[:, 0]) < tolerance
    assert relative_error(features["x_norm_patchtokens"], expected[:, 1 + registers :]) < tolerance
    if registers:
        assert relative_error(features["x_norm_regtokens"], expected[:, 1 : 1 + registers]) < tolerance


class TestMetasBackbones:
    """DINO's and DINOv2's released files: the state dict alone."""

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("spec", META_SPECS.values(), ids=META_SPECS)
    def test_the_parameters_and_the_architecture(self, spec, suffix, tmp_path):
        tensors = meta_tensors(spec)
        loaded = load_backbone(write(tensors, tmp_path / f"weights{suffix}"))
        assert_holds(loaded, tensors)
        assert loaded.spec == spec
        assert loaded.description["layout"] == ("DINOv2" if spec.layer_scale else "DINO")

    def test_as_torch_wrote_files_before_1_6(self, tmp_path):
        tensors = meta_tensors(DINO)
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert_holds(load_backbone(tmp_path / "old.pth"), tensors)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_keeps_its_values_in_fp32(self, dtype, tmp_path):
        tensors = {name: tensor.to(dtype) for name, tensor in meta_tensors(DINOV2).items()}
        loaded = load_backbone(write(tensors, tmp_path / "weights.pth"))
        assert_holds(loaded, {name: tensor.float() for name, tensor in tensors.items()})

    def test_it_is_ready_for_features(self, tmp_path):
        """Evaluation mode, and the preprocessing of every release, with means for as many channels as there are."""
        for channels, mean in {3: (0.485, 0.456, 0.406), 1: (0.5,), 5: (0.5,) * 5}.items():
            spec = replace(DINO, in_chans=channels)
            loaded = load_backbone(write(meta_tensors(spec), tmp_path / "weights.pth"))
            assert not loaded.training
            assert tuple(loaded.preprocess.mean) == mean
            images = loaded.preprocess(torch.randint(256, (2, channels, 300, 260), dtype=torch.uint8))
            assert images.shape == (2, channels, 224, 224)
            assert loaded(images).isfinite().all()

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "module.backbone."]
    )
    @pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
    @pytest.mark.parametrize("name", IDENTIFY)
    def test_prefixes_and_wrappings(self, name, wrapper, prefix, tmp_path):
        """Of DistributedDataParallel, torch.compile, multi-crop wrappers, and the usual entries of checkpoints."""
        tensors = meta_tensors(META_SPECS[name])
        content = prefixed(prefix, tensors)
        file = write({"epoch": 3, wrapper: content} if wrapper else content, tmp_path / "weights.pth")
        assert_holds(load_backbone(file), tensors)

    def test_a_compiled_and_distributed_module(self, tmp_path):
        """The prefix is torch's own, not one written by hand."""
        tensors = meta_tensors(DINO)
        backbone = load_backbone(write(tensors, tmp_path / "weights.pth"))
        compiled = torch.compile(nn.ModuleDict({"backbone": backbone}))
        assert all(name.startswith("_orig_mod.backbone.") for name in compiled.state_dict())
        assert_holds(load_backbone(write(compiled.state_dict(), tmp_path / "compiled.pth")), tensors)


class TestDINOsCheckpoints:
    """What main_dino.py saves: student, teacher, their heads, and the rest of the training."""

    @staticmethod
    def content(student: State, teacher: State, parametrized: bool = False) -> dict[str, Any]:
        layer = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        heads = [prefixed("head.", head(parametrized=parametrized)) for _ in range(2)]
        return {
            "student": prefixed("module.", prefixed("backbone.", student) | heads[0]),
            "teacher": prefixed("backbone.", teacher) | heads[1],
            "optimizer": optimizer.state_dict(),
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4), lr=5e-4, use_fp16=True),
            "dino_loss": {"center": torch.randn(1, 32)},
            "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        }

    @pytest.mark.parametrize("parametrized", [False, True], ids=["weight_g", "original0"])
    @pytest.mark.parametrize("wanted", ["", "@teacher", "@student"])
    def test_either_network(self, wanted, parametrized, tmp_path, caplog):
        student, teacher = meta_tensors(DINO), meta_tensors(DINO)
        file = write(self.content(student, teacher, parametrized), tmp_path / "checkpoint.pth")
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(f"{file}{wanted}")
        assert_holds(loaded, student if wanted == "@student" else teacher)
        assert loaded.spec == DINO
        assert "8 tensors of heads are not part of the backbone" in caplog.text
        assert f"{len(teacher)} of {len(teacher)} tensors matched" in caplog.text

    def test_a_teacher_in_distributed_data_parallel(self, tmp_path):
        """A teacher with BatchNorm is wrapped, too; here a ResNet, whose statistics count."""
        tensors = [without_classifier(torchvisions("resnet18")) for _ in range(2)]
        content = self.content(*tensors) | {"teacher": prefixed("module.backbone.", tensors[1])}
        file = write(content, tmp_path / "checkpoint0080.pth")
        assert_holds(load_backbone(file), tensors[1])
        assert_holds(load_backbone(f"{file}@student"), tensors[0])

    def test_in_the_working_directory(self, tmp_path, monkeypatch):
        student, teacher = meta_tensors(DINO), meta_tensors(DINO)
        write(self.content(student, teacher), tmp_path / "checkpoint.pth")
        monkeypatch.chdir(tmp_path)
        assert_holds(load_backbone("checkpoint.pth@student"), student)

    @pytest.mark.parametrize("wanted", ["", "@student"])
    def test_in_a_folder_whose_name_has_an_at_sign(self, wanted, tmp_path):
        student, teacher = meta_tensors(DINO), meta_tensors(DINO)
        folder = tmp_path / "runs@night"
        folder.mkdir()
        file = write(self.content(student, teacher), folder / "checkpoint.pth")
        assert_holds(load_backbone(f"{file}{wanted}"), student if wanted else teacher)

    @pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
    def test_no_student_where_there_is_none(self, wrapper, tmp_path):
        tensors = meta_tensors(DINO)
        file = write({wrapper: tensors} if wrapper else tensors, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="student"):
            load_backbone(f"{file}@student")

    @pytest.mark.parametrize(("has", "wanted"), [("student", ""), ("student", "@teacher"), ("teacher", "@student")])
    def test_never_the_other_network(self, has, wanted, tmp_path):
        file = write({has: meta_tensors(DINO), "epoch": 1}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=f"no weights of a {'student' if 'student' in wanted else 'teacher'}"):
            load_backbone(f"{file}{wanted}")

    def test_a_tensor_beside_the_networks(self, tmp_path):
        tensors = meta_tensors(DINO)
        file = write({"step": torch.tensor(100), "teacher": tensors}, tmp_path / "weights.pth")
        assert_holds(load_backbone(file), tensors)


class TestDINOv2sCheckpoints:
    """eval/training_…/teacher_checkpoint.pth of DINOv2's training."""

    @staticmethod
    def chunked(tensors: State, depth: int, chunks: int) -> State:
        """Blocks in lists of blocks: the chunk's number comes first, the block keeps its own."""
        per_chunk = depth // chunks
        block = re.compile(r"^blocks\.(\d+)\.")
        return {
            block.sub(lambda found: f"blocks.{int(found[1]) // per_chunk}.{found[1]}.", name): tensor
            for name, tensor in tensors.items()
        }

    @pytest.mark.parametrize("ibot", [False, True], ids=["one head", "iBOT's head"])
    @pytest.mark.parametrize("chunks", [0, 1, 4, 12])
    @pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
    def test_with_and_without_chunks_of_blocks(self, ffn, chunks, ibot, tmp_path, caplog):
        spec = replace(DINOV2, embed_dim=64, num_heads=1, depth=12, ffn=ffn)
        tensors = meta_tensors(spec)
        written = self.chunked(tensors, spec.depth, chunks) if chunks else tensors
        if chunks == 4:
            assert {"blocks.0.0.ls1.gamma", "blocks.1.3.ls1.gamma", "blocks.3.11.ls1.gamma"} <= written.keys()
        content = prefixed("backbone.", written) | prefixed("dino_head.", head(width=64))
        if ibot:
            content |= prefixed("ibot_head.", head(width=64))
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(write({"teacher": content}, tmp_path / "teacher_checkpoint.pth"))
        assert_holds(loaded, tensors)
        assert loaded.spec == spec
        assert loaded.description["layout"] == "DINOv2"
        assert f"{16 if ibot else 8} tensors of heads" in caplog.text

    @pytest.mark.parametrize("wanted", ["", "@teacher", "@student"])
    def test_both_networks_in_one_mapping(self, wanted, tmp_path):
        """The whole training module's state dict: names begin with student or teacher."""
        networks = {"student": meta_tensors(REGISTERS), "teacher": meta_tensors(REGISTERS)}
        content = {"dino_loss.center": torch.zeros(1, 32)}
        for name, tensors in networks.items():
            content |= prefixed(f"{name}.backbone.", tensors) | prefixed(f"{name}.dino_head.", head())
        file = write({"model": content, "iteration": 9}, tmp_path / "model.pth")
        assert_holds(load_backbone(f"{file}{wanted}"), networks[wanted.removeprefix("@") or "teacher"])


TIMM = {
    "DINO": ("vit_small_patch16_224.dino", {"img_size": 64, "depth": 2}),
    "DINO's ViT-Ti with a classifier": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "num_classes": 10}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 70, "depth": 2}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "depth": 2}),
    "DINOv2's giant": ("vit_giant_patch14_dinov2", {"img_size": 42, "depth": 2}),
    "a narrow giant with registers": (
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 42, "depth": 2, "embed_dim": 384, "num_heads": 6, "num_classes": 7},
    ),
}


class TestTimm:
    @pytest.mark.parametrize(
        ("case", "suffix"),
        [
            pytest.param(case, suffix, marks=pytest.mark.slow) if case == "DINOv2's giant" else (case, suffix)
            for case in TIMM
            for suffix in (".pth", ".safetensors")
        ],
    )
    def test_its_features(self, case, suffix, tmp_path, randomise):
        name, options = TIMM[case]
        theirs = randomise(timm.create_model(name, pretrained=False, **{"num_classes": 0} | options))
        file = write(theirs.state_dict(), tmp_path / f"model{suffix}")
        loaded = load_backbone(file)
        file.unlink()  # large, and pytest would keep it for several sessions
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
WITH_REGISTERS = {"num_register_tokens": 3, **SIZES}
HUGGING_FACE: dict[str, Callable[[int], PreTrainedModel]] = {
    "ViT and its pooler": lambda heads: ViTModel(
        ViTConfig(intermediate_size=512, num_attention_heads=heads, **SIZES), add_pooling_layer=True
    ),
    "ViT": lambda heads: ViTModel(
        ViTConfig(intermediate_size=512, num_attention_heads=heads, **SIZES), add_pooling_layer=False
    ),
    "ViT with a classifier": lambda heads: ViTForImageClassification(
        ViTConfig(intermediate_size=512, num_attention_heads=heads, **SIZES)
    ),
    "DINOv2": lambda heads: Dinov2Model(Dinov2Config(num_attention_heads=heads, **SIZES)),
    "DINOv2, SwiGLU": lambda heads: Dinov2Model(Dinov2Config(num_attention_heads=heads, use_swiglu_ffn=True, **SIZES)),
    "DINOv2 with a classifier": lambda heads: Dinov2ForImageClassification(
        Dinov2Config(num_attention_heads=heads, **SIZES)
    ),
    "DINOv2 with registers": lambda heads: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(num_attention_heads=heads, **WITH_REGISTERS)
    ),
    "DINOv2 with registers, SwiGLU": lambda heads: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(num_attention_heads=heads, use_swiglu_ffn=True, **WITH_REGISTERS)
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
            mask_token="DINOv2" in case,
            position_interpolation="size" if registers else "offset",
        )
        self.assert_same(loaded, theirs)

    def test_norms_as_by_default(self, tmp_path, randomise):
        """A ViT's config there says ε 1e-12, also of DINO's weights, whose own code has 1e-6: the latter is kept."""
        sizes = SIZES | {"layer_norm_eps": 1e-12}
        theirs = randomise(ViTModel(ViTConfig(intermediate_size=512, num_attention_heads=2, **sizes)))
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
            loaded = load_backbone(tmp_path / "model")
        assert "2 tensors of heads are not part of the backbone" in caplog.text
        assert not any("pooler" in name for name in loaded.state_dict())

    @pytest.mark.parametrize("written", ["pytorch_model.bin", "model.safetensors"])
    def test_the_file_itself_or_an_older_directory(self, written, tmp_path, randomise):
        theirs = randomise(HUGGING_FACE["DINOv2 with registers"](8))
        theirs.save_pretrained(tmp_path / "model")
        folder = tmp_path / "other"
        folder.mkdir()
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        file = write(tensors, folder / written)
        (folder / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
        self.assert_same(load_backbone(folder), theirs)
        self.assert_same(load_backbone(file), theirs)

    def test_without_config_a_head_is_64_wide(self, tmp_path, randomise):
        theirs = randomise(HUGGING_FACE["DINOv2"](2))
        theirs.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").unlink()
        self.assert_same(load_backbone(tmp_path / "model"), theirs)

    def test_a_config_that_is_no_json(self, tmp_path):
        HUGGING_FACE["DINOv2"](2).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json"):
            load_backbone(tmp_path / "model")

    @pytest.mark.parametrize("part", ["key", "value"])
    def test_a_part_of_the_attention_is_missing(self, part, tmp_path):
        HUGGING_FACE["DINOv2"](2).save_pretrained(tmp_path / "model")
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors.pop(f"encoder.layer.1.attention.attention.{part}.bias")
        with pytest.raises(UserError, match=r"1 missing: blocks\.1\.attn\.qkv\.bias"):
            load_backbone(write(tensors, tmp_path / "model.pth"))

    @pytest.mark.parametrize("activation", ["relu", "quick_gelu"])
    def test_another_activation(self, activation, tmp_path):
        """Parameters have the same names and shapes."""
        HUGGING_FACE["DINOv2"](2).save_pretrained(tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": activation}))
        with pytest.raises(UserError, match=activation):
            load_backbone(tmp_path / "model")

    def test_a_vit_with_a_mask_token(self, tmp_path, randomise):
        theirs = randomise(
            ViTModel(ViTConfig(intermediate_size=512, num_attention_heads=2, **SIZES), use_mask_token=True)
        )
        theirs.save_pretrained(tmp_path / "model")
        self.assert_same(load_backbone(tmp_path / "model"), theirs)


def torchvisions(arch: str) -> nn.Module:
    """torchvision's network in evaluation mode, with weights and statistics that are not the initial ones."""
    network = getattr(torchvision.models, arch)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return network.eval()


def without_classifier(network: nn.Module) -> State:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


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
        theirs = getattr(torchvision.models, arch)(weights=None)
        with pytest.raises(UserError, match=r"does not fit the model, \d+ unexpected: layer1\.2|layer3\.10"):
            load_backbone(write(theirs.state_dict(), tmp_path / f"{arch}.pth"))


class Harmful:
    """Unpickled as anything goes, this writes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "executed")


class TestNoCodeFromFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "as before torch 1.6"])
    @pytest.mark.parametrize("place", ["alone", "beside the weights", "in args", "in a list"])
    def test_an_object_is_not_executed(self, place, legacy, suffix, tmp_path):
        trace, harmful = tmp_path / "trace", Harmful(tmp_path / "trace")
        content = {
            "alone": harmful,
            "beside the weights": {"teacher": meta_tensors(DINO), "extra": harmful},
            "in args": {"teacher": meta_tensors(DINO), "args": argparse.Namespace(harmful=harmful)},
            "in a list": {"teacher": meta_tensors(DINO), "extra": [harmful]},
        }[place]
        file = tmp_path / f"weights{suffix}"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="more than weights"):
            load_backbone(file)
        assert not trace.exists()
        torch.load(file, weights_only=False)
        assert trace.exists(), "the object does nothing, so this test shows nothing"

    def test_a_whole_module_is_refused(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
        with pytest.raises(UserError, match=r"more than weights.*state dict"):
            load_backbone(tmp_path / "model.pth")

    def test_the_message_names_what_is_no_weight(self, tmp_path):
        torch.save({"teacher": meta_tensors(DINO), "args": argparse.Namespace(out=Path("/runs"))}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="pathlib") as refused:
            load_backbone(tmp_path / "x.pth")
        assert "\x1b" not in str(refused.value)

    def test_what_is_trusted_while_reading_is_not_afterwards(self, tmp_path):
        torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="no weights of a teacher"):
            load_backbone(tmp_path / "x.pth")
        assert argparse.Namespace not in torch.serialization.get_safe_globals()


class TestMismatches:
    """A ViT's file with something wrong in it: the message says what and where."""

    @pytest.fixture
    def refuses(self, tmp_path):
        """Function that writes a state dict and asserts that it is refused, with the name of the file."""

        def check(tensors: State, match: str) -> None:
            file = write(tensors, tmp_path / "weights.pth")
            with pytest.raises(UserError, match=match) as refused:
                load_backbone(file)
            assert str(file) in str(refused.value)

        return check

    @pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "norm.bias", "blocks.0.norm1.weight"])
    def test_missing(self, name, refuses):
        tensors = meta_tensors(DINO)
        tensors.pop(name)
        refuses(tensors, f"1 missing: {re.escape(name)}$")

    def test_a_block_is_missing(self, refuses):
        tensors = meta_tensors(replace(DINO, depth=3))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
        refuses(tensors, r"12 missing: blocks\.1\.attn\.proj\.bias, ")

    @pytest.mark.parametrize("name", ["decoder.weight", "blocks.1.attn.q_norm.weight", "dist_token"])
    def test_unexpected(self, name, refuses):
        refuses(meta_tensors(DINO) | {name: torch.zeros(3)}, f"1 unexpected: {re.escape(name)}$")

    @pytest.mark.parametrize("name", ["cls_token", "blocks.1.mlp.fc1.bias", "norm.weight", "patch_embed.proj.bias"])
    def test_of_another_shape(self, name, refuses):
        tensors = meta_tensors(DINO)
        shape = tuple(tensors[name].shape)
        tensors[name] = torch.zeros(3, 5)
        refuses(tensors, re.escape(f"1 of another shape: {name} is (3, 5), not {shape}"))

    def test_another_mlp_ratio(self, refuses):
        tensors = meta_tensors(DINO)
        for block in range(2):
            for name in ("fc1.weight", "fc1.bias"):
                tensors[f"blocks.{block}.mlp.{name}"] = tensors[f"blocks.{block}.mlp.{name}"][:256]
        refuses(tensors, r"4 of another shape: blocks\.0\.mlp\.fc1\.bias is \(256,\), not \(512,\)")

    @pytest.mark.parametrize("patches", [15, 17, 5, 14])
    def test_a_position_table_that_is_no_square(self, patches, refuses):
        tensors = meta_tensors(DINO)
        tensors["pos_embed"] = torch.zeros(1, 1 + patches, 128)
        refuses(tensors, f"position table of {1 + patches} entries is no square")

    def test_several_at_once(self, refuses):
        tensors = meta_tensors(DINO) | {"extra": torch.zeros(1), "norm.weight": torch.zeros(1)}
        tensors.pop("norm.bias")
        refuses(tensors, r"1 missing: norm\.bias; 1 unexpected: extra; 1 of another shape: norm\.weight is \(1,\)")

    @pytest.mark.parametrize("extra", [{}, {"storage_tokens": torch.zeros(1, 4, 128)}], ids=["DINO", "DINOv3"])
    def test_no_position_table(self, extra, refuses):
        """DINOv3 has none: its positions are rotations."""
        tensors = meta_tensors(DINO) | extra
        tensors.pop("pos_embed")
        refuses(tensors, "pos_embed")

    def test_no_blocks(self, refuses):
        tensors = {name: tensor for name, tensor in meta_tensors(DINO).items() if not name.startswith("blocks.")}
        refuses(tensors, "blocks")

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("patch_embed.proj.weight", (128, 192)), ("pos_embed", (128,)), ("register_tokens", (128,))],
        ids=str,
    )
    def test_of_other_dimensions(self, name, shape, refuses):
        refuses(meta_tensors(DINO) | {name: torch.zeros(shape)}, re.escape(name))

    def test_a_width_that_heads_of_64_do_not_divide(self, refuses):
        refuses(meta_tensors(replace(DINO, embed_dim=200)), "200")

    def test_blocks_without_numbers(self, refuses):
        refuses(meta_tensors(DINO) | {"blocks.last.weight": torch.zeros(1)}, r"blocks\.last\.weight")

    def test_one_name_twice(self, refuses):
        refuses(meta_tensors(DINO) | prefixed("module.", meta_tensors(DINO)), "twice|both")


TEXTS = {
    "nothing": "",
    "HTML": "<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0676ba61\nsize 102530333\n",
    "JSON": "{}",
}


class TestNoWeights:
    @pytest.mark.parametrize(
        "content",
        [
            {},
            {"teacher": {}},
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
            {"epoch": 3},
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)},
            {"teacher": {"weight": torch.zeros(2, 2)}},
            {"teacher": [torch.zeros(3)]},
            head(),
            [meta_tensors(replace(DINO, depth=1))],
            torch.zeros(3),
            None,
            {1: torch.zeros(2)},
        ],
        ids=lambda content: re.sub(r"tensor\(.*?\)\)?", "…", str(content), flags=re.DOTALL)[:40],
    )
    def test_another_content(self, content, tmp_path):
        file = write(content, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=r"weights\.pth holds no"):
            load_backbone(file)

    def test_entries_are_named(self, tmp_path):
        file = write({"optimizer": {"state": {}}, "epoch": 3}, tmp_path / "weights.pth")
        with pytest.raises(UserError, match="no weights of a teacher: its entries are optimizer, epoch"):
            load_backbone(file)

    @pytest.mark.parametrize("kept", [0.01, 0.3, 0.6, 0.99, 0.9999])
    @pytest.mark.parametrize("suffix", [".pth", "legacy.pth", ".safetensors"])
    def test_cut_short(self, suffix, kept, tmp_path):
        file = tmp_path / f"weights{suffix}"
        tensors = meta_tensors(DINO)
        if suffix.startswith("legacy"):
            torch.save(tensors, file, _use_new_zipfile_serialization=False)
        else:
            write(tensors, file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(UserError, match=re.escape(str(file))):
            load_backbone(file)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
    def test_text(self, text, suffix, tmp_path):
        file = tmp_path / f"weights{suffix}"
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(file))):
            load_backbone(file)

    @pytest.mark.parametrize("text", ["hello, these are weights\n", "a" * 100, "Rate limit exceeded"])
    def test_text_of_which_each_letter_is_an_instruction(self, text, tmp_path):
        (tmp_path / "weights.pth").write_text(text)
        with pytest.raises(UserError, match=r"weights\.pth"):
            load_backbone(tmp_path / "weights.pth")

    def test_of_text_no_danger_is_told(self, tmp_path):
        (tmp_path / "weights.pth").write_text("<!DOCTYPE html><html></html>")
        with pytest.raises(UserError) as refused:
            load_backbone(tmp_path / "weights.pth")
        assert "run code" not in str(refused.value)

    @pytest.mark.parametrize("network", ["nonsense", "Teacher", "teacher ", "students"])
    def test_after_at_comes_teacher_or_student(self, network, tmp_path):
        file = write(meta_tensors(DINO), tmp_path / "weights.pth")
        with pytest.raises(UserError, match="teacher or student"):
            load_backbone(f"{file}@{network}")

    def test_a_directory_without_weights(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="no weights at"):
            load_backbone(tmp_path)
