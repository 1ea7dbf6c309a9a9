"""The documentation's commands that fit a CPU run, page by page, in a folder where what they name exists, and give what
they promise. Only settings that make them small are added."""

import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from test_pages import PAGES, REPOSITORY, commands

from dino import cli

pytestmark = pytest.mark.slow

NOT_RUN = (  # words of commands that are only parsed here
    ("torchrun", "accelerate", "python", "pip", "sbatch", "git", "make", "docker"),  # several processes, other programs
    ("dinov2_vits14_small", "--published", "imagenet/train"),  # released weights, ImageNet
    ("omniglot", "export"),  # run by end_to_end/test_readme.py and test_examples.py
    ("--wandb", "tracking.backends=[wandb]"),  # run by end_to_end/test_tracking.py
)
RELEASED = ("dinov2_vits14", "dinov2_vitl14")  # a small run stands for them
TINY = ["data.workers=0", "views.global_size=16", "views.local_size=8", "views.local_crops=1", "train.cpu_threads=1"]
TINY += ["model.arch=vit_tiny", "model.patch_size=4", "model.embed_dim=16", "model.depth=2", "model.num_heads=2"]
TINY += ["objective.prototypes=32", "objective.head_hidden=16", "objective.head_bottleneck=8"]
TINY += ["train.batch_size=8", "train.steps=2"]
SMALL = {"train": TINY, "curate": ["clusters.counts=[4,2]", "run.cpu_threads=1"]}


def is_run(command: str) -> bool:
    words = shlex.split(command)
    return not any(word in words for group in NOT_RUN for word in group)


RUN = {page: [command for command in commands([page]) if is_run(command)] for page in PAGES if page.stem != "tracking"}
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def dino(*words: str) -> None:
    """A command in this process; without the page of a run, which takes longer than all the rest."""
    page = mock.patch("dino.report.run.Reporter.write", return_value={})
    with mock.patch.object(sys, "argv", ["dino", *words]), page:
        cli.main()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the pages name, under these names; two runs of two steps stand for those that have ended."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    rows = ["path,species"]
    for number in range(104):  # of images, for rebalancing needs a hundred; of all else fewer
        name, low = ("dark", 0) if number % 2 else ("bright", 120)
        picture = Image.fromarray(random.integers(low, low + 120, (20, 22, 3), dtype=np.uint8))
        for place in ("images", "labelled", "tiles", "xrays", "drawings") if number < 24 else ("images",):
            (folder / "path/to" / place / name).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "path/to" / place / name / f"{number}.png")
        for place in ("test", "examples"):
            if number < 2:
                (folder / "path/to" / place).mkdir(exist_ok=True)
                picture.save(folder / "path/to" / place / f"{number}.png")
        if number >= 24:
            continue
        for place, pixels in (
            ("scans", random.normal(40, 90, (20, 20)).astype(np.float32)),
            ("satellite", random.integers(0, 10_000, (20, 20, 12), dtype=np.uint16)),
        ):
            (folder / "path/to" / place).mkdir(exist_ok=True)
            np.save(folder / "path/to" / place / f"{number}.npy", pixels)
        rows.append(f"{name}/{number}.png,{name}")
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DINO_CACHE", str(folder / "cache"))
        for run in ("runs/mine", "runs/other"):
            dino("train", "data.root=path/to/images", f"run.dir={run}", *TINY)
    return folder


@pytest.mark.parametrize("page", [page for page in RUN if RUN[page]], ids=lambda page: page.stem)
def test_commands_of(page, world, monkeypatch, fresh_accelerate, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("DINO_CACHE", str(world / "cache"))
    for number, command in enumerate(RUN[page]):
        if command in README:
            continue  # run by end_to_end/test_readme.py
        subcommand, *words = shlex.split(command)[1:]
        for released in RELEASED:
            words = ["runs/mine" if word == released else word.replace(f"={released}", "=runs/mine") for word in words]
        if subcommand == "train" and folder_of(words).exists():  # by an earlier command, of other images
            words.append(f"run.dir=runs/{page.stem}-{number}")
        if any(word.startswith("clusters.counts") for word in words):
            words.append("clusters.parts=2")
        dino(subcommand, *words, *SMALL.get(subcommand, []))
        printed = capsys.readouterr().out
        assert printed.strip(), command
        for path in results(subcommand, words):
            assert path.exists(), f"{command}: {path} is not there"
        if "--dry-run" in words:
            assert not folder_of(words).exists(), command
        if "--report-only" in words:
            assert not (folder_of(words) / "manifest.parquet").exists(), command


def test_a_look_leaves_the_manifest_of_an_earlier_call_and_says_so(world, monkeypatch, fresh_accelerate, capsys):
    monkeypatch.chdir(world)
    words = ["data.root=path/to/images", "weights=runs/mine", "run.dir=runs/twice", *SMALL["curate"]]
    dino("curate", *words)
    manifest = Path("runs/twice/manifest.parquet")
    earlier = manifest.read_bytes()
    capsys.readouterr()
    dino("curate", *words, "rebalance.method=none", "--report-only")
    assert manifest.read_bytes() == earlier
    assert f"{manifest} is left as an earlier call wrote it" in capsys.readouterr().out


def folder_of(words: list[str]) -> Path:
    """The last run.dir that a command names."""
    return Path([word.partition("=")[2] for word in words if word.startswith("run.dir=")][-1])


def results(subcommand: str, words: list[str]) -> list[Path]:
    """What a command writes."""
    written = [Path(words[words.index(option) + 1]) for option in ("--out", "--copy", "--list") if option in words]
    if subcommand == "train" and "--dry-run" not in words:
        written.append(folder_of(words) / "backbone.safetensors")
    if subcommand == "curate":
        written.append(folder_of(words) / ("report.html" if "--report-only" in words else "manifest.parquet"))
    if subcommand == "report":
        written.append(Path("runs/comparison.html"))
    return written


def test_most_commands_of_dino_are_run():
    of_dino = [command for page in RUN for command in commands([page]) if command.startswith("dino ")]
    assert sum(map(len, RUN.values())) > 0.6 * len(of_dino)
