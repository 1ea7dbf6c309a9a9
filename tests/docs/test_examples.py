"""The examples of the documentation run: a small backbone of ours begins to tell dark images from bright ones."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino.commands import export
from dino.models import ViTSpec, build, save_backbone

EXAMPLES = Path(__file__).parents[2] / "examples"
PREPROCESSING = {"image_size": 16, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture
def labelled(tmp_path, monkeypatch) -> Path:
    """Sixteen dark and sixteen bright images, in the folder that is worked in; backbone.safetensors beside them."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 150)):
        folder = tmp_path / "labelled" / name
        folder.mkdir(parents=True)
        for index in range(16):
            pixels = generator.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    torch.manual_seed(0)
    training = {"objective": "dino", "steps": 10, "batch_size": 8, "seed": 0}
    save_backbone(tmp_path / "backbone.safetensors", build(ViTSpec(16, 2, 2, 4, 16)), PREPROCESSING, training)
    return tmp_path / "labelled"


def run(monkeypatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def exported(monkeypatch, target: str) -> str:
    monkeypatch.setattr(
        sys, "argv", ["export", "--weights", "backbone.safetensors", "--to", target, "--out", "exported"]
    )
    export.main()
    return "exported"


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss\W+([0-9.]+)", printed)]


def test_plain_pytorch(labelled, monkeypatch, capsys):
    run(monkeypatch, "finetune_torch.py", "backbone.safetensors", labelled, 4)
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first
    before, after = load_file("backbone.safetensors"), torch.load("finetuned.pt", weights_only=True)
    assert after["1.weight"].shape == (2, 16)
    assert not torch.equal(after["0.cls_token"], before["cls_token"])  # the backbone has learned too


@pytest.mark.slow  # timm and transformers take seconds to be imported
def test_timm(labelled, monkeypatch, capsys):
    run(monkeypatch, "finetune_timm.py", exported(monkeypatch, "timm"), labelled, 4)
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first
    before, after = load_file("exported/model.safetensors"), torch.load("finetuned.pt", weights_only=True)
    assert after["head.weight"].shape == (2, 16)
    assert torch.allclose(after["pos_embed"], before["pos_embed"], atol=0.1)  # it began with these weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # transformers asks for it on CPUs too
def test_hugging_face(labelled, monkeypatch, capsys):
    run(monkeypatch, "finetune_huggingface.py", exported(monkeypatch, "huggingface"), labelled, 4)
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first
    assert load_file("finetuned/model.safetensors")["classifier.weight"].shape == (2, 32)  # class token and mean patch
