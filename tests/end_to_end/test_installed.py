"""The wheel, away from the checkout: it has the command, the recipes and nothing that a checkout would have to give."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launching import REPOSITORY, TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's files in a folder, as pip lays them out."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    for name in ("dino", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def dino(installed: Path, cwd: Path, *words: str) -> str:
    """Run the installed command in an empty directory."""
    script = "import sys; sys.argv[0] = 'dino'; from dino.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed), "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_the_command_and_every_recipe_and_package(installed):
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dino = dino.cli:main" in entry.read_text()
    recipes = {path.name: path.read_bytes() for path in (installed / "dino" / "recipes").glob("*.yaml")}
    assert recipes == {path.name: path.read_bytes() for path in (REPOSITORY / "configs").glob("*.yaml")}
    modules = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "dino").rglob("*.py")}
    assert modules <= {path.relative_to(installed) for path in installed.rglob("*.py")}


def test_it_trains_by_a_recipes_name_embeds_and_reports(installed, tmp_path):
    dino(installed, tmp_path, "train", "demo", *TINY, "train.steps=2", "run.dir=run")
    before = (tmp_path / "run" / "report.html").read_bytes()
    assert "run/report.html" in dino(installed, tmp_path, "report", "run")
    assert len((tmp_path / "run" / "report.html").read_bytes()) > 0.5 * len(before)
    words = ("--weights", "run", "--data", "", "--kind", "digits", "--out", "tokens.npy")
    assert "1,797 × 32" in dino(installed, tmp_path, "embed", *words)
