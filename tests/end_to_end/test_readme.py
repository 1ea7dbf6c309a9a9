"""Every command of the README but the two `make` ones runs, with small settings added, and its Python code too."""

import json
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, TINY, Runs, losses
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModel

import dino

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS_OF_README = ["train", "knn", "visualize", "export"]
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
OMNIGLOT = (  # of docs/evaluating.md and the recipe's header
    "dino train omniglot_cpu data.root=images_background.zip",
    "dino omniglot --weights runs/omniglot --data images_background.zip --out runs/omniglot",
)
SCRIPTS = {"train": "train/pretrain.py", "curate": "train/curate.py"}  # others are those of eval/
SMALL = [setting for setting in TINY if not setting.startswith("data.kind")]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """The README's names of files and folders to real ones: digits as photographs, and as Omniglot is laid out."""
    folder = tmp_path_factory.mktemp("readme")
    images, archive, labelled = folder / "images", folder / "images_background.zip", folder / "labelled"
    images.mkdir()
    digits = load_digits()
    with zipfile.ZipFile(archive, "w") as drawings:
        for number, (pixels, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
            picture = Image.fromarray(255 - (pixels * 255 / 16).astype(np.uint8)).resize((105, 105))
            path = images / f"{number}.png"
            picture.save(path)
            if number < 150:
                (labelled / str(label)).mkdir(parents=True, exist_ok=True)
                picture.save(labelled / str(label) / f"{number}.png")
            drawings.write(path, f"images_background/Alphabet{label % 3}/character{label:02d}/0001_{number:02d}.png")
    return {
        "path/to/images": str(images),
        "path/to/labelled": str(labelled),
        "images_background.zip": str(archive),
        **{f"runs/{name}": str(folder / name) for name in ("mine", "pictures", "exported", "omniglot")},
    }


def run(runs: Runs, command: str, places: dict[str, str]) -> str:
    """What a command prints."""
    words = shlex.split(command)
    if words[1] == "train":
        words += SMALL
        words += ["train.epochs=1", f"run.dir={places['runs/omniglot']}"] if command in OMNIGLOT else ["train.steps=2"]
    for name, place in places.items():
        words = [re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w/])", place, word) for word in words]
    assert words[0] == "dino"
    done = runs.here(REPOSITORY / SCRIPTS.get(words[1], f"eval/{words[1]}.py"), *words[2:])
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_commands_are_found_and_so_are_the_files_that_are_linked():
    assert [command.split()[1] for command in COMMANDS if command.startswith("dino")] == COMMANDS_OF_README
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_first_run_and_its_use(runs, places):
    printed = {command.split()[1]: run(runs, command, places) for command in COMMANDS if command.startswith("dino")}
    assert (Path(places["runs/mine"]) / "backbone.safetensors").exists()
    assert "knn/top1_k10" in printed["knn"]
    assert "10 classes" in printed["knn"]
    for name in ("attention", "pca", "foreground", "neighbours", "map"):
        with Image.open(Path(places["runs/pictures"]) / f"{name}.png") as picture:
            assert picture.width > 200
    assert "class tokens differ by at most" in printed["export"]
    exported = AutoModel.from_pretrained(places["runs/exported"])
    assert exported.config.hidden_size == 32
    code = next(block for language, block in BLOCKS if language == "python")
    found: dict = {}
    exec(code.replace("runs/mine", places["runs/mine"]), found)
    assert found["class_tokens"].shape == (2, 32)
    assert found["patches"].shape == (2, 4, 32)


def test_omniglot(runs, places):
    for command in OMNIGLOT:
        printed = run(runs, command, places)
    out = Path(places["runs/omniglot"])
    results = json.loads((out / "results.json").read_text())
    assert [row[0] for row in results["rows"]] == ["chance", "raw pixels", "untrained ViT 32×2/4", out.name]
    assert all(0 <= value["accuracy"] <= 1 for value in results["article"].values())
    assert "raw pixels" in printed
    with Image.open(out / "chart.png") as chart:
        assert chart.width > 500
    assert "Readout" in (out / "report.html").read_text()
    assert dino.load_backbone(out).embed_dim == 32


def test_demo_readout(runs, tmp_path):
    """What `make demo` does after training; the table's pre-trained row is there, and its report shows the table."""
    demo = tmp_path / "demo"
    runs.finish(f"run.dir={demo}", "train.steps=3")
    printed = run(runs, f"dino digits --run {demo}", {})
    results = json.loads((demo / "results.json").read_text())
    assert list(results["accuracy"]) == ["raw pixels", "untrained ViT", "pretrained ViT"]
    assert results["accuracy"]["raw pixels"]["knn"]["mean"] == pytest.approx(0.912, abs=0.005)
    assert results["accuracy"]["raw pixels"]["logistic"]["mean"] == pytest.approx(0.899, abs=0.005)
    assert "pretrained ViT" in printed
    assert "pretrained ViT" in (demo / "report.html").read_text()


def test_compiled_blocks_train(runs, tmp_path):
    settings = ("train.steps=2", "model.drop_path=0")
    runs.finish(f"run.dir={tmp_path / 'plain'}", *settings)
    runs.finish(f"run.dir={tmp_path / 'compiled'}", *settings, "train.compile=true", launcher="python")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
