"""Weights that claim what they do not hold are refused at once; what tensors do not tell is not guessed in silence."""

import copy
import json
import logging
import os
import re
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import DINO, DINOV2, REGISTERS, State, published_vit
from safetensors.torch import load_file, save_file
from torch import nn

from dino.errors import UserError
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import Preprocess, ViTSpec, load_backbone
from dino.models.registry import build
from dino.models.resnet import ResNetSpec
from dino.models.weights import load_heads, save_backbone
from dino.models.weights.facts import METADATA_KEY, describe

PREPROCESSING = {"image_size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
NARROW = replace(DINO, embed_dim=96, num_heads=3)


@pytest.fixture(autouse=True)
def quick():
    """Each of these within two seconds, and in little memory."""
    start = time.monotonic()
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 20  # on a machine that is busy; hangs took minutes
    assert peak < 200 * 2**20


def containing_itself() -> Any:
    loop: dict[str, Any] = {"model": {}}
    loop["model"]["model"] = loop
    return loop


def deep(levels: int) -> Any:
    content: Any = published_vit(DINO)
    for _ in range(levels):
        content = {"model": content}
    return content


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], State]:
    def state() -> State:
        tensors = published_vit(DINO)
        return tensors | {name: change(tensors[name])}

    return state


NORM = "blocks.0.norm1.weight"
QKV = "blocks.0.attn.qkv.weight"
CLAIMS: dict[str, tuple[Callable[[], Any], str]] = {
    "a million blocks": (lambda: published_vit(DINO) | {"blocks.1000000.norm1.weight": torch.ones(128)}, "missing"),
    "more blocks than numbers": (
        lambda: published_vit(DINO) | {f"blocks.{10**40}.norm1.weight": torch.ones(128)},
        "unexpected",
    ),
    "itself": (containing_itself, "no weights of a teacher"),
    "a thousand levels": (lambda: deep(300), "holds"),
    "a giant of nothing": (changed(QKV, lambda t: torch.zeros(1).expand(3 * 10**5, 10**5)), "claims"),
    "a wide patch": (
        changed("patch_embed.proj.weight", lambda t: torch.zeros(1, 1, 1, 1).expand(10**9, 3, 8, 8)),
        "claims",
    ),
    "one memory many times": (
        lambda: (
            {name: torch.zeros(2**20)[: t.numel()].view(t.shape) for name, t in published_vit(DINO).items()}
            and {f"blocks.{i}.x": SHARED for i in range(2000)}
        ),
        "share their memory",
    ),
    "sparse": (changed(QKV, torch.Tensor.to_sparse), "no plain tensor|cannot be read"),
    "meta": (changed(QKV, lambda t: t.to("meta")), "no plain tensor"),
    "complex": (changed(NORM, lambda t: t.to(torch.complex64)), "complex64"),
    "int8": (changed(NORM, lambda t: t.to(torch.int8)), "int8"),
    "bool": (changed(NORM, lambda t: t > 0), "bool"),
    "float8": (changed(NORM, lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    "NaN": (changed(NORM, lambda t: t.index_fill(0, torch.tensor([3]), float("nan"))), f"NaN or infinity: {NORM}"),
    "infinite": (changed("norm.bias", lambda t: t / 0), r"1 tensor\(s\) hold NaN or infinity: norm.bias"),
    "no width": (changed("patch_embed.proj.weight", lambda t: t[:0]), "attention heads"),
    "no positions": (changed("pos_embed", lambda t: t[:, :0]), "position table of 0"),
    "no patch": (changed("patch_embed.proj.weight", lambda t: t[..., :0, :0]), "describes no backbone|does not fit"),
}
SHARED = torch.zeros(2**18)
CLAIMS |= {
    "a name that steers the terminal": (lambda: {"\x1b[31m\n": torch.ones(1)}, r"begins with \\x1b\[31m\\n\)$"),
    "a name without end": (lambda: published_vit(DINO) | {"x" * 9999: torch.ones(1)}, f"unexpected: {'x' * 100}$"),
    "numbers without shape": (lambda: dict.fromkeys(published_vit(DINO), torch.tensor(1.0)), "shapes of no known"),
    "a ResNet without shape": (
        lambda: dict.fromkeys(("conv1.weight", "layer1.0.conv1.weight"), torch.tensor(1.0)),
        "0 dimensions, not 4",
    ),
    "more tensors than any network": (lambda: {f"{i}": torch.ones(1) for i in range(20_001)}, r"20,0\d\d tensors"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_that_claims_the_impossible(claim, tmp_path):
    make, match = CLAIMS[claim]
    torch.save(make(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=match) as refused:
        load_backbone(tmp_path / "weights.pth")
    assert "\n" not in str(refused.value)


def test_entries_are_not_unpacked_beyond_the_files_size(tmp_path):
    torch.save({"x": torch.zeros(10**7)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.namelist():
            packed.writestr(entry, stored.read(entry))
    with pytest.raises(UserError, match="would unpack to 40,0"):
        load_backbone(tmp_path / "weights.pth")


def test_transposed_and_half_precision_tensors_are_fine(tmp_path):
    expected = published_vit(DINO)
    torch.save({name: t.half() for name, t in expected.items()}, tmp_path / "half.pth")
    torch.save(expected | {QKV: expected[QKV].t().contiguous().t()}, tmp_path / "transposed.pth")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_backbone(tmp_path / "transposed.pth").state_dict()[QKV], expected[QKV])
    assert load_backbone(tmp_path / "half.pth")(images).isfinite().all()


DESCRIPTIONS = {
    "spec": ["nothing", 3, [], {}, {"embed_dim": 128}, {"unknown": 1}],
    "spec.embed_dim": [10**9, 10**6, -1, 0, 1.5, "128", True, None],
    "spec.depth": [10**7, 10**5, -3, 0, 1e300],
    "spec.num_heads": [0, 7, -2, "2", 10**9],
    "spec.patch_size": [0, 10**6, -8],
    "spec.image_size": [10**7, 33, 0],
    "spec.registers": [10**7, -1],
    "spec.in_chans": [0, 10**7],
    "spec.mlp_ratio": [float("nan"), 10**6, -1.0, 0],
    "spec.ffn": ["relu", 3],
    "spec.position_interpolation": ["cubic", None],
    "spec.mask_token": [1, "yes", True],
    "family": ["nobody", 3, None],
    "image_size": [0, 10**9, "x", None],
    "mean": [[], [0.5], ["a"] * 3, [float("inf")] * 3, 3, [[1]] * 3],
    "std": [[0.0] * 3, [-1] * 3, [0.5, 0.5], None],
    "training": [3, "x", {"seed": "x"}, {"seed": -1}, {"seed": True}, {"initialisation": 3}],
    "layout": [3, ["a"], "x" * 10**6],
    "format": [2, "x", None],
}


@pytest.mark.parametrize("key", DESCRIPTIONS)
def test_a_description_that_cannot_be(key, tmp_path):
    backbone = build(DINO)
    described = json.loads(describe(backbone, PREPROCESSING, {})[METADATA_KEY])
    for value in DESCRIPTIONS[key]:
        description = copy.deepcopy(described)
        *outer, last = key.split(".")
        (description["spec"] if outer else description)[last] = value
        file = tmp_path / "weights.safetensors"
        save_file(backbone.state_dict(), file, {METADATA_KEY: json.dumps(description)})
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            load_backbone(file)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"format": 1}', "null", "\u0000"])
def test_a_description_that_is_none(text, tmp_path):
    save_file(build(DINO).state_dict(), tmp_path / "weights.safetensors", {METADATA_KEY: text})
    with pytest.raises(UserError, match="cannot be read as a backbone"):
        load_backbone(tmp_path / "weights.safetensors")


TIMM = {"architecture": "vit_tiny_patch8", "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0], "std": [1]}}


def in_safetensors(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


LARGE = json.dumps({f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(99_999)})
HEADERS = {
    "longer than the file": in_safetensors(b"{}", 1000),
    "longer than any file": in_safetensors(b"{}", 2**63),
    "of more tensors than any network": in_safetensors(LARGE.encode()),
    "of endless depth": in_safetensors(b"[" * 10**6),
    "of a terabyte": in_safetensors(b'{"a": {"dtype": "F32", "shape": [262144000], "data_offsets": [0, 1048576000]}}'),
    "none": b"",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_cannot_be(header, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(HEADERS[header])
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read as"):
        load_backbone(file)


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "../a", "/etc/passwd", "x" * 5000, "\x1b[31m\n", "a\0b", "none", "pipe"]
)
def test_an_index_that_leads_elsewhere(shard, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": shard}}))
    with pytest.raises(UserError, match=r"index\.json: [^\n\x1b]{1,120} is no file beside it$"):
        load_backbone(tmp_path)


class TestHeads:
    def test_are_asked_for_where_they_cannot_be_told(self, tmp_path):
        torch.save(published_vit(NARROW), tmp_path / "model.pth")
        with pytest.raises(UserError, match=r'--heads N.*arguments.json.*"num_heads": N'):
            load_backbone(tmp_path / "model.pth")
        assert load_backbone(tmp_path / "model.pth", heads=3).spec == NARROW
        (tmp_path / "arguments.json").write_text('{"num_heads": 6}')
        assert load_backbone(tmp_path / "model.pth").spec.num_heads == 6
        assert load_backbone(tmp_path / "model.pth", heads=3).spec.num_heads == 3

    def test_the_usual_number_is_taken_aloud(self, tmp_path, caplog):
        torch.save(published_vit(DINO), tmp_path / "model.pth")
        assert load_backbone(tmp_path / "model.pth").spec.num_heads == 2
        assert "taken for 2, each 64 wide" in caplog.text

    @pytest.mark.parametrize("width", [1280, 1408])
    def test_widths_of_other_heads_are_asked_for(self, width, tmp_path):
        torch.save(published_vit(replace(DINO, embed_dim=width, depth=1, num_heads=16)), tmp_path / "model.pth")
        with pytest.raises(UserError, match="how many attention heads"):
            load_backbone(tmp_path / "model.pth")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("arguments.json", {"num_heads": 0}),
            ("arguments.json", {"num_heads": "3"}),
            ("arguments.json", {"position_interpolation": "best"}),
            ("arguments.json", {"image_size": 0, "mean": [0.5] * 3, "std": [0.5] * 3}),
            ("config.json", {"num_attention_heads": -1}),
            ("config.json", {"architecture": "vit_small_patch16_224", "model_args": 3}),
            ("config.json", {"architecture": "x", "pretrained_cfg": {"input_size": 3, "mean": [0], "std": [1]}}),
            ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": 0}),
            ("config.json", []),
            ("arguments.json", {"num_heads": "\x1b[31m\n"}),
            ("arguments.json", {"image_size": 8, "mean": [0.5] * 3, "std": [1e-310] * 3}),
            ("config.json", {**TIMM, "pretrained_cfg": TIMM["pretrained_cfg"] | {"crop_pct": 1e-310}}),
        ],
        ids=str,
    )
    def test_facts_that_cannot_be(self, name, content, tmp_path):
        torch.save(published_vit(DINO), tmp_path / "model.pth")
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}.*\.json[^\n\x1b]*$"):
            load_backbone(tmp_path / "model.pth")

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            *(("arguments.json", key) for key in ("embed_dim", "depth", "patch_size")),
            *(("config.json", key) for key in ("hidden_size", "num_hidden_layers", "patch_size")),
        ],
    )
    def test_facts_of_other_weights_are_told_from_those_of_these(self, name, key, tmp_path):
        torch.save(published_vit(DINO), tmp_path / "model.pth")
        size = {"depth": DINO.depth, "num_hidden_layers": DINO.depth, "patch_size": DINO.patch_size}.get(key, 128)
        for value in (size, size + 1):
            (tmp_path / name).write_text(json.dumps({"num_heads": 2, "num_attention_heads": 2, key: value}))
            if value == size:
                assert load_backbone(tmp_path / "model.pth").spec.num_heads == 2
                continue
            with pytest.raises(UserError, match=rf"{name} is of other weights: its {key} is"):
                load_backbone(tmp_path / "model.pth", heads=2)

    def test_facts_beside_a_file(self, tmp_path, caplog):
        torch.save(published_vit(REGISTERS), tmp_path / "model.pth")
        with caplog.at_level(logging.INFO):
            load_backbone(tmp_path / "model.pth")
        assert "taken for granted: positions are resampled as DINO's releases do (size)" in caplog.text
        assert "prepared as DINO's were" in caplog.text
        facts = {"num_heads": 2, "position_interpolation": "offset", **PREPROCESSING, "resize": 40}
        (tmp_path / "arguments.json").write_text(json.dumps(facts))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            loaded = load_backbone(tmp_path / "model.pth")
        assert "taken" not in caplog.text
        assert loaded.spec.position_interpolation == "offset"
        assert loaded.preprocess == Preprocess(32, PREPROCESSING["mean"], PREPROCESSING["std"], 40)


@pytest.mark.parametrize(
    "spec", [NARROW, replace(DINOV2, position_interpolation="size"), ViTSpec(48, 2, 3, 4, 24, positions="rotary")]
)
def test_a_file_of_a_checkpoint_is_the_network_it_was(spec, tmp_path):
    """By itself, wherever it lies."""
    network = Network(build(spec), DINOHead(spec.embed_dim, 8, hidden=16, bottleneck=4))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    metadata = describe(network.backbone, PREPROCESSING, {}, layout="checkpoint")
    save_file({name: t.clone() for name, t in network.state_dict().items()}, tmp_path / "teacher.safetensors", metadata)
    loaded = load_backbone(tmp_path / "teacher.safetensors")
    assert loaded.spec == spec
    assert loaded.preprocess == Preprocess(**PREPROCESSING)
    side = spec.image_size + spec.patch_size
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(loaded(images), network.backbone.eval()(images))
    assert load_heads(tmp_path / "teacher.safetensors")


def test_files_of_earlier_versions_are_read(tmp_path):
    """A run's backbone of yesterday: the same bytes as today's."""
    save_backbone(tmp_path / "b.safetensors", build(ResNetSpec("resnet18")), PREPROCESSING, {"seed": 1})
    assert load_backbone(tmp_path / "b.safetensors").preprocess == Preprocess(**PREPROCESSING)
    assert "resize" not in Path(tmp_path / "b.safetensors").read_bytes()[:2000].decode("latin-1")
    assert len(load_file(tmp_path / "b.safetensors")) > 100
