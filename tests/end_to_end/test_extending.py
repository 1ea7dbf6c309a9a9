"""docs/extending.md is true: its files and lines, written into a copy of the program, do what the page says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, TINY, metrics, write_images

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
LONGEST = 300  # seconds, on a busy machine
REPLACED = ("data.kind", "views.preset", "objective.", "train.batch")


def blocks(language: str) -> list[tuple[str, list[str]]]:
    """Fenced blocks of a language: the file that the first line names, and the other lines."""
    found = []
    for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.S):
        first, *lines = text.splitlines()
        found.append((first.removeprefix("# "), lines))
    return found


def apply(lines: list[str], source: list[str]) -> list[str]:
    """Source lines after a change: a line after +, instead of one after −, or after the one that stands above it."""
    result, position = list(source), -1
    for line in lines:
        sign, text = line[0], line[1:]
        if sign == "+":
            position += 1
            result.insert(position, text)
        else:
            position = result.index(text)
            if sign == "-":
                del result[position]
                position -= 1
    return result


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """A copy of the program with everything that the page adds."""
    root = tmp_path_factory.mktemp("program")
    shutil.copytree(REPOSITORY / "dino", root / "dino", ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in blocks("python"):
        assert not (root / name).exists(), f"{name} is there already"
        (root / name).write_text("\n".join(lines) + "\n")
    for name, lines in blocks("diff"):
        file = root / name
        file.write_text("\n".join(apply(lines, file.read_text().splitlines())) + "\n")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A list of 48 images in two folders."""
    folder = tmp_path_factory.mktemp("images")
    rows = [f"0\t{name}\t{path.relative_to(folder)}" for name in "ab" for path in write_images(folder / name, 24)]
    (folder / "list.lst").write_text("\n".join(rows))
    return folder


def dino(program: Path, *arguments: object) -> str:
    """Run a command of the copy; gives what it printed."""
    code = "from dino.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(program), "DINO_CACHE": str(program / "cache")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=program, capture_output=True, text=True, timeout=LONGEST, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings(images: Path, run: Path, *more: str) -> list[str]:
    tiny = [
        setting
        for setting in TINY
        if not setting.startswith(("data.kind", "views.preset", "objective.", "train.batch"))
    ]
    own = [f"data.root={images / 'list.lst'}", f"run.dir={run}", "train.steps=4", "train.batch_size=16"]
    return [*tiny, *own, "monitor.health_every=2", *more]


def test_seven_kinds_are_shown():
    assert len(blocks("python")) == len(blocks("diff")) == 7
    assert all(sum(line.startswith("+") for line in lines) <= 2 for _, lines in blocks("diff"))


def test_a_new_method_with_a_new_backbone_source_augmentation_and_indicator(program, images, tmp_path):
    run = tmp_path / "simclr"
    new = ["objective.name=simclr_small", "objective.width=16", "model.arch=tiny_cnn", "views.augment={invert: 0.5}"]
    dino(program, "train", *settings(images, run, *new))
    lines = metrics(run)
    assert all(line["loss/nt_xent"] > 0 for line in lines)
    assert lines[-1]["health/token_length"] > 0
    assert "length of class tokens" in (run / "report.html").read_text()
    config = (run / "config.yaml").read_text()
    assert "kind: mxnet_list" in config
    out = tmp_path / "results.json"
    dino(program, "class_means", "--weights", run, "--data", images, "--out", out)
    (figures,) = json.loads(out.read_text()).values()
    assert 0 <= figures["class_means/top1"] <= 1


def test_a_new_loss_term(program, images, tmp_path):
    sizes = ["objective.prototypes=16", "objective.head_hidden=16", "objective.head_bottleneck=8"]
    dino(program, "train", *settings(images, tmp_path / "gram", *sizes, "objective.terms={gram: 0.1}"))
    assert all(line["loss/gram"] > 0 for line in metrics(tmp_path / "gram"))
